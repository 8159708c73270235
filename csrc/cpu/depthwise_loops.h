// The loop of a depthwise convolution; compiled once per vector level, internal linkage.
#pragma once

#include "product_kernels.h"

namespace ewc_fast::cpu {
namespace {

// sums[k][lane] += sum_n (sum_t g[n][t][lane] a[n][t + elements[k]][lane])^2, for one k or
// kElements.
template <class T, int kElements>
void depthwise_bundle(const DepthwiseFactors& f, const T* g, const T* a,
                      const std::int64_t* elements, T* sums) {
  for (std::int64_t n = 0; n < f.samples; ++n) {
    const T* grads = g + n * f.grad_sample_stride;
    const T* inputs = a + n * f.input_sample_stride;
    T acc[kElements][kDepthwiseLanes] = {};
    for (std::int64_t t = 0; t < f.positions; ++t) {
      const T* __restrict grad = grads + f.grad_positions[t];
      for (int k = 0; k < kElements; ++k) {
        const T* __restrict input = inputs + f.input_positions[t] + elements[k];
        for (int lane = 0; lane < kDepthwiseLanes; ++lane) acc[k][lane] += grad[lane] * input[lane];
      }
    }
    for (int k = 0; k < kElements; ++k)
      for (int lane = 0; lane < kDepthwiseLanes; ++lane)
        sums[k * kDepthwiseLanes + lane] += acc[k][lane] * acc[k][lane];
  }
}

template <class T>
void depthwise(const DepthwiseFactors& factors, const void* g_, const void* a_,
               const std::int64_t* elements, int count, void* sums_) {
  const T *g = static_cast<const T*>(g_), *a = static_cast<const T*>(a_);
  T* sums = static_cast<T*>(sums_);
  if (count == kDepthwiseElements)
    return depthwise_bundle<T, kDepthwiseElements>(factors, g, a, elements, sums);
  for (int k = 0; k < count; ++k)
    depthwise_bundle<T, 1>(factors, g, a, elements + k, sums + k * kDepthwiseLanes);
}

}  // namespace
}  // namespace ewc_fast::cpu
