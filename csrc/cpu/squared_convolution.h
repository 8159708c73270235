// The squared product of a convolution in up to three dimensions: position t of sample n meets
// channel c and kernel element k where the padded input has (c, t step + k spread).
#pragma once

#include <array>

#include "squared_product.h"

namespace ewc_fast::cpu {

using Three = std::array<std::int64_t, 3>;

struct Image {
  const void* data;
  DType dtype;
  std::int64_t sample_stride, channel_stride;
  std::int64_t channels;
  Three size, strides;
};

struct Convolution {
  std::int64_t samples;
  Image grads, inputs;
  Three kernel, step, padding, spread;
};

// totals.total is (grads' channels, inputs' channels, kernel), contiguous.
void accumulate_squared_convolution(const Totals& totals, const Convolution& convolution, Run run);

// One channel of the inputs for each of the grads: total is (channels, kernel), contiguous.
void accumulate_squared_depthwise(const Totals& totals, const Convolution& convolution, Run run);

}  // namespace ewc_fast::cpu
