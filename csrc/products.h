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

}  // namespace ewc_fast
