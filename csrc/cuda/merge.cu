// Two quadratics into one, and online EWC, in double arithmetic.
//
// Bytes an element for float parameters; 2 less for 16-bit ones, 4 less with a bfloat16 Fisher:
//   merge          read F, a, residual, F_t, theta; write F, a, residual     28
//   merge_online   read F, F_t, theta; write F, a                            20
// The division is some 20 operations in double, which GPUs for computing have at half their rate;
// on others, at 1/64, it takes longer than the memory. Once a task, so no matter.
#include "multi_tensor.cuh"

namespace ewc_fast::cuda {
namespace {

template <class Types>
struct Merge {
  using T = typename Types::T;
  using F = typename Types::F;
  using C = typename Types::C;
  using Sum = double;
  static constexpr int kOperands = 5, kPack = kPackOf<T, F, C>;

  struct Row {
    F* fisher;
    C* anchor;
    __nv_bfloat16* residual;
    const C* new_fisher;
    const T* param;
    std::uint32_t seed;
  };
  static Row row(const ewc_fast::Row& row, std::uint32_t seed) {
    return {row.at<F>(0, 0), row.at<C>(1, 0), row.at<__nv_bfloat16>(2, 0),
            row.at<C>(3, 0), row.at<T>(4, 0), seed};
  }

  double gamma;
  explicit Merge(double value) : gamma(value) {}

  template <class Access>
  __device__ void step(const Row& row, Access access, Sum& sum) const {
    auto fisher = access.load(row.fisher);
    auto anchor = access.load(row.anchor);
    auto residual = access.load(row.residual);
    const auto new_fisher = access.load(row.new_fisher);
    const auto param = access.load(row.param);
#pragma unroll
    for (int k = 0; k < Access::N; ++k) {
      const double exact_anchor =
          static_cast<double>(anchor.at[k]) + static_cast<float>(residual.at[k]);
      const Merged merged = ewc_fast::merge(gamma, static_cast<C>(fisher.at[k]), exact_anchor,
                                            new_fisher.at[k], static_cast<C>(param.at[k]));
      keep(fisher.at[k], merged.fisher, row.seed, access.index(k));
      anchor.at[k] = static_cast<C>(merged.anchor);
      residual.at[k] = static_cast<__nv_bfloat16>(static_cast<float>(merged.anchor - anchor.at[k]));
      sum += merged.constant;
    }
    access.store(row.fisher, fisher);
    access.store(row.anchor, anchor);
    access.store(row.residual, residual);
  }
};

template <class Types>
struct MergeOnline {
  using T = typename Types::T;
  using F = typename Types::F;
  using C = typename Types::C;
  using Sum = Nothing;
  static constexpr int kOperands = 4, kPack = kPackOf<T, F, C>;

  struct Row {
    F* fisher;
    C* anchor;
    const C* new_fisher;
    const T* param;
    std::uint32_t seed;
  };
  static Row row(const ewc_fast::Row& row, std::uint32_t seed) {
    return {row.at<F>(0, 0), row.at<C>(1, 0), row.at<C>(2, 0), row.at<T>(3, 0), seed};
  }

  double gamma;
  explicit MergeOnline(double value) : gamma(value) {}

  template <class Access>
  __device__ void step(const Row& row, Access access, Sum&) const {
    auto fisher = access.load(row.fisher);
    const auto new_fisher = access.load(row.new_fisher);
    const auto param = access.load(row.param);
    // The anchor is done with before the Fisher is rounded, which needs the registers.
    Pack<C, Access::N> anchor;
#pragma unroll
    for (int k = 0; k < Access::N; ++k) anchor.at[k] = static_cast<C>(param.at[k]);
    access.store(row.anchor, anchor);
#pragma unroll
    for (int k = 0; k < Access::N; ++k)
      keep(fisher.at[k], decayed_sum(gamma, static_cast<C>(fisher.at[k]), new_fisher.at[k]),
           row.seed, access.index(k));
    access.store(row.fisher, fisher);
  }
};

}  // namespace

void merge(const Table& table, Run run, double gamma) {
  sum_rows<Merge>("merge", table, gamma, 1.0, run);
}

void merge_online(const Table& table, Run run, double gamma) {
  for_rows<MergeOnline>("merge_online", table, gamma, run);
}

}  // namespace ewc_fast::cuda
