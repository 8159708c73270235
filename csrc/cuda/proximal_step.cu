// theta <- (theta + eta lambda F a) / (1 + eta lambda F).
//
// Bytes an element: read theta, F, a, write theta: 16 for float parameters, 12 for 16-bit ones; 2
// less with a bfloat16 Fisher, 3 - 4/256 less with one of 8 bits. Two divisions, some 30
// operations, still hide behind the memory.
#include "multi_tensor.cuh"

namespace ewc_fast::cuda {
namespace {

template <class Types>
struct ProximalStep {
  using T = typename Types::T;
  using F = typename Types::F;
  using C = typename Types::C;
  using Sum = Nothing;
  static constexpr int kOperands = 3, kPack = kPackOf<T, F, C>;

  struct Row {
    T* param;
    FisherIn<F> fisher;
    const C* anchor;
  };
  static Row row(const ewc_fast::Row& row, std::uint32_t) {
    return {row.at<T>(0, 0), fisher_in<F>(row, 1, 3), row.at<C>(2, 0)};
  }

  C eta_lambda;
  explicit ProximalStep(double value) : eta_lambda(static_cast<C>(value)) {}

  template <class Access>
  __device__ void step(const Row& row, Access access, Sum&) const {
    auto param = access.load(row.param);
    const auto fisher = load_fisher<C>(access, row.fisher);
    const auto anchor = access.load(row.anchor);
#pragma unroll
    for (int k = 0; k < Access::N; ++k)
      param.at[k] = static_cast<T>(
          proximal<C>(eta_lambda * fisher.at[k], static_cast<C>(param.at[k]), anchor.at[k]));
    access.store(row.param, param);
  }
};

}  // namespace

void proximal_step(const Table& table, Run run, double eta_lambda) {
  for_rows<ProximalStep>("proximal_step", table, eta_lambda, run);
}

}  // namespace ewc_fast::cuda
