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
    // Small calls, whose time this would be a part of, are near whatever their dtypes are.
    const std::int64_t elements = layout.n() * layout.rows();
    const auto most_bytes = static_cast<std::int64_t>(tensors.size() * sizeof(double));
    if (elements < far_bytes() / most_bytes) return;
    const Operand& written = layout.operand(out);
    std::int64_t bytes = 0;
    bool in_place = false;
    for (const Role role : tensors) {
      const Operand& o = layout.operand(role);
      if (!o.present) continue;
      in_place = in_place || (role != out && o.data == written.data);
      bytes += size_in_bytes(o.dtype);
    }
    bytes *= elements;
    far_ = bytes >= far_bytes();
    // What is written over an input is in the cache already.
    streams_ = !in_place && bytes >= streaming_bytes() && can_stream(layout, written);
  }

  // Whether the tensors lie in the third level or beyond.
  bool is_far() const { return far_; }

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

  // The walk of forward, where `adds` tells of a residual. The choices for CPUs that fetch well are
  // those of a Zen 5 with AVX-512. A pair of figures is the time warm and the time cold, over those
  // of groups of rows with fetching.
  Walk walk(std::int64_t n, DType t, bool adds, bool streams) const {
    const std::int64_t row_bytes = n * size_in_bytes(t);
    if (!fetches_well()) return {RowWalk::groups, rows_of_group(row_bytes, t, 1), true};
    if (is_short(n, row_bytes, t, adds, streams)) return {RowWalk::short_rows, max_group, false};
    const int group = rows_of_group(row_bytes, t, 1);
    // The time of 16-bit rows that are a little longer depends on where x, y and the instructions
    // lie, and least so in groups with fetching. Those took, cold, in good and in bad places, 0.99
    // and 0.90 of the time of side by side for bf16 16384 x 256, 1.01 and 0.77 for f16; warm they
    // took 1.00 and 1.07.
    if (far_ && !streams && !adds && is_16_bit(t) && n <= block) {
      return {RowWalk::groups, group, true};
    }
    // What 16 bits take to add and to round hides little else: bf16 4096 x 4096, which goes past
    // the caches, took (0.96, 0.98) in groups with fetching and (1.14, 1.18) side by side.
    if (adds && is_16_bit(t)) return {RowWalk::groups, group, streams};
    const bool leaves_l1 = row_bytes >= 32 * 1024, middling = is_long(row_bytes) && !leaves_l1;
    // From L3 and beyond the plainest loops run ahead the furthest, and f32 waits for little else:
    // 4096 x 128 took (0.71, 0.54) one by one and (0.71, 0.67) side by side, 256 x 4096 took
    // (0.87, 0.91) and (1.03, 0.87). It is not so where y goes past the caches: 4096 x 4096 took
    // (1.12, 1.12) one by one and (0.98, 0.94) side by side.
    if (far_ && !streams && !leaves_l1 && !adds && !is_16_bit(t)) {
      return {RowWalk::one_by_one, group, false};
    }
    // Rows with a residual go one by one for the same reason, f32 256 x 4096 (1.03, 1.04) against
    // (1.16, 0.98), and so do rows of 16 bits that last longer than the CPU looks ahead, bf16
    // 256 x 4096 (0.99, 0.92) against (0.92, 1.15).
    if (far_ && middling && !(streams && !is_16_bit(t))) return {RowWalk::groups, 1, false};
    // 16-bit rows last longer than their lines take to come: bf16 2048 x 512 took (0.82, 0.67) with
    // fetching and (0.77, 1.36) without.
    const bool gains = streams || !adds;
    return {RowWalk::side_by_side, group, far_ && gains};
  }

  // The walk of backward, which reads row_bytes in each row. A Zen 5 took (0.77, 0.92) of the time
  // of groups of 2 KiB with fetching for f32 4096 x 128 in groups of 8 KiB without, and
  // (1.03, 1.19) for 256 x 4096 without; for bf16 that was (0.91, 1.00) and (0.90, 1.61).
  Walk gradient_walk(std::int64_t row_bytes, DType t, int least) const {
    if (!fetches_well() || is_long(row_bytes / 2)) {
      return {RowWalk::groups, rows_of_group(row_bytes, t, least), true};
    }
    return {RowWalk::groups, rows_of_group(row_bytes / 4, t, least), false};
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
  // Whether rows cost what their roots cost, and are so few bytes that the lines of x and of y for
  // max_group of them are under way at a time: then f32 16384 x 64 took (0.53, 0.79) as short rows
  // and (0.72, 0.83) one by one, bf16 4096 x 128 took (0.63, 0.64) and (0.72, 0.75) side by side.
  // f32 16384 x 128 took (0.57, 0.99) and (0.65, 0.97) one by one where pages are large; where they
  // are small and the places of x, y and the instructions are bad for it, 1.1 to 1.3 times what it
  // did one by one, cold. With a residual past the caches, f32 65536 x 64 took 1.24 and 1.18 times
  // what it did side by side. What is near has no lines to wait for; doubles share no root.
  bool is_short(std::int64_t n, std::int64_t row_bytes, DType t, bool adds, bool streams) const {
    if (n > block) return false;
    if (!far_) return row_bytes <= (t == DType::f64 ? 256 : adds ? 512 : 1024);
    if (adds && streams && !is_16_bit(t)) return row_bytes <= 128;
    return row_bytes <= (adds || is_16_bit(t) ? 256 : streams ? 384 : 512);
  }
  static bool is_long(std::int64_t row_bytes) { return row_bytes > 2048; }

  // Such stores go to 16-byte boundaries.
  static bool can_stream(const RowLayout& layout, const Operand& o) {
    bool aligned = o.unit && reinterpret_cast<std::uintptr_t>(o.data) % 16 == 0;
    for (int d = 0; d < layout.row_rank(); ++d) aligned = aligned && o.row_strides[d] % 16 == 0;
    return aligned;
  }

  const RowLayout& layout_;
  Role out_;
  bool far_ = false;
  bool streams_ = false;
};

}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm
