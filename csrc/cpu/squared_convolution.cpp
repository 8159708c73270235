#include "squared_convolution.h"

#include <algorithm>

#include "staging.h"

namespace ewc_fast::cpu {
namespace {

// From so many channels on they come last in the staged inputs, to be packed by vector copies; with
// fewer, kernel elements do, and blocks of positions are transposed.
constexpr std::int64_t kManyChannels = 8;

// What of the padded input meets the kernel.
Three met_size(const Convolution& c) {
  Three size;
  for (int d = 0; d < 3; ++d)
    size[d] = (c.grads.size[d] - 1) * c.step[d] + c.spread[d] * (c.kernel[d] - 1) + 1;
  return size;
}

const void* sample(const Image& image, std::int64_t index) {
  return static_cast<const char*>(image.data) +
         index * image.sample_stride * item_size(image.dtype);
}

Factor grads_factor(const Image& grads, std::int64_t first) {
  Factor factor{sample(grads, first),
                grads.dtype,
                grads.sample_stride,
                offsets_of(grads.size, grads.strides),
                {}};
  for (std::int64_t c = 0; c < grads.channels; ++c)
    factor.columns.push_back(c * grads.channel_stride);
  return factor;
}

Factor inputs_factor(const Image& inputs, std::int64_t first, const Convolution& convolution,
                     bool channels_last) {
  Factor factor{sample(inputs, first),
                inputs.dtype,
                inputs.sample_stride,
                offsets_of(convolution.grads.size, times(convolution.step, inputs.strides)),
                {}};
  const std::vector<std::int64_t> kernel =
      offsets_of(convolution.kernel, times(convolution.spread, inputs.strides));
  if (channels_last) {
    for (const std::int64_t k : kernel)
      for (std::int64_t c = 0; c < inputs.channels; ++c)
        factor.columns.push_back(c * inputs.channel_stride + k);
  } else {
    for (std::int64_t c = 0; c < inputs.channels; ++c)
      for (const std::int64_t k : kernel) factor.columns.push_back(c * inputs.channel_stride + k);
  }
  return factor;
}

// total[o][c][k] += sums[o][k][c]
template <class T>
void add_reordered(T* total, const T* sums, std::int64_t rows, std::int64_t channels,
                   std::int64_t kernel, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (std::int64_t row = 0; row < rows; ++row) {
    T* __restrict out = total + row * channels * kernel;
    const T* __restrict in = sums + row * channels * kernel;
    for (std::int64_t c = 0; c < channels; ++c)
      for (std::int64_t k = 0; k < kernel; ++k) out[c * kernel + k] += in[k * channels + c];
  }
}

template <class T>
void run_convolution(const Totals& totals, const Convolution& convolution, Run run) {
  const Image &grads = convolution.grads, &inputs = convolution.inputs;
  const std::int64_t kernel = volume(convolution.kernel);
  const bool channels_last = kernel > 1 && inputs.channels >= kManyChannels;
  const std::int64_t numbers = grads.channels * inputs.channels * kernel;
  const Buffer<T> reordered(channels_last ? numbers : 0);
  if (channels_last) std::fill(reordered.data(), reordered.data() + numbers, T(0));
  Totals sums = totals;
  if (channels_last) sums.total = reordered.data();

  const bool as_it_is =
      convolution.padding == Three{} && (kernel == 1 || inputs.channel_stride == 1);
  if (as_it_is) {
    accumulate_squared_product(sums, grads_factor(grads, 0),
                               inputs_factor(inputs, 0, convolution, channels_last),
                               convolution.samples, run);
  } else {
    const Staged<T> staged(inputs, met_size(convolution), convolution.padding,
                           channels_last ? inputs.channels : 0, convolution.samples);
    const Factor from_staged = inputs_factor(staged.image(), 0, convolution, channels_last);
    for (std::int64_t first = 0; first < convolution.samples; first += staged.chunk()) {
      const std::int64_t samples = std::min(staged.chunk(), convolution.samples - first);
      staged.fill(first, samples, run);
      accumulate_squared_product(sums, grads_factor(grads, first), from_staged, samples, run);
    }
  }
  if (channels_last)
    add_reordered(static_cast<T*>(totals.total), reordered.data(), grads.channels, inputs.channels,
                  kernel, run.threads);
}

// Channels stand in lanes: positions and samples run for kLanes channels and a few kernel elements.
template <class T>
void run_depthwise(const Totals& totals, const Convolution& convolution, Run run) {
  constexpr std::int64_t kLanes = kDepthwiseLanes;
  constexpr int kIndex = sizeof(T) == sizeof(double);
  const std::int64_t channels = convolution.grads.channels, kernel = volume(convolution.kernel);
  const std::int64_t blocks = (channels + kLanes - 1) / kLanes, pitch = blocks * kLanes;
  const Staged<T> grads(convolution.grads, convolution.grads.size, {}, pitch, convolution.samples);
  const Staged<T> inputs(convolution.inputs, met_size(convolution), convolution.padding, pitch,
                         convolution.samples);
  const auto grad_positions = offsets_of(convolution.grads.size, grads.image().strides);
  const auto positions =
      offsets_of(convolution.grads.size, times(convolution.step, inputs.image().strides));
  const auto elements =
      offsets_of(convolution.kernel, times(convolution.spread, inputs.image().strides));
  const std::vector<T> ones(kLanes, T(1));
  const std::vector<std::int64_t> nowhere(positions.size(), 0);
  const std::int64_t bundles = (kernel + kDepthwiseElements - 1) / kDepthwiseElements;
  const std::int64_t bundles_and_bias = bundles + (totals.bias != nullptr);
  const std::int64_t chunk = std::min(grads.chunk(), inputs.chunk());
  for (std::int64_t first = 0; first < convolution.samples; first += chunk) {
    const std::int64_t samples = std::min(chunk, convolution.samples - first);
    grads.fill(first, samples, run);
    inputs.fill(first, samples, run);
    DepthwiseFactors factors{samples,
                             static_cast<std::int64_t>(positions.size()),
                             grads.image().sample_stride,
                             inputs.image().sample_stride,
                             grad_positions.data(),
                             positions.data()};
#pragma omp parallel for num_threads(run.threads) schedule(dynamic) if (run.threads > 1)
    for (std::int64_t task = 0; task < blocks * bundles_and_bias; ++task) {
      const std::int64_t begin = task / bundles_and_bias * kLanes;
      const std::int64_t element = task % bundles_and_bias * kDepthwiseElements;
      const bool is_bias = task % bundles_and_bias == bundles;
      const std::int64_t count =
          is_bias ? 1 : std::min<std::int64_t>(kDepthwiseElements, kernel - element);
      DepthwiseFactors mine = factors;
      if (is_bias) {
        mine.input_sample_stride = 0;
        mine.input_positions = nowhere.data();
      }
      const T* in = is_bias ? ones.data() : static_cast<const T*>(inputs.image().data) + begin;
      T sums[kDepthwiseElements * kLanes] = {};
      run.kernels.product.depthwise[kIndex](
          mine, static_cast<const T*>(grads.image().data) + begin, in,
          is_bias ? nowhere.data() : elements.data() + element, static_cast<int>(count), sums);
      for (std::int64_t lane = 0; lane < std::min(kLanes, channels - begin); ++lane)
        for (std::int64_t k = 0; k < count; ++k) {
          T* out = is_bias ? static_cast<T*>(totals.bias) + (begin + lane) * totals.bias_stride
                           : static_cast<T*>(totals.total) + (begin + lane) * kernel + element + k;
          *out += sums[k * kLanes + lane];
        }
    }
  }
}

bool nothing_to_add(const Convolution& convolution) {
  return convolution.samples == 0 || volume(convolution.grads.size) == 0 ||
         convolution.grads.channels == 0;
}

}  // namespace

void accumulate_squared_convolution(const Totals& totals, const Convolution& convolution, Run run) {
  if (nothing_to_add(convolution)) return;
  if (convolution.grads.dtype == DType::float64)
    run_convolution<double>(totals, convolution, run);
  else
    run_convolution<float>(totals, convolution, run);
}

void accumulate_squared_depthwise(const Totals& totals, const Convolution& convolution, Run run) {
  if (nothing_to_add(convolution)) return;
  if (convolution.grads.dtype == DType::float64)
    run_depthwise<double>(totals, convolution, run);
  else
    run_depthwise<float>(totals, convolution, run);
}

}  // namespace ewc_fast::cpu
