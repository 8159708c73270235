// What an optimizer's step does with the elements of one thread: loads all of them, takes the
// springs and the optimizer's own update, stores.
//
// What a step lacks has no address. All threads of a block lack the same, so that the branches cost
// next to nothing, where an instance for each of the combinations would make 32 times as many.
// Steps with a path alone have instances of their own, whose registers the others then don't need.
// All loads of a step come before its arithmetic, under predicates, and are in flight at once.
#pragma once

#include <type_traits>

#include "../optimizer.h"
#include "elements.cuh"
#include "operations.h"

namespace ewc_fast::cuda {

// Moments are of the parameters' dtype or, beside 16-bit parameters, float.
template <class Param, class Fisher, class Moment>
struct StepTypes : Types<Param, Fisher> {
  using M = Moment;
};

// Adam's moments are the first, the second and the largest second; SGD's only one is its buffer.
template <class Types, int Moments, bool Path>
struct StepRow {
  static constexpr bool kPath = Path;
  using T = typename Types::T;
  using F = typename Types::F;
  using M = typename Types::M;
  using C = typename Types::C;

  T* param;
  const T* grad;
  const F* fisher;
  const C* anchor;
  C* master;
  C* path;
  M* moments[Moments];
  const AdamStep<double>* coefficients;
  std::uint32_t seed;
};

template <class C>
__device__ AdamStep<C> rounded(const AdamStep<double>& step) {
  return {static_cast<C>(step.weight_decay),    static_cast<C>(step.kept),
          static_cast<C>(step.first_share),     static_cast<C>(step.beta2),
          static_cast<C>(step.second_share),    static_cast<C>(step.step_size),
          static_cast<C>(step.root_correction), static_cast<C>(step.eps)};
}

template <class OfRow>
inline OfRow step_row(const ewc_fast::Row& row, std::uint32_t seed) {
  OfRow made{row.at<typename OfRow::T>(kStepParam, 0),
             row.at<typename OfRow::T>(kStepGrad, 0),
             row.at<typename OfRow::F>(kStepFisher, 0),
             row.at<typename OfRow::C>(kStepAnchor, 0),
             row.at<typename OfRow::C>(kStepMaster, 0),
             row.at<typename OfRow::C>(kStepPath, 0),
             {},
             nullptr,
             seed};
  int operand = kStepFirst;
  for (auto& moment : made.moments) moment = row.at<typename OfRow::M>(operand++, 0);
  return made;
}

template <class Access, class T>
__device__ void load_if_there(Access access, const T* from, Pack<T, Access::N>& pack) {
  if (from != nullptr) pack = access.load(from);
}
template <class Access, class T>
__device__ void store_if_there(Access access, T* to, const Pack<T, Access::N>& pack) {
  if (to != nullptr) access.store(to, pack);
}

// Where the learning rate is: with the caller, or in a tensor on the device, so that a CUDA graph
// reads at each replay what stands there then.
struct LearningRate {
  double number;
  DeviceNumber there;

  __device__ double operator()() const {
    if (there.address == nullptr) return number;
    if (there.dtype == DType::float64) return *static_cast<const double*>(there.address);
    return *static_cast<const float*>(there.address);
  }
};

// What both optimizers do around their own update of an element.
template <class C>
struct Around {
  C sign, ewc_lambda;
  C strength = 0;  // eta lambda
  bool proximal, by_chance;

  explicit Around(const StepOptions& options)
      : sign(options.maximize ? C(-1) : C(1)),
        ewc_lambda(static_cast<C>(options.ewc_lambda)),
        proximal(options.proximal),
        by_chance(options.by_chance) {}

  template <class T>
  __device__ void store(T& param, C theta, std::uint32_t seed, std::int64_t element) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      if (by_chance) return keep(param, theta, seed, element);
    }
    param = static_cast<T>(theta);
  }

  // `update` returns the new theta of an element from the old one and its gradient, and moves its
  // moments on.
  template <class Row, class Access, class Update>
  __device__ void step(const Row& row, Access access, const Update& update, C& sum) const {
    constexpr int N = Access::N, kMoments = Update::kMoments;
    Pack<typename Row::T, N> param;
    Pack<typename Row::F, N> fisher;
    Pack<C, N> anchor, master, path;
    Pack<typename Row::M, N> moments[kMoments];
    const auto grad = access.load(row.grad);
    if (Row::kPath || row.master == nullptr) param = access.load(row.param);
    if constexpr (Row::kPath) path = access.load(row.path);
    load_if_there(access, row.master, master);
    load_if_there(access, row.fisher, fisher);
    load_if_there(access, row.anchor, anchor);
#pragma unroll
    for (int j = 0; j < kMoments; ++j) load_if_there(access, row.moments[j], moments[j]);

    const bool springs = row.fisher != nullptr;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const C before = static_cast<C>(param.at[k]), given = static_cast<C>(grad.at[k]);
      C theta = row.master == nullptr ? before : master.at[k];
      C gradient = signed_gradient<C>(sign, given);
      if (springs) {
        const C distance = theta - anchor.at[k];
        const C pull = penalty_gradient<C>(ewc_lambda, static_cast<C>(fisher.at[k]), distance);
        if (!proximal) gradient += pull;
        sum += pull * distance;
      }
      C of_element[kMoments];
#pragma unroll
      for (int j = 0; j < kMoments; ++j) of_element[j] = static_cast<C>(moments[j].at[k]);
      theta = update(theta, gradient, of_element);
#pragma unroll
      for (int j = 0; j < kMoments; ++j)
        moments[j].at[k] = static_cast<typename Row::M>(of_element[j]);
      if (springs && proximal)
        theta = ewc_fast::proximal<C>(strength * static_cast<C>(fisher.at[k]), theta, anchor.at[k]);
      master.at[k] = theta;
      store(param.at[k], theta, row.seed, access.index(k));
      if constexpr (Row::kPath)
        path.at[k] += path_term<C>(given, before, static_cast<C>(param.at[k]));
    }
    access.store(row.param, param);
    store_if_there(access, row.master, master);
    if constexpr (Row::kPath) access.store(row.path, path);
#pragma unroll
    for (int j = 0; j < kMoments; ++j) store_if_there(access, row.moments[j], moments[j]);
  }
};

template <class C>
struct AdamUpdate {
  static constexpr int kMoments = 3;
  AdamStep<C> step;
  bool amsgrad;

  __device__ C operator()(C theta, C grad, C (&moments)[kMoments]) const {
    auto& [first, second, largest] = moments;
    grad = decayed_gradient(step.weight_decay, grad, theta);
    first = adam_first_moment(step, first, grad);
    second = adam_second_moment(step, second, grad);
    if (amsgrad) largest = larger_or_nan(largest, second);
    return adam_param(step, theta, first, amsgrad ? largest : second);
  }
};

template <class C>
struct SgdUpdate {
  static constexpr int kMoments = 1;
  SgdStep<C> step;
  bool momentum;

  __device__ C operator()(C theta, C grad, C (&moments)[kMoments]) const {
    grad = decayed_gradient(step.weight_decay, grad, theta);
    moments[0] = momentum ? sgd_buffer(step, moments[0], grad) : grad;
    return sgd_param(step, theta, grad, moments[0]);
  }
};

}  // namespace ewc_fast::cuda
