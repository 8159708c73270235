#include "tensor_reader.h"

#include <algorithm>
#include <optional>
#include <string>

namespace py = pybind11;

namespace ewc_fast {
namespace {

std::optional<DType> dtype_of(dlpack::DataType type) {
  if (type.lanes != 1) return std::nullopt;
  if (type.code == dlpack::kFloat && type.bits == 32) return DType::float32;
  if (type.code == dlpack::kFloat && type.bits == 64) return DType::float64;
  if (type.code == dlpack::kFloat && type.bits == 16) return DType::float16;
  if (type.code == dlpack::kBfloat && type.bits == 16) return DType::bfloat16;
  if (type.code == dlpack::kUnsigned && type.bits == 8) return DType::e5m3;
  return std::nullopt;
}

std::optional<DType> dtype_of(const std::string& name) {
  if (name == "torch.float32") return DType::float32;
  if (name == "torch.float64") return DType::float64;
  if (name == "torch.float16") return DType::float16;
  if (name == "torch.bfloat16") return DType::bfloat16;
  if (name == "torch.uint8") return DType::e5m3;
  return std::nullopt;
}

bool on_host(dlpack::Device device) {
  return device.type == dlpack::kCPU || device.type == dlpack::kCUDAHost;
}
bool on_gpu(dlpack::Device device) {
  return device.type == dlpack::kCUDA || device.type == dlpack::kROCM ||
         device.type == dlpack::kOneAPI;
}
int device_of(dlpack::Device device) { return on_gpu(device) ? device.index : -1; }

// Whether a tensor is as the view in everything but its address. Views are only of devices and
// dtypes that the core knows.
bool same_form(const dlpack::Tensor& tensor, const TensorView& view) {
  const auto ndim = static_cast<std::size_t>(tensor.ndim);
  return (on_host(tensor.device) || on_gpu(tensor.device)) &&
         device_of(tensor.device) == view.device && ndim == view.ndim() &&
         dtype_of(tensor.dtype) == view.dtype &&
         std::equal(tensor.shape, tensor.shape + ndim, view.dims.begin()) &&
         std::equal(tensor.strides, tensor.strides + ndim, view.dims.begin() + ndim);
}

}  // namespace

TensorReader::TensorReader(py::object exchange) : keep_alive_(std::move(exchange)) {
  if (keep_alive_.is_none()) return;
  const auto* header = static_cast<const dlpack::ExchangeHeader*>(
      PyCapsule_GetPointer(keep_alive_.ptr(), dlpack::kCapsuleName));
  if (header == nullptr) throw py::error_already_set();
  if (header->major == 1) exchange_ = reinterpret_cast<const dlpack::Exchange*>(header);
}

bool TensorReader::read(PyObject* tensor, TensorView& view) const {
  return exchange_ != nullptr ? read_exchange(tensor, view) : read_attributes(tensor, view);
}

bool TensorReader::export_tensor(PyObject* tensor, dlpack::Tensor& found) const {
  if (exchange_->tensor_from_object(tensor, &found) == 0) return true;
  PyErr_Clear();  // no tensor, or one without storage: the caller says so in its own words
  return false;
}

bool TensorReader::read_address(PyObject* tensor, const TensorView& known, void*& data) const {
  if (exchange_ == nullptr) {
    TensorView now;
    if (!read_attributes(tensor, now) || !now.same_form(known)) return false;
    data = now.data;
    return true;
  }
  dlpack::Tensor found;
  if (!export_tensor(tensor, found) || !same_form(found, known)) return false;
  data = static_cast<char*>(found.data) + found.byte_offset;
  return true;
}

void* TensorReader::current_stream(int device) const {
  if (exchange_ == nullptr) {
    const py::object stream =
        py::module_::import("torch").attr("cuda").attr("current_stream")(device);
    return reinterpret_cast<void*>(py::cast<std::uintptr_t>(stream.attr("cuda_stream")));
  }
  void* stream = nullptr;
  if (exchange_->current_stream(dlpack::kCUDA, device, &stream) != 0) throw py::error_already_set();
  return stream;
}

bool TensorReader::read_exchange(PyObject* tensor, TensorView& view) const {
  dlpack::Tensor found;
  if (!export_tensor(tensor, found)) return false;
  const std::optional<DType> dtype = dtype_of(found.dtype);
  if (!dtype || !(on_host(found.device) || on_gpu(found.device))) return false;
  view.data = static_cast<char*>(found.data) + found.byte_offset;
  view.device = device_of(found.device);
  view.dtype = *dtype;
  view.dims.resize(2 * static_cast<std::size_t>(found.ndim));
  for (int i = 0; i < found.ndim; ++i) {
    view.dims[i] = found.shape[i];
    view.dims[found.ndim + i] = found.strides[i];
  }
  return true;
}

bool TensorReader::read_attributes(py::handle tensor, TensorView& view) const {
  try {
    const std::optional<DType> dtype = dtype_of(std::string(py::str(tensor.attr("dtype"))));
    const py::object device = tensor.attr("device");
    const std::string device_type = py::cast<std::string>(device.attr("type"));
    if (!dtype || (device_type != "cpu" && device_type != "cuda" && device_type != "xpu"))
      return false;
    view.dtype = *dtype;
    view.device = device_type == "cpu" ? -1 : py::cast<int>(device.attr("index"));
    view.data = reinterpret_cast<void*>(py::cast<std::uintptr_t>(tensor.attr("data_ptr")()));
    view.dims.clear();
    for (const py::handle size : py::tuple(tensor.attr("shape")))
      view.dims.push_back(py::cast<std::int64_t>(size));
    for (const py::handle stride : py::tuple(tensor.attr("stride")()))
      view.dims.push_back(py::cast<std::int64_t>(stride));
    return true;
  } catch (const py::error_already_set&) {
    return false;
  }
}

}  // namespace ewc_fast
