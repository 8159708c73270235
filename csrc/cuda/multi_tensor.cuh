// One loop for every operation over lists of tensors.
//
// An operation is a functor: its Row holds the pointers of one row, step() does the elements that
// one thread takes at once. Rows go to the kernel by value, in its parameters: nothing is uploaded
// that could go stale, nothing must be kept alive until the kernel has run, and a CUDA graph keeps
// its own copy. Parameters may take 32,764 bytes (sm_70 and later; CUDA 12.1 and a driver R530 or
// later), room for 500 rows and more, so that most models are one launch. Each block looks its row
// up by bisection in the constant bank that parameters lie in, at the same addresses in all
// threads: nine reads or so before tens of kilobytes of work.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "../operands.h"
#include "elements.cuh"
#include "fisher.cuh"
#include "operations.h"
#include "reduce.cuh"

namespace ewc_fast::cuda {

constexpr std::size_t kParameterBytes = 32764;
constexpr std::size_t kFewBytes = 4096;  // which are cheaper to launch
constexpr int kFewRows = 48;             // or as many as these hold

// A block works on one chunk of one row: long chunks for large tables, shorter ones where else some
// multiprocessors would have nothing to do. From the shapes alone, so that sums repeat bit for bit
// on every device, for operands aligned alike. Every length keeps 16-byte alignment.
constexpr std::int64_t kLongestChunk = 16384, kShortestChunk = 1024, kEnoughBlocks = 2048;

inline std::int64_t chunk_length(const Table& table) {
  std::int64_t length = kLongestChunk;
  while (length > kShortestChunk && table.elements < length * kEnoughBlocks) length /= 2;
  return length;
}
inline std::int64_t blocks_of(const Row& row, std::int64_t chunk) {
  return (row.numel + chunk - 1) / chunk;
}

struct Nothing {};  // the sum of an operation without a value

template <class OpRow, int Capacity>
struct Rows {
  OpRow row[Capacity];
  std::int64_t numel[Capacity];
  std::int32_t first_block[Capacity];
  // Decided on the host: integer arithmetic on a pointer in the kernel would make the compiler
  // lose its address space and fall back to generic loads.
  bool aligned[Capacity];
  std::int32_t count, chunk;
};

// The last row whose blocks begin at or before `block`.
template <class OpRow, int Capacity>
__device__ int row_of(const Rows<OpRow, Capacity>& rows, int block) {
  int row = 0, after = rows.count;
  while (after - row > 1) {
    const int middle = (row + after) / 2;
    (rows.first_block[middle] <= block ? row : after) = middle;
  }
  return row;
}

// Whether an operation has what each block does once for its row: begin(row).
template <class Op, class = void>
constexpr bool kBegins = false;
template <class Op>
constexpr bool kBegins<Op, std::void_t<decltype(&Op::begin)>> = true;

// How many blocks of it a multiprocessor must be able to hold, so that registers are spent on that
// and not on more blocks; 0 leaves it to the compiler.
template <class Op, class = void>
constexpr int kResidentBlocks = 0;
template <class Op>
constexpr int kResidentBlocks<Op, std::void_t<decltype(Op::kResident)>> = Op::kResident;

template <class Op, int Capacity>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Op>)
    over_rows(const Rows<typename Op::Row, Capacity> __grid_constant__ rows, const Op given,
              double* partial) {
  constexpr int N = Op::kPack;
  const int block = blockIdx.x, index = row_of(rows, block);
  const typename Op::Row row = rows.row[index];
  const std::int64_t begin = std::int64_t{block - rows.first_block[index]} * rows.chunk;
  const std::int64_t numel = rows.numel[index];
  const std::int64_t end = begin + rows.chunk < numel ? begin + rows.chunk : numel;
  Op op = given;
  if constexpr (kBegins<Op>) op.begin(row);

  // Not unrolled: the stores of one step keep the loads of the next behind them anyway. With 32
  // registers a multiprocessor holds all the threads it can, and these have loads enough in flight.
  typename Op::Sum sum{};
  std::int64_t packs_end = begin;
  if (rows.aligned[index]) {
    packs_end += (end - begin) / N * N;
#pragma unroll 1
    for (std::int64_t i = begin + threadIdx.x * N; i < packs_end; i += kThreads * N)
      op.step(row, Neighbours<N>{i}, sum);
  } else {
    packs_end += (end - begin) / (kThreads * N) * (kThreads * N);
#pragma unroll 1
    for (std::int64_t i = begin + threadIdx.x; i < packs_end; i += kThreads * N)
      op.step(row, Apart<N>{i}, sum);
  }
#pragma unroll 1
  for (std::int64_t i = packs_end + threadIdx.x; i < end; i += kThreads)
    op.step(row, Apart<1>{i}, sum);

  if constexpr (!std::is_same_v<typename Op::Sum, Nothing>) {
    if (partial == nullptr) return;  // nobody asked
    const double total = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) partial[block] = total;
  }
}

