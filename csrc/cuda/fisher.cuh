// How operations that only read the Fisher read it: as elements, or as the codes and scales of 8
// bits, 1 + 4/256 bytes an element in place of 4. Decoding takes four instructions an element (a
// shift, a sum, a choice, a product) where the memory allows over 90; so it is hidden behind it.
#pragma once

#include "../operands.h"
#include "elements.cuh"

namespace ewc_fast::cuda {

template <class F>
struct FisherIn {
  const F* values;
};
template <>
struct FisherIn<e5m3> {
  const e5m3* codes;
  const float* scales;
};

// From the operands at these places, the second of which only a Fisher in 8 bits has.
template <class F>
FisherIn<F> fisher_in(const Row& row, int fisher, int scales) {
  if constexpr (std::is_same_v<F, e5m3>)
    return {row.at<e5m3>(fisher, 0), row.at<float>(scales, 0)};
  else
    return {row.at<F>(fisher, 0)};
}

__device__ inline float scale_of(const FisherIn<e5m3>& fisher, std::int64_t element) {
  return fisher.scales[static_cast<std::uint64_t>(element) / kEncodedBlock];
}

// The Fisher of the elements of a step, as C.
template <class C, class Access, class F>
__device__ Pack<C, Access::N> load_fisher(Access access, const FisherIn<F>& fisher) {
  const auto kept = access.load(fisher.values);
  Pack<C, Access::N> values;
#pragma unroll
  for (int k = 0; k < Access::N; ++k) values.at[k] = static_cast<C>(kept.at[k]);
  return values;
}

// Neighbours have one scale, which two warps share: packs begin at multiples of their length.
template <class C, int N>
__device__ Pack<C, N> load_fisher(Neighbours<N> access, const FisherIn<e5m3>& fisher) {
  static_assert(kEncodedBlock % N == 0, "no pack reaches into another block");
  const auto codes = access.load(fisher.codes);
  const float scale = scale_of(fisher, access.first);
  Pack<C, N> values;
#pragma unroll
  for (int k = 0; k < N; ++k) values.at[k] = decode(codes.at[k], scale);
  return values;
}

template <class C, int N>
__device__ Pack<C, N> load_fisher(Apart<N> access, const FisherIn<e5m3>& fisher) {
  const auto codes = access.load(fisher.codes);
  Pack<C, N> values;
#pragma unroll
  for (int k = 0; k < N; ++k) values.at[k] = decode(codes.at[k], scale_of(fisher, access.index(k)));
  return values;
}

}  // namespace ewc_fast::cuda
