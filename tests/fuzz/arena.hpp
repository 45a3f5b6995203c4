// From the bytes of a fuzzer to tensors that lie anywhere in one arena, and back to the elements of
// its outputs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <rmsnorm/rmsnorm.hpp>
#include <vector>

namespace rmsnorm_fuzz {

constexpr std::int64_t arena_bytes = 1 << 15;

[[noreturn]] inline void fail(const char* what, rmsnorm::cpu::Isa isa) {
  std::fprintf(stderr, "%s on %s\n", what, rmsnorm::cpu::name(isa));
  std::abort();
}

// What a fuzzer is there to reach, counted. A run of as many inputs as its test has must have
// reached all of it, and says at its end how often.
enum class Reached : int {
  rank_zero,
  rank_beyond_limit,
  rank_at_limit,
  no_rows,
  no_elements_in_rows,
  eps_zero,
  statistic_zero,
  statistic_negative,
  statistic_denormal,
  statistic_infinite,
  statistic_nan,
  count
};

class Tally {
 public:
  ~Tally() {
    constexpr const char* names[] = {"a rank of zero",
                                     "a rank beyond the limit",
                                     "the largest rank",
                                     "no rows",
                                     "rows without elements",
                                     "an eps of zero",
                                     "a given statistic of zero",
                                     "a negative one",
                                     "a denormal one",
                                     "an infinite one",
                                     "one that is NaN"};
    bool all = true;
    for (int i = 0; i < static_cast<int>(Reached::count); ++i) {
      std::fprintf(stderr, "reached %-28s %8ld times\n", names[i], times_[i]);
      all = all && times_[i] > 0;
    }
    if (inputs_ >= 20000 && !all) {
      std::fprintf(stderr, "what is named above with 0 times was not reached\n");
      std::_Exit(1);
    }
  }
  void input() { ++inputs_; }
  void add(Reached what, bool is_so = true) { times_[static_cast<int>(what)] += is_so ? 1 : 0; }

  // Of a call that is good, or the rank of one that may not be.
  void add_rank(const rmsnorm::ConstTensor& x) {
    add(Reached::rank_zero, x.rank == 0);
    add(Reached::rank_beyond_limit, x.rank > rmsnorm::max_rank && x.rank <= rmsnorm::max_rank + 2);
  }
  void add_good_call(const rmsnorm::ConstTensor& x, std::int32_t axis, double eps) {
    const std::int64_t rows = row_count(x, axis);
    bool no_elements = false;
    for (int d = axis < 0 ? axis + x.rank : axis; d < x.rank; ++d) {
      no_elements = no_elements || x.sizes[d] == 0;
    }
    add(Reached::rank_at_limit, x.rank == rmsnorm::max_rank);
    add(Reached::no_rows, rows == 0);
    add(Reached::no_elements_in_rows, rows > 0 && no_elements);
    add(Reached::eps_zero, eps == 0 && rows > 0 && !no_elements);
  }
  void add_statistic(double v) {
    add(Reached::statistic_zero, v == 0);
    add(Reached::statistic_negative, v < 0 && !std::isinf(v));
    add(Reached::statistic_denormal,
        v != 0 && std::fabs(v) < static_cast<double>(std::numeric_limits<float>::min()));
    add(Reached::statistic_infinite, std::isinf(v));
    add(Reached::statistic_nan, std::isnan(v));
  }

 private:
  long inputs_ = 0;
  long times_[static_cast<int>(Reached::count)] = {};
};

inline Tally& tally() {
  static Tally t;
  return t;
}

// Bytes of the input, zeros after its end.
class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}
  std::uint8_t byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }
  std::int64_t below(int n) { return byte() % n; }
  template <class T>
  T raw() {
    std::uint8_t bytes[sizeof(T)];
    for (std::uint8_t& b : bytes) b = byte();
    T value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
  }
  std::size_t left() const { return left_; }

 private:
  const std::uint8_t* data_;
  std::size_t left_;
};

inline bool is_empty(const rmsnorm::ConstTensor& t) {
  for (int d = 0; d < t.rank && d < rmsnorm::max_rank; ++d) {
    if (t.sizes[d] == 0) return true;
  }
  return false;
}

// Byte offsets from its data of the lowest element and of the end of the highest, in arithmetic
// that cannot overflow.
struct Reach {
  double low = 0, high = 0;
};

inline Reach reach_of(const rmsnorm::ConstTensor& t) {
  const auto size = static_cast<double>(rmsnorm::size_in_bytes(t.dtype));
  Reach r{0, size};
  if (t.rank > rmsnorm::max_rank) return r;
  for (int d = 0; d < t.rank; ++d) {
    if (t.sizes[d] <= 1) continue;
    const double step =
        static_cast<double>(t.strides[d]) * static_cast<double>(t.sizes[d] - 1) * size;
    (step < 0 ? r.low : r.high) += step;
  }
  return r;
}

