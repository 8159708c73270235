// The GPU operations over a table whose rows are all on one device; operands stand in the order of
// each comment. Asynchronous on the stream; nothing here allocates or waits, so calls can be
// captured in a CUDA graph. Values are the same bits in every run.
#pragma once

#include <cstdint>

#include "../operands.h"
#include "../optimizer.h"

namespace ewc_fast::cuda {

#ifdef EWC_FAST_CUDA_BUILT
constexpr const char* kArchitectures = EWC_FAST_CUDA_BUILT;
#else
constexpr const char* kArchitectures = "";
#endif

struct Run {
  void* stream = nullptr;
  double* memory = nullptr;  // memory_needed() doubles on the device, for operations with a value
  std::uint32_t seed = 0;    // of the rounding where a bfloat16 Fisher is written
};

// How many doubles an operation with a value needs on the device; it leaves the value in the first.
std::int64_t memory_needed(const Table& table);

void add_penalty_grad(const Table& table, Run run, double ewc_lambda);  // value; grad, param, F, a
void penalty(const Table& table, Run run, double ewc_lambda);           // value; param, F, a
void penalty_grad(const Table& table, Run run, double ewc_lambda);      // out, param, F, a
void accumulate_square(const Table& table, Run run, double weight);     // F, grads
void merge(const Table& table, Run run, double gamma);  // value; F, a, residual, new F, param
void merge_online(const Table& table, Run run, double gamma);        // F, a, new F, param
void proximal_step(const Table& table, Run run, double eta_lambda);  // param, F, a

// A float32 or float64 on the device that the kernels read, so that a CUDA graph follows it; an
// operation then ignores the number in its options.
struct DeviceNumber {
  const void* address = nullptr;
  DType dtype = DType::float32;
};

// The steps of optimizers; operands as in optimizer.h. Value where there are springs. run.memory
// has step_memory_needed() doubles.
std::int64_t step_memory_needed(const Table& table);
void adam_step(const Table& table, Run run, const AdamOptions& options, DeviceNumber lr);
void sgd_step(const Table& table, Run run, const SgdOptions& options, DeviceNumber lr);

}  // namespace ewc_fast::cuda
