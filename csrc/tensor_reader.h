// Reads address, dtype, device, shape and strides off a PyTorch tensor, without PyTorch's headers:
// through DLPack's exchange interface where the installed PyTorch has it (50 ns a tensor), else
// through the tensor's Python attributes (300 ns).
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "dlpack.h"
#include "operands.h"

namespace ewc_fast {

// What a plan remembers of one tensor. `dims` holds the shape, then the strides.
struct TensorView {
  void* data = nullptr;
  int device = -1;  // CUDA device index; -1 is the CPU
  DType dtype = DType::float32;
  std::vector<std::int64_t> dims;

  std::size_t ndim() const { return dims.size() / 2; }
  std::int64_t size(std::size_t dim) const { return dims[dim]; }
  std::int64_t stride(std::size_t dim) const { return dims[ndim() + dim]; }
  // Everything but the address.
  bool same_form(const TensorView& other) const {
    return device == other.device && dtype == other.dtype && dims == other.dims;
  }
};

class TensorReader {
 public:
  // `exchange` is torch.Tensor.__dlpack_c_exchange_api__, or None.
  explicit TensorReader(pybind11::object exchange);

  // False where the object is no dense CPU or CUDA tensor of a dtype that the core knows: floating,
  // or uint8, which it takes for the codes of a Fisher.
  bool read(PyObject* tensor, TensorView& view) const;
  // Reads the address of a tensor that should be as `known` in all else; false where it is not.
  bool read_address(PyObject* tensor, const TensorView& known, void*& data) const;
  // PyTorch's current stream on a CUDA device.
  void* current_stream(int device) const;
  bool uses_exchange() const { return exchange_ != nullptr; }

 private:
  bool read_exchange(PyObject* tensor, TensorView& view) const;
  bool read_attributes(pybind11::handle tensor, TensorView& view) const;
  bool export_tensor(PyObject* tensor, dlpack::Tensor& found) const;

  pybind11::object keep_alive_;
  const dlpack::Exchange* exchange_ = nullptr;
};

}  // namespace ewc_fast
