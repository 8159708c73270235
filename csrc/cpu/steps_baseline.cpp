#include "optimizer_loops.h"

namespace ewc_fast::cpu {
const StepKernels kBaselineSteps = EWC_FAST_STEP_KERNELS;
}
