// Sums over the elements of a chunk, in an order of their own; internal linkage (see loops.h).
#pragma once

#include <cstdint>

namespace ewc_fast::cpu {
namespace {

// Sums run in 16 lanes whatever the vector width, so that every level adds in the same order, and
// move to double every 4096 elements: error below 3e-7 relative, at no cost in bandwidth.
constexpr int kLanes = 16;
constexpr std::int64_t kFlush = 4096;
template <class C>
using Lanes = C[kLanes];

// Adds term(i) for i < n to the lanes; n is a multiple of kLanes but for the last elements of all.
template <class C, class Term>
inline __attribute__((always_inline)) void add_terms(Lanes<C>& lanes, std::int64_t n, Term term) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int lane = 0; i < n; ++i, ++lane) lanes[lane] += term(i);
}

// The sum over n elements, of which add(lanes, first element, how many) adds a run at a time.
template <class C, std::int64_t Run, class Add>
inline __attribute__((always_inline)) double sum_runs(std::int64_t n, Add add) {
  static_assert(Run % kLanes == 0 && kFlush % Run == 0, "every element keeps its lane");
  double total = 0;
  for (std::int64_t begin = 0; begin < n; begin += kFlush) {
    const std::int64_t end = begin + kFlush < n ? begin + kFlush : n;
    Lanes<C> lanes = {};
    for (std::int64_t first = begin; first < end; first += Run)
      add(lanes, first, first + Run < end ? Run : end - first);
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  }
  return total;
}

template <class C, class Term>
inline __attribute__((always_inline)) double sum_terms(std::int64_t n, Term term) {
  return sum_runs<C, kFlush>(n, [=](Lanes<C>& lanes, std::int64_t first,
                                    std::int64_t length) __attribute__((always_inline)) {
    add_terms<C>(lanes, length,
                 [=](std::int64_t i) __attribute__((always_inline)) { return term(first + i); });
  });
}

}  // namespace
}  // namespace ewc_fast::cpu
