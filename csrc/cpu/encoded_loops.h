// The loops that only read the Fisher, with one of 8 bits. A block of it is decoded into the
// first-level cache, and the float32 loop works on that: so all is bit by bit what a float32 Fisher
// of these values gives. A block is short enough for the processor to load what comes next
// meanwhile; decoded where they are used, the values would keep compilers from vectorising the
// sums. Internal linkage (see loops.h).
#pragma once

#include "loops.h"

namespace ewc_fast::cpu {
namespace {

static_assert(kFlush % kEncodedBlock == 0 && kEncodedBlock % kLanes == 0,
              "sums take every element in its lane, and flush where those over float32 do");

// Calls work(first element, how many, their Fisher) for every block.
template <class Work>
inline __attribute__((always_inline)) void for_each_block(EncodedFisher fisher, std::int64_t n,
                                                          Work work) {
  for_each_run<kEncodedBlock>(
      n, [&](std::int64_t first, std::int64_t length) __attribute__((always_inline)) {
        float decoded[kEncodedBlock];
        const e5m3* __restrict codes = fisher.codes + first;
        const float scale = fisher.scales[first / kEncodedBlock];
        for (std::int64_t i = 0; i < length; ++i) decoded[i] = decode(codes[i], scale);
        work(first, length, static_cast<const float*>(decoded));
      });
}

template <class T>
double add_penalty_grad_encoded(void* grad_, const void* param_, EncodedFisher fisher,
                                const void* anchor_, std::int64_t n, double ewc_lambda_) {
  T* grad = static_cast<T*>(grad_);
  const T* param = static_cast<const T*>(param_);
  const float* anchor = static_cast<const float*>(anchor_);
  const float ewc_lambda = static_cast<float>(ewc_lambda_);
  RunningSum<float> sum;
  for_each_block(fisher, n, [&](std::int64_t first, std::int64_t length, const float* decoded) {
    add_penalty_grad_run<T, float>(sum, grad + first, param + first, decoded, anchor + first,
                                   length, ewc_lambda);
  });
  return sum.total();
}

template <class T>
double penalty_encoded(const void* param_, EncodedFisher fisher, const void* anchor_,
                       std::int64_t n, double ewc_lambda_) {
  const T* param = static_cast<const T*>(param_);
  const float* anchor = static_cast<const float*>(anchor_);
  const float ewc_lambda = static_cast<float>(ewc_lambda_);
  RunningSum<float> sum;
  for_each_block(fisher, n, [&](std::int64_t first, std::int64_t length, const float* decoded) {
    penalty_run<T, float>(sum, param + first, decoded, anchor + first, length, ewc_lambda);
  });
  return sum.total();
}

template <class T>
void penalty_grad_encoded(void* out, const void* param, EncodedFisher fisher, const void* anchor,
                          std::int64_t n, double ewc_lambda) {
  for_each_block(fisher, n, [=](std::int64_t first, std::int64_t length, const float* decoded) {
    penalty_grad<T, float>(static_cast<T*>(out) + first, static_cast<const T*>(param) + first,
                           decoded, static_cast<const float*>(anchor) + first, length, ewc_lambda);
  });
}

template <class T>
void proximal_step_encoded(void* param, EncodedFisher fisher, const void* anchor, std::int64_t n,
                           double eta_lambda) {
  for_each_block(fisher, n, [=](std::int64_t first, std::int64_t length, const float* decoded) {
    proximal_step<T, float>(static_cast<T*>(param) + first, decoded,
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
