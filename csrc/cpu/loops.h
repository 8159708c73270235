// The loops themselves. Included by level_*.cpp with encoded_loops.h, each compiled for its own
// vector level; therefore everything here has internal linkage and no standard header with code is
// included.
#pragma once

#include "depthwise_loops.h"
#include "gather.h"
#include "half.h"
#include "kernels.h"
#include "product_loops.h"
#include "sums.h"

namespace ewc_fast::cpu {
namespace {

template <class T>
struct Types {
  using compute = float;
  using state = float;
};
template <>
struct Types<double> {
  using compute = double;
  using state = double;
};

template <class F>
constexpr bool kByChance = false;
template <>
constexpr bool kByChance<bfloat16> = true;

// Writes an element of the Fisher: bfloat16 by chance, or small addends would be lost in it.
template <class S, class V>
EWC_FAST_FORMULA void keep(S& fisher, V value, Rounding) {
  fisher = static_cast<S>(value);
}
template <class V>
EWC_FAST_FORMULA void keep(bfloat16& fisher, V value, Rounding rounding) {
  const std::uint32_t random = random_bits(rounding.seed, rounding.element);
  store_stochastically(fisher, static_cast<float>(value), random);
}

// Calls work(first element, how many) for runs of n elements.
template <std::int64_t Run, class Work>
inline __attribute__((always_inline)) void for_each_run(std::int64_t n, Work work) {
  for (std::int64_t first = 0; first < n; first += Run)
    work(first, n - first < Run ? n - first : Run);
}

// T: of the parameters; F: of the Fisher.
template <class T, class F, class C = typename Types<T>::compute>
inline __attribute__((always_inline)) void add_penalty_grad_run(
    RunningSum<C>& sum, T* __restrict grad, const T* __restrict param, const F* __restrict fisher,
    const typename Types<T>::state* __restrict anchor, std::int64_t n, C ewc_lambda) {
  sum.add(n, [=](std::int64_t i) __attribute__((always_inline)) {
    const C distance = load(param[i]) - anchor[i];
    const C pull = penalty_gradient<C>(ewc_lambda, load(fisher[i]), distance);
    store(grad[i], load(grad[i]) + pull);
    return pull * distance;
  });
}
template <class T, class F>
double add_penalty_grad(void* grad_, const void* param_, const void* fisher_, const void* anchor_,
                        std::int64_t n, double ewc_lambda_) {
  using C = typename Types<T>::compute;
  T* grad = static_cast<T*>(grad_);
  const T* param = static_cast<const T*>(param_);
  const F* fisher = static_cast<const F*>(fisher_);
  const auto* anchor = static_cast<const typename Types<T>::state*>(anchor_);
  const C ewc_lambda = static_cast<C>(ewc_lambda_);
  RunningSum<C> sum;
  for_each_run<kFlush>(n, [&](std::int64_t first, std::int64_t length) {
    add_penalty_grad_run<T, F>(sum, grad + first, param + first, fisher + first, anchor + first,
                               length, ewc_lambda);
  });
  return sum.total();
}

template <class T, class F, class C = typename Types<T>::compute>
inline __attribute__((always_inline)) void penalty_run(
    RunningSum<C>& sum, const T* __restrict param, const F* __restrict fisher,
    const typename Types<T>::state* __restrict anchor, std::int64_t n, C ewc_lambda) {
  sum.add(n, [=](std::int64_t i) __attribute__((always_inline)) {
    const C distance = load(param[i]) - anchor[i];
    return penalty_gradient<C>(ewc_lambda, load(fisher[i]), distance) * distance;
  });
}
template <class T, class F>
double penalty(const void* param_, const void* fisher_, const void* anchor_, std::int64_t n,
               double ewc_lambda_) {
  using C = typename Types<T>::compute;
  const T* param = static_cast<const T*>(param_);
  const F* fisher = static_cast<const F*>(fisher_);
  const auto* anchor = static_cast<const typename Types<T>::state*>(anchor_);
  const C ewc_lambda = static_cast<C>(ewc_lambda_);
  RunningSum<C> sum;
  for_each_run<kFlush>(n, [&](std::int64_t first, std::int64_t length) {
    penalty_run<T, F>(sum, param + first, fisher + first, anchor + first, length, ewc_lambda);
  });
  return sum.total();
}

template <class T, class F>
void penalty_grad(void* out_, const void* param_, const void* fisher_, const void* anchor_,
                  std::int64_t n, double ewc_lambda_) {
  using C = typename Types<T>::compute;
  using S = typename Types<T>::state;
  T* __restrict out = static_cast<T*>(out_);
  const T* __restrict param = static_cast<const T*>(param_);
  const F* __restrict fisher = static_cast<const F*>(fisher_);
  const S* __restrict anchor = static_cast<const S*>(anchor_);
  const C ewc_lambda = static_cast<C>(ewc_lambda_);
  for (std::int64_t i = 0; i < n; ++i)
    store(out[i], penalty_gradient<C>(ewc_lambda, load(fisher[i]), load(param[i]) - anchor[i]));
}

// Samples run inside blocks of F that stay in the first-level cache: F is read and written once.
template <class T, class F>
void accumulate_square(void* fisher_, const void* grads_, std::int64_t n, std::int64_t samples,
                       std::int64_t sample_stride, double weight_, Rounding rounding) {
  using C = typename Types<T>::compute;
  constexpr std::int64_t kBlock = 1024;
  F* __restrict fisher = static_cast<F*>(fisher_);
  const T* __restrict grads = static_cast<const T*>(grads_);
  const C weight = static_cast<C>(weight_);
  C squares[kBlock];
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t length = n - begin < kBlock ? n - begin : kBlock;
    for (std::int64_t i = 0; i < length; ++i) squares[i] = 0;
    for (std::int64_t sample = 0; sample < samples; ++sample) {
      const T* __restrict grad = grads + sample * sample_stride + begin;
      for (std::int64_t i = 0; i < length; ++i) squares[i] += load(grad[i]) * load(grad[i]);
    }
    for (std::int64_t i = 0; i < length; ++i) squares[i] *= weight;
    asm volatile("" : : "r"(squares) : "memory");  // the product is rounded also where there is FMA
    for (std::int64_t i = 0; i < length; ++i, ++rounding.element)
      keep(fisher[begin + i], load(fisher[begin + i]) + squares[i], rounding);
  }
}

template <class T, class F>
double merge(void* fisher_, void* anchor_, void* residual_, const void* new_fisher_,
             const void* param_, std::int64_t n, double gamma, Rounding rounding) {
  using S = typename Types<T>::state;
  F* __restrict fisher = static_cast<F*>(fisher_);
  S* __restrict anchor = static_cast<S*>(anchor_);
  bfloat16* __restrict residual = static_cast<bfloat16*>(residual_);
  const S* __restrict new_fisher = static_cast<const S*>(new_fisher_);
  const T* __restrict param = static_cast<const T*>(param_);
  const double constant = sum_terms<double>(n, [=](std::int64_t i) __attribute__((always_inline)) {
    const double exact_anchor = double(anchor[i]) + load(residual[i]);
    const Merged merged =
        ewc_fast::merge(gamma, load(fisher[i]), exact_anchor, new_fisher[i], load(param[i]));
    if constexpr (!kByChance<F>) fisher[i] = static_cast<F>(merged.fisher);
    anchor[i] = static_cast<S>(merged.anchor);
    store(residual[i], static_cast<float>(merged.anchor - anchor[i]));
    return merged.constant;
  });
  // From cache, in a loop of its own: with the random bits beside the sums, compilers would
  // vectorise neither.
  if constexpr (kByChance<F>)
    for (std::int64_t i = 0; i < n; ++i, ++rounding.element)
      keep(fisher[i], decayed_sum(gamma, load(fisher[i]), new_fisher[i]), rounding);
  return constant;
}

template <class T, class F>
void merge_online(void* fisher_, void* anchor_, const void* new_fisher_, const void* param_,
                  std::int64_t n, double gamma, Rounding rounding) {
  using S = typename Types<T>::state;
  F* __restrict fisher = static_cast<F*>(fisher_);
  S* __restrict anchor = static_cast<S*>(anchor_);
  const S* __restrict new_fisher = static_cast<const S*>(new_fisher_);
  const T* __restrict param = static_cast<const T*>(param_);
  for (std::int64_t i = 0; i < n; ++i, ++rounding.element) {
    keep(fisher[i], decayed_sum(gamma, load(fisher[i]), new_fisher[i]), rounding);
    anchor[i] = load(param[i]);
  }
}

template <class T, class F>
void proximal_step(void* param_, const void* fisher_, const void* anchor_, std::int64_t n,
                   double eta_lambda_) {
  using C = typename Types<T>::compute;
  using S = typename Types<T>::state;
  T* __restrict param = static_cast<T*>(param_);
  const F* __restrict fisher = static_cast<const F*>(fisher_);
  const S* __restrict anchor = static_cast<const S*>(anchor_);
  const C eta_lambda = static_cast<C>(eta_lambda_);
  for (std::int64_t i = 0; i < n; ++i)
    store(param[i], proximal<C>(eta_lambda * load(fisher[i]), load(param[i]), anchor[i]));
}

// The four instances of each loop, in the order of DType; with a Fisher of the state's dtype, and
// of bfloat16.
#define EWC_FAST_INSTANCES(loop) {loop<float>, loop<double>, loop<bfloat16>, loop<float16>}
#define EWC_FAST_FISHER_INSTANCES(loop)                                           \
  {                                                                               \
    {loop<float, float>, loop<float, bfloat16>}, {loop<double, double>, nullptr}, \
        {loop<bfloat16, float>, loop<bfloat16, bfloat16>}, {                      \
      loop<float16, float>, loop<float16, bfloat16>                               \
    }                                                                             \
  }
#define EWC_FAST_TWO(loop) {loop<float>, loop<double>}

}  // namespace
}  // namespace ewc_fast::cpu

