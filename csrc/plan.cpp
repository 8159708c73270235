#include "plan.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/operations.h"
#include "math.h"

namespace py = pybind11;

namespace ewc_fast {
namespace {

std::string element(const std::string& list, std::size_t index) {
  return list + "[" + std::to_string(index) + "]";
}

bool is_empty(const TensorView& view) {
  const auto sizes_end = view.dims.begin() + static_cast<std::ptrdiff_t>(view.ndim());
  return std::find(view.dims.begin(), sizes_end, 0) != sizes_end;
}

// True where the elements fill numel consecutive places, each once, in some order of dimensions.
bool fills_its_storage(const TensorView& view) {
  if (is_empty(view)) return true;
  std::vector<std::size_t> order(view.ndim());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return view.stride(a) < view.stride(b); });
  std::int64_t expected = 1;
  for (const std::size_t dim : order) {
    if (view.size(dim) == 1) continue;
    if (view.stride(dim) != expected) return false;
    expected *= view.size(dim);
  }
  return true;
}

bool same_layout(const TensorView& view, std::size_t first_dim, const TensorView& reference) {
  if (view.ndim() - first_dim != reference.ndim()) return false;
  const bool empty = is_empty(reference);
  for (std::size_t dim = 0; dim < reference.ndim(); ++dim) {
    if (view.size(first_dim + dim) != reference.size(dim)) return false;
    if (!empty && reference.size(dim) > 1 && view.stride(first_dim + dim) != reference.stride(dim))
      return false;
  }
  return true;
}

std::int64_t blocks_of(std::int64_t numel) { return (numel + kEncodedBlock - 1) / kEncodedBlock; }

bool are_scales(const TensorView& view, std::int64_t numel) {
  return view.ndim() == 1 && view.size(0) == blocks_of(numel) &&
         (view.size(0) <= 1 || view.stride(0) == 1);
}

bool fits(DType dtype, Role role, DType param) {
  if (role == Role::codes || dtype == DType::e5m3)
    return role == Role::codes && dtype == DType::e5m3 && param != DType::float64;
  if (role == Role::scales) return dtype == DType::float32;
  if (role == Role::parameter) return dtype == param;
  if (role == Role::residual) return dtype == DType::bfloat16;
  if (role == Role::count) return dtype == DType::float32;
  if (role == Role::moment && dtype == param) return true;
  if (param == DType::float64) return dtype == DType::float64;
  return dtype == DType::float32 || (role == Role::fisher && dtype == DType::bfloat16);
}

}  // namespace

void Plan::refuse(std::size_t operand, std::size_t row, const std::string& why) const {
  throw std::invalid_argument(element(specs_[operand].name, row) + ": " + why);
}

bool Plan::refresh(const py::args& lists) {
  if (!adopted_ || lists.size() != specs_.size()) return false;
  bool moved = false;
  for (std::size_t operand = 0; operand < specs_.size(); ++operand) {
    if (specs_[operand].pinned) continue;
    const py::object list = py::reinterpret_steal<py::object>(
        PySequence_Fast(lists[operand].ptr(), "operands must be lists of tensors"));
    if (!list) throw py::error_already_set();
    if (static_cast<std::size_t>(PySequence_Fast_GET_SIZE(list.ptr())) != rows_) return false;
    PyObject** tensors = PySequence_Fast_ITEMS(list.ptr());
    for (std::size_t row = 0; row < rows_; ++row) {
      TensorView& known = views_[operand * rows_ + row];
      void* data = known.data;
      if (!reader_.read_address(tensors[row], known, data)) {
        adopted_ = false;
        return false;
      }
      if (data == known.data) continue;
      moved = true;
      known.data = table_.rows[row].data[specs_[operand].slot] = data;
    }
  }
  if (moved) {
    ++moves_;
    adopted_ = false;
    check_written_apart();
    adopted_ = true;
  }
  return true;
}

bool Plan::accepts(const py::args& lists) {
  try {
    adopt(lists);
  } catch (const std::invalid_argument&) {
    return false;
  } catch (const py::error_already_set&) {
    return false;
  }
  adopted_ = std::all_of(table_.rows.begin(), table_.rows.end(),
                         [&](const Row& row) { return row.device == table_.rows[0].device; });
  return adopted_;
}

bool Plan::has_bfloat16_fisher() const {
  return std::any_of(table_.rows.begin(), table_.rows.end(),
                     [](const Row& row) { return row.fisher == DType::bfloat16; });
}

