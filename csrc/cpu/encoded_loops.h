// The loops that only read the Fisher, with one of 8 bits. A stretch of it is decoded into the
// first-level cache, and the float32 loop works on that: so all is bit by bit what a float32 Fisher
// of these values gives. Internal linkage (see loops.h).
#pragma once

#include "loops.h"

namespace ewc_fast::cpu {
namespace {

// Stretches are as long as those between which sums move to double: these add up in one order.
static_assert(kFlush % kEncodedBlock == 0, "a stretch begins where a block does");

// Decodes n <= kFlush elements.
inline __attribute__((always_inline)) void decode_stretch(EncodedFisher fisher, std::int64_t n,
                                                          float* __restrict decoded) {
  const e5m3* __restrict codes = fisher.codes;
  for (std::int64_t begin = 0; begin < n; begin += kEncodedBlock) {
    const std::int64_t end = begin + kEncodedBlock < n ? begin + kEncodedBlock : n;
    const float scale = fisher.scales[begin / kEncodedBlock];
    for (std::int64_t i = begin; i < end; ++i) decoded[i] = decode(codes[i], scale);
  }
}

// Calls work(first element, how many, their Fisher) for every stretch.
template <class Work>
inline __attribute__((always_inline)) void in_stretches(EncodedFisher fisher, std::int64_t n,
                                                        Work work) {
  float decoded[kFlush];
  for (std::int64_t begin = 0; begin < n; begin += kFlush) {
    const std::int64_t length = n - begin < kFlush ? n - begin : kFlush;
    decode_stretch({fisher.codes + begin, fisher.scales + begin / kEncodedBlock}, length, decoded);
    work(begin, length, decoded);
  }
}

template <class T>
double add_penalty_grad_encoded(void* grad, const void* param, EncodedFisher fisher,
                                const void* anchor, std::int64_t n, double ewc_lambda) {
  double total = 0;
  in_stretches(fisher, n, [&](std::int64_t begin, std::int64_t length, const float* decoded) {
    total = add_penalty_grad_after<T, float>(
        total, static_cast<T*>(grad) + begin, static_cast<const T*>(param) + begin, decoded,
        static_cast<const float*>(anchor) + begin, length, ewc_lambda);
  });
  return total;
}

template <class T>
double penalty_encoded(const void* param, EncodedFisher fisher, const void* anchor, std::int64_t n,
                       double ewc_lambda) {
  double total = 0;
  in_stretches(fisher, n, [&](std::int64_t begin, std::int64_t length, const float* decoded) {
    total = penalty_after<T, float>(total, static_cast<const T*>(param) + begin, decoded,
                                    static_cast<const float*>(anchor) + begin, length, ewc_lambda);
  });
  return total;
}

template <class T>
void penalty_grad_encoded(void* out, const void* param, EncodedFisher fisher, const void* anchor,
                          std::int64_t n, double ewc_lambda) {
  in_stretches(fisher, n, [&](std::int64_t begin, std::int64_t length, const float* decoded) {
    penalty_grad<T, float>(static_cast<T*>(out) + begin, static_cast<const T*>(param) + begin,
                           decoded, static_cast<const float*>(anchor) + begin, length, ewc_lambda);
  });
}

template <class T>
void proximal_step_encoded(void* param, EncodedFisher fisher, const void* anchor, std::int64_t n,
                           double eta_lambda) {
  in_stretches(fisher, n, [&](std::int64_t begin, std::int64_t length, const float* decoded) {
    proximal_step<T, float>(static_cast<T*>(param) + begin, decoded,
                            static_cast<const float*>(anchor) + begin, length, eta_lambda);
  });
}

}  // namespace
}  // namespace ewc_fast::cpu

#define EWC_FAST_ENCODED_INSTANCES(loop) {loop<float>, nullptr, loop<bfloat16>, loop<float16>}
#define EWC_FAST_ENCODED_KERNELS                                                                  \
  {EWC_FAST_ENCODED_INSTANCES(add_penalty_grad_encoded),                                          \
   EWC_FAST_ENCODED_INSTANCES(penalty_encoded), EWC_FAST_ENCODED_INSTANCES(penalty_grad_encoded), \
   EWC_FAST_ENCODED_INSTANCES(proximal_step_encoded)}
