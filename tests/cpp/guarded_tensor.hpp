// A tensor of any layout in memory of its own that knows every byte around and between its
// elements, so that a write where none belongs is seen.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "float_formats.hpp"
#include "rmsnorm/contract.hpp"

namespace rmsnorm_test {

enum class Layout {
  contiguous,
  padded_rows,    // the last dimension is a slice of a longer one
  packed_slice,   // the first dimension strides over three times its extent, as q in a packed qkv
  gapped,         // no two dimensions collapse; unit inner stride
  reversed_rows,  // negative outer strides, unit inner stride
  inner_stride_two,  // every other element
  reversed,          // inner stride -1
  column_major,      // first dimension fastest
  broadcast_rows,    // outer strides zero: one row read again and again; inputs only
};

constexpr Layout output_layouts[] = {
    Layout::contiguous,    Layout::padded_rows,      Layout::packed_slice, Layout::gapped,
    Layout::reversed_rows, Layout::inner_stride_two, Layout::reversed,     Layout::column_major};

const char* name(Layout layout);

// Element strides of the layout; the first `outer` dimensions are those of the rows.
std::vector<std::int64_t> strides_of(Layout layout, const std::vector<std::int64_t>& sizes,
                                     int outer);

// A half-open range of rows or of elements.
using Range = std::pair<std::int64_t, std::int64_t>;

class GuardedTensor {
 public:
  GuardedTensor() = default;  // absent

  // The first byte of the lowest element lies `offset` elements after a 64-byte boundary, behind
  // `margin` elements of canary and followed by as many. Without a margin the allocation ends with
  // the last element, which lets AddressSanitizer see a read beyond it. `shift` bytes are added to
  // every address: elements then lie unaligned.
  GuardedTensor(DType dtype, std::vector<std::int64_t> sizes, std::vector<std::int64_t> strides,
                int offset, int margin, int shift = 0);

  bool present() const { return present_; }
  DType dtype() const { return dtype_; }
  std::int64_t count() const { return static_cast<std::int64_t>(places_.size()); }
  rmsnorm::Tensor view() const;

  // All of its memory, canaries included.
  unsigned char* memory() const { return memory_.get(); }
  std::size_t bytes() const { return bytes_; }

  // Elements by their row-major position.
  std::uint64_t bits(std::int64_t i) const { return load_bits(dtype_, at(i)); }
  void set_bits(std::int64_t i, std::uint64_t bits) { store_bits(dtype_, at(i), bits); }
  double value(std::int64_t i) const { return decode(dtype_, bits(i)); }
  void set(std::int64_t i, double v) { set_bits(i, encode(dtype_, round_to(dtype_, v))); }

  // The memory as it is to be found at the start of every call.
  void remember();
  void restore();

  // Whether any byte outside the elements of these ranges differs from what was remembered.
  bool written_outside(const std::vector<Range>& elements) const;

 private:
  struct Free {
    void operator()(unsigned char* p) const;
  };

  unsigned char* at(std::int64_t i) const {
    return origin_ + places_[static_cast<std::size_t>(i)] * rmsnorm::size_in_bytes(dtype_);
  }

  bool present_ = false;
  DType dtype_ = DType::f32;
  std::vector<std::int64_t> sizes_;
  std::vector<std::int64_t> strides_;
  std::vector<std::int64_t> places_;  // element offset of each row-major position
  std::unique_ptr<unsigned char[], Free> memory_;
  std::size_t bytes_ = 0;
  unsigned char* origin_ = nullptr;
  std::vector<unsigned char> remembered_;
};

}  // namespace rmsnorm_test
