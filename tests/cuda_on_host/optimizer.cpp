// The optimizers' CUDA steps as a shared library for the CPU.
#include "../../csrc/cuda/optimizer.cu"

#include <cuda_runtime.h>

#include <cmath>

#include "../../csrc/cuda/penalty.cu"
#include "rows.h"

namespace cuda = ewc_fast::cuda;

// As HostOptions in tests/test_cuda_steps_on_host.py lays it out.
struct GivenOptions {
  double lr, weight_decay, ewc_lambda, first, second, eps;  // betas, or momentum and dampening
  std::int32_t maximize, proximal, by_chance, seed, decoupled, nesterov, begins;
};

template <class Options>
static Options common(const GivenOptions& given) {
  Options options;
  options.lr = given.lr;
  options.weight_decay = given.weight_decay;
  options.ewc_lambda = given.ewc_lambda;
  options.maximize = given.maximize != 0;
  options.proximal = given.proximal != 0;
  options.by_chance = given.by_chance != 0;
  options.seed = static_cast<std::uint32_t>(given.seed);
  return options;
}

// `lr` is the address of a learning rate "on the device", or null. Returns the value, NaN where
// there are no springs.
extern "C" double run(int adam, const GivenRow* rows, int count, std::int64_t elements,
                      const GivenOptions* given, const float* lr, int reverse_order,
                      int* launches) {
  const ewc_fast::Table table = as_table(rows, count, elements);
  const cuda::DeviceNumber there{lr, ewc_fast::DType::float32};
  std::vector<double> memory(cuda::step_memory_needed(table), std::nan(""));
  const cuda::Run run{nullptr, memory.data()};
  host::reverse_order = reverse_order != 0;
  host::launches = 0;
  if (adam) {
    auto options = common<ewc_fast::AdamOptions>(*given);
    options.beta1 = given->first;
    options.beta2 = given->second;
    options.eps = given->eps;
    options.decoupled = given->decoupled != 0;
    cuda::adam_step(table, run, options, there);
  } else {
    auto options = common<ewc_fast::SgdOptions>(*given);
    options.momentum = given->first;
    options.dampening = given->second;
    options.nesterov = given->nesterov != 0;
    options.first = given->begins != 0;
    cuda::sgd_step(table, run, options, there);
  }
  *launches = host::launches;
  return memory.front();
}
