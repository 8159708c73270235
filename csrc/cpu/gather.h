// Gathers a matrix through tables of offsets; compiled once per vector level, internal linkage.
#pragma once

#include "half.h"

namespace ewc_fast::cpu {
namespace {

constexpr int kSquare = 8;  // the side of the blocks that are transposed in registers

// A run of constant length: no call, no loop.
template <int kLength, class C>
inline __attribute__((always_inline)) void copy(C* out, const C* in) {
  __builtin_memcpy(out, in, kLength * sizeof(C));
}
template <int kLength, class C, class T>
inline __attribute__((always_inline)) void copy(C* __restrict out, const T* __restrict in) {
  for (int lane = 0; lane < kLength; ++lane) out[lane] = load(in[lane]);
}

template <int kLength, class C, class T>
void copy_runs(C* out, std::int64_t out_stride, const T* in, const std::int64_t* row_offsets,
               std::int64_t rows) {
  for (std::int64_t r = 0; r < rows; ++r) copy<kLength>(out + r * out_stride, in + row_offsets[r]);
}

// out[r][i] = in[row_offsets[r] + i]
template <class C, class T>
void copy_runs(C* out, std::int64_t out_stride, const T* in, const std::int64_t* row_offsets,
               std::int64_t rows, std::int64_t length) {
  // The widths of panels at the vector levels.
  if (length == 32) return copy_runs<32>(out, out_stride, in, row_offsets, rows);
  if (length == 16) return copy_runs<16>(out, out_stride, in, row_offsets, rows);
  if (length == 12) return copy_runs<12>(out, out_stride, in, row_offsets, rows);
  if (length == 8) return copy_runs<8>(out, out_stride, in, row_offsets, rows);
  if (length == 6) return copy_runs<6>(out, out_stride, in, row_offsets, rows);
  for (std::int64_t r = 0; r < rows; ++r) {
    const T* from = in + row_offsets[r];
    C* to = out + r * out_stride;
    std::int64_t i = 0;
    for (; i + 16 <= length; i += 16) copy<16>(to + i, from + i);
    for (; i + 4 <= length; i += 4) copy<4>(to + i, from + i);
    for (; i < length; ++i) to[i] = load(from[i]);
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define EWC_FAST_SHUFFLES
#endif
#endif

// out[r][c] = in[column_offsets[c] + r] for 8 x 8 numbers, whose rows are contiguous in memory.
// Only the first kStored columns are stored.
template <int kStored, class C, class T>
inline __attribute__((always_inline)) void transpose(C* __restrict out, std::int64_t out_stride,
                                                     const T* in,
                                                     const std::int64_t* column_offsets) {
#ifdef EWC_FAST_SHUFFLES
  typedef C V __attribute__((vector_size(kSquare * sizeof(C))));
  V x[8], y[8];
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) {
    C values[8];
    for (int r = 0; r < 8; ++r) values[r] = load(in[column_offsets[c] + r]);
    __builtin_memcpy(&x[c], values, sizeof values);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 8; c += 2) {  // pairs of columns
    y[c] = __builtin_shufflevector(x[c], x[c + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    y[c + 1] = __builtin_shufflevector(x[c], x[c + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // quadruples
    const int c = (i / 2) * 4 + i % 2;
    x[c] = __builtin_shufflevector(y[c], y[c + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    x[c + 2] = __builtin_shufflevector(y[c], y[c + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // whole rows
    y[c] = __builtin_shufflevector(x[c], x[c + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    y[c + 4] = __builtin_shufflevector(x[c], x[c + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) __builtin_memcpy(out + r * out_stride, &y[r], kStored * sizeof(C));
#else
  for (int r = 0; r < kSquare; ++r)
    for (int c = 0; c < kStored; ++c) out[r * out_stride + c] = load(in[column_offsets[c] + r]);
#endif
}

inline bool consecutive(const std::int64_t* offsets, std::int64_t n) {
  for (std::int64_t i = 1; i < n; ++i)
    if (offsets[i] != offsets[i - 1] + 1) return false;
  return true;
}

// out[r][c] = in[row_offsets[r] + column_offsets[c]] for kStored columns.
template <int kStored, class C, class T>
void gather_columns(C* out, std::int64_t out_stride, const T* in, const std::int64_t* row_offsets,
                    std::int64_t rows, const std::int64_t* column_offsets) {
  std::int64_t r = 0;
  while (r < rows) {
    C* to = out + r * out_stride;
    if (r + kSquare <= rows && consecutive(row_offsets + r, kSquare)) {
      transpose<kStored>(to, out_stride, in + row_offsets[r], column_offsets);
      r += kSquare;
      continue;
    }
    for (int c = 0; c < kStored; ++c) to[c] = load(in[row_offsets[r] + column_offsets[c]]);
    ++r;
  }
}

// out[r][c] = in[row_offsets[r] + column_offsets[c]]. Columns from the last one up to `width`,
// which nobody reads, get zeros or repetitions. Runs of consecutive columns are copied; where
// instead rows are consecutive, blocks are transposed.
template <class T>
void gather(void* out_, std::int64_t out_stride, std::int64_t width, const void* in_,
            const std::int64_t* row_offsets, std::int64_t rows, const std::int64_t* column_offsets,
            std::int64_t columns) {
  using C = decltype(load(T{}));
  C* __restrict out = static_cast<C*>(out_);
  const T* in = static_cast<const T*>(in_);
  constexpr std::int64_t kLongRun = 4;
  std::int64_t begin = 0;
  while (begin < columns) {
    std::int64_t end = begin + 1;
    while (end < columns && column_offsets[end] == column_offsets[end - 1] + 1) ++end;
    if (end - begin >= kLongRun) {
      copy_runs(out + begin, out_stride, in + column_offsets[begin], row_offsets, rows,
                end - begin);
      begin = end;
      continue;
    }
    std::int64_t offsets[kSquare];  // the last column again where there are no more
    for (int c = 0; c < kSquare; ++c)
      offsets[c] = column_offsets[begin + c < columns ? begin + c : columns - 1];
    const std::int64_t room = width - begin;
    const auto some = [&](auto* columns_of_one_size, std::int64_t count) {
      columns_of_one_size(out + begin, out_stride, in, row_offsets, rows, offsets);
      begin += count;
    };
    if (room >= 8)
      some(gather_columns<8, C, T>, 8);
    else if (room >= 4)
      some(gather_columns<4, C, T>, 4);
    else if (room >= 2)
      some(gather_columns<2, C, T>, 2);
    else
      some(gather_columns<1, C, T>, 1);
  }
  for (std::int64_t r = 0; begin < width && r < rows; ++r)
    for (std::int64_t c = begin; c < width; ++c) out[r * out_stride + c] = 0;
}

}  // namespace
}  // namespace ewc_fast::cpu
