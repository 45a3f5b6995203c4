// Rows of any stride and dtype as blocks of the compute type in scratch memory, and back.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernel_table.hpp"
#include "row_cursor.hpp"

namespace rmsnorm {
namespace cpu {
namespace detail {

// Calls visit(begin, count) for the blocks of a row.
template <class Visit>
inline void for_each_block(std::int64_t n, Visit visit) {
  for (std::int64_t i = 0; i < n; i += block) visit(i, n - i < block ? n - i : block);
}

// Copies elements [begin, begin + count) of the row at `row` to packed memory, or back.
template <class T>
inline void gather(const RowLayout& layout, const Operand& o, const char* row, std::int64_t begin,
                   std::int64_t count, void* packed) {
  char* to = static_cast<char*>(packed);
  layout.for_each_element(o, begin, count, [&](std::int64_t offset) {
    std::memcpy(to, row + offset, sizeof(T));
    to += sizeof(T);
  });
}
template <class T>
inline void scatter(const RowLayout& layout, const Operand& o, char* row, std::int64_t begin,
                    std::int64_t count, const void* packed) {
  const char* from = static_cast<const char*>(packed);
  layout.for_each_element(o, begin, count, [&](std::int64_t offset) {
    std::memcpy(row + offset, from, sizeof(T));
    from += sizeof(T);
  });
}

// The row of x, or x + residual, in blocks of the compute type.
template <class C>
class RowSource {
 public:
  RowSource(const RowLayout& layout, const KernelTable& table)
      : layout_(layout), ops_(blocks<C>(table)) {}

  // Rounding of x + residual, where it is to be rounded.
  void round_sum_to(DType t) {
    rounds_sum_ = true;
    sum_dtype_ = t;
  }

  // From now on reads row i of the cursor's run: tensor `a`, plus `b` unless that is role_none.
  void set(const RowCursor& cursor, std::int64_t i, Role a, Role b) {
    a_ = a;
    b_ = b;
    row_a_ = cursor.row(a, i);
    row_b_ = b == role_none ? nullptr : cursor.row(b, i);
  }

  void read(std::int64_t begin, std::int64_t count, C* to) {
    widen(a_, row_a_, begin, count, to);
    if (row_b_ == nullptr) return;
    widen(b_, row_b_, begin, count, addend_);
    ops_.add(to, addend_, count);
    if (rounds_sum_) round(to, count, sum_dtype_);
  }

  void widen(Role role, const char* row, std::int64_t begin, std::int64_t count, C* to) {
    const Operand& o = layout_.operand(role);
    const void* from = row + begin * size_in_bytes(o.dtype);
    if (!o.unit) {
      const auto gather = o.dtype == DType::f64   ? detail::gather<std::uint64_t>
                          : o.dtype == DType::f32 ? detail::gather<std::uint32_t>
                                                  : detail::gather<std::uint16_t>;
      gather(layout_, o, row, begin, count, packed_);
      from = packed_;
    }
    ops_.widen[static_cast<int>(o.dtype)](from, to, count);
  }

  void narrow(const C* from, Role role, char* row, std::int64_t begin, std::int64_t count) {
    const Operand& o = layout_.operand(role);
    if (o.unit) {
      ops_.narrow[static_cast<int>(o.dtype)](from, row + begin * size_in_bytes(o.dtype), count);
      return;
    }
    ops_.narrow[static_cast<int>(o.dtype)](from, packed_, count);
    const auto scatter = o.dtype == DType::f64   ? detail::scatter<std::uint64_t>
                         : o.dtype == DType::f32 ? detail::scatter<std::uint32_t>
                                                 : detail::scatter<std::uint16_t>;
    scatter(layout_, o, row, begin, count, packed_);
  }

  void round(C* v, std::int64_t count, DType t) {
    if (size_in_bytes(t) >= static_cast<std::int64_t>(sizeof(C))) return;
    ops_.narrow[static_cast<int>(t)](v, packed_, count);
    ops_.widen[static_cast<int>(t)](packed_, v, count);
  }

  // v times 2^exponent, in steps whose own power of two is a normal number of C.
  void scale(C* v, std::int64_t count, int exponent) {
    constexpr int limit = sizeof(C) == sizeof(float) ? 126 : 1022;
    while (exponent != 0) {
      const int step = exponent > limit ? limit : exponent < -limit ? -limit : exponent;
      ops_.scale(v, static_cast<C>(std::ldexp(1.0, step)), count);
      exponent -= step;
    }
  }

  const BlockOps<C>& ops() const { return ops_; }

 private:
  const RowLayout& layout_;
  const BlockOps<C>& ops_;
  bool rounds_sum_ = false;
  DType sum_dtype_ = DType::f32;
  Role a_ = role_none, b_ = role_none;
  const char* row_a_ = nullptr;
  const char* row_b_ = nullptr;
  alignas(64) C addend_[block];
  alignas(64) std::uint64_t packed_[block];
};

}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm
