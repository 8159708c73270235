// Uninitialised memory that starts on a cache line.
#pragma once

#include <cstdint>
#include <memory>

namespace ewc_fast::cpu {

template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t n) : bytes_(new char[n * sizeof(T) + kLine]) {}
  T* data() const {
    const auto address = reinterpret_cast<std::uintptr_t>(bytes_.get());
    return reinterpret_cast<T*>(bytes_.get() + (kLine - address % kLine));
  }

 private:
  static constexpr std::size_t kLine = 64;
  std::unique_ptr<char[]> bytes_;
};

}  // namespace ewc_fast::cpu
