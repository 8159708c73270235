// The optimizers' steps over all chunks of a table; operands stand as StepOperand says.
#pragma once

#include "../optimizer.h"
#include "operations.h"

namespace ewc_fast::cpu {

// Both return lambda/2 sum F (theta - a)^2 at theta before the step.
double adam_step(const Table& table, Run run, const AdamOptions& options);
double sgd_step(const Table& table, Run run, const SgdOptions& options);

}  // namespace ewc_fast::cpu
