// CUDA's bfloat16 in terms of the CPU's, which is tested exhaustively.
#pragma once

#include "../../csrc/cpu/half.h"

struct __nv_bfloat16 {
  ewc_fast::bfloat16 stored;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) { ewc_fast::store(stored, value); }
  operator float() const { return ewc_fast::load(stored); }
};

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 value;
  value.stored.bits = bits;
  return value;
}
