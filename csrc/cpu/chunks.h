// The chunks of a table, shared out among threads, and sums over them in their order.
#pragma once

#include <algorithm>
#include <vector>

#include "../math.h"
#include "operations.h"

namespace ewc_fast::cpu {

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
inline Rounding rounding_of(std::uint32_t seed, const Row& row, const Chunk& chunk) {
  const std::uint32_t row_seed = random_bits(seed, static_cast<std::uint64_t>(row.ordinal));
  const auto first = static_cast<std::uint64_t>(chunk.offset);
  return {seed_of_upper_half(row_seed, first), static_cast<std::uint32_t>(first)};
}

}  // namespace ewc_fast::cpu
