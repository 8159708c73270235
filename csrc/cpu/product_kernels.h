// The loops of the squared product as a table of functions, one table per vector level.
#pragma once

#include <cstdint>

#include "../operands.h"

namespace ewc_fast::cpu {

// Consecutive products that are added up before they are squared, and how many times.
struct Groups {
  std::int64_t count, depth;
  bool squared;  // false where the factors already are squares
};

// A chunk of a depthwise convolution, channels last.
struct DepthwiseFactors {
  std::int64_t samples, positions;
  std::int64_t grad_sample_stride, input_sample_stride;
  const std::int64_t *grad_positions, *input_positions;
};
constexpr int kDepthwiseLanes = 16;    // channels
constexpr int kDepthwiseElements = 3;  // of the kernel

// Of two: float, double.
struct ProductKernels {
  // Outputs in a tile, and the steps in which smaller tiles come.
  int rows, row_step;
  int columns[2], column_step[2];

  void (*tile[2])(int rows, int columns, const void* g, const void* a, const Groups& groups,
                  const void* carried_in, void* carried_out, void* sums);
  void (*bias_tile[2])(int rows, const void* g, const Groups& groups, void* carried, bool carry_in,
                       bool carry_out, void* sums);
  // total[row][column] += sums[row][column]; sums' rows are `width` long, a tile's columns.
  void (*add_block[2])(void* total, std::int64_t row_stride, const void* sums, std::int64_t width,
                       std::int64_t rows, std::int64_t columns);
  void (*square_in_place[2])(void* values, std::int64_t n);
  // Indexed by the DType of what is gathered; gives double for double and float otherwise.
  void (*gather[kDTypes])(void* out, std::int64_t out_stride, std::int64_t width, const void* in,
                          const std::int64_t* row_offsets, std::int64_t rows,
                          const std::int64_t* column_offsets, std::int64_t columns);
  void (*depthwise[2])(const DepthwiseFactors& factors, const void* g, const void* a,
                       const std::int64_t* elements, int count, void* sums);
};

}  // namespace ewc_fast::cpu
