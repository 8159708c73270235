// The squared product over samples n and positions t, the heart of the Fisher diagonal:
//
//   total[o][i] += sum_n (sum_t g[n][t][o] a[n][t][i])^2        bias[o] += sum_n (sum_t
//   g[n][t][o])^2
//
// 2 N T O I + 2 N O I flops, against 4 (N T (O + I) + 2 O I) bytes that must be read and written:
// bound by arithmetic wherever O and I exceed some tens. Per-sample products are never stored; with
// more positions than a block holds one sample's sums are, O I numbers.
#pragma once

#include <cstdint>
#include <vector>

#include "operations.h"

namespace ewc_fast::cpu {

// Element (n, t, i) stands at data[n sample_stride + positions[t] + columns[i]]: so linear layers
// and convolutions of any dimension are the same to the kernel.
struct Factor {
  const void* data;
  DType dtype;
  std::int64_t sample_stride;
  std::vector<std::int64_t> positions, columns;
};

// float, or double for double factors. Columns are contiguous.
struct Totals {
  void* total;
  std::int64_t row_stride;
  void* bias;  // or null
  std::int64_t bias_stride;
};

// Every sum runs in an order that depends on the sizes alone.
void accumulate_squared_product(const Totals& totals, const Factor& grads, const Factor& inputs,
                                std::int64_t samples, Run run);

}  // namespace ewc_fast::cpu
