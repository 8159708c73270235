// grad += lambda F (theta - a), with the penalty's value from the same read.
// Bytes an element: read 2 sizeof(T) + 8, write sizeof(T): 20 for float, 14 for bfloat16.
#include "../math.h"
#include "operations.h"
#include "reduce.cuh"

namespace ewc_fast::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_penalty_grad_kernel(const __grid_constant__ Batch<4> batch,
                            typename Types<T>::compute ewc_lambda, double* __restrict__ partial) {
  using C = typename Types<T>::compute;
  using S = typename Types<T>::state;
  constexpr int N = kPack<T>;
  const int row = batch.row_of_block[blockIdx.x];
  T* __restrict__ grad = static_cast<T*>(batch.data[0][row]);
  const T* __restrict__ param = static_cast<const T*>(batch.data[1][row]);
  const S* __restrict__ fisher = static_cast<const S*>(batch.data[2][row]);
  const S* __restrict__ anchor = static_cast<const S*>(batch.data[3][row]);
  const std::int64_t begin = batch.chunk_of_block[blockIdx.x] * kChunk;
  const std::int64_t numel = batch.numel[row];
  const std::int64_t end = begin + kChunk < numel ? begin + kChunk : numel;

  C sum = 0;
  const auto element = [&](T& g, T theta, S f, S a) {
    const C distance = static_cast<C>(theta) - a;
    const C pull = penalty_gradient<C>(ewc_lambda, f, distance);
    g = static_cast<T>(static_cast<C>(g) + pull);
    sum += pull * distance;
  };
  for_chunk<N>(
      begin, end, batch.aligned[row],
      [&](std::int64_t i) {
        auto g = *reinterpret_cast<const Pack<T, N>*>(grad + i);
        const auto theta = *reinterpret_cast<const Pack<T, N>*>(param + i);
        const auto f = *reinterpret_cast<const Pack<S, N>*>(fisher + i);
        const auto a = *reinterpret_cast<const Pack<S, N>*>(anchor + i);
#pragma unroll
        for (int k = 0; k < N; ++k) element(g.at[k], theta.at[k], f.at[k], a.at[k]);
        *reinterpret_cast<Pack<T, N>*>(grad + i) = g;
      },
      [&](std::int64_t i) { element(grad[i], param[i], fisher[i], anchor[i]); });

  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[batch.first_block + blockIdx.x] = total;
}

template <class T>
std::int64_t launch(const Table& table, DType dtype, std::int64_t first_block, double ewc_lambda,
                    double* partial, cudaStream_t stream) {
  return launch_batches<4>(table, dtype, first_block, [&](const Batch<4>& batch, int blocks) {
    launch_kernel("add_penalty_grad", add_penalty_grad_kernel<T>, blocks, stream, batch,
                  static_cast<typename Types<T>::compute>(ewc_lambda), partial);
  });
}

}  // namespace

std::int64_t workspace(const Table& table) {
  std::int64_t blocks = 0;
  for (const Row& row : table.rows) blocks += chunks_of(row);
  return blocks;
}

void add_penalty_grad(const Table& table, double ewc_lambda, double* value, double* workspace,
                      void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const int device = table.rows.empty() ? 0 : table.rows.front().device;
  for (const Row& row : table.rows)
    if (row.device != device || device < 0)
      throw std::invalid_argument("the tensors of one call must be on one CUDA device");
  for (const Row& row : table.rows)
    if (row.fisher == DType::bfloat16)
      throw std::invalid_argument("no CUDA kernel reads a bfloat16 Fisher yet; use impl='auto'");
  const DeviceGuard guard(device);
  std::int64_t blocks = 0;
  blocks = launch<float>(table, DType::float32, blocks, ewc_lambda, workspace, stream);
  blocks = launch<double>(table, DType::float64, blocks, ewc_lambda, workspace, stream);
  blocks = launch<__nv_bfloat16>(table, DType::bfloat16, blocks, ewc_lambda, workspace, stream);
  blocks = launch<__half>(table, DType::float16, blocks, ewc_lambda, workspace, stream);
  launch_kernel("sum_partials", sum_partials, 1, stream, workspace, blocks, 0.5, value);
}

}  // namespace ewc_fast::cuda