// Whether every operand begins at a multiple of its pack's bytes, in every sample.
template <class Op>
bool aligned(const Row& row) {
  std::uintptr_t off = row.samples > 1 ? row.sample_stride % Op::kPack : 0;
  for (int operand = 0; operand < Op::kOperands; ++operand)
    off |= reinterpret_cast<std::uintptr_t>(row.data[operand]) &
           std::min<std::uintptr_t>(15, row.step[operand] * Op::kPack - 1);
  return off == 0;
}

// Where the blocks after these leave their sums, if blocks do.
inline double* after(double* partial, std::int64_t blocks) {
  return partial == nullptr ? nullptr : partial + blocks;
}

// Launches over the rows that `belongs` picks, at most Capacity in one launch. Returns the number
// of blocks, each of which has left its sum in `partial`.
template <class Op, int Capacity, class Belongs>
std::int64_t launch_over(const char* name, const Table& table, const Op& op, Run run,
                         double* partial, Belongs belongs) {
  Rows<typename Op::Row, Capacity> rows;
  static_assert(sizeof rows + sizeof op + sizeof partial + 16 <= kParameterBytes);
  rows.count = 0;
  rows.chunk = static_cast<std::int32_t>(chunk_length(table));
  std::int64_t blocks = 0, launched = 0;
  const auto flush = [&] {
    if (blocks == 0) return;
    const Grid grid{static_cast<int>(blocks), kThreads, static_cast<cudaStream_t>(run.stream)};
    launch_kernel(name, over_rows<Op, Capacity>, grid, rows, op, after(partial, launched));
    launched += blocks;
    blocks = rows.count = 0;
  };
  for (const Row& row : table.rows) {
    if (row.numel == 0 || !belongs(row)) continue;
    const std::int64_t more = blocks_of(row, rows.chunk);
    if (rows.count == Capacity || blocks + more > std::numeric_limits<std::int32_t>::max()) flush();
    rows.row[rows.count] = op.row(row, random_bits(run.seed, row.ordinal));
    rows.numel[rows.count] = row.numel;
    rows.first_block[rows.count] = static_cast<std::int32_t>(blocks);
    rows.aligned[rows.count++] = aligned<Op>(row);
    blocks += more;
  }
  flush();
  return launched;
}

// Whether an operation only reads the Fisher, which may then be in 8 bits too.
template <class Op, class = void>
constexpr bool kOnlyReadsFisher = false;
template <class Op>
constexpr bool kOnlyReadsFisher<Op, std::void_t<decltype(Op::Row::fisher)>> =
    std::is_same_v<decltype(Op::Row::fisher), FisherIn<typename Op::F>>;

