// A plan remembers the operands of one operation between calls: it notices whether anything but an
// address has changed, takes over new addresses, and holds the table the kernels walk.
#pragma once

#include <string>

#include "tensor_reader.h"

namespace ewc_fast {

// What the core demands of an operand's dtype: the parameters' own; float for the state (double
// beside double parameters); the state's or, beside other parameters than double, bfloat16 for the
// Fisher; bfloat16 for the residual; the parameters' own or float for an optimizer's moments, one
// dtype for all of a row; float for a count, which is a single number whatever the row's shape. A
// Fisher in 8 bits is two operands, beside other parameters than double: codes like the parameters,
// and a vector of scales, one float for each block of codes.
enum class Role : std::uint8_t { parameter, state, fisher, residual, moment, count, codes, scales };

struct OperandSpec {
  std::string name;  // for messages
  Role role;
  bool written;
  bool stacked;  // may carry per-sample gradients in a leading dimension
  bool pinned;   // its owner promises not to replace its tensors, so they are read only once
  int slot;      // where it stands in a Row, which may have places for operands not given
};

class Plan {
 public:
  Plan(const TensorReader& reader, std::vector<OperandSpec> specs)
      : reader_(reader), specs_(std::move(specs)) {}

  // True where the lists hold tensors of the same form as those adopted; addresses are taken over.
  bool refresh(const pybind11::args& lists);
  // Adopts the lists where they are all in order and on one device. False otherwise: whoever asks
  // then finds out why and says it in the user's words.
  bool accepts(const pybind11::args& lists);
  // Builds the table; throws where kernels could touch memory that the operands do not own.
  // `ordinals` are the rows' places in the call where the lists are only a part of it.
  void adopt(const pybind11::args& lists, const std::vector<std::int64_t>& ordinals = {});

  // Whether a Fisher of the adopted rows is bfloat16, which operations that write it round by
  // chance.
  bool has_bfloat16_fisher() const;
  const Table& table() const { return table_; }
  // How often `refresh` has found new addresses: whoever keeps a copy sees when it is stale.
  std::int64_t moves() const { return moves_; }
  const std::vector<OperandSpec>& specs() const { return specs_; }
  // PyTorch's current stream on the CUDA device that the rows are on.
  void* current_stream() const;

 private:
  const TensorView& view(std::size_t operand, std::size_t row) const {
    return views_[operand * rows_ + row];
  }
  Row make_row(std::size_t row) const;
  [[noreturn]] void refuse(std::size_t operand, std::size_t row, const std::string& why) const;
  void check_written_apart() const;

  const TensorReader& reader_;
  std::vector<OperandSpec> specs_;
  std::vector<TensorView> views_;  // operand-major
  std::size_t rows_ = 0;
  bool adopted_ = false;
  std::int64_t moves_ = 0;
  Table table_;
};

}  // namespace ewc_fast