#define EWC_FAST_PRODUCT_KERNELS                                                \
  {kTileRows,                                                                   \
   kTileRows / 3,                                                               \
   {kTileVectors * Vector<float>::lanes, kTileVectors * Vector<double>::lanes}, \
   {Vector<float>::lanes, Vector<double>::lanes},                               \
   EWC_FAST_TWO(any_tile),                                                      \
   EWC_FAST_TWO(bias_tile),                                                     \
   EWC_FAST_TWO(add_block),                                                     \
   EWC_FAST_TWO(square_in_place),                                               \
   EWC_FAST_INSTANCES(gather),                                                  \
   EWC_FAST_TWO(depthwise)}

#define EWC_FAST_KERNELS(name, steps)            \
  {name,                                         \
   EWC_FAST_FISHER_INSTANCES(add_penalty_grad),  \
   EWC_FAST_FISHER_INSTANCES(penalty),           \
   EWC_FAST_FISHER_INSTANCES(penalty_grad),      \
   EWC_FAST_FISHER_INSTANCES(accumulate_square), \
   EWC_FAST_FISHER_INSTANCES(merge),             \
   EWC_FAST_FISHER_INSTANCES(merge_online),      \
   EWC_FAST_FISHER_INSTANCES(proximal_step),     \
   EWC_FAST_ENCODED_KERNELS,                     \
   EWC_FAST_PRODUCT_KERNELS,                     \
   &steps}
