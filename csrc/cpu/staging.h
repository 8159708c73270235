// Chunks of a convolution's inputs, padded with zeros and with the channels where they are wanted,
// as float or double. One pass over the inputs, in place of one for each kernel element.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "squared_convolution.h"

namespace ewc_fast::cpu {

inline std::int64_t volume(const Three& size) { return size[0] * size[1] * size[2]; }

// Calls visit(x) for every place of a box in order.
template <class Visit>
void for_each_place(const Three& size, Visit visit) {
  Three x;
  for (x[0] = 0; x[0] < size[0]; ++x[0])
    for (x[1] = 0; x[1] < size[1]; ++x[1])
      for (x[2] = 0; x[2] < size[2]; ++x[2]) visit(x);
}

inline std::int64_t dot(const Three& x, const Three& y) {
  return x[0] * y[0] + x[1] * y[1] + x[2] * y[2];
}
inline Three times(const Three& x, const Three& y) {
  return {x[0] * y[0], x[1] * y[1], x[2] * y[2]};
}

// The offsets of all places, in order.
inline std::vector<std::int64_t> offsets_of(const Three& size, const Three& strides) {
  std::vector<std::int64_t> offsets;
  offsets.reserve(volume(size));
  for_each_place(size, [&](const Three& x) { offsets.push_back(dot(x, strides)); });
  return offsets;
}

template <class T>
class Staged {
 public:
  // `pitch` is the number of channels with zeros appended, where they come last; else it is 0.
  Staged(const Image& from, const Three& size, const Three& padding, std::int64_t pitch,
         std::int64_t samples)
      : from_(from),
        padding_(padding),
        pitch_(pitch),
        in_columns_(pitch > 0 ? arithmetic(from.channels, from.channel_stride)
                              : arithmetic(from.size[2], from.strides[2])),
        in_rows_(pitch > 0 ? arithmetic(from.size[2], from.strides[2]) : arithmetic(1, 0)),
        image_{nullptr,
               sizeof(T) == sizeof(double) ? DType::float64 : DType::float32,
               (pitch > 0 ? pitch : from.channels) * volume(size),
               pitch > 0 ? 1 : volume(size),
               from.channels,
               size,
               {}},
        chunk_(std::clamp<std::int64_t>(
            kChunkBytes / std::int64_t(sizeof(T)) / std::max<std::int64_t>(image_.sample_stride, 1),
            1, samples)),
        buffer_(chunk_ * image_.sample_stride) {
    const std::int64_t last = pitch > 0 ? pitch : 1;
    image_.strides = {last * size[2] * size[1], last * size[2], last};
    image_.data = buffer_.data();
  }

  std::int64_t chunk() const { return chunk_; }  // samples
  const Image& image() const { return image_; }

  // Stages samples from `first` on.
  void fill(std::int64_t first, std::int64_t samples, Run run) const {
    const auto gather = run.kernels.product.gather[static_cast<int>(from_.dtype)];
    const Three& size = image_.size;
    const std::int64_t lines = samples * size[0] * size[1];
#pragma omp parallel for num_threads(run.threads) schedule(static) if (run.threads > 1)
    for (std::int64_t line = 0; line < lines; ++line) {
      const std::int64_t y = line % size[1], z = line / size[1] % size[0];
      fill_line(first, line / size[1] / size[0], z, y, gather);
    }
  }

 private:
  static constexpr std::int64_t kChunkBytes = 4 << 20;

  static std::vector<std::int64_t> arithmetic(std::int64_t n, std::int64_t step) {
    std::vector<std::int64_t> offsets(n);
    for (std::int64_t i = 0; i < n; ++i) offsets[i] = i * step;
    return offsets;
  }

  template <class Gather>
  void fill_line(std::int64_t first, std::int64_t sample, std::int64_t z, std::int64_t y,
                 Gather gather) const {
    T* line = buffer_.data() + sample * image_.sample_stride + z * image_.strides[0] +
              y * image_.strides[1];
    const std::int64_t in_z = z - padding_[0], in_y = y - padding_[1], width = image_.size[2];
    const bool inside = 0 <= in_z && in_z < from_.size[0] && 0 <= in_y && in_y < from_.size[1];
    const std::int64_t found =
        inside ? std::clamp<std::int64_t>(width - padding_[2], 0, from_.size[2]) : 0;
    const char* in =
        static_cast<const char*>(from_.data) +
        item_size(from_.dtype) * ((first + sample) * from_.sample_stride +
                                  (inside ? in_z * from_.strides[0] + in_y * from_.strides[1] : 0));
    const std::int64_t before = std::min(padding_[2], width), after = before + found;
    if (pitch_ > 0) {
      std::fill(line, line + before * pitch_, T(0));
      std::fill(line + after * pitch_, line + width * pitch_, T(0));
      if (found > 0)
        gather(line + before * pitch_, pitch_, pitch_, in, in_rows_.data(), found,
               in_columns_.data(), from_.channels);
      return;
    }
    for (std::int64_t channel = 0; channel < from_.channels; ++channel) {
      T* out = line + channel * image_.channel_stride;
      std::fill(out, out + before, T(0));
      std::fill(out + after, out + width, T(0));
      if (found > 0)
        gather(out + before, found, found,
               in + channel * from_.channel_stride * item_size(from_.dtype), in_rows_.data(), 1,
               in_columns_.data(), found);
    }
  }

  const Image from_;
  const Three padding_;
  const std::int64_t pitch_;
  const std::vector<std::int64_t> in_columns_, in_rows_;
  Image image_;
  const std::int64_t chunk_;
  const Buffer<T> buffer_;
};

}  // namespace ewc_fast::cpu
