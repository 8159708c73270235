#include "optimizer_loops.h"

namespace ewc_fast::cpu {
const StepKernels kV3Steps = EWC_FAST_STEP_KERNELS;
}
