// The CUDA operation as a shared library for the CPU: one call over rows given as arrays.
#include "../../csrc/cuda/add_penalty_grad.cu"

#include <cuda_runtime.h>

extern "C" double add_penalty_grad(int rows, void* const* pointers, const std::int64_t* numel,
                                   const int* dtypes, double ewc_lambda, int reverse_order) {
  ewc_fast::Table table;
  for (int i = 0; i < rows; ++i) {
    ewc_fast::Row row;
    for (int operand = 0; operand < 4; ++operand) row.data[operand] = pointers[operand * rows + i];
    row.numel = numel[i];
    row.dtype = static_cast<ewc_fast::DType>(dtypes[i]);
    row.device = 0;
    table.rows.push_back(row);
  }
  host::reverse_order = reverse_order != 0;
  std::vector<double> workspace(ewc_fast::cuda::workspace(table), 0.0 / 0.0);
  double value = 0.0 / 0.0;
  ewc_fast::cuda::add_penalty_grad(table, ewc_lambda, &value, workspace.data(), nullptr);
  return value;
}
