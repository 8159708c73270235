// Rows as the tests give them, turned into the core's.
#pragma once

#include <algorithm>

#include "../../csrc/operands.h"

// As HostRow in tests/host_kernels.py lays it out.
struct GivenRow {
  void* data[ewc_fast::kMaxOperands];
  std::int64_t step[ewc_fast::kMaxOperands];
  std::int64_t numel, samples, sample_stride, ordinal;
  std::int32_t dtype, fisher, moments;
};

inline ewc_fast::Row as_row(const GivenRow& given) {
  ewc_fast::Row row;
  std::copy_n(given.data, ewc_fast::kMaxOperands, row.data.begin());
  std::copy_n(given.step, ewc_fast::kMaxOperands, row.step.begin());
  row.numel = given.numel;
  row.samples = given.samples;
  row.sample_stride = given.sample_stride;
  row.ordinal = given.ordinal;
  row.dtype = static_cast<ewc_fast::DType>(given.dtype);
  row.fisher = static_cast<ewc_fast::DType>(given.fisher);
  row.moments = static_cast<ewc_fast::DType>(given.moments);
  row.device = 0;
  return row;
}

// `elements` is the size of the table that the rows are said to be part of: it sets the length of
// chunks.
inline ewc_fast::Table as_table(const GivenRow* rows, int count, std::int64_t elements) {
  ewc_fast::Table table;
  for (int i = 0; i < count; ++i) table.rows.push_back(as_row(rows[i]));
  table.elements = elements;
  return table;
}
