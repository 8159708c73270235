// The loops of the optimizers' steps. Included by steps_*.cpp, each compiled for its own vector
// level; internal linkage throughout (see loops.h).
//
// One pass over memory: a step goes block by block, through several loops that find the block in
// the first-level cache. Operands in the dtype that is computed with are used where they lie;
// others are converted to a buffer and back. So conversions, springs and updates are each written
// once, not once for each combination of dtypes.
//
// Compiled without contraction to FMA: products and sums are rounded each, as in PyTorch and on the
// GPU, and every level gives the same bits. Memory is the limit.
#pragma once

#include "half.h"
#include "optimizer_kernels.h"
#include "sums.h"

namespace ewc_fast::cpu {
namespace {

constexpr std::int64_t kBlock = 512;  // eight operands of float: 16 KB

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

// Puts the signed gradient and, unless the springs act after the update, their pull into `out`;
// returns sum lambda F (theta - a)^2.
template <class C, bool proximal>
double pull(C* __restrict out, const C* __restrict grad, const C* __restrict theta,
            const C* __restrict fisher, const C* __restrict anchor, std::int64_t n, C sign,
            C ewc_lambda) {
  return sum_terms<C>(n, [=](std::int64_t i) __attribute__((always_inline)) {
    const C distance = theta[i] - anchor[i];
    const C pulling = penalty_gradient<C>(ewc_lambda, fisher[i], distance);
    const C signed_grad = signed_gradient(sign, grad[i]);
    out[i] = proximal ? signed_grad : signed_grad + pulling;
    return pulling * distance;
  });
}

template <class C>
void settle(C* __restrict theta, const C* __restrict fisher, const C* __restrict anchor,
            std::int64_t n, C eta_lambda) {
  for (std::int64_t i = 0; i < n; ++i)
    theta[i] = ewc_fast::proximal<C>(eta_lambda * fisher[i], theta[i], anchor[i]);
}

// One block's operands as C.
template <class C>
struct Block {
  std::int64_t begin, n;
  C *theta, *grad, *fisher, *anchor, *first, *second, *largest;
  C sign;  // that the gradient is still to be multiplied with
};

// What every optimizer does around its own update of a block.
template <class C, class Update>
double over_blocks(const StepChunk& chunk, const StepOptions& options, Update update) {
  alignas(64) Buffer<C> theta, grad, fisher, first, second, largest;
  const DType state = sizeof(C) == sizeof(double) ? DType::float64 : DType::float32;
  void* const master = chunk.data[kStepMaster];
  const C ewc_lambda = static_cast<C>(options.ewc_lambda);
  const C eta_lambda = static_cast<C>(options.lr * options.ewc_lambda);
  double sum = 0;
  for (std::int64_t begin = 0; begin < chunk.length; begin += kBlock) {
    const std::int64_t n = chunk.length - begin < kBlock ? chunk.length - begin : kBlock;
    const auto stage = [&](StepOperand operand, DType dtype, C* buffer) {
      return staged<C>(chunk.data[operand], dtype, begin, n, buffer);
    };
    Block<C> block{begin,
                   n,
                   master != nullptr ? stage(kStepMaster, state, theta)
                                     : stage(kStepParam, chunk.param, theta),
                   stage(kStepGrad, chunk.param, grad),
                   stage(kStepFisher, chunk.fisher, fisher),
                   stage(kStepAnchor, state, nullptr),
                   stage(kStepFirst, chunk.moments, first),
                   stage(kStepSecond, chunk.moments, second),
                   stage(kStepLargest, chunk.moments, largest),
                   options.maximize ? C(-1) : C(1)};
    if (block.fisher != nullptr) {
      alignas(64) Buffer<C> pulled;
      const auto pull_block = options.proximal ? pull<C, true> : pull<C, false>;
      sum += pull_block(pulled, block.grad, block.theta, block.fisher, block.anchor, n, block.sign,
                        ewc_lambda);
      block.grad = pulled;
      block.sign = 1;
      update(block);
      if (options.proximal) settle(block.theta, block.fisher, block.anchor, n, eta_lambda);
    } else {
      update(block);
    }
    if (options.by_chance && chunk.param == DType::bfloat16)
      keep_by_chance(chunk.data[kStepParam], begin, n, block.theta, chunk.rounding);
    else
      keep(chunk.data[kStepParam], chunk.param, begin, n, block.theta);
    const auto keep_moment = [&](StepOperand operand, const C* values) {
      if (values != nullptr) keep(chunk.data[operand], chunk.moments, begin, n, values);
    };
    keep_moment(kStepFirst, block.first);
    keep_moment(kStepSecond, block.second);
    keep_moment(kStepLargest, block.largest);
  }
  return sum;
}

template <class C, bool amsgrad>
void adam_block(const Block<C> block, const AdamStep<C> step) {
  C* __restrict theta = block.theta;
  C* __restrict first = block.first;
  C* __restrict second = block.second;
  C* __restrict largest = block.largest;
  const C* __restrict grads = block.grad;
#pragma GCC ivdep  // operands lie apart, each at its own place in the row
  for (std::int64_t i = 0; i < block.n; ++i) {
    const C grad =
        decayed_gradient(step.weight_decay, signed_gradient(block.sign, grads[i]), theta[i]);
    const C new_first = adam_first_moment(step, first[i], grad);
    const C new_second = adam_second_moment(step, second[i], grad);
    const C used = amsgrad ? larger_or_nan(largest[i], new_second) : new_second;
    first[i] = new_first;
    second[i] = new_second;
    if constexpr (amsgrad) largest[i] = used;
    theta[i] = adam_param(step, theta[i], new_first, used);
  }
}

template <class C>
double adam(const StepChunk& chunk, const AdamOptions& options, double power1, double power2) {
  const AdamStep<C> step = adam_step_of<C>(options, power1, power2);
  return over_blocks<C>(chunk, options, [&](const Block<C>& block) {
    if (block.largest != nullptr)
      adam_block<C, true>(block, step);
    else
      adam_block<C, false>(block, step);
  });
}

template <class C, bool momentum>
void sgd_block(const Block<C> block, const SgdStep<C> step) {
  C* __restrict theta = block.theta;
  C* __restrict buffers = block.first;
  const C* __restrict grads = block.grad;
#pragma GCC ivdep  // operands lie apart, each at its own place in the row
  for (std::int64_t i = 0; i < block.n; ++i) {
    const C grad =
        decayed_gradient(step.weight_decay, signed_gradient(block.sign, grads[i]), theta[i]);
    if constexpr (momentum) {
      buffers[i] = sgd_buffer(step, buffers[i], grad);
      theta[i] = sgd_param(step, theta[i], grad, buffers[i]);
    } else {
      theta[i] = sgd_param(step, theta[i], grad, grad);
    }
  }
}

template <class C>
double sgd(const StepChunk& chunk, const SgdOptions& options) {
  const SgdStep<C> step = sgd_step_of<C>(options);
  return over_blocks<C>(chunk, options, [&](const Block<C>& block) {
    if (block.first != nullptr)
      sgd_block<C, true>(block, step);
    else
      sgd_block<C, false>(block, step);
  });
}

}  // namespace
}  // namespace ewc_fast::cpu

#define EWC_FAST_STEP_KERNELS                                \
  {                                                          \
    {adam<float>, adam<double>}, { sgd<float>, sgd<double> } \
  }
