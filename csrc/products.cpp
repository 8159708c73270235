#include "products.h"

#include <stdexcept>
#include <string>

#include "cpu/squared_convolution.h"

namespace py = pybind11;

namespace ewc_fast {
namespace {

using cpu::Factor;
using cpu::Totals;

void demand(bool holds, const std::string& name, const std::string& what) {
  if (!holds) throw std::invalid_argument(name + ": expected " + what);
}

TensorView view_of(const TensorReader& reader, py::handle tensor, const std::string& name,
                   std::size_t ndim) {
  TensorView view;
  demand(reader.read(tensor.ptr(), view) && view.device < 0 && view.dtype != DType::e5m3, name,
         "a floating tensor on the CPU");
  demand(view.ndim() == ndim, name, std::to_string(ndim) + " dimensions");
  return view;
}

std::vector<std::int64_t> arithmetic(std::int64_t n, std::int64_t step) {
  std::vector<std::int64_t> offsets(n);
  for (std::int64_t i = 0; i < n; ++i) offsets[i] = i * step;
  return offsets;
}

// The dtype of totals beside factors of this one.
DType total_dtype(DType factor) {
  return factor == DType::float64 ? DType::float64 : DType::float32;
}

void demand_dtypes(const TensorView& total, const TensorView& grads, const TensorView& inputs) {
  demand(total.dtype == total_dtype(grads.dtype), "grads", "a dtype that fits total's");
  demand(total.dtype == total_dtype(inputs.dtype), "inputs", "a dtype that fits total's");
}

void add_bias(Totals& totals, const TensorReader& reader, py::handle bias_total, DType dtype,
              std::int64_t rows) {
  if (bias_total.is_none()) return;
  const TensorView bias = view_of(reader, bias_total, "bias_total", 1);
  demand(bias.dtype == dtype && bias.size(0) == rows, "bias_total", "one number for each row");
  totals.bias = bias.data;
  totals.bias_stride = bias.stride(0);
}

}  // namespace

void squared_product(const TensorReader& reader, py::handle total_, py::handle grads_,
                     py::handle inputs_, py::handle bias_total, cpu::Run run) {
  const TensorView total = view_of(reader, total_, "total", 2);
  const TensorView grads = view_of(reader, grads_, "grads", 3);
  const TensorView inputs = view_of(reader, inputs_, "inputs", 3);
  demand_dtypes(total, grads, inputs);
  const std::int64_t samples = grads.size(0), positions = grads.size(1);
  demand(total.size(0) == grads.size(2), "grads", "total's rows in its last dimension");
  demand(inputs.size(0) == samples && inputs.size(1) == positions, "inputs", "grads' positions");
  demand(total.size(1) == inputs.size(2), "inputs", "total's columns in its last dimension");
  demand(total.size(1) <= 1 || total.stride(1) == 1, "total", "contiguous rows");
  Totals totals{total.data, total.stride(0), nullptr, 0};
  add_bias(totals, reader, bias_total, total.dtype, total.size(0));
  const auto factor = [](const TensorView& view) {
    return Factor{view.data, view.dtype, view.stride(0), arithmetic(view.size(1), view.stride(1)),
                  arithmetic(view.size(2), view.stride(2))};
  };
  const Factor g = factor(grads), a = factor(inputs);
  const py::gil_scoped_release unlocked;
  cpu::accumulate_squared_product(totals, g, a, samples, run);
}

void squared_convolution(const TensorReader& reader, py::handle total_, py::handle grads_,
                         py::handle inputs_, py::handle bias_total, const Geometry& geometry,
                         cpu::Run run) {
  const TensorView total = view_of(reader, total_, "total", 5);
  const TensorView grads = view_of(reader, grads_, "grads", 5);
  const TensorView inputs = view_of(reader, inputs_, "inputs", 5);
  demand_dtypes(total, grads, inputs);
  demand(inputs.size(0) == grads.size(0), "inputs", "grads' samples");
  demand(total.size(0) == grads.size(1), "grads", "total's rows");
  if (geometry.depthwise)
    demand(total.size(1) == 1 && inputs.size(1) == grads.size(1), "inputs", "grads' channels");
  else
    demand(total.size(1) == inputs.size(1), "inputs", "total's channels");
  std::int64_t step = 1;
  for (std::size_t dim = 5; dim-- > 0; step *= total.size(dim))
    demand(total.size(dim) <= 1 || total.stride(dim) == step, "total", "a contiguous tensor");
  const auto image = [](const TensorView& view) {
    return cpu::Image{view.data,
                      view.dtype,
                      view.stride(0),
                      view.stride(1),
                      view.size(1),
                      {view.size(2), view.size(3), view.size(4)},
                      {view.stride(2), view.stride(3), view.stride(4)}};
  };
  const cpu::Three kernel{total.size(2), total.size(3), total.size(4)};
  const cpu::Convolution convolution{grads.size(0),   image(grads),     image(inputs),    kernel,
                                     geometry.stride, geometry.padding, geometry.dilation};
  for (int d = 0; d < 3; ++d) {
    demand(geometry.stride[d] > 0 && geometry.padding[d] >= 0 && geometry.dilation[d] > 0,
           "stride, padding, dilation", "numbers of a convolution");
    demand(kernel[d] > 0, "total", "a kernel of at least one element");
    const std::int64_t last = (convolution.grads.size[d] - 1) * geometry.stride[d] +
                              geometry.dilation[d] * (kernel[d] - 1);
    demand(convolution.grads.size[d] == 0 ||
               last < convolution.inputs.size[d] + 2 * geometry.padding[d],
           "grads", "positions inside the padded inputs");
  }
  Totals totals{total.data, total.size(1) * kernel[0] * kernel[1] * kernel[2], nullptr, 0};
  add_bias(totals, reader, bias_total, total.dtype, total.size(0));
  const py::gil_scoped_release unlocked;
  if (geometry.depthwise)
    cpu::accumulate_squared_depthwise(totals, convolution, run);
  else
    cpu::accumulate_squared_convolution(totals, convolution, run);
}

}  // namespace ewc_fast