// What the caller answers for, and no check can see: memory that is there.
inline bool is_memory(const rmsnorm::ConstTensor& t, const unsigned char* arena) {
  if (!t.present() || !rmsnorm::is_valid(t.dtype) || t.rank > rmsnorm::max_rank) return true;
  if (is_empty(t) || t.data == nullptr) return true;
  for (int d = 0; d < t.rank; ++d) {
    if (t.sizes[d] < 0) return true;
  }
  const auto place = static_cast<double>(static_cast<const unsigned char*>(t.data) - arena);
  const Reach r = reach_of(t);
  return place + r.low >= 0 && place + r.high <= static_cast<double>(arena_bytes);
}

inline rmsnorm::DType dtype_from(Bytes& in) {
  const std::uint8_t b = in.byte();
  return b == 255 ? static_cast<rmsnorm::DType>(in.byte()) : static_cast<rmsnorm::DType>(b % 4);
}

// Sizes given, strides of one of the usual forms or any small numbers. Of a rank that no tensor has
// those that it holds are set.
inline rmsnorm::Tensor tensor_from(Bytes& in, unsigned char* arena, const std::int64_t* sizes,
                                   int rank) {
  rmsnorm::Tensor t;
  const std::uint8_t form = in.byte();
  t.dtype = dtype_from(in);
  t.rank = form == 255 ? static_cast<std::int32_t>(in.byte()) - 3 : rank;
  std::int64_t step = form % 8 == 1 ? 2 : 1;
  if (rank > rmsnorm::max_rank) rank = rmsnorm::max_rank;
  for (int d = rank - 1; d >= 0; --d) {
    t.sizes[d] = form == 254 ? in.below(9) - 1 : sizes[d];
    t.strides[d] = form % 8 == 2 ? in.below(7) - 3 : step;
    if (form % 8 == 3) t.strides[d] = -step;
    // Another tensor's sizes, which these may be, may have any product.
    if (t.sizes[d] > 0) step = rmsnorm::detail::saturated_product(step, t.sizes[d]);
    step = std::min(step, std::int64_t{1} << 62);
    if (form % 8 == 4) step += in.below(5);
  }
  if (form == 253 && rank > 0) t.strides[in.below(rank)] = in.raw<std::int64_t>();
  if (form == 252 && rank > 0) t.sizes[in.below(rank)] = in.raw<std::int64_t>();
  const std::int64_t wanted = in.byte() * 256 + in.byte();
  const bool aligned = in.byte() % 8 != 1;
  // No memory, which a tensor without elements may have.
  if (form == 251 || (form % 4 == 0 && is_empty(t))) return t;
  t.data = arena;
  if (!rmsnorm::is_valid(t.dtype)) return t;
  // Anywhere that it fits; callers drop what does not.
  const Reach r = reach_of(t);
  const double room = static_cast<double>(arena_bytes) - (r.high - r.low);
  if (room < 0) return t;
  const std::int64_t size = aligned ? rmsnorm::size_in_bytes(t.dtype) : 1;
  const std::int64_t place = wanted % (static_cast<std::int64_t>(room) + 1);
  t.data = arena + (place - static_cast<std::int64_t>(r.low)) / size * size;
  return t;
}

inline double option_from(Bytes& in, double usual) {
  switch (in.byte() % 16) {
    case 1: return 1;
    case 6: return 0;
    case 2: return 0.5;
    case 3: return 1e-30;
    case 4: return in.raw<double>();
    case 5: return in.byte() / 255.0;
    default: return usual;
  }
}

// Sizes of x. Row dimensions are few enough for the arena to hold some tensors of several blocks.
struct Shape {
  explicit Shape(Bytes& in) {
    rank = 1 + static_cast<int>(in.below(4)) + (in.byte() % 32 == 7 ? 4 : 0);
    const std::uint8_t other = in.byte();
    if (other % 64 == 3) rank = static_cast<int>(in.below(most_dimensions + 1));
    for (int d = 0; d < rank; ++d) {
      sizes[d] = d + 1 < rank       ? in.below(4) + 1
                 : in.below(8) == 1 ? in.below(256) + 200
                                    : in.below(70);
      if (in.byte() % 32 == 9) sizes[d] = 0;
    }
  }
  // Row dimensions for an axis, 0 for one that is outside of the rank.
  int row_rank(std::int32_t axis) const {
    const int first = axis < 0 ? axis + rank : axis;
    return first >= 0 && first <= rank ? first : 0;
  }

  static constexpr int most_dimensions = rmsnorm::max_rank + 2;

  int rank;
  std::int64_t sizes[most_dimensions] = {};
};

// A parameter for rows of `shape`: the normalised dimensions, behind some leading ones whose sizes
// are those of x or one.
inline rmsnorm::Tensor parameter_from(Bytes& in, unsigned char* arena, const Shape& shape,
                                      int row_rank) {
  const int extra = static_cast<int>(in.below(row_rank + 1));
  std::int64_t sizes[Shape::most_dimensions];
  const int rank = shape.rank - row_rank + extra;
  std::memcpy(sizes, shape.sizes + row_rank - extra, sizeof(std::int64_t) * rank);
  const std::uint8_t ones = extra > 0 ? in.byte() : 0;
  for (int d = 0; d < extra; ++d) {
    if (((ones >> d) & 1) != 0) sizes[d] = 1;
  }
  return tensor_from(in, arena, sizes, rank);
}

