// CUDA's float16 in terms of the CPU's, which is tested exhaustively.
#pragma once

#include "../../csrc/cpu/half.h"

struct __half {
  ewc_fast::float16 stored;
  __half() = default;
  explicit __half(float value) { ewc_fast::store(stored, value); }
  operator float() const { return ewc_fast::load(stored); }
};
