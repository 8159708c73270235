// What an optimizer's step is told, for the CPU and the GPU alike.
#pragma once

#include <cstdint>

#include "math.h"

namespace ewc_fast {

// Where the operands of a step stand in a row, Adam's and SGD's alike. The row's data is null where
// a step lacks one: springs (fisher, anchor), a master copy, amsgrad, momentum, a path.
//
//   param     written; bfloat16 to nearest, or by chance from the seed
//   grad      read
//   fisher    read; float (double beside double parameters) or bfloat16
//   anchor    read; float or double
//   master    written; float copies of 16-bit parameters: theta is read from here, and the
//             parameters are only written
//   first     written; Adam's first moment, SGD's momentum buffer
//   second    written; Adam's second moment
//   largest   written; the largest second moment so far (amsgrad)
//   path      written; float or double: omega of synaptic intelligence, see path_term()
//   count     written; the number of steps taken, one float32 for the whole row. A step adds 1 to
//             it before anything else.
//
// Moments are of the parameters' dtype, or float beside 16-bit parameters (Row::moments).
enum StepOperand {
  kStepParam,
  kStepGrad,
  kStepFisher,
  kStepAnchor,
  kStepMaster,
  kStepFirst,
  kStepSecond,
  kStepLargest,
  kStepPath,
  kStepCount,
  kStepOperands
};

// With springs, a step returns lambda/2 sum F (theta - a)^2 at theta before the step, in both
// modes.
struct StepOptions {
  double lr = 0, weight_decay = 0, ewc_lambda = 0;
  bool maximize = false;
  bool proximal =
      false;  // the springs act by a proximal step after the update, not in the gradient
  bool by_chance = false;  // rounds bfloat16 parameters by chance
  std::uint32_t seed = 0;
};

struct AdamOptions : StepOptions {
  double beta1 = 0, beta2 = 0, eps = 0;
  bool decoupled = false;  // weight decay as in AdamW
};

struct SgdOptions : StepOptions {
  double momentum = 0, dampening = 0;
  bool nesterov = false;
  bool first = false;  // the momentum buffers hold nothing yet
};

// Coefficients are computed in double and rounded once, as PyTorch rounds a number beside a tensor.
// The powers are beta1^t and beta2^t, with t the number of steps including this one.
template <class T>
EWC_FAST_FORMULA AdamStep<T> adam_step_of(const AdamOptions& options, double power1,
                                          double power2) {
  const double decay = options.weight_decay;
  return {static_cast<T>(options.decoupled ? 0 : decay),
          static_cast<T>(options.decoupled ? 1 - options.lr * decay : 1),
          static_cast<T>(1 - options.beta1),
          static_cast<T>(options.beta2),
          static_cast<T>(1 - options.beta2),
          static_cast<T>(options.lr / (1 - power1)),
          static_cast<T>(square_root(1 - power2)),
          static_cast<T>(options.eps)};
}

template <class T>
EWC_FAST_FORMULA SgdStep<T> sgd_step_of(const SgdOptions& options) {
  return {static_cast<T>(options.weight_decay),
          static_cast<T>(options.momentum),
          static_cast<T>(1 - options.dampening),
          static_cast<T>(options.lr),
          options.first,
          options.nesterov};
}

}  // namespace ewc_fast
