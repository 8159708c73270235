// Every formula of ewc_fast, once, for the CPU loops and the GPU kernels alike.
//
//   penalty   L(theta)  = lambda/2 sum_i F_i (theta_i - a_i)^2     Kirkpatrick et al. 2017, eq. 3
//   gradient  g_i      += lambda F_i (theta_i - a_i)
//   fisher    F_i      += w g_i^2
//   merge     F' = gamma F + F_t,  a' = a + F_t / F' (theta - a)   (one quadratic for all tasks)
//   online    F' = gamma F + F_t,  a' = theta                      Schwarz et al. 2018
//   proximal  theta <- (theta + eta lambda F a) / (1 + eta lambda F)
#pragma once

#include <cstdint>

// Forced inline and static: the same source is compiled for several vector levels, and a shared
// out-of-line copy could be one that this processor cannot run.
#if defined(__CUDACC__)
#define EWC_FAST_FORMULA static __host__ __device__ __forceinline__
#else
#define EWC_FAST_FORMULA static inline __attribute__((always_inline))
#endif

namespace ewc_fast {

// The gradient of the penalty. Its product with the distance is twice the penalty, so one read
// gives both. lambda F is formed first: it stays near one where lambda is huge and F tiny.
template <class T>
EWC_FAST_FORMULA T penalty_gradient(T ewc_lambda, T fisher, T distance) {
  return ewc_lambda * fisher * distance;
}

// Two quadratics are one: gamma F (theta - a)^2 / 2 + F_t (theta - theta_t)^2 / 2
//   = F' (theta - a')^2 / 2 + constant, with the constant below (added over all elements).
struct Merged {
  double fisher, anchor, constant;
};

EWC_FAST_FORMULA double decayed_sum(double gamma, double fisher, double new_fisher) {
  return gamma * fisher + new_fisher;
}

EWC_FAST_FORMULA Merged merge(double gamma, double fisher, double anchor, double new_fisher,
                              double param) {
  const double kept = gamma * fisher;
  const double total = decayed_sum(gamma, fisher, new_fisher);
  const double distance = param - anchor;
  // Where nothing is kept the anchor is the parameter itself, bit for bit, and 0/0 never arises.
  const double share = kept > 0 ? new_fisher / total : 1.0;
  return {total, kept > 0 ? anchor + share * distance : param,
          0.5 * share * kept * distance * distance};
}

// strength = eta lambda F. The form 1 / (1 + 1/s) of s / (1 + s) is exactly 0 at s = 0 and 1 at
// s = infinity, and keeps full relative precision between.
template <class T>
EWC_FAST_FORMULA T proximal(T strength, T param, T anchor) {
  return param - (param - anchor) / (T(1) + T(1) / strength);
}

// The seed with the upper half of an element's number in it: constant in a loop over 2^32 elements.
EWC_FAST_FORMULA std::uint32_t seed_of_upper_half(std::uint32_t seed, std::uint64_t element) {
  return seed ^ static_cast<std::uint32_t>(element >> 32) * 0x7feb352du;
}

// 32 random bits that depend on the seed and the element alone (murmur3's finaliser).
EWC_FAST_FORMULA std::uint32_t random_bits(std::uint32_t seed, std::uint64_t element) {
  std::uint32_t hash =
      seed_of_upper_half(seed, element) ^ static_cast<std::uint32_t>(element) * 0x9e3779b1u;
  hash = (hash ^ hash >> 16) * 0x85ebca6bu;
  hash = (hash ^ hash >> 13) * 0xc2b2ae35u;
  return hash ^ hash >> 16;
}

// The bfloat16 (its bits) below or above a finite float, above with the probability of the part
// that is dropped: right on average, so that small addends are not lost in a large sum.
EWC_FAST_FORMULA std::uint16_t round_stochastically(std::uint32_t float_bits,
                                                    std::uint32_t random) {
  return static_cast<std::uint16_t>((float_bits + (random & 0xffffu)) >> 16);
}

}  // namespace ewc_fast
