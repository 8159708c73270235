// One chunk loop for every operation over lists of tensors: rows go to the kernel by value, as many
// as fit into its parameters, and each block works on one chunk of one row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../operands.h"

namespace ewc_fast::cuda {

constexpr int kThreads = 256;
constexpr std::int64_t kChunk = 16384;  // elements of one block; keeps 16-byte alignment
constexpr int kRowsPerLaunch = 36;      // what fits into the 4 KB of kernel parameters
constexpr int kBlocksPerLaunch = 320;

template <int Operands>
struct Batch {
  void* data[Operands][kRowsPerLaunch];
  std::int64_t numel[kRowsPerLaunch];
  std::int32_t chunk_of_block[kBlocksPerLaunch];
  std::uint8_t row_of_block[kBlocksPerLaunch];
  // Decided on the host: integer arithmetic on a pointer in the kernel would make the compiler
  // lose its address space and fall back to generic loads.
  bool aligned[kRowsPerLaunch];
  std::int64_t first_block;  // blocks in the launches before this one
};

// Neighbouring elements moved by 16-byte accesses.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};
template <class T>
constexpr int kPack = 16 / sizeof(T);

template <class T>
struct Types {
  using compute = float;
  using state = float;
};
template <>
struct Types<double> {
  using compute = double;
  using state = double;
};

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes `device` current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// Launches on `stream` and checks. Compiled as plain C++ (tests/cuda_on_host) the threads of each
// block run as fibers instead.
template <class... Params, class... Args>
void launch_kernel(const char* name, void (*kernel)(Params...), int blocks, cudaStream_t stream,
                   const Args&... args) {
#if defined(__CUDACC__)
  kernel<<<blocks, kThreads, 0, stream>>>(args...);
#else
  run_on_host(blocks, kThreads, [&] { kernel(args...); });
#endif
  check(cudaGetLastError(), name);
}

inline std::int64_t chunks_of(const Row& row) { return (row.numel + kChunk - 1) / kChunk; }

template <int Operands>
bool aligned(const Row& row) {
  return std::all_of(row.data.begin(), row.data.begin() + Operands, [](const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
  });
}

// Calls launch(batch, blocks) until every chunk of every row of `dtype` has had its block.
// Returns the number of blocks in all, `first_block` included.
template <int Operands, class Launch>
std::int64_t launch_batches(const Table& table, DType dtype, std::int64_t first_block,
                            Launch launch) {
  Batch<Operands> batch;
  batch.first_block = first_block;
  int rows = 0, blocks = 0;
  const auto flush = [&] {
    if (blocks > 0) launch(batch, blocks);
    batch.first_block += blocks;
    rows = blocks = 0;
  };
  const auto place = [&](const Row& row) {
    for (int operand = 0; operand < Operands; ++operand)
      batch.data[operand][rows] = row.data[operand];
    batch.numel[rows] = row.numel;
    batch.aligned[rows] = aligned<Operands>(row);
    return rows++;
  };
  for (const Row& row : table.rows) {
    if (row.dtype != dtype || row.numel == 0) continue;
    if (rows == kRowsPerLaunch || blocks == kBlocksPerLaunch) flush();
    int placed = place(row);
    for (std::int64_t chunk = 0; chunk < chunks_of(row); ++chunk) {
      if (blocks == kBlocksPerLaunch) {
        flush();
        placed = place(row);
      }
      batch.row_of_block[blocks] = static_cast<std::uint8_t>(placed);
      batch.chunk_of_block[blocks++] = static_cast<std::int32_t>(chunk);
    }
  }
  flush();
  return batch.first_block;
}

// Calls body(index of the pack or element, whether a whole pack) over this block's chunk.
template <int PackSize, class Vector, class Scalar>
__device__ void for_chunk(std::int64_t begin, std::int64_t end, bool use_packs, Vector vector,
                          Scalar scalar) {
  const std::int64_t packs_end = use_packs ? begin + (end - begin) / PackSize * PackSize : begin;
  for (std::int64_t i = begin + threadIdx.x * PackSize; i < packs_end; i += kThreads * PackSize)
    vector(i);
  for (std::int64_t i = packs_end + threadIdx.x; i < end; i += kThreads) scalar(i);
}

}  // namespace ewc_fast::cuda
