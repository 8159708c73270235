#include "encoded_loops.h"
#include "loops.h"

namespace ewc_fast::cpu {
const Kernels kBaseline = EWC_FAST_KERNELS("baseline", kBaselineSteps);
}
