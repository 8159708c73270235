// The CUDA operations as a shared library for the CPU: one call over rows given as an array.
#include <cuda_runtime.h>

#include <cmath>
#include <map>

#include "../../csrc/cuda/accumulate_square.cu"
#include "../../csrc/cuda/merge.cu"
#include "../../csrc/cuda/penalty.cu"
#include "../../csrc/cuda/proximal_step.cu"

namespace cuda = ewc_fast::cuda;

// As HostRow in tests/test_cuda_on_host.py lays it out.
struct GivenRow {
  void* data[ewc_fast::kMaxOperands];
  std::int64_t step[ewc_fast::kMaxOperands];
  std::int64_t numel, samples, sample_stride, ordinal;
  std::int32_t dtype, fisher;
};

static ewc_fast::Row as_row(const GivenRow& given) {
  ewc_fast::Row row;
  std::copy_n(given.data, ewc_fast::kMaxOperands, row.data.begin());
  std::copy_n(given.step, ewc_fast::kMaxOperands, row.step.begin());
  row.numel = given.numel;
  row.samples = given.samples;
  row.sample_stride = given.sample_stride;
  row.ordinal = given.ordinal;
  row.dtype = static_cast<ewc_fast::DType>(given.dtype);
  row.fisher = static_cast<ewc_fast::DType>(given.fisher);
  row.device = 0;
  return row;
}

// `elements` is the size of the table that the rows are said to be part of: it sets the length of
// chunks. Returns the value, NaN where the operation has none; `launches` counts.
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
  ewc_fast::Table table;
  for (int i = 0; i < count; ++i) table.rows.push_back(as_row(rows[i]));
  table.elements = elements;
  host::reverse_order = reverse_order != 0;
  host::launches = 0;
  std::vector<double> memory(cuda::memory_needed(table), std::nan(""));
  operations.at(name)(table, {nullptr, memory.data(), seed}, coefficient);
  *launches = host::launches;
  return memory.front();
}
