#include "encoded_loops.h"
#include "loops.h"

namespace ewc_fast::cpu {
const Kernels kV4 = EWC_FAST_KERNELS("x86-64-v4", kV4Steps);
}
