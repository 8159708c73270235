// What every launch needs: the device made current, the stream, a check of its status.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace ewc_fast::cuda {

struct Grid {
  int blocks, threads;
  cudaStream_t stream;
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
    changed_ = device != before_;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Launches and checks. Not by <<< >>>, which would copy large parameters once more. Compiled as
// plain C++ (tests/cuda_on_host) the threads of each block run as fibers instead.
template <class... Params, class... Args>
void launch_kernel(const char* name, void (*kernel)(Params...), Grid grid, const Args&... args) {
  static_assert((std::is_same_v<std::remove_cv_t<std::remove_reference_t<Params>>, Args> && ...),
                "the kernel reads each argument in its parameter's own type");
#if defined(__CUDACC__)
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid.blocks),
                         dim3(grid.threads), addresses, 0, grid.stream),
        name);
#else
  static_cast<void>(name);
  run_on_host(grid.blocks, grid.threads, [&] { kernel(args...); });
#endif
}

}  // namespace ewc_fast::cuda
