// Which vector levels this processor can run, best first.
#pragma once

#include <vector>

#include "kernels.h"

namespace ewc_fast::cpu {

const std::vector<const Kernels*>& runnable_levels();

}  // namespace ewc_fast::cpu
