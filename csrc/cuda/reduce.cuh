// Sums that repeat bit for bit: fixed order within a warp, a block and over blocks; no atomics.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace ewc_fast::cuda {

// The sum over all threads of the block, valid in thread 0.
template <int Threads>
__device__ double block_sum(double value) {
  static_assert(Threads % 32 == 0, "whole warps");
  __shared__ double of_warp[Threads / 32];
  for (int offset = 16; offset > 0; offset /= 2)
    value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < Threads / 32; ++warp) total += of_warp[warp];
  return total;
}

// One block adds what the others left: the more threads and loads in flight the better.
constexpr int kSumThreads = 1024;
constexpr int kSumLoads = 4;

// *value = factor * (the sum of the partial sums).
static __global__ void __launch_bounds__(kSumThreads)
    sum_partials(const double* __restrict__ partial, std::int64_t count, double factor,
                 double* __restrict__ value) {
  double sums[kSumLoads] = {};
  for (std::int64_t first = threadIdx.x; first < count; first += kSumThreads * kSumLoads) {
#pragma unroll
    for (int k = 0; k < kSumLoads; ++k) {
      const std::int64_t i = first + k * kSumThreads;
      sums[k] += i < count ? partial[i] : 0.0;
    }
  }
  const double total = block_sum<kSumThreads>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  if (threadIdx.x == 0) *value = factor * total;
}

}  // namespace ewc_fast::cuda
