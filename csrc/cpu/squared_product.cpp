#include "squared_product.h"

#include <algorithm>
#include <memory>

#include "buffer.h"

namespace ewc_fast::cpu {
namespace {

// Products in one block. Panels of 12 rows, 36 KiB, stay in a core's own cache while those of 32
// columns pass by. At 256 and at 2048 the rate is 5 to 10 % lower on a Zen 4.
constexpr std::int64_t kDepth = 768;
// Products that are packed into all panels before the next ones.
constexpr std::int64_t kPackedAtOnce = 64;
// Below this many multiply-adds a second thread costs more than it brings.
constexpr double kOneThreadBelow = 2e6;
constexpr std::int64_t kMaxTile = 12 * 32;

std::int64_t rounded_up(std::int64_t value, std::int64_t step) {
  return (value + step - 1) / step * step;
}

// Some consecutive rows or columns, cut into panels; the last is cut to what is left, in steps.
struct Panels {
  std::int64_t first, total, size, step;

  std::int64_t count() const { return (total + size - 1) / size; }
  std::int64_t begin(std::int64_t panel) const { return panel * size; }
  std::int64_t valid(std::int64_t panel) const { return std::min(size, total - begin(panel)); }
  std::int64_t width(std::int64_t panel) const { return rounded_up(valid(panel), step); }
  std::int64_t padded() const { return rounded_up(total, step); }
  // The index-th of `parts` equal parts, in whole steps.
  Panels part(std::int64_t index, std::int64_t parts) const {
    const std::int64_t each = part_size(parts), begin = std::min(index * each, total);
    return {first + begin, std::min(each, total - begin), size, step};
  }
  std::int64_t part_size(std::int64_t parts) const {
    return rounded_up((total + parts - 1) / parts, step);
  }
};

// Groups of products whose factors are packed at one time: several whole ones, or a part of one.
struct Block {
  std::int64_t first_group, first_product;
  Groups groups;
  bool carry_in, carry_out;
};

std::vector<Block> make_blocks(std::int64_t count, std::int64_t depth, bool squared) {
  std::vector<Block> blocks;
  if (depth <= kDepth) {
    const std::int64_t most = kDepth / depth;
    for (std::int64_t group = 0; group < count; group += most)
      blocks.push_back({group, 0, {std::min(most, count - group), depth, squared}, false, false});
    return blocks;
  }
  const std::int64_t pieces = (depth + kDepth - 1) / kDepth, each = (depth + pieces - 1) / pieces;
  for (std::int64_t group = 0; group < count; ++group)
    for (std::int64_t begin = 0; begin < depth; begin += each) {
      const std::int64_t length = std::min(each, depth - begin);
      blocks.push_back({group,
                        begin,
                        {1, length, squared},
                        squared && begin > 0,
                        squared && begin + length < depth});
    }
  return blocks;
}

// A rectangle of outputs, which one thread forms alone.
template <class T>
class Product {
 public:
  Product(const Totals& totals, const Factor& grads, const Factor& inputs, std::int64_t samples,
          const ProductKernels& kernels, Panels rows, Panels columns)
      : totals_(totals),
        grads_(grads),
        inputs_(inputs),
        kernels_(kernels),
        one_position_(grads.positions.size() == 1),
        with_bias_(totals.bias != nullptr && columns.first == 0),
        rows_(rows),
        columns_(columns),
        // (g a)^2 = g^2 a^2: with one position the squares of all samples are one group.
        blocks_(one_position_ ? make_blocks(1, samples, false)
                              : make_blocks(samples, grads.positions.size(), true)),
        depth_(blocks_.front().groups.count * blocks_.front().groups.depth),
        packed_grads_(rows_.padded() * depth_),
        packed_inputs_(columns_.padded() * depth_),
        carried_(carries() ? tiles() * kernels.rows * kernels.columns[kIndex] : 0),
        carried_bias_(carries() ? rows_.padded() : 0) {}

  void run() const {
    for (const Block& block : blocks_) {
      const std::int64_t products = block.groups.count * block.groups.depth;
      for (std::int64_t first = 0; first < products; first += kPackedAtOnce) {
        pack(block, inputs_, columns_, first, packed_inputs_.data());
        pack(block, grads_, rows_, first, packed_grads_.data());
      }
      for (std::int64_t row_panel = 0; row_panel < rows_.count(); ++row_panel) {
        if (with_bias_) add_bias(block, row_panel);
        for (std::int64_t column_panel = 0; column_panel < columns_.count(); ++column_panel)
          add_tile(block, row_panel, column_panel);
      }
    }
  }

 private:
  static constexpr int kIndex = sizeof(T) == sizeof(double);

  std::int64_t tiles() const { return rows_.count() * columns_.count(); }
  bool carries() const { return blocks_.front().carry_out; }

  // Copies some consecutive products of a block into all panels, in one pass over the factor.
  void pack(const Block& block, const Factor& factor, const Panels& panels, std::int64_t first,
            T* packed) const {
    const std::int64_t in_block = block.groups.count * block.groups.depth;
    const std::int64_t products = std::min(kPackedAtOnce, in_block - first);
    std::int64_t offsets[kPackedAtOnce];
    std::int64_t group = block.first_group + first / block.groups.depth;
    std::int64_t product = first % block.groups.depth;
    for (std::int64_t i = 0; i < products; ++i) {
      const std::int64_t nth = block.first_product + product;
      offsets[i] = one_position_ ? nth * factor.sample_stride + factor.positions[0]
                                 : group * factor.sample_stride + factor.positions[nth];
      if (++product == block.groups.depth) product = 0, ++group;
    }
    for (std::int64_t panel = 0; panel < panels.count(); ++panel) {
      const std::int64_t width = panels.width(panel);
      T* out = packed + panels.begin(panel) * depth_ + first * width;
      kernels_.gather[static_cast<int>(factor.dtype)](
          out, width, width, factor.data, offsets, products,
          factor.columns.data() + panels.first + panels.begin(panel), panels.valid(panel));
      if (one_position_) kernels_.square_in_place[kIndex](out, products * width);
    }
  }

