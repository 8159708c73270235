// Every formula of ewc_fast, once, for the CPU loops and the GPU kernels alike.
//
//   penalty   L(theta)  = lambda/2 sum_i F_i (theta_i - a_i)^2     Kirkpatrick et al. 2017, eq. 3
//   gradient  g_i      += lambda F_i (theta_i - a_i)
//   fisher    F_i      += w g_i^2
//   e5m3      F_i       = S 2^(e - 31) (1 + m / 8) of the byte 8 e + m; 0 of 0
//   merge     F' = gamma F + F_t,  a' = a + F_t / F' (theta - a)   (one quadratic for all tasks)
//   online    F' = gamma F + F_t,  a' = theta                      Schwarz et al. 2018
//   proximal  theta <- (theta + eta lambda F a) / (1 + eta lambda F)
//   adam      m' = b1 m + (1 - b1) g,  v' = b2 v + (1 - b2) g^2                 Kingma & Ba 2015
//             theta <- theta - eta (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps)
//   sgd       b' = mu b + (1 - d) g,  theta <- theta - eta b'
//   path      omega += -g (theta' - theta)                         Zenke et al. 2017, eq. 3
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

// The optimizers' steps. Operations stand in the order, and are rounded each, as in PyTorch's own
// optimizers on one tensor after another (foreach=False).

EWC_FAST_FORMULA float square_root(float value) { return __builtin_sqrtf(value); }
EWC_FAST_FORMULA double square_root(double value) { return __builtin_sqrt(value); }

// The gradient that a step takes. `sign` is -1 to maximize; the pull of the penalty is never turned
// around: a penalty is always to be small. It is taken at theta before any weight decay.
template <class T>
EWC_FAST_FORMULA T signed_gradient(T sign, T grad) {
  return sign * grad;
}

// Weight decay inside the gradient ("L2"). Without it theta is not touched, be it infinite.
template <class T>
EWC_FAST_FORMULA T decayed_gradient(T weight_decay, T grad, T param) {
  return weight_decay != 0 ? grad + weight_decay * param : grad;
}

// From `from` a share of the way to `to`; for more than half of it backwards from `to`, which the
// whole way then reaches exactly.
template <class T>
EWC_FAST_FORMULA T moved_towards(T share, T from, T to) {
  const bool from_near = share < T(0.5);
  return (from_near ? from : to) + (from_near ? share : share - T(1)) * (to - from);
}

template <class T>
EWC_FAST_FORMULA T larger_or_nan(T one, T other) {
  return one != one || one >= other ? one : other;
}

// What all elements of a row share in a step of Adam.
template <class T>
struct AdamStep {
  T weight_decay;  // inside the gradient; 0 where decoupled
  T kept;          // what decoupled weight decay leaves of theta, 1 - eta w; else 1
  T first_share;   // 1 - beta1
  T beta2;
  T second_share;     // 1 - beta2
  T step_size;        // eta / (1 - beta1^t)
  T root_correction;  // sqrt(1 - beta2^t)
  T eps;
};

template <class T>
EWC_FAST_FORMULA T adam_first_moment(const AdamStep<T>& step, T first, T grad) {
  return moved_towards(step.first_share, first, grad);
}
template <class T>
EWC_FAST_FORMULA T adam_second_moment(const AdamStep<T>& step, T second, T grad) {
  return step.beta2 * second + step.second_share * grad * grad;
}
// `second` is the largest so far with amsgrad.
template <class T>
EWC_FAST_FORMULA T adam_param(const AdamStep<T>& step, T param, T first, T second) {
  const T root = square_root(second) / step.root_correction + step.eps;
  return step.kept * param - step.step_size * first / root;
}

// What all elements share in a step of SGD.
template <class T>
struct SgdStep {
  T weight_decay;
  T momentum;
  T gain;  // 1 - dampening
  T lr;
  bool first;  // the buffer begins as the gradient, undamped
  bool nesterov;
};

template <class T>
EWC_FAST_FORMULA T sgd_buffer(const SgdStep<T>& step, T buffer, T grad) {
  return step.first ? grad : step.momentum * buffer + step.gain * grad;
}
// `buffer` is the gradient itself without momentum.
template <class T>
EWC_FAST_FORMULA T sgd_param(const SgdStep<T>& step, T param, T grad, T buffer) {
  return param - step.lr * (step.nesterov ? grad + step.momentum * buffer : buffer);
}

// What a step adds to the path integral of synaptic intelligence: the fall of the loss that this
// parameter's way explains. `grad` is the loss's own, whatever sign, decay or springs made of it;
// before and after are the parameters as they are kept, rounded.
template <class T>
EWC_FAST_FORMULA T path_term(T grad, T before, T after) {
  return grad * (before - after);
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

EWC_FAST_FORMULA float float_of(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// A Fisher in 8 bits: the byte 8 e + m is S 2^(e - 31) (1 + m / 8), and 0 is 0, with one scale S (a
// power of two) for each block of elements. ewc_fast/formats.py specifies it, and encodes.
struct e5m3 {
  std::uint8_t bits;
};
constexpr int kEncodedBlock = 256;

// Shifted by 20 the byte stands where a float has its exponent and its mantissa's first bits, and
// the exponent is 96 too small: a shift, a sum and a choice, where a table would need one load more
// for each element. Exact, down to float's denormals.
EWC_FAST_FORMULA float decode(e5m3 code, float scale) {
  const std::uint32_t bits = code.bits;
  return float_of(bits == 0 ? 0 : (bits << 20) + (96u << 23)) * scale;
}

}  // namespace ewc_fast
