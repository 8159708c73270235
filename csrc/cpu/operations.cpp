#include "operations.h"

#include "chunks.h"

namespace ewc_fast::cpu {

namespace {

static_assert(kChunk % kEncodedBlock == 0, "a chunk begins where a block does");

bool is_encoded(const Row& row) { return row.fisher == DType::e5m3; }

EncodedFisher encoded_fisher(const Row& row, int fisher, int scales, std::int64_t offset) {
  return {row.at<const e5m3>(fisher, offset),
          row.at<const float>(scales, 0) + offset / kEncodedBlock};
}

template <class Kernel>
Kernel encoded_kernel_of(Kernel const (&kernels)[kDTypes], const Row& row) {
  return kernels[static_cast<int>(row.dtype)];
}

}  // namespace

double add_penalty_grad(const Table& table, Run run, double ewc_lambda) {
  return 0.5 * sum_chunks(table, run.threads, [&](const Row& row, const Chunk& c) {
           if (is_encoded(row))
             return encoded_kernel_of(run.kernels.encoded.add_penalty_grad, row)(
                 row.at(0, c.offset), row.at(1, c.offset), encoded_fisher(row, 2, 4, c.offset),
                 row.at(3, c.offset), c.length, ewc_lambda);
           return kernel_of(run.kernels.add_penalty_grad, row)(
               row.at(0, c.offset), row.at(1, c.offset), row.at(2, c.offset), row.at(3, c.offset),
               c.length, ewc_lambda);
         });
}

double penalty(const Table& table, Run run, double ewc_lambda) {
  return 0.5 * sum_chunks(table, run.threads, [&](const Row& row, const Chunk& c) {
           if (is_encoded(row))
             return encoded_kernel_of(run.kernels.encoded.penalty, row)(
                 row.at(0, c.offset), encoded_fisher(row, 1, 3, c.offset), row.at(2, c.offset),
                 c.length, ewc_lambda);
           return kernel_of(run.kernels.penalty, row)(row.at(0, c.offset), row.at(1, c.offset),
                                                      row.at(2, c.offset), c.length, ewc_lambda);
         });
}

void penalty_grad(const Table& table, Run run, double ewc_lambda) {
  visit_chunks(table, run.threads, [&](const Row& row, const Chunk& c) {
    if (is_encoded(row))
      return encoded_kernel_of(run.kernels.encoded.penalty_grad, row)(
          row.at(0, c.offset), row.at(1, c.offset), encoded_fisher(row, 2, 4, c.offset),
          row.at(3, c.offset), c.length, ewc_lambda);
    kernel_of(run.kernels.penalty_grad, row)(row.at(0, c.offset), row.at(1, c.offset),
                                             row.at(2, c.offset), row.at(3, c.offset), c.length,
                                             ewc_lambda);
  });
}

void accumulate_square(const Table& table, Run run, double weight, std::uint32_t seed) {
  visit_chunks(table, run.threads, [&](const Row& row, const Chunk& c) {
    kernel_of(run.kernels.accumulate_square, row)(row.at(0, c.offset), row.at(1, c.offset),
                                                  c.length, row.samples, row.sample_stride, weight,
                                                  rounding_of(seed, row, c));
  });
}

double merge(const Table& table, Run run, double gamma, std::uint32_t seed) {
  return sum_chunks(table, run.threads, [&](const Row& row, const Chunk& c) {
    return kernel_of(run.kernels.merge, row)(
        row.at(0, c.offset), row.at(1, c.offset), row.at(2, c.offset), row.at(3, c.offset),
        row.at(4, c.offset), c.length, gamma, rounding_of(seed, row, c));
  });
}

void merge_online(const Table& table, Run run, double gamma, std::uint32_t seed) {
  visit_chunks(table, run.threads, [&](const Row& row, const Chunk& c) {
    kernel_of(run.kernels.merge_online, row)(row.at(0, c.offset), row.at(1, c.offset),
                                             row.at(2, c.offset), row.at(3, c.offset), c.length,
                                             gamma, rounding_of(seed, row, c));
  });
}

void proximal_step(const Table& table, Run run, double eta_lambda) {
  visit_chunks(table, run.threads, [&](const Row& row, const Chunk& c) {
    if (is_encoded(row))
      return encoded_kernel_of(run.kernels.encoded.proximal_step, row)(
          row.at(0, c.offset), encoded_fisher(row, 1, 3, c.offset), row.at(2, c.offset), c.length,
          eta_lambda);
    kernel_of(run.kernels.proximal_step, row)(row.at(0, c.offset), row.at(1, c.offset),
                                              row.at(2, c.offset), c.length, eta_lambda);
  });
}

}  // namespace ewc_fast::cpu