void Plan::adopt(const py::args& lists, const std::vector<std::int64_t>& ordinals) {
  adopted_ = false;
  if (lists.size() != specs_.size()) throw std::invalid_argument("wrong number of operand lists");
  rows_ = py::len(lists[0]);
  views_.assign(specs_.size() * rows_, {});
  for (std::size_t operand = 0; operand < specs_.size(); ++operand) {
    const py::sequence list = py::cast<py::sequence>(lists[operand]);
    if (list.size() != rows_) throw std::invalid_argument("operand lists differ in length");
    for (std::size_t row = 0; row < rows_; ++row) {
      const py::object tensor = list[row];
      if (!reader_.read(tensor.ptr(), views_[operand * rows_ + row]))
        refuse(operand, row, "not a dense floating tensor on a CPU or CUDA device");
    }
  }
  table_ = {};
  for (std::size_t row = 0; row < rows_; ++row) {
    table_.rows.push_back(make_row(row));
    table_.rows.back().ordinal =
        ordinals.empty() ? static_cast<std::int64_t>(row) : ordinals.at(row);
  }
  check_written_apart();
  table_.chunks = make_chunks(table_.rows, cpu::kChunk);
  for (const Row& row : table_.rows) table_.elements += row.numel;
  adopted_ = true;
}

void* Plan::current_stream() const {
  return table_.rows.empty() ? nullptr : reader_.current_stream(table_.rows.front().device);
}

Row Plan::make_row(std::size_t row) const {
  std::size_t reference = 0;  // an operand that has one value for every element
  while (specs_[reference].stacked) ++reference;
  const TensorView& layout = view(reference, row);
  if (!fills_its_storage(layout)) refuse(reference, row, "its strides leave gaps or overlap");

  Row made;
  made.device = layout.device;
  made.numel = 1;
  for (std::size_t dim = 0; dim < layout.ndim(); ++dim) made.numel *= layout.size(dim);
  for (std::size_t operand = 0; operand < specs_.size(); ++operand)
    if (specs_[operand].role == Role::parameter) made.dtype = view(operand, row).dtype;

  std::optional<DType> moments;
  for (std::size_t operand = 0; operand < specs_.size(); ++operand) {
    const TensorView& tensor = view(operand, row);
    const OperandSpec& spec = specs_[operand];
    if (tensor.device != made.device) refuse(operand, row, "it is on another device");
    if (!fits(tensor.dtype, spec.role, made.dtype))
      refuse(operand, row, "its dtype does not fit the parameters'");
    made.data[spec.slot] = tensor.data;
    if (spec.role == Role::count) {
      if (tensor.ndim() != 0) refuse(operand, row, "it is not a scalar");
      continue;  // one number: from each element to the next it takes no step
    }
    if (spec.role == Role::scales) {
      if (!are_scales(tensor, made.numel)) refuse(operand, row, "it has not one for each block");
      continue;
    }
    const std::size_t stacked = spec.stacked && tensor.ndim() == layout.ndim() + 1;
    if (!same_layout(tensor, stacked, layout)) refuse(operand, row, "its shape or strides differ");
    if (spec.role == Role::fisher || spec.role == Role::codes) made.fisher = tensor.dtype;
    if (spec.role == Role::moment) {
      if (moments && *moments != tensor.dtype)
        refuse(operand, row, "its dtype differs from the other moments'");
      moments = made.moments = tensor.dtype;
    }
    if (stacked) {
      made.samples = tensor.size(0);
      made.sample_stride = tensor.stride(0);
    }
    made.step[spec.slot] = item_size(tensor.dtype);
  }
  return made;
}

// Threads write different chunks at once, so no written tensor may share memory with any other.
void Plan::check_written_apart() const {
  struct Extent {
    const char *begin, *end;
    std::size_t operand, row;
  };
  std::vector<Extent> written, others;
  for (std::size_t operand = 0; operand < specs_.size(); ++operand) {
    auto& extents = specs_[operand].written ? written : others;
    for (std::size_t i = 0; i < rows_; ++i) {
      const Row& row = table_.rows[i];
      const int slot = specs_[operand].slot;
      const char* begin = row.at<char>(slot, 0);
      const Role role = specs_[operand].role;
      if (role == Role::count || role == Role::scales) {
        const std::int64_t numbers = role == Role::count ? 1 : blocks_of(row.numel);
        extents.push_back({begin, begin + numbers * item_size(DType::float32), operand, i});
        continue;
      }
      const std::int64_t samples = specs_[operand].stacked ? row.samples : 1;
      if (row.numel == 0 || samples == 0) continue;
      const std::int64_t elements = (samples - 1) * row.sample_stride + row.numel;
      extents.push_back({begin, begin + elements * row.step[slot], operand, i});
    }
  }
  const auto refuse_pair = [this](const Extent& one, const Extent& other) {
    refuse(one.operand, one.row,
           "expected memory of its own, since it is written, but it shares memory with " +
               element(specs_[other.operand].name, other.row) + "; pass a clone of one of them");
  };
  std::sort(written.begin(), written.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (std::size_t i = 1; i < written.size(); ++i)
    if (written[i].begin < written[i - 1].end) refuse_pair(written[i], written[i - 1]);
  // The written extents are apart and in order: the first one to end behind another tensor's begin
  // overlaps it, or none does.
  for (const Extent& other : others) {
    const auto found = std::upper_bound(
        written.begin(), written.end(), other.begin,
        [](const char* begin, const Extent& extent) { return begin < extent.end; });
    if (found != written.end() && found->begin < other.end) refuse_pair(*found, other);
  }
}

}  // namespace ewc_fast
