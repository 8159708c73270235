// The optimizers' steps over one chunk as a table of functions, one table per vector level.
#pragma once

#include <array>

#include "../optimizer.h"
#include "kernels.h"

namespace ewc_fast::cpu {

// The operands of a chunk, from its first element on; null where the step lacks one.
struct StepChunk {
  std::array<void*, kStepOperands> data;
  std::int64_t length;
  DType param, fisher, moments;
  Rounding rounding;
};

// Of two: float, double. Each returns sum lambda F (theta - a)^2 at theta before the step.
// Bytes an element, of float:
//   adam  read g, theta, m, v, F, a, write theta, m, v     36; without springs 28, amsgrad 8 more
//   sgd   read g, theta, b, F, a, write theta, b           28; without momentum 20
// A path takes 8 more.
// 16-bit parameters and gradients take 2 bytes for each read and write of theta and g, 16-bit
// moments too. A master copy is read and written, its parameters then are only written.
struct StepKernels {
  double (*adam[2])(const StepChunk& chunk, const AdamOptions& options, double power1,
                    double power2);
  double (*sgd[2])(const StepChunk& chunk, const SgdOptions& options);
};

}  // namespace ewc_fast::cpu