// An output over an input.
inline rmsnorm::Tensor over(const rmsnorm::ConstTensor& t) {
  rmsnorm::Tensor same;
  same.data = const_cast<void*>(t.data);
  same.dtype = t.dtype;
  same.rank = t.rank;
  std::memcpy(same.sizes, t.sizes, sizeof t.sizes);
  std::memcpy(same.strides, t.strides, sizeof t.strides);
  return same;
}

// The rest of the input, again and again.
inline void fill(Bytes& in, std::vector<unsigned char>* memory) {
  std::vector<unsigned char> content;
  while (in.left() > 0) content.push_back(in.byte());
  for (std::size_t i = 0; i < memory->size(); ++i) {
    (*memory)[i] =
        content.empty() ? static_cast<unsigned char>(i * 37 % 64) : content[i % content.size()];
  }
}

// Calls visit(place, size) with the byte offset in the arena of each element of rows [begin, end)
// of an output that check() found good.
template <class Visit>
void for_each_element(const rmsnorm::Tensor& t, int row_rank, std::int64_t begin, std::int64_t end,
                      const unsigned char* arena, Visit visit) {
  if (!t.present() || is_empty(t)) return;
  std::int64_t per_row = 1;
  for (int d = row_rank; d < t.rank; ++d) per_row *= t.sizes[d];
  const std::int64_t size = rmsnorm::size_in_bytes(t.dtype);
  for (std::int64_t i = begin * per_row; i < end * per_row; ++i) {
    std::int64_t rest = i, place = 0;
    for (int d = t.rank - 1; d >= 0; --d) {
      place += rest % t.sizes[d] * (t.sizes[d] == 1 ? 0 : t.strides[d]);
      rest /= t.sizes[d];
    }
    visit(static_cast<const unsigned char*>(t.data) - arena + place * size, size);
  }
}

// Given statistics of a call that check() found good: of half of the calls values that no row has.
// They are chosen by a hash of the whole input, which leaves none of them out as inputs end early.
class Statistics {
 public:
  Statistics(const std::uint8_t* data, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) hash_ = (hash_ ^ data[i]) * 0x100000001b3u;
  }

  void set(const rmsnorm::ConstTensor& t, unsigned char* arena) {
    if (!t.present() || next() % 2 == 0) return;
    for_each_element(over(t), 0, 0, 1, arena, [&](std::int64_t place, std::int64_t size) {
      const double v = odd[next() % (sizeof odd / sizeof odd[0])];
      const auto narrow = static_cast<float>(v);
      std::memcpy(arena + place, size == 8 ? static_cast<const void*>(&v) : &narrow,
                  static_cast<std::size_t>(size));
      tally().add_statistic(size == 8 ? v : static_cast<double>(narrow));
    });
  }

 private:
  static constexpr double infinity = std::numeric_limits<double>::infinity();
  static constexpr double odd[] = {
      0,     -0.0,  infinity, -infinity, std::numeric_limits<double>::quiet_NaN(),
      -1,    1e-42, -1e-42,   0x1p-1074, 1e-310,
      1e300, 1e-20, 1e20};

  // The upper bits of a linear congruential generator (Knuth's MMIX).
  std::uint64_t next() {
    hash_ = hash_ * 6364136223846793005u + 1442695040888963407u;
    return hash_ >> 33;
  }

  std::uint64_t hash_ = 0xcbf29ce484222325u;  // FNV-1a
};

// Gives every NaN the same bits: payloads are not promised.
inline void forget_payload(rmsnorm::DType t, unsigned char* p, std::int64_t size) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, p, static_cast<std::size_t>(size));
  const std::uint64_t infinity = t == rmsnorm::DType::f16    ? 0x7c00u
                                 : t == rmsnorm::DType::bf16 ? 0x7f80u
                                 : t == rmsnorm::DType::f32  ? 0x7f800000u
                                                             : 0x7ff0000000000000u;
  const std::uint64_t sign = std::uint64_t{1} << (8 * size - 1);
  if ((bits & (sign - 1)) > infinity) std::memset(p, 0xff, static_cast<std::size_t>(size));
}

// Copies the elements of rows [begin, end) of an output, in which NaNs are made alike, to the same
// places of `to`.
inline void copy_elements(const rmsnorm::Tensor& t, int row_rank, std::int64_t begin,
                          std::int64_t end, unsigned char* arena, unsigned char* to) {
  for_each_element(t, row_rank, begin, end, arena, [&](std::int64_t place, std::int64_t bytes) {
    forget_payload(t.dtype, arena + place, bytes);
    std::memcpy(to + place, arena + place, static_cast<std::size_t>(bytes));
  });
}

}  // namespace rmsnorm_fuzz
