// The CUDA operations as a shared library for the CPU: one call over rows given as an array.
#include <cuda_runtime.h>

#include <cmath>
#include <map>

#include "../../csrc/cuda/accumulate_square.cu"
#include "../../csrc/cuda/merge.cu"
#include "../../csrc/cuda/penalty.cu"
#include "../../csrc/cuda/proximal_step.cu"
#include "rows.h"

namespace cuda = ewc_fast::cuda;

// Returns the value, NaN where the operation has none; `launches` counts.
extern "C" double run(const char* name, const GivenRow* rows, int count, std::int64_t elements,
                      double coefficient, std::uint32_t seed, int reverse_order, int* launches) {
  static const std::map<std::string, void (*)(const ewc_fast::Table&, cuda::Run, double)>
      operations{{"add_penalty_grad", cuda::add_penalty_grad},
                 {"penalty", cuda::penalty},
                 {"penalty_grad", cuda::penalty_grad},
                 {"accumulate_square", cuda::accumulate_square},
                 {"merge", cuda::merge},
                 {"merge_online", cuda::merge_online},
                 {"proximal_step", cuda::proximal_step}};
  const ewc_fast::Table table = as_table(rows, count, elements);
  host::reverse_order = reverse_order != 0;
  host::launches = 0;
  std::vector<double> memory(cuda::memory_needed(table), std::nan(""));
  operations.at(name)(table, {nullptr, memory.data(), seed}, coefficient);
  *launches = host::launches;
  return memory.front();
}
