// Stands in for CUDA's header when the kernels are compiled as plain C++: every thread of a block
// is a fiber, blocks run one after another. Checks indexing, tails and reductions, not races.
//
// Every fiber runs to its next synchronisation before any goes on, so one round over all fibers is
// a barrier. That holds as long as all threads reach the same synchronisations, which
// run_on_host checks.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__ &  // large parameters: not on every fiber's small stack
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

namespace host {

constexpr std::size_t kStackBytes = 64 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  int synchronisations = 0;
  bool done = false;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::vector<double> exchanged;
inline int launches = 0;
inline bool reverse_order = false;  // of the threads within a block: results must not depend on it

inline Fiber& current() { return fibers[threadIdx.x]; }
inline void enter() {
  body();
  current().done = true;
}
inline void synchronise() {
  ++current().synchronisations;
  swapcontext(&current().context, &scheduler);
}

inline void run_block(int threads) {
  fibers.resize(threads);
  exchanged.assign(threads, 0);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.synchronisations = 0;
    fiber.done = false;
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (int turn = 0; turn < threads; ++turn) {
      threadIdx.x = reverse_order ? threads - 1 - turn : turn;
      if (current().done) continue;
      swapcontext(&scheduler, &current().context);
      running = true;
    }
  }
  for (const Fiber& fiber : fibers)
    if (fiber.synchronisations != fibers.front().synchronisations)
      throw std::logic_error("threads of a block reached different synchronisations");
}

}  // namespace host

template <class Body>
void run_on_host(int blocks, int threads, Body body) {
  host::body = body;
  ++host::launches;
  for (int block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    host::run_block(threads);
  }
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline void __syncthreads() { host::synchronise(); }

inline double __shfl_down_sync(unsigned, double value, int offset) {
  const unsigned thread = threadIdx.x, source = thread + offset;
  host::exchanged[thread] = value;
  host::synchronise();
  const double received = source / 32 == thread / 32 ? host::exchanged[source] : value;
  host::synchronise();
  return received;
}
