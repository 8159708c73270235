// bfloat16 and float16 as storage: converted to float to compute, rounded to nearest even to
// keep (a Fisher in bfloat16, by chance). Plain integer arithmetic without branches, so that
// compilers vectorise it at every level.
#pragma once

#include <cstdint>

#include "../math.h"

namespace ewc_fast {

struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

EWC_FAST_FORMULA std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

EWC_FAST_FORMULA float load(float value) { return value; }
EWC_FAST_FORMULA double load(double value) { return value; }
EWC_FAST_FORMULA float load(bfloat16 value) {
  return float_of(static_cast<std::uint32_t>(value.bits) << 16);
}
EWC_FAST_FORMULA float load(float16 value) {
  // Moved into a float's field the exponent is 112 too small; the product mends it, denormals too.
  const std::uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const float scaled = float_of(magnitude) * 0x1p112f;
  const std::uint32_t finite = bits_of(scaled);
  const std::uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN
  const std::uint32_t bits = magnitude >= 0x0f800000u ? special : finite;
  return float_of(bits | (value.bits & 0x8000u) << 16);
}

EWC_FAST_FORMULA void store(float& target, float value) { target = value; }
EWC_FAST_FORMULA void store(double& target, double value) { target = value; }
EWC_FAST_FORMULA void store(bfloat16& target, float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const std::uint32_t quiet_nan = bits >> 16 | 0x40u;
  target.bits = static_cast<std::uint16_t>(value != value ? quiet_nan : rounded);
}
EWC_FAST_FORMULA void store_stochastically(bfloat16& target, float value, std::uint32_t random) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t quiet_nan = bits >> 16 | 0x40u;
  const std::uint32_t rounded = round_stochastically(bits, random);
  target.bits = static_cast<std::uint16_t>(value != value ? quiet_nan : rounded);
}
EWC_FAST_FORMULA void store(float16& target, float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is denormal: adding 1/2 lines its last bit up with the float's.
  const std::uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  std::uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to 65536 or beyond: infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  target.bits = static_cast<std::uint16_t>(half | (bits >> 16 & 0x8000u));
}

}  // namespace ewc_fast
