#include "guarded_tensor.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

namespace rmsnorm_test {
namespace {

constexpr std::size_t alignment = 64;
constexpr unsigned char canary = 0xa5;

std::vector<std::int64_t> row_major(const std::vector<std::int64_t>& sizes) {
  std::vector<std::int64_t> strides(sizes.size());
  std::int64_t step = 1;
  for (std::size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= std::max<std::int64_t>(sizes[d], 1);
  }
  return strides;
}

}  // namespace

const char* name(Layout layout) {
  switch (layout) {
    case Layout::contiguous: return "contiguous";
    case Layout::padded_rows: return "padded_rows";
    case Layout::packed_slice: return "packed_slice";
    case Layout::gapped: return "gapped";
    case Layout::reversed_rows: return "reversed_rows";
    case Layout::inner_stride_two: return "inner_stride_two";
    case Layout::reversed: return "reversed";
    case Layout::column_major: return "column_major";
    case Layout::broadcast_rows: return "broadcast_rows";
  }
  return "unknown";
}

std::vector<std::int64_t> strides_of(Layout layout, const std::vector<std::int64_t>& sizes,
                                     int outer) {
  std::vector<std::int64_t> strides = row_major(sizes);
  const std::size_t rank = sizes.size();
  const auto rows = static_cast<std::size_t>(outer);
  switch (layout) {
    case Layout::contiguous: break;
    case Layout::padded_rows:
      if (rank > 0) {
        std::vector<std::int64_t> longer = sizes;
        longer[rank - 1] += 5;
        strides = row_major(longer);
      }
      break;
    case Layout::packed_slice:
      if (rank > 1) strides[0] *= 3;
      break;
    case Layout::gapped: {
      std::int64_t step = 1;
      for (std::size_t d = rank; d-- > 0;) {
        strides[d] = step;
        step = step * std::max<std::int64_t>(sizes[d], 1) + 1 + static_cast<std::int64_t>(d);
      }
      break;
    }
    case Layout::reversed_rows:
      for (std::size_t d = 0; d < rows; ++d) strides[d] = -strides[d];
      break;
    case Layout::inner_stride_two:
      for (std::int64_t& s : strides) s *= 2;
      break;
    case Layout::reversed:
      for (std::int64_t& s : strides) s = -s;
      break;
    case Layout::column_major: {
      std::int64_t step = 1;
      for (std::size_t d = 0; d < rank; ++d) {
        strides[d] = step;
        step *= std::max<std::int64_t>(sizes[d], 1);
      }
      break;
    }
    case Layout::broadcast_rows:
      for (std::size_t d = 0; d < rows; ++d) strides[d] = 0;
      break;
  }
  return strides;
}

void GuardedTensor::Free::operator()(unsigned char* p) const {
  ::operator delete[](p, std::align_val_t(alignment));
}

GuardedTensor::GuardedTensor(DType dtype, std::vector<std::int64_t> sizes,
                             std::vector<std::int64_t> strides, int offset, int margin, int shift)
    : present_(true), dtype_(dtype), sizes_(std::move(sizes)), strides_(std::move(strides)) {
  std::int64_t count = 1;
  for (const std::int64_t s : sizes_) count *= s;
  std::vector<std::int64_t> index(sizes_.size(), 0);
  places_.resize(static_cast<std::size_t>(count));
  std::int64_t place = 0, lowest = 0, highest = -1;
  for (std::size_t i = 0; i < places_.size(); ++i) {
    places_[i] = place;
    lowest = std::min(lowest, place);
    highest = std::max(highest, place);
    for (std::size_t d = sizes_.size(); d-- > 0;) {
      place += strides_[d];
      if (++index[d] < sizes_[d]) break;
      place -= strides_[d] * sizes_[d];
      index[d] = 0;
    }
  }
  const std::int64_t size = rmsnorm::size_in_bytes(dtype_);
  bytes_ = static_cast<std::size_t>((highest - lowest + 1 + offset + 2 * margin) * size + shift);
  memory_.reset(new (std::align_val_t(alignment)) unsigned char[bytes_]);
  std::memset(memory_.get(), canary, bytes_);
  origin_ = memory_.get() + (offset + margin - lowest) * size + shift;
}

rmsnorm::Tensor GuardedTensor::view() const {
  rmsnorm::Tensor t;
  if (!present_) return t;
  t.data = origin_;
  t.dtype = dtype_;
  t.rank = static_cast<std::int32_t>(sizes_.size());
  for (std::size_t d = 0; d < sizes_.size(); ++d) {
    t.sizes[d] = sizes_[d];
    t.strides[d] = strides_[d];
  }
  return t;
}

void GuardedTensor::remember() { remembered_.assign(memory_.get(), memory_.get() + bytes_); }

void GuardedTensor::restore() {
  if (bytes_ > 0) std::memcpy(memory_.get(), remembered_.data(), bytes_);
}

bool GuardedTensor::written_outside(const std::vector<Range>& elements) const {
  if (bytes_ == 0) return false;
  const auto size = static_cast<std::size_t>(rmsnorm::size_in_bytes(dtype_));
  std::vector<unsigned char> expected = remembered_;
  for (const Range& range : elements) {
    for (std::int64_t i = range.first; i < range.second; ++i) {
      const auto from_start = static_cast<std::size_t>(at(i) - memory_.get());
      std::memcpy(expected.data() + from_start, at(i), size);
    }
  }
  return std::memcmp(expected.data(), memory_.get(), bytes_) != 0;
}

}  // namespace rmsnorm_test
