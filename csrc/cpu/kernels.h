// The loops over one chunk, as a table of functions; one table per vector level.
#pragma once

#include <cstdint>

#include "../math.h"
#include "../operands.h"
#include "product_kernels.h"

namespace ewc_fast::cpu {

// What the rounding of an element by chance depends on. Loops over a chunk are given the first
// element's and count on.
struct Rounding {
  std::uint32_t seed;     // of the row and the upper half of the element's number
  std::uint32_t element;  // lower half of its number
};

struct StepKernels;

// A Fisher in 8 bits from the start of a block, scales[i] the scale of its i-th block.
struct EncodedFisher {
  const e5m3* codes;
  const float* scales;
};

// What only reads the Fisher, with one of 8 bits; indexed by the parameters' DType, none of which
// is float64. 3 bytes an element less than with float, but for the 4 of each block's scale: 17.02,
// 9.02, 13.02 and 13.02.
struct EncodedKernels {
  double (*add_penalty_grad[kDTypes])(void* grad, const void* param, EncodedFisher fisher,
                                      const void* anchor, std::int64_t n, double ewc_lambda);
  double (*penalty[kDTypes])(const void* param, EncodedFisher fisher, const void* anchor,
                             std::int64_t n, double ewc_lambda);
  void (*penalty_grad[kDTypes])(void* out, const void* param, EncodedFisher fisher,
                                const void* anchor, std::int64_t n, double ewc_lambda);
  void (*proximal_step[kDTypes])(void* param, EncodedFisher fisher, const void* anchor,
                                 std::int64_t n, double eta_lambda);
};

// Indexed by the parameters' DType and whether the Fisher is bfloat16. The state (fisher, anchor)
// is double for double parameters and float otherwise; the residual of the anchor is bfloat16.
// Bytes an element are those of float; a bfloat16 Fisher saves 2 of each read and write of F.
struct Kernels {
  const char* level;
  // grad += lambda F (theta - a); returns sum lambda F (theta - a)^2        20 bytes an element
  double (*add_penalty_grad[kDTypes][2])(void* grad, const void* param, const void* fisher,
                                         const void* anchor, std::int64_t n, double ewc_lambda);
  // sum lambda F (theta - a)^2                                               12 bytes
  double (*penalty[kDTypes][2])(const void* param, const void* fisher, const void* anchor,
                                std::int64_t n, double ewc_lambda);
  // out = lambda F (theta - a)                                               16 bytes
  void (*penalty_grad[kDTypes][2])(void* out, const void* param, const void* fisher,
                                   const void* anchor, std::int64_t n, double ewc_lambda);
  // F += w sum_s g[s]^2, s < samples                                4 samples + 8 bytes
  void (*accumulate_square[kDTypes][2])(void* fisher, const void* grads, std::int64_t n,
                                        std::int64_t samples, std::int64_t sample_stride,
                                        double weight, Rounding rounding);
  // F, a, residual <- merge; returns the sum of the constants                28 bytes
  double (*merge[kDTypes][2])(void* fisher, void* anchor, void* residual, const void* new_fisher,
                              const void* param, std::int64_t n, double gamma, Rounding rounding);
  // F <- gamma F + F_t, a <- theta                                           20 bytes
  void (*merge_online[kDTypes][2])(void* fisher, void* anchor, const void* new_fisher,
                                   const void* param, std::int64_t n, double gamma,
                                   Rounding rounding);
  // theta <- (theta + eta lambda F a) / (1 + eta lambda F)                   16 bytes
  void (*proximal_step[kDTypes][2])(void* param, const void* fisher, const void* anchor,
                                    std::int64_t n, double eta_lambda);
  EncodedKernels encoded;
  ProductKernels product;
  const StepKernels* steps;
};

extern const StepKernels kBaselineSteps, kV3Steps, kV4Steps;
extern const Kernels kBaseline;
extern const Kernels kV3;  // x86-64-v3: AVX2, FMA
extern const Kernels kV4;  // x86-64-v4: AVX-512 F, BW, DQ, VL

}  // namespace ewc_fast::cpu
