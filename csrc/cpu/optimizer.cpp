#include "optimizer.h"

#include <cmath>

#include "chunks.h"
#include "optimizer_kernels.h"

namespace ewc_fast::cpu {
namespace {

struct Powers {
  double first, second;  // of beta1 and beta2
};

// Adds a step to every row's count; returns the powers of the betas at the new counts. Nearly
// always all rows have the same, and the powers are taken once.
std::vector<Powers> count_step(const std::vector<Row>& rows, const AdamOptions& options) {
  std::vector<Powers> powers;
  powers.reserve(rows.size());
  float last = 0;
  for (const Row& row : rows) {
    float& count = *row.at<float>(kStepCount, 0);
    count += 1;
    if (!powers.empty() && count == last) {
      powers.push_back(powers.back());
      continue;
    }
    last = count;
    powers.push_back({std::pow(options.beta1, static_cast<double>(count)),
                      std::pow(options.beta2, static_cast<double>(count))});
  }
  return powers;
}

StepChunk step_chunk(const Row& row, const Chunk& chunk, const StepOptions& options) {
  StepChunk made{{},         chunk.length, row.dtype,
                 row.fisher, row.moments,  rounding_of(options.seed, row, chunk)};
  for (int operand = 0; operand < kStepOperands; ++operand)
    if (row.data[operand] != nullptr) made.data[operand] = row.at(operand, chunk.offset);
  return made;
}

bool is_double(const Row& row) { return row.dtype == DType::float64; }

}  // namespace

double adam_step(const Table& table, Run run, const AdamOptions& options) {
  const std::vector<Powers> powers = count_step(table.rows, options);
  return 0.5 * sum_chunks(table, run.threads, [&](const Row& row, const Chunk& chunk) {
           const Powers& power = powers[chunk.row];
           return run.kernels.steps->adam[is_double(row)](step_chunk(row, chunk, options), options,
                                                          power.first, power.second);
         });
}

double sgd_step(const Table& table, Run run, const SgdOptions& options) {
  return 0.5 * sum_chunks(table, run.threads, [&](const Row& row, const Chunk& chunk) {
           return run.kernels.steps->sgd[is_double(row)](step_chunk(row, chunk, options), options);
         });
}

}  // namespace ewc_fast::cpu
