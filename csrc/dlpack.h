// The part of DLPack's C exchange interface (version 1.3, https://dmlc.github.io/dlpack) that the
// core reads tensors through. Its layout is fixed by that standard.
#pragma once

#include <cstdint>

namespace ewc_fast::dlpack {

enum DeviceType : std::int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3, kROCM = 10, kOneAPI = 14 };
enum TypeCode : std::uint8_t { kUnsigned = 1, kFloat = 2, kBfloat = 4 };

struct Device {
  std::int32_t type, index;
};
struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct ExchangeHeader {
  std::uint32_t major, minor;
  ExchangeHeader* previous;
};
struct Exchange {
  ExchangeHeader header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // borrows; 0 is success
  int (*current_stream)(DeviceType type, std::int32_t device, void** stream);
};

constexpr const char* kCapsuleName = "dlpack_exchange_api";

}  // namespace ewc_fast::dlpack
