// The loops of the optimizers' steps. Included by steps_*.cpp, each compiled for its own vector
// level; internal linkage throughout (see loops.h).
//
// One pass over memory: a step goes block by block. Operands in the dtype that is computed with are
// used where they lie; others are converted to a buffer in the first-level cache and back. So there
// is one loop for all combinations of dtypes.
//
// Compiled without contraction to FMA: products and sums are rounded each, as in PyTorch and on the
// GPU, and every level gives the same bits. Memory is the limit.
#pragma once

#include "half.h"
#include "optimizer_kernels.h"
#include "sums.h"

namespace ewc_fast::cpu {
namespace {

// A kilobyte of floats: all operands and buffers of a block stay in the first-level cache.
constexpr std::int64_t kBlock = 256;

template <class C>
using Buffer = C[kBlock];

// n elements as C: where they lie, or converted to the buffer.
template <class C>
C* staged(void* data, DType dtype, std::int64_t begin, std::int64_t n, C* __restrict buffer) {
  if (data == nullptr) return nullptr;
  const auto convert = [&](auto* from) {
    for (std::int64_t i = 0; i < n; ++i) buffer[i] = load(from[begin + i]);
    return buffer;
  };
  if (dtype == DType::bfloat16) return convert(static_cast<const bfloat16*>(data));
  if (dtype == DType::float16) return convert(static_cast<const float16*>(data));
  return static_cast<C*>(data) + begin;
}

// Writes n elements back, unless they lie there already.
template <class C>
void keep(void* data, DType dtype, std::int64_t begin, std::int64_t n, const C* __restrict values) {
  const auto convert = [&](auto* to) {
    for (std::int64_t i = 0; i < n; ++i) store(to[begin + i], values[i]);
  };
  if (dtype == DType::bfloat16) return convert(static_cast<bfloat16*>(data));
  if (dtype == DType::float16) return convert(static_cast<float16*>(data));
  if (static_cast<C*>(data) + begin != values) convert(static_cast<C*>(data));
}

template <class C>
void keep_by_chance(void* data, std::int64_t begin, std::int64_t n, const C* __restrict values,
                    Rounding rounding) {
  bfloat16* to = static_cast<bfloat16*>(data) + begin;
  const std::uint32_t first = rounding.element + static_cast<std::uint32_t>(begin);
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t random = random_bits(rounding.seed, first + static_cast<std::uint32_t>(i));
    store_stochastically(to[i], static_cast<float>(values[i]), random);
  }
}

// The parameters as they are kept, copied: a step overwrites them.
template <class C>
void copy_kept(const StepChunk& chunk, std::int64_t begin, std::int64_t n, C* __restrict buffer) {
  const C* kept = staged<C>(chunk.data[kStepParam], chunk.param, begin, n, buffer);
  if (kept == buffer) return;
  for (std::int64_t i = 0; i < n; ++i) buffer[i] = kept[i];
}

// Adds to the path integral what a step has done to the parameters.
template <class C>
void follow(const StepChunk& chunk, std::int64_t begin, std::int64_t n, const C* __restrict grad,
            const C* __restrict before) {
  alignas(64) Buffer<C> buffer;
  const C* __restrict after = staged<C>(chunk.data[kStepParam], chunk.param, begin, n, buffer);
  C* __restrict path = static_cast<C*>(chunk.data[kStepPath]) + begin;
  for (std::int64_t i = 0; i < n; ++i) path[i] = path[i] + path_term(grad[i], before[i], after[i]);
}

enum class Springs { none, gradient, proximal };

// One block's operands as C.
template <class C>
struct Block {
  std::int64_t length;
  C* theta;
  const C *grad, *fisher, *anchor;
  C *first, *second, *largest;
  C sign, weight_decay, ewc_lambda, eta_lambda;
};

// Takes the step of every element: springs and weight decay here, update(i, gradient, theta) is
// what the optimizer makes of them. Adds lambda F (theta - a)^2 to `terms`.
//
// Not in one loop: F and anchor are read in a loop of their own, before the update or after it.
// Memory then has four streams to follow at a time instead of six, and the divisions of the update
// overlap with reads. On a Zen 4 and 1e8 elements that took 11 % (gradient) and 17 % (proximal) off
// Adam's step, down to the time of a bare loop over the same streams that divides nothing. Touching
// or prefetching the streams one after the other, a block ahead, made it slower by half.
template <class C, Springs springs, class Update>
void walk(const Block<C> block, Update update, RunningSum<C>& terms) {
  alignas(64) Buffer<C> between;  // the pulls, or theta before the proximal step
  if constexpr (springs == Springs::gradient)
    terms.add(block.length, [&](std::int64_t i) {
      const C distance = block.theta[i] - block.anchor[i];
      const C pull = between[i] = penalty_gradient(block.ewc_lambda, block.fisher[i], distance);
      return pull * distance;
    });
  C* const moved = springs == Springs::proximal ? between : block.theta;
#pragma GCC ivdep  // operands lie apart, each at its own place in the row
  for (std::int64_t i = 0; i < block.length; ++i) {
    const C theta = block.theta[i];
    C grad = signed_gradient(block.sign, block.grad[i]);
    if constexpr (springs == Springs::gradient) grad = grad + between[i];
    moved[i] = update(i, decayed_gradient(block.weight_decay, grad, theta), theta);
  }
  if constexpr (springs == Springs::proximal)
    terms.add(block.length, [&](std::int64_t i) {
      const C fisher = block.fisher[i], anchor = block.anchor[i];
      const C distance = block.theta[i] - anchor;
      block.theta[i] = proximal(block.eta_lambda * fisher, between[i], anchor);
      return penalty_gradient(block.ewc_lambda, fisher, distance) * distance;
    });
}

// Goes through a chunk block by block. `update_of(block)` returns what walk() calls.
template <class C, Springs springs, class UpdateOf>
double over_blocks(const StepChunk& chunk, const StepOptions& options, C weight_decay,
                   UpdateOf update_of) {
  alignas(64) Buffer<C> theta, grad, fisher, first, second, largest, before;
  const DType state = sizeof(C) == sizeof(double) ? DType::float64 : DType::float32;
  const auto& data = chunk.data;
  RunningSum<C> terms;
  for (std::int64_t begin = 0; begin < chunk.length; begin += kBlock) {
    const std::int64_t n = chunk.length - begin < kBlock ? chunk.length - begin : kBlock;
    const auto stage = [&](StepOperand operand, DType dtype, C* buffer) {
      return staged<C>(data[operand], dtype, begin, n, buffer);
    };
    const Block<C> block{n,
                         data[kStepMaster] != nullptr ? stage(kStepMaster, state, theta)
                                                      : stage(kStepParam, chunk.param, theta),
                         stage(kStepGrad, chunk.param, grad),
                         stage(kStepFisher, chunk.fisher, fisher),
                         stage(kStepAnchor, state, nullptr),
                         stage(kStepFirst, chunk.moments, first),
                         stage(kStepSecond, chunk.moments, second),
                         stage(kStepLargest, chunk.moments, largest),
                         options.maximize ? C(-1) : C(1),
                         weight_decay,
                         static_cast<C>(options.ewc_lambda),
                         static_cast<C>(options.lr * options.ewc_lambda)};
    if (data[kStepPath] != nullptr) copy_kept(chunk, begin, n, before);
    walk<C, springs>(block, update_of(block), terms);
    if (options.by_chance && chunk.param == DType::bfloat16)
      keep_by_chance(data[kStepParam], begin, n, block.theta, chunk.rounding);
    else
      keep(data[kStepParam], chunk.param, begin, n, block.theta);
    if (data[kStepPath] != nullptr) follow(chunk, begin, n, block.grad, before);
    const auto keep_moment = [&](StepOperand operand, const C* values) {
      if (values != nullptr) keep(data[operand], chunk.moments, begin, n, values);
    };
    keep_moment(kStepFirst, block.first);
    keep_moment(kStepSecond, block.second);
    keep_moment(kStepLargest, block.largest);
  }
  return terms.total();
}

template <class C, class UpdateOf>
double over_chunk(const StepChunk& chunk, const StepOptions& options, C weight_decay,
                  UpdateOf update_of) {
  if (chunk.data[kStepFisher] == nullptr)
    return over_blocks<C, Springs::none>(chunk, options, weight_decay, update_of);
  if (options.proximal)
    return over_blocks<C, Springs::proximal>(chunk, options, weight_decay, update_of);
  return over_blocks<C, Springs::gradient>(chunk, options, weight_decay, update_of);
}

template <class C, bool amsgrad>
double adam_chunk(const StepChunk& chunk, const AdamOptions& options, const AdamStep<C> step) {
  return over_chunk<C>(chunk, options, step.weight_decay, [=](const Block<C>& block) {
    return [=, first = block.first, second = block.second, largest = block.largest](
               std::int64_t i, C grad, C theta) __attribute__((always_inline)) {
      const C new_first = first[i] = adam_first_moment(step, first[i], grad);
      const C new_second = second[i] = adam_second_moment(step, second[i], grad);
      if constexpr (!amsgrad) return adam_param(step, theta, new_first, new_second);
      const C new_largest = largest[i] = larger_or_nan(largest[i], new_second);
      return adam_param(step, theta, new_first, new_largest);
    };
  });
}

template <class C>
double adam(const StepChunk& chunk, const AdamOptions& options, double power1, double power2) {
  const AdamStep<C> step = adam_step_of<C>(options, power1, power2);
  return chunk.data[kStepLargest] != nullptr ? adam_chunk<C, true>(chunk, options, step)
                                             : adam_chunk<C, false>(chunk, options, step);
}

template <class C, bool momentum>
double sgd_chunk(const StepChunk& chunk, const SgdOptions& options, const SgdStep<C> step) {
  return over_chunk<C>(chunk, options, step.weight_decay, [=](const Block<C>& block) {
    return [=, buffers = block.first](std::int64_t i, C grad, C theta)
               __attribute__((always_inline)) {
                 if constexpr (!momentum) return sgd_param(step, theta, grad, grad);
                 const C buffer = buffers[i] = sgd_buffer(step, buffers[i], grad);
                 return sgd_param(step, theta, grad, buffer);
               };
  });
}

template <class C>
double sgd(const StepChunk& chunk, const SgdOptions& options) {
  const SgdStep<C> step = sgd_step_of<C>(options);
  return chunk.data[kStepFirst] != nullptr ? sgd_chunk<C, true>(chunk, options, step)
                                           : sgd_chunk<C, false>(chunk, options, step);
}

}  // namespace
}  // namespace ewc_fast::cpu

#define EWC_FAST_STEP_KERNELS                                \
  {                                                          \
    {adam<float>, adam<double>}, { sgd<float>, sgd<double> } \
  }
