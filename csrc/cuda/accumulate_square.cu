// F += w sum_s g[s]^2 over the samples of a chunk of per-sample gradients, or over one gradient.
//
// Bytes an element for float gradients: 4 samples + 8, the Fisher being read and written once;
// 2 samples + 4 where both are 16 bits wide.
#include "multi_tensor.cuh"

namespace ewc_fast::cuda {
namespace {

template <class Types>
struct AccumulateSquare {
  using T = typename Types::T;
  using F = typename Types::F;
  using C = typename Types::C;
  using Sum = Nothing;
  static constexpr int kOperands = 2, kPack = kPackOf<T, F>;

  struct Row {
    F* fisher;
    const T* grads;
    std::int64_t samples, sample_stride;
    std::uint32_t seed;
  };
  static Row row(const ewc_fast::Row& row, std::uint32_t seed) {
    return {row.at<F>(0, 0), row.at<T>(1, 0), row.samples, row.sample_stride, seed};
  }

  C weight;
  explicit AccumulateSquare(double value) : weight(static_cast<C>(value)) {}

  template <class Access>
  __device__ void step(const Row& row, Access access, Sum&) const {
    auto fisher = access.load(row.fisher);
    C squares[Access::N] = {};
    // Nothing is written between the loads, so several samples are on their way at once.
#pragma unroll 4
    for (std::int64_t sample = 0; sample < row.samples; ++sample) {
      const auto grad = access.load(row.grads + sample * row.sample_stride);
#pragma unroll
      for (int k = 0; k < Access::N; ++k)
        squares[k] += static_cast<C>(grad.at[k]) * static_cast<C>(grad.at[k]);
    }
#pragma unroll
    for (int k = 0; k < Access::N; ++k)
      keep(fisher.at[k], static_cast<C>(fisher.at[k]) + weight * squares[k], row.seed,
           access.index(k));
    access.store(row.fisher, fisher);
  }
};

}  // namespace

void accumulate_square(const Table& table, Run run, double weight) {
  for_rows<AccumulateSquare>("accumulate_square", table, weight, run);
}

}  // namespace ewc_fast::cuda
