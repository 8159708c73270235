// The loops over one chunk, as a table of functions; one table per vector level.
#pragma once

#include <cstdint>

#include "../operands.h"
#include "product_kernels.h"

namespace ewc_fast::cpu {

// Indexed by the parameters' DType. The state (fisher, anchor) is double for double parameters
// and float otherwise; the residual of the anchor is bfloat16.
struct Kernels {
  const char* level;
  // grad += lambda F (theta - a); returns sum lambda F (theta - a)^2        20 bytes an element
  double (*add_penalty_grad[kDTypes])(void* grad, const void* param, const void* fisher,
                                      const void* anchor, std::int64_t n, double ewc_lambda);
  // sum lambda F (theta - a)^2                                               12 bytes
  double (*penalty[kDTypes])(const void* param, const void* fisher, const void* anchor,
                             std::int64_t n, double ewc_lambda);
  // out = lambda F (theta - a)                                               16 bytes
  void (*penalty_grad[kDTypes])(void* out, const void* param, const void* fisher,
                                const void* anchor, std::int64_t n, double ewc_lambda);
  // F += w sum_s g[s]^2, s < samples                                4 samples + 8 bytes
  void (*accumulate_square[kDTypes])(void* fisher, const void* grads, std::int64_t n,
                                     std::int64_t samples, std::int64_t sample_stride,
                                     double weight);
  // F, a, residual <- merge; returns the sum of the constants                28 bytes
  double (*merge[kDTypes])(void* fisher, void* anchor, void* residual, const void* new_fisher,
                           const void* param, std::int64_t n, double gamma);
  // F <- gamma F + F_t, a <- theta                                           20 bytes
  void (*merge_online[kDTypes])(void* fisher, void* anchor, const void* new_fisher,
                                const void* param, std::int64_t n, double gamma);
  // theta <- (theta + eta lambda F a) / (1 + eta lambda F)                   16 bytes
  void (*proximal_step[kDTypes])(void* param, const void* fisher, const void* anchor,
                                 std::int64_t n, double eta_lambda);
  ProductKernels product;
};

extern const Kernels kBaseline;
extern const Kernels kV3;  // x86-64-v3: AVX2, FMA
extern const Kernels kV4;  // x86-64-v4: AVX-512 F, BW, DQ, VL

}  // namespace ewc_fast::cpu
