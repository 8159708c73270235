// Sums that repeat bit for bit: fixed order within a warp, a block and over blocks; no atomics.
#pragma once

#include "multi_tensor.cuh"

namespace ewc_fast::cuda {

// The sum over all threads of the block, valid in thread 0.
__device__ inline double block_sum(double value) {
  __shared__ double of_warp[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2)
    value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kThreads / 32; ++warp) total += of_warp[warp];
  return total;
}

// *value = factor * (the sum of the partial sums). One block.
__global__ void __launch_bounds__(kThreads)
    sum_partials(const double* __restrict__ partial, std::int64_t count, double factor,
                 double* __restrict__ value) {
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *value = factor * sum;
}

}  // namespace ewc_fast::cuda
