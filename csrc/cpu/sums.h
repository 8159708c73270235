// Sums over the elements of a chunk, in an order of their own; internal linkage (see loops.h).
#pragma once

#include <cstdint>

namespace ewc_fast::cpu {
namespace {

// Sums run in 16 lanes whatever the vector width, so that every level adds in the same order, and
// move to double every 4096 elements: error below 3e-7 relative, at no cost in bandwidth.
constexpr int kLanes = 16;
constexpr std::int64_t kFlush = 4096;

template <class C, class Term>
inline __attribute__((always_inline)) void add_to_lanes(C (&lanes)[kLanes], std::int64_t begin,
                                                        std::int64_t end, Term term) {
  std::int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int lane = 0; i < end; ++i, ++lane) lanes[lane] += term(i);
}

template <class C, class Term>
inline __attribute__((always_inline)) double sum_terms(std::int64_t n, Term term) {
  double total = 0;
  for (std::int64_t begin = 0; begin < n; begin += kFlush) {
    const std::int64_t end = begin + kFlush < n ? begin + kFlush : n;
    C lanes[kLanes] = {};
    add_to_lanes(lanes, begin, end, term);
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  }
  return total;
}

// The same sum over a chunk that is worked on in shorter blocks.
template <class C>
class RunningSum {
 public:
  template <class Term>
  inline __attribute__((always_inline)) void add(std::int64_t n, Term term) {
    C lanes[kLanes];  // in registers, where no store of `term` can meet them
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lanes_[lane];
    add_to_lanes(lanes, 0, n, term);
    for (int lane = 0; lane < kLanes; ++lane) lanes_[lane] = lanes[lane];
    added_ += n;
    if (added_ >= kFlush) flush();
  }
  double total() {
    flush();
    return total_;
  }

 private:
  void flush() {
    for (C& lane : lanes_) {
      total_ += lane;
      lane = 0;
    }
    added_ = 0;
  }

  alignas(64) C lanes_[kLanes] = {};
  std::int64_t added_ = 0;
  double total_ = 0;
};

}  // namespace
}  // namespace ewc_fast::cpu
