// What the sizes of a call's tensors decide: how many rows make a group, what is fetched before it
// is needed, and whether results are stored past the caches.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../statistics.hpp"
#include "kernel_table.hpp"
#include "memory.hpp"
#include "row_cursor.hpp"

namespace rmsnorm {
namespace cpu {
namespace detail {

class Traffic {
 public:
  // Of all rows of the call, so that it does not matter how they are split over threads. `tensors`
  // may be absent; `out` is one of them.
  Traffic(const RowLayout& layout, std::initializer_list<Role> tensors, Role out)
      : layout_(layout), out_(out) {
    const Operand& written = layout.operand(out);
    std::int64_t bytes = 0;
    bool in_place = false;
    for (const Role role : tensors) {
      const Operand& o = layout.operand(role);
      if (!o.present) continue;
      in_place = in_place || (role != out && o.data == written.data);
      bytes += size_in_bytes(o.dtype);
    }
    bytes *= layout.n() * layout.rows();
    far_ = bytes >= far_bytes();
    // What is written over an input is in the cache already.
    streams_ = !in_place && bytes >= streaming_bytes() && can_stream(layout, written);
  }

  // Whether kernels store past the caches, in rows up to `last_row`.
  bool streams(std::int64_t last_row) const {
    return streams_ && is_backed(RowCursor(layout_, last_row).row(out_));
  }

  // How kernels take rows of n elements of t, which they read twice in turn: see RowWalk.
  struct Walk {
    RowWalk order;
    int group;     // rows
    bool fetches;  // what is needed soon
  };
  Walk walk(std::int64_t n, DType t, bool streams) const {
    const int group = rows_of_group(n * size_in_bytes(t), t, 1);
    if (!fetches_well()) return {RowWalk::groups, group, true};
    // Rows that are no more than a set cost what their roots cost, of which rows together share
    // one.
    if (n <= lanes) return {RowWalk::groups_ahead, max_group, false};
    // Between rows whose products end before the CPU is through with what it looks ahead to, and
    // those that leave L1 before they are read again, a row by itself is taken fastest from L3 and
    // beyond; not so when y of 32 bits goes past the caches. On Zen 5, 256 x 4096 over groups of
    // rows with fetching, warm and cold: row by row f32 0.92 and 0.92, bf16 0.99 and 0.92; side by
    // side f32 1.04 and 0.89, bf16 with fetching 0.93 and 1.15, without 0.85 and 1.56.
    const std::int64_t row_bytes = n * size_in_bytes(t);
    const bool long_row = row_bytes > 2048, very_long = row_bytes >= 32 * 1024;
    const bool by_itself = long_row && !very_long && !(streams && !is_16_bit(t));
    if (far_ && by_itself) return {RowWalk::groups, 1, false};
    // 16-bit rows compute for longer than a line takes to come, and short rows of f32 do not.
    return {RowWalk::side_by_side, group, far_ && (is_16_bit(t) || long_row || streams)};
  }

  // Rows that are read twice in turn, of row_bytes each. From the nearest caches, larger groups
  // push their rows out of L1 before they are read again, and smaller ones share less of what a row
  // costs by itself. From farther away a group is no longer than what a CPU has under way at a
  // time, so that reading one overlaps with writing the one before. On an Intel Xeon, f32
  // 16384 x 128, cold, over a copy: groups of 2 KiB 1.02, 4 KiB 1.10, 16 KiB 1.20; in
  // L3 1.01, 1.01, 1.03. bf16: 1.06, 1.03, 1.18 and 1.43, 1.35, 1.42; so twice as much there.
  int rows_of_group(std::int64_t row_bytes, DType t, int least) const {
    const std::int64_t bytes = !far_ ? 16 * 1024 : is_16_bit(t) ? 4 * 1024 : 2 * 1024;
    const std::int64_t rows = row_bytes > 0 ? bytes / row_bytes : 1;
    return rows < least ? least : rows > max_group ? max_group : static_cast<int>(rows);
  }

  // The rows behind the next `rows` ones, of which `left` are left: to be fetched meanwhile. They
  // may lie outside of the tensor where a run ends; fetching does no harm there.
  NextRows next_rows(const RowCursor& cursor, std::int64_t rows, std::int64_t left, Role a,
                     Role b) const {
    NextRows next;
    if (!far_ || left <= rows) return next;
    int k = 0;
    for (const Role role : {a, b}) {
      if (role != role_none) {
        next.rows[k] = cursor.row(role, rows);
        next.strides[k] = cursor.stride(role);
      }
      ++k;
    }
    return next;
  }

 private:
  // Such stores go to 16-byte boundaries.
  static bool can_stream(const RowLayout& layout, const Operand& o) {
    bool aligned = o.unit && reinterpret_cast<std::uintptr_t>(o.data) % 16 == 0;
    for (int d = 0; d < layout.row_rank(); ++d) aligned = aligned && o.row_strides[d] % 16 == 0;
    return aligned;
  }

  const RowLayout& layout_;
  Role out_;
  bool far_;
  bool streams_;
};

}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm
