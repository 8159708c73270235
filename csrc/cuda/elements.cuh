// How a thread reads and writes elements: dtypes, packs, and where the elements of one step lie.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../math.h"
#include "launch.cuh"

namespace ewc_fast::cuda {

constexpr int kThreads = 256;

// The dtypes of one instance of an operation.
template <class Param, class Fisher>
struct Types {
  using T = Param;   // parameters and gradients
  using F = Fisher;  // the kept Fisher: C, or bfloat16
  using C = std::conditional_t<std::is_same_v<T, double>, double, float>;  // state and arithmetic
};

template <class T, int N>
struct alignas(std::min<std::size_t>(16, N * sizeof(T))) Pack {
  T at[N];
};

// The widest operand moves 16 bytes at once and the others the same number of elements: so every
// access of a warp covers consecutive bytes. Wider packs of the narrow operands would leave gaps
// between the threads' accesses to the wide ones.
template <class... Operands>
constexpr int kPackOf = 16 / std::max({sizeof(Operands)...});

// One step of a thread takes N elements: neighbours, where all operands are aligned to whole packs;
// else as many that lie kThreads apart, so that a warp still reads consecutive bytes.
template <int Count>
struct Neighbours {
  static constexpr int N = Count;
  std::int64_t first;

  __device__ std::int64_t index(int k) const { return first + k; }
  template <class T>
  __device__ Pack<T, N> load(const T* from) const {
    return *reinterpret_cast<const Pack<T, N>*>(from + first);
  }
  template <class T>
  __device__ void store(T* to, const Pack<T, N>& pack) const {
    *reinterpret_cast<Pack<T, N>*>(to + first) = pack;
  }
};

template <int Count>
struct Apart {
  static constexpr int N = Count;
  std::int64_t first;

  __device__ std::int64_t index(int k) const { return first + k * kThreads; }
  template <class T>
  __device__ Pack<T, N> load(const T* from) const {
    Pack<T, N> pack;
#pragma unroll
    for (int k = 0; k < N; ++k) pack.at[k] = from[index(k)];
    return pack;
  }
  template <class T>
  __device__ void store(T* to, const Pack<T, N>& pack) const {
#pragma unroll
    for (int k = 0; k < N; ++k) to[index(k)] = pack.at[k];
  }
};

// Keeps a value of the Fisher in its dtype. In bfloat16 its error is below one unit in the last
// place, 2^-7 relative, and zero on average: addends below half a unit are not lost.
template <class F>
__device__ void keep(F& kept, double value, std::uint32_t, std::int64_t) {
  kept = static_cast<F>(value);
}
__device__ inline void keep(__nv_bfloat16& kept, double value, std::uint32_t seed,
                            std::int64_t element) {
  const float rounded = static_cast<float>(value);
  const std::uint32_t bits = __float_as_uint(rounded);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  kept = finite ? __ushort_as_bfloat16(round_stochastically(bits, random_bits(seed, element)))
                : static_cast<__nv_bfloat16>(rounded);
}

}  // namespace ewc_fast::cuda