// Calls visit(dtypes of the parameters and the Fisher, Types) for every instance there is.
template <template <class> class Operation, class Visit>
void for_each_types(Visit visit) {
  constexpr DType f32 = DType::float32, f64 = DType::float64, b16 = DType::bfloat16,
                  f16 = DType::float16, f8 = DType::e5m3;
  visit(f32, f32, Types<float, float>{});
  visit(f64, f64, Types<double, double>{});
  visit(b16, f32, Types<__nv_bfloat16, float>{});
  visit(f16, f32, Types<__half, float>{});
  visit(f32, b16, Types<float, __nv_bfloat16>{});
  visit(b16, b16, Types<__nv_bfloat16, __nv_bfloat16>{});
  visit(f16, b16, Types<__half, __nv_bfloat16>{});
  if constexpr (kOnlyReadsFisher<Operation<Types<float, float>>>) {
    visit(f32, f8, Types<float, e5m3>{});
    visit(b16, f8, Types<__nv_bfloat16, e5m3>{});
    visit(f16, f8, Types<__half, e5m3>{});
  }
}

inline int device_of(const Table& table) {
  const int device = table.rows.empty() ? 0 : table.rows.front().device;
  for (const Row& row : table.rows) {
    if (row.device != device || device < 0)
      throw std::invalid_argument("the tensors of one call must be on one CUDA device");
    if (row.dtype == DType::float64 && (row.fisher == DType::bfloat16 || row.fisher == DType::e5m3))
      throw std::invalid_argument("beside float64 parameters the Fisher must be float64");
  }
  return device;
}

// Runs one instance of an operation over the rows that belong to it; returns the number of blocks.
template <class Op, class Belongs>
std::int64_t launch_instance(const char* name, const Table& table, const Op& op, Run run,
                             double* partial, Belongs belongs) {
  constexpr std::size_t row_bytes = sizeof(Rows<typename Op::Row, 8>) / 8;
  constexpr int most = (kParameterBytes - sizeof(Op) - 64) / row_bytes;
  constexpr int few = std::min<int>(kFewRows, (kFewBytes - sizeof(Op) - 64) / row_bytes);
  const auto rows = std::count_if(table.rows.begin(), table.rows.end(), belongs);
  if (rows > few) return launch_over<Op, most>(name, table, op, run, partial, belongs);
  return rows > 0 ? launch_over<Op, few>(name, table, op, run, partial, belongs) : 0;
}

// Runs the operation, made of its settings, over all rows; returns the number of blocks. The device
// must be current.
template <template <class> class Operation, class Settings>
std::int64_t launch_all(const char* name, const Table& table, const Settings& settings, Run run,
                        double* partial) {
  std::int64_t blocks = 0;
  for_each_types<Operation>([&](DType dtype, DType fisher, auto types) {
    const auto belongs = [=](const Row& row) { return row.dtype == dtype && row.fisher == fisher; };
    const Operation<decltype(types)> op(settings);
    blocks += launch_instance(name, table, op, run, after(partial, blocks), belongs);
  });
  return blocks;
}

// run.memory[0] = factor * (the sum of what so many blocks left behind it).
inline void sum_blocks(Run run, std::int64_t blocks, double factor) {
  const Grid one{1, kSumThreads, static_cast<cudaStream_t>(run.stream)};
  launch_kernel("sum_partials", sum_partials, one, static_cast<const double*>(run.memory + 1),
                blocks, factor, run.memory);
}

template <template <class> class Operation, class Settings>
void for_rows(const char* name, const Table& table, const Settings& settings, Run run) {
  const DeviceGuard guard(device_of(table));
  launch_all<Operation>(name, table, settings, run, nullptr);
}

// The same, and run.memory[0] = factor * (the sum over all elements).
template <template <class> class Operation>
void sum_rows(const char* name, const Table& table, double coefficient, double factor, Run run) {
  const DeviceGuard guard(device_of(table));
  sum_blocks(run, launch_all<Operation>(name, table, coefficient, run, run.memory + 1), factor);
}

}  // namespace ewc_fast::cuda
