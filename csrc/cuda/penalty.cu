// The penalty, its gradient, and both in one pass.
//
// Bytes an element for float parameters, and for bfloat16 or float16 ones; 2 less with a bfloat16
// Fisher, 3 - 4/256 less with one of 8 bits (17.02 and 11.02 for the first):
//   add_penalty_grad   read grad, theta, F, a; write grad     20   14
//   penalty            read theta, F, a                       12   10
//   penalty_grad       read theta, F, a; write out            16   12
// At most ten operations each: far below what the memory allows.
#include "multi_tensor.cuh"

namespace ewc_fast::cuda {
namespace {

template <class Types>
struct AddPenaltyGrad {
  using T = typename Types::T;
  using F = typename Types::F;
  using C = typename Types::C;
  using Sum = C;
  static constexpr int kOperands = 4, kPack = kPackOf<T, F, C>;

  struct Row {
    T* grad;
    const T* param;
    FisherIn<F> fisher;
    const C* anchor;
  };
  static Row row(const ewc_fast::Row& row, std::uint32_t) {
    return {row.at<T>(0, 0), row.at<T>(1, 0), fisher_in<F>(row, 2, 4), row.at<C>(3, 0)};
  }

  C ewc_lambda;
  explicit AddPenaltyGrad(double value) : ewc_lambda(static_cast<C>(value)) {}

  template <class Access>
  __device__ void step(const Row& row, Access access, Sum& sum) const {
    auto grad = access.load(row.grad);
    const auto param = access.load(row.param);
    const auto fisher = load_fisher<C>(access, row.fisher);
    const auto anchor = access.load(row.anchor);
#pragma unroll
    for (int k = 0; k < Access::N; ++k) {
      const C distance = static_cast<C>(param.at[k]) - anchor.at[k];
      const C pull = penalty_gradient<C>(ewc_lambda, fisher.at[k], distance);
      grad.at[k] = static_cast<T>(static_cast<C>(grad.at[k]) + pull);
      sum += pull * distance;
    }
    access.store(row.grad, grad);
  }
};

template <class Types>
struct Penalty {
  using T = typename Types::T;
  using F = typename Types::F;
  using C = typename Types::C;
  using Sum = C;
  static constexpr int kOperands = 3, kPack = kPackOf<T, F, C>;

  struct Row {
    const T* param;
    FisherIn<F> fisher;
    const C* anchor;
  };
  static Row row(const ewc_fast::Row& row, std::uint32_t) {
    return {row.at<T>(0, 0), fisher_in<F>(row, 1, 3), row.at<C>(2, 0)};
  }

  C ewc_lambda;
  explicit Penalty(double value) : ewc_lambda(static_cast<C>(value)) {}

  template <class Access>
  __device__ void step(const Row& row, Access access, Sum& sum) const {
    const auto param = access.load(row.param);
    const auto fisher = load_fisher<C>(access, row.fisher);
    const auto anchor = access.load(row.anchor);
#pragma unroll
    for (int k = 0; k < Access::N; ++k) {
      const C distance = static_cast<C>(param.at[k]) - anchor.at[k];
      sum += penalty_gradient<C>(ewc_lambda, fisher.at[k], distance) * distance;
    }
  }
};

template <class Types>
struct PenaltyGrad {
  using T = typename Types::T;
  using F = typename Types::F;
  using C = typename Types::C;
  using Sum = Nothing;
  static constexpr int kOperands = 4, kPack = kPackOf<T, F, C>;

  struct Row {
    T* out;
    const T* param;
    FisherIn<F> fisher;
    const C* anchor;
  };
  static Row row(const ewc_fast::Row& row, std::uint32_t) {
    return {row.at<T>(0, 0), row.at<T>(1, 0), fisher_in<F>(row, 2, 4), row.at<C>(3, 0)};
  }

  C ewc_lambda;
  explicit PenaltyGrad(double value) : ewc_lambda(static_cast<C>(value)) {}

  template <class Access>
  __device__ void step(const Row& row, Access access, Sum&) const {
    const auto param = access.load(row.param);
    const auto fisher = load_fisher<C>(access, row.fisher);
    const auto anchor = access.load(row.anchor);
    Pack<T, Access::N> out;
#pragma unroll
    for (int k = 0; k < Access::N; ++k) {
      const C distance = static_cast<C>(param.at[k]) - anchor.at[k];
      out.at[k] = static_cast<T>(penalty_gradient<C>(ewc_lambda, fisher.at[k], distance));
    }
    access.store(row.out, out);
  }
};

}  // namespace

std::int64_t memory_needed(const Table& table) {
  const std::int64_t chunk = chunk_length(table);
  std::int64_t doubles = 1;
  for (const Row& row : table.rows) doubles += blocks_of(row, chunk);
  return doubles;
}

void add_penalty_grad(const Table& table, Run run, double ewc_lambda) {
  sum_rows<AddPenaltyGrad>("add_penalty_grad", table, ewc_lambda, 0.5, run);
}

void penalty(const Table& table, Run run, double ewc_lambda) {
  sum_rows<Penalty>("penalty", table, ewc_lambda, 0.5, run);
}

void penalty_grad(const Table& table, Run run, double ewc_lambda) {
  for_rows<PenaltyGrad>("penalty_grad", table, ewc_lambda, run);
}

}  // namespace ewc_fast::cuda
