#include "encoded_loops.h"
#include "loops.h"

namespace ewc_fast::cpu {
const Kernels kV3 = EWC_FAST_KERNELS("x86-64-v3", kV3Steps);
}
