// How the rows of a backward pass are cut into blocks, and where the sums of dy * xhat and of dy
// over each block lie in the workspace. dweight and dbias are the sums of the blocks' sums.
#pragma once

#include <cstdint>

#include "host_device.hpp"
#include "row_layout.hpp"

namespace rmsnorm {
namespace detail {

// The rows in the order that backward takes them: dimensions over which dweight or dbias vary come
// first. The rows that share their gradients, a group, thus follow each other.
inline RowLayout layout_of(const BackwardParams& p) {
  RowLayout layout(p.x, p.axis);
  layout.add(role_x, p.x);
  layout.add(role_residual, p.residual);
  layout.add(role_weight, p.weight);
  layout.add(role_dy, p.dy);
  layout.add(role_d_residual, p.d_residual);
  layout.add(role_dx, p.dx);
  layout.add(role_dweight, p.dweight);
  layout.add(role_dbias, p.dbias);
  layout.add_per_row(role_rstd, p.rstd);
  layout.add_per_row(role_mean_square, p.mean_square);
  layout.add_per_row(role_d_mean_square, p.d_mean_square);
  layout.put_first({role_dweight, role_dbias});
  layout.merge_rows();
  return layout;
}

struct RowRange {
  std::int64_t begin, end;
};

// No block spans two groups. Rows that have nothing to be computed, those without elements and
// without a gradient of their mean square, are in no block: they may be any number.
struct GradientBlocks {
  int group_rank;  // leading row dimensions that tell the groups apart
  std::int64_t groups;
  std::int64_t rows_per_group;
  std::int64_t rows_per_block;
  std::int64_t blocks_per_group;

  RMSNORM_HOST_DEVICE std::int64_t count() const { return groups * blocks_per_group; }

  RMSNORM_HOST_DEVICE RowRange rows_of(std::int64_t block) const {
    const std::int64_t group = block / blocks_per_group;
    const std::int64_t first = (block - group * blocks_per_group) * rows_per_block;
    const std::int64_t last = first + rows_per_block;
    return {group * rows_per_group + first,
            group * rows_per_group + (last < rows_per_group ? last : rows_per_group)};
  }
};

// rows_per_block(rows) is asked for the size of a block where `rows` > 0 rows share their
// gradients.
template <class RowsPerBlock>
inline GradientBlocks gradient_blocks(const RowLayout& layout, RowsPerBlock rows_per_block) {
  GradientBlocks b = {layout.leading({role_dweight, role_dbias}), 1, 1, 1, 0};
  for (int d = 0; d < layout.row_rank(); ++d) {
    std::int64_t& count = d < b.group_rank ? b.groups : b.rows_per_group;
    count = saturated_product(count, layout.row_size(d));
  }
  if (b.groups == 0 || b.rows_per_group == 0) return b;
  if (layout.n() == 0 && !layout.operand(role_d_mean_square).present) return b;
  b.rows_per_block = rows_per_block(b.rows_per_group);
  b.blocks_per_group = quotient_rounded_up(b.rows_per_group, b.rows_per_block);
  return b;
}

// The workspace: for each block n sums of dy * xhat, then n sums of dy, each present only where
// its output is, in the compute type, padded to whole vectors.
struct GradientSums {
  std::int64_t stride;  // bytes from one row of sums to the next
  int rows;             // of a block: of dweight, of dbias or of both

  GradientSums(const BackwardParams& p, std::int64_t n)
      : stride(saturated_product(quotient_rounded_up(n, 32), 32 * size_in_bytes(compute_type(p)))),
        rows((p.dweight.present() ? 1 : 0) + (p.dbias.present() ? 1 : 0)) {}

  // int64_max in place of more, which nobody has: weights may vary over rows that are repeated.
  std::int64_t bytes(std::int64_t blocks) const {
    return saturated_product(saturated_product(blocks, rows), stride);
  }
  // Of dbias where `second`.
  char* row(void* workspace, std::int64_t block, bool second) const {
    return static_cast<char*>(workspace) + (block * rows + (second ? 1 : 0)) * stride;
  }
};

}  // namespace detail
}  // namespace rmsnorm
