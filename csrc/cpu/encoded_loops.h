// The loops that only read the Fisher, with one of 8 bits. A block of it is decoded into the
// first-level cache, and the float32 loop works on that: so all is bit by bit what a float32 Fisher
// of these values gives. A block is short enough for the processor to load what comes next
// meanwhile; decoded where they are used, the values would keep compilers from vectorising the
// sums. Internal linkage (see loops.h).
#pragma once

#include "loops.h"

namespace ewc_fast::cpu {
namespace {

// The block that begins at `first`.
struct DecodedBlock {
  float values[kEncodedBlock];

  __attribute__((always_inline)) DecodedBlock(EncodedFisher fisher, std::int64_t first,
                                              std::int64_t length) {
    const e5m3* __restrict codes = fisher.codes + first;
    const float scale = fisher.scales[first / kEncodedBlock];
    for (std::int64_t i = 0; i < length; ++i) values[i] = decode(codes[i], scale);
  }
};

// Calls work(first element, how many, their Fisher) for every block.
template <class Work>
inline __attribute__((always_inline)) void for_each_block(EncodedFisher fisher, std::int64_t n,
                                                          Work work) {
  for (std::int64_t first = 0; first < n; first += kEncodedBlock) {
    const std::int64_t length = n - first < kEncodedBlock ? n - first : kEncodedBlock;
    const DecodedBlock block(fisher, first, length);
    work(first, length, block.values);
  }
}

template <class T>
double add_penalty_grad_encoded(void* grad_, const void* param_, EncodedFisher fisher,
                                const void* anchor_, std::int64_t n, double ewc_lambda) {
  T* grad = static_cast<T*>(grad_);
  const T* param = static_cast<const T*>(param_);
  const float* anchor = static_cast<const float*>(anchor_);
  return sum_runs<float, kEncodedBlock>(n, [=](Lanes<float>& lanes, std::int64_t first,
                                               std::int64_t length) __attribute__((always_inline)) {
    const DecodedBlock block(fisher, first, length);
    add_penalty_grad_run<T, float>(lanes, grad + first, param + first, block.values, anchor + first,
                                   length, static_cast<float>(ewc_lambda));
  });
}

template <class T>
double penalty_encoded(const void* param_, EncodedFisher fisher, const void* anchor_,
                       std::int64_t n, double ewc_lambda) {
  const T* param = static_cast<const T*>(param_);
  const float* anchor = static_cast<const float*>(anchor_);
  return sum_runs<float, kEncodedBlock>(n, [=](Lanes<float>& lanes, std::int64_t first,
                                               std::int64_t length) __attribute__((always_inline)) {
    const DecodedBlock block(fisher, first, length);
    penalty_run<T, float>(lanes, param + first, block.values, anchor + first, length,
                          static_cast<float>(ewc_lambda));
  });
}

template <class T>
void penalty_grad_encoded(void* out, const void* param, EncodedFisher fisher, const void* anchor,
                          std::int64_t n, double ewc_lambda) {
  for_each_block(fisher, n, [=](std::int64_t first, std::int64_t length, const float* values) {
    penalty_grad<T, float>(static_cast<T*>(out) + first, static_cast<const T*>(param) + first,
                           values, static_cast<const float*>(anchor) + first, length, ewc_lambda);
  });
}

template <class T>
void proximal_step_encoded(void* param, EncodedFisher fisher, const void* anchor, std::int64_t n,
                           double eta_lambda) {
  for_each_block(fisher, n, [=](std::int64_t first, std::int64_t length, const float* values) {
    proximal_step<T, float>(static_cast<T*>(param) + first, values,
                            static_cast<const float*>(anchor) + first, length, eta_lambda);
  });
}

}  // namespace
}  // namespace ewc_fast::cpu

#define EWC_FAST_ENCODED_INSTANCES(loop) {loop<float>, nullptr, loop<bfloat16>, loop<float16>}
#define EWC_FAST_ENCODED_KERNELS                                                                  \
  {EWC_FAST_ENCODED_INSTANCES(add_penalty_grad_encoded),                                          \
   EWC_FAST_ENCODED_INSTANCES(penalty_encoded), EWC_FAST_ENCODED_INSTANCES(penalty_grad_encoded), \
   EWC_FAST_ENCODED_INSTANCES(proximal_step_encoded)}
