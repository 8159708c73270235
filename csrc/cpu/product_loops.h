// The inner loops of the squared product, compiled once per vector level like loops.h, and like it
// of internal linkage: packing, one tile of outputs, sums for biases. squared_product.h has the
// formula.
//
// A tile of kRows x kVectors vectors of outputs stays in registers while one group of products is
// added up: 2 kRows kVectors lanes flops for each (kRows + kVectors lanes) numbers read from packed
// panels. With 512-bit registers that is 12 x 2 vectors, 24 multiply-adds for 14 loads and
// 176 bytes, which the second-level cache delivers several times faster than they are used. On a
// Zen 4 512-bit registers and 256-bit ones (6 x 2 vectors) both run at 95 % of the peak.
#pragma once

#include "half.h"
#include "kernels.h"

namespace ewc_fast::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 12;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kTileRows = 6;
#else
constexpr int kVectorBytes = 16, kTileRows = 6;
#endif
constexpr int kTileVectors = 2;

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  static constexpr int lanes = kVectorBytes / sizeof(T);
};
template <class T>
using VectorOf = typename Vector<T>::type;

template <class V, class T>
inline __attribute__((always_inline)) void read(V& vector, const T* from) {
  __builtin_memcpy(&vector, from, sizeof vector);
}
template <class V, class T>
inline __attribute__((always_inline)) void write(T* to, const V& vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

// For each group: acc[r][c] = sum_d g[d][r] a[d][c], from where the carried sums left off; then
// either carried on, or added to the sums, squared or as it is.
template <class T, int kRows, int kVectors>
void tile(const T* __restrict g, const T* __restrict a, const Groups& groups, const T* carried_in,
          T* carried_out, T* __restrict sums) {
  using V = VectorOf<T>;
  constexpr int lanes = Vector<T>::lanes, width = kVectors * lanes;
  for (std::int64_t group = 0; group < groups.count; ++group) {
    V acc[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        if (carried_in != nullptr)
          read(acc[r][v], carried_in + r * width + v * lanes);
        else
          acc[r][v] = V{};
      }
    for (std::int64_t d = 0; d < groups.depth; ++d, g += kRows, a += width) {
      V x[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) read(x[v], a + v * lanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[r][v] += x[v] * g[r];
    }
    if (carried_out != nullptr) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) write(carried_out + r * width + v * lanes, acc[r][v]);
      continue;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        V sum;
        read(sum, sums + r * width + v * lanes);
        if (groups.squared)
          sum += acc[r][v] * acc[r][v];
        else
          sum += acc[r][v];
        write(sums + r * width + v * lanes, sum);
      }
  }
}

// The tile of this size: rows are one, two or three thirds of kTileRows, columns one or two
// vectors.
template <class T>
void any_tile(int rows, int columns, const void* g_, const void* a_, const Groups& groups,
              const void* carried_in_, void* carried_out_, void* sums_) {
  constexpr int third = kTileRows / 3;
  const auto *g = static_cast<const T*>(g_), *a = static_cast<const T*>(a_);
  const auto* carried_in = static_cast<const T*>(carried_in_);
  auto *carried_out = static_cast<T*>(carried_out_), *sums = static_cast<T*>(sums_);
  const auto run = [&](auto* one, auto* two) {
    (columns == Vector<T>::lanes ? one : two)(g, a, groups, carried_in, carried_out, sums);
  };
  if (rows == 3 * third)
    run(tile<T, 3 * third, 1>, tile<T, 3 * third, 2>);
  else if (rows == 2 * third)
    run(tile<T, 2 * third, 1>, tile<T, 2 * third, 2>);
  else
    run(tile<T, third, 1>, tile<T, third, 2>);
}

// The same for biases, whose inputs are all 1.
template <class T>
void bias_tile(int rows, const void* g_, const Groups& groups, void* carried_, bool carry_in,
               bool carry_out, void* sums_) {
  const T* g = static_cast<const T*>(g_);
  T *carried = static_cast<T*>(carried_), *sums = static_cast<T*>(sums_);
  for (std::int64_t group = 0; group < groups.count; ++group) {
    T acc[kTileRows] = {};
    if (carry_in)
      for (int r = 0; r < rows; ++r) acc[r] = carried[r];
    if (rows == kTileRows) {
      for (std::int64_t d = 0; d < groups.depth; ++d, g += kTileRows)
        for (int r = 0; r < kTileRows; ++r) acc[r] += g[r];
    } else {
      for (std::int64_t d = 0; d < groups.depth; ++d, g += rows)
        for (int r = 0; r < rows; ++r) acc[r] += g[r];
    }
    // Plain statements, so that compilers fuse multiply and add alike for every number of rows.
    if (carry_out)
      for (int r = 0; r < rows; ++r) carried[r] = acc[r];
    else if (groups.squared)
      for (int r = 0; r < rows; ++r) sums[r] += acc[r] * acc[r];
    else
      for (int r = 0; r < rows; ++r) sums[r] += acc[r];
  }
}

template <class T>
void add_block(void* total_, std::int64_t row_stride, const void* sums_, std::int64_t width,
               std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t full = kTileVectors * Vector<T>::lanes;
  T* __restrict total = static_cast<T*>(total_);
  const T* __restrict sums = static_cast<const T*>(sums_);
  for (std::int64_t row = 0; row < rows; ++row, total += row_stride, sums += width) {
    if (columns == full)
      for (std::int64_t column = 0; column < full; ++column) total[column] += sums[column];
    else
      for (std::int64_t column = 0; column < columns; ++column) total[column] += sums[column];
  }
}

template <class T>
void square_in_place(void* values_, std::int64_t n) {
  T* values = static_cast<T*>(values_);
  for (std::int64_t i = 0; i < n; ++i) values[i] *= values[i];
}

}  // namespace
}  // namespace ewc_fast::cpu
