// The GPU operations over a table whose rows are all on one device. Asynchronous on `stream`;
// nothing here allocates or waits, so calls can be captured in a CUDA graph.
#pragma once

#include <cstdint>

#include "../operands.h"

namespace ewc_fast::cuda {

#ifdef EWC_FAST_CUDA_BUILT
constexpr const char* kArchitectures = EWC_FAST_CUDA_BUILT;
#else
constexpr const char* kArchitectures = "";
#endif

// How many doubles of device memory `add_penalty_grad` needs for its partial sums.
std::int64_t workspace(const Table& table);

// grad += lambda F (theta - a), over operands grad, param, F, a; *value (on the device) becomes
// lambda/2 sum F (theta - a)^2, bit for bit the same in every run.
void add_penalty_grad(const Table& table, double ewc_lambda, double* value, double* workspace,
                      void* stream);

}  // namespace ewc_fast::cuda
