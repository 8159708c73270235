#include "vector_level.h"

namespace ewc_fast::cpu {

const std::vector<const Kernels*>& runnable_levels() {
  static const std::vector<const Kernels*> levels = [] {
    std::vector<const Kernels*> found;
#ifdef EWC_FAST_HAS_LEVEL_v4
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      found.push_back(&kV4);
#endif
#ifdef EWC_FAST_HAS_LEVEL_v3
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
      found.push_back(&kV3);
#endif
    found.push_back(&kBaseline);
    return found;
  }();
  return levels;
}

}  // namespace ewc_fast::cpu
