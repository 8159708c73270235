// Squared products of PyTorch tensors: reads them, checks that nothing outside them is touched, and
// runs the kernels.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/operations.h"
#include "tensor_reader.h"

namespace ewc_fast {

// total (O, I), grads (N, T, O), inputs (N, T, I), bias_total (O) or None.
void squared_product(const TensorReader& reader, pybind11::handle total, pybind11::handle grads,
                     pybind11::handle inputs, pybind11::handle bias_total, cpu::Run run);

// One group of a convolution in three dimensions: total (O, I, *kernel), grads (N, O, *positions),
// inputs (N, I, *size). Where depthwise, O is I and total (O, 1, *kernel).
struct Geometry {
  std::array<std::int64_t, 3> stride, padding, dilation;
  bool depthwise;
};
void squared_convolution(const TensorReader& reader, pybind11::handle total, pybind11::handle grads,
                         pybind11::handle inputs, pybind11::handle bias_total,
                         const Geometry& geometry, cpu::Run run);

}  // namespace ewc_fast
