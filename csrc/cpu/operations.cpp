#include "operations.h"

#include <algorithm>

#include "../math.h"

namespace ewc_fast::cpu {
namespace {

// Below this many elements a second thread costs more than it brings (measured crossover).
constexpr std::int64_t kOneThreadBelow = 50000;

// Calls work(chunk index) for every chunk; each thread takes one contiguous range holding its
// share of the elements.
template <class Work>
void for_each_chunk(const Table& table, int threads, Work work) {
  const std::int64_t count = static_cast<std::int64_t>(table.chunks.size());
  if (table.elements < kOneThreadBelow || count < threads) threads = 1;
  if (threads <= 1) {
    for (std::int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  const auto first_at_or_after = [&](std::int64_t element) {
    const auto before = [](const Chunk& chunk, std::int64_t value) { return chunk.before < value; };
    return std::lower_bound(table.chunks.begin(), table.chunks.end(), element, before) -
           table.chunks.begin();
  };
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    const auto share = [&](int t) {
      return t == threads ? table.elements : table.elements / threads * t;
    };
    const std::int64_t end = first_at_or_after(share(thread + 1));
    for (std::int64_t i = first_at_or_after(share(thread)); i < end; ++i) work(i);
  }
}

// The sum of work(row, chunk) over all chunks, added in the chunks' order.
template <class Work>
double sum_chunks(const Table& table, int threads, Work work) {
  std::vector<double> partial(table.chunks.size());
  for_each_chunk(table, threads, [&](std::int64_t i) {
    const Chunk& chunk = table.chunks[i];
    partial[i] = work(table.rows[chunk.row], chunk);
  });
  double total = 0;
  for (const double value : partial) total += value;
  return total;
}

template <class Work>
void visit_chunks(const Table& table, int threads, Work work) {
  for_each_chunk(table, threads,
                 [&](std::int64_t i) { work(table.rows[table.chunks[i].row], table.chunks[i]); });
}

template <class Kernel>
Kernel kernel_of(Kernel const (&kernels)[kDTypes][2], const Row& row) {
  return kernels[static_cast<int>(row.dtype)][row.fisher == DType::bfloat16];
}

static_assert((std::int64_t{1} << 32) % kChunk == 0, "a chunk has one upper half of its numbers");
Rounding rounding_of(std::uint32_t seed, const Row& row, const Chunk& chunk) {
  const std::uint32_t row_seed = random_bits(seed, static_cast<std::uint64_t>(row.ordinal));
  const auto first = static_cast<std::uint64_t>(chunk.offset);
  return {seed_of_upper_half(row_seed, first), static_cast<std::uint32_t>(first)};
}

}  // namespace

double add_penalty_grad(const Table& table, Run run, double ewc_lambda) {
  return 0.5 * sum_chunks(table, run.threads, [&](const Row& row, const Chunk& c) {
           return kernel_of(run.kernels.add_penalty_grad, row)(
               row.at(0, c.offset), row.at(1, c.offset), row.at(2, c.offset), row.at(3, c.offset),
               c.length, ewc_lambda);
         });
}

static_assert(kChunk % kEncodedBlock == 0, "a chunk begins where a block does");
double add_penalty_grad_e5m3(const Table& table, Run run, const std::vector<EncodedFisher>& fisher,
                             double ewc_lambda) {
  return 0.5 * sum_chunks(table, run.threads, [&](const Row& row, const Chunk& c) {
           const EncodedFisher& encoded = fisher[c.row];
           return run.kernels.add_penalty_grad_e5m3[static_cast<int>(row.dtype)](
               row.at(0, c.offset), row.at(1, c.offset), encoded.codes + c.offset,
               encoded.scales + c.offset / kEncodedBlock, row.at(2, c.offset), c.length,
               ewc_lambda);
         });
}

double penalty(const Table& table, Run run, double ewc_lambda) {
  return 0.5 * sum_chunks(table, run.threads, [&](const Row& row, const Chunk& c) {
           return kernel_of(run.kernels.penalty, row)(row.at(0, c.offset), row.at(1, c.offset),
                                                      row.at(2, c.offset), c.length, ewc_lambda);
         });
}

void penalty_grad(const Table& table, Run run, double ewc_lambda) {
  visit_chunks(table, run.threads, [&](const Row& row, const Chunk& c) {
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
    kernel_of(run.kernels.proximal_step, row)(row.at(0, c.offset), row.at(1, c.offset),
                                              row.at(2, c.offset), c.length, eta_lambda);
  });
}

}  // namespace ewc_fast::cpu