  void add_bias(const Block& block, std::int64_t panel) const {
    T sums[kMaxTile] = {};
    kernels_.bias_tile[kIndex](static_cast<int>(rows_.width(panel)),
                               packed_grads_.data() + rows_.begin(panel) * depth_, block.groups,
                               carried_bias_.data() + rows_.begin(panel), block.carry_in,
                               block.carry_out, sums);
    T* bias =
        static_cast<T*>(totals_.bias) + (rows_.first + rows_.begin(panel)) * totals_.bias_stride;
    for (std::int64_t row = 0; row < rows_.valid(panel); ++row)
      bias[row * totals_.bias_stride] += sums[row];
  }

  void add_tile(const Block& block, std::int64_t row_panel, std::int64_t column_panel) const {
    const std::int64_t rows = rows_.valid(row_panel), columns = columns_.valid(column_panel);
    const std::int64_t width = columns_.width(column_panel);
    T* total = static_cast<T*>(totals_.total) +
               (rows_.first + rows_.begin(row_panel)) * totals_.row_stride + columns_.first +
               columns_.begin(column_panel);
    T* carried = carries() ? carried_.data() + (row_panel * columns_.count() + column_panel) *
                                                   kernels_.rows * kernels_.columns[kIndex]
                           : nullptr;
    if (!block.carry_out)
      for (std::int64_t row = 0; row < rows; ++row)
        __builtin_prefetch(total + row * totals_.row_stride, 1);
    alignas(64) T sums[kMaxTile];
    std::fill(sums, sums + rows_.width(row_panel) * width, T(0));
    kernels_.tile[kIndex](static_cast<int>(rows_.width(row_panel)), static_cast<int>(width),
                          packed_grads_.data() + rows_.begin(row_panel) * depth_,
                          packed_inputs_.data() + columns_.begin(column_panel) * depth_,
                          block.groups, block.carry_in ? carried : nullptr,
                          block.carry_out ? carried : nullptr, sums);
    if (block.carry_out) return;
    kernels_.add_block[kIndex](total, totals_.row_stride, sums, width, rows, columns);
  }

  const Totals& totals_;
  const Factor &grads_, &inputs_;
  const ProductKernels& kernels_;
  const bool one_position_, with_bias_;
  const Panels rows_, columns_;
  const std::vector<Block> blocks_;
  const std::int64_t depth_;  // of a panel's memory
  const Buffer<T> packed_grads_, packed_inputs_, carried_, carried_bias_;
};

struct Grid {
  std::int64_t rows, columns;
};

// Threads share the outputs out in a grid and never wait for each other, which would cost more than
// packing some factors twice: they meet once, at the end.
Grid grid_for(std::int64_t threads, const Panels& rows, const Panels& columns) {
  constexpr double kLanes = 16, kPacking = 0.5;  // cycles a number
  Grid best{1, 1};
  double least = 0;
  for (std::int64_t down = 1; down <= threads; ++down) {
    const Grid grid{down, threads / down};
    const double height = rows.part_size(grid.rows), width = columns.part_size(grid.columns);
    const double cost = height * width / kLanes + kPacking * (height + width);
    if (down == 1 || cost < least) best = grid, least = cost;
  }
  return best;
}

template <class T>
void run_product(const Totals& totals, const Factor& grads, const Factor& inputs,
                 std::int64_t samples, const ProductKernels& kernels, std::int64_t threads) {
  constexpr int index = sizeof(T) == sizeof(double);
  const Panels rows{0, std::int64_t(grads.columns.size()), kernels.rows, kernels.row_step};
  const Panels columns{0, std::int64_t(inputs.columns.size()), kernels.columns[index],
                       kernels.column_step[index]};
  const Grid grid = grid_for(threads, rows, columns);
  std::vector<std::unique_ptr<Product<T>>> products;  // memory is had before anything is written
  for (std::int64_t row = 0; row < grid.rows; ++row)
    for (std::int64_t column = 0; column < grid.columns; ++column) {
      const Panels height = rows.part(row, grid.rows), width = columns.part(column, grid.columns);
      if (height.total > 0 && (width.total > 0 || column == 0))
        products.push_back(
            std::make_unique<Product<T>>(totals, grads, inputs, samples, kernels, height, width));
    }
  const std::int64_t count = products.size();
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (count > 1)
  for (std::int64_t i = 0; i < count; ++i) products[i]->run();
}

}  // namespace

void accumulate_squared_product(const Totals& totals, const Factor& grads, const Factor& inputs,
                                std::int64_t samples, Run run) {
  const std::size_t positions = grads.positions.size();
  if (samples == 0 || positions == 0 || grads.columns.empty()) return;
  if (inputs.columns.empty() && totals.bias == nullptr) return;
  const double products = double(samples) * double(positions) * double(grads.columns.size()) *
                          double(inputs.columns.size());
  const int threads = products < kOneThreadBelow ? 1 : std::max(run.threads, 1);
  const ProductKernels& kernels = run.kernels.product;
  if (grads.dtype == DType::float64)
    run_product<double>(totals, grads, inputs, samples, kernels, threads);
  else
    run_product<float>(totals, grads, inputs, samples, kernels, threads);
}

}  // namespace ewc_fast::cpu
