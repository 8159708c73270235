// The operations over all chunks of a table, on several threads. Operands stand in the order of
// each comment, and behind them the scales of a Fisher in 8 bits, if there is one; values are sums
// over chunks in their order, the same for any number of threads.
#pragma once

#include "kernels.h"

namespace ewc_fast::cpu {

constexpr std::int64_t kChunk = 16384;

struct Run {
  const Kernels& kernels;
  int threads;
};

double add_penalty_grad(const Table& table, Run run, double ewc_lambda);  // grad, param, F, a
double penalty(const Table& table, Run run, double ewc_lambda);           // param, F, a
void penalty_grad(const Table& table, Run run, double ewc_lambda);        // out, param, F, a
void proximal_step(const Table& table, Run run, double eta_lambda);       // param, F, a

// These write F. Where it is bfloat16, the seed says which way each element is rounded.
void accumulate_square(const Table& table, Run run, double weight, std::uint32_t seed);  // F, grads
double merge(const Table& table, Run run, double gamma,
             std::uint32_t seed);  // F, a, residual, new F, param
void merge_online(const Table& table, Run run, double gamma,
                  std::uint32_t seed);  // F, a, new F, param

}  // namespace ewc_fast::cpu
