#include "operands.h"

#include <algorithm>

namespace ewc_fast {

std::vector<Chunk> make_chunks(const std::vector<Row>& rows, std::int64_t max_length) {
  std::vector<Chunk> chunks;
  std::int64_t before = 0;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    for (std::int64_t offset = 0; offset < rows[row].numel; offset += max_length) {
      const std::int64_t length = std::min(max_length, rows[row].numel - offset);
      chunks.push_back({static_cast<std::int64_t>(row), offset, length, before});
      before += length;
    }
  }
  return chunks;
}

}  // namespace ewc_fast
