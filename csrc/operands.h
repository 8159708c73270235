// The operands of one call: equal-length lists of tensors, seen as rows of raw pointers.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace ewc_fast {

// The last is of a Fisher in 8 bits alone (uint8 to PyTorch); tables of kernels know the others.
enum class DType : std::uint8_t { float32, float64, bfloat16, float16, e5m3 };
constexpr int kDTypes = 4;
constexpr int item_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : dtype == DType::e5m3 ? 1 : 2;
}

constexpr int kMaxOperands = 10;

// The i-th tensor of every list. All have the same shape and the same dense strides, so that one
// running index addresses the same element in each.
struct Row {
  std::array<void*, kMaxOperands> data{};
  std::array<std::int64_t, kMaxOperands> step{};  // bytes from one element to the next
  std::int64_t numel = 0;
  std::int64_t samples = 1;        // per-sample gradients stacked in front
  std::int64_t sample_stride = 0;  // elements from one sample's gradient to the next
  std::int64_t ordinal = 0;        // its place in the call's lists, which may be split up
  DType dtype = DType::float32;    // of the parameters
  DType fisher = DType::float32;   // of the Fisher: float, double beside double, bfloat16 or e5m3
  DType moments = DType::float32;  // of an optimizer's moments: the parameters', or float
  int device = -1;                 // CUDA device index; -1 is the CPU

  template <class T = void>
  T* at(int operand, std::int64_t element) const {
    return reinterpret_cast<T*>(static_cast<char*>(data[operand]) + element * step[operand]);
  }
};

// A piece of a row, the unit of work. Chunks depend on the shapes alone, never on the number of
// threads, so sums over chunks in their order repeat bit for bit.
struct Chunk {
  std::int64_t row, offset, length;
  std::int64_t before;  // elements in all chunks before this one
};

struct Table {
  std::vector<Row> rows;
  std::vector<Chunk> chunks;
  std::int64_t elements = 0;
};

std::vector<Chunk> make_chunks(const std::vector<Row>& rows, std::int64_t max_length);

}  // namespace ewc_fast
