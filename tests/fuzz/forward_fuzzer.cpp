// Decodes bytes into a call of forward on tensors that lie anywhere in one arena, and checks that
// the call either is refused and writes nothing, or writes every element of its outputs and nothing
// else, the same bits on every instruction set.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <rmsnorm/rmsnorm.hpp>
#include <vector>

namespace {

using rmsnorm::cpu::Isa;

constexpr std::int64_t arena_bytes = 1 << 15;

[[noreturn]] void fail(const char* what, Isa isa) {
  std::fprintf(stderr, "%s on %s\n", what, rmsnorm::cpu::name(isa));
  std::abort();
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

bool is_empty(const rmsnorm::ConstTensor& t) {
  for (int d = 0; d < t.rank; ++d) {
    if (t.sizes[d] == 0) return true;
  }
  return false;
}

// Byte offsets from its data of the lowest element and of the end of the highest, in arithmetic
// that cannot overflow.
struct Reach {
  double low = 0, high = 0;
};

Reach reach_of(const rmsnorm::ConstTensor& t) {
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

// What the caller answers for, and no check can see: memory that is there, aligned to the element.
bool is_memory(const rmsnorm::ConstTensor& t, const unsigned char* arena) {
  if (!t.present() || !rmsnorm::is_valid(t.dtype) || t.rank > rmsnorm::max_rank) return true;
  if (is_empty(t) || t.data == nullptr) return true;
  for (int d = 0; d < t.rank; ++d) {
    if (t.sizes[d] < 0) return true;
  }
  const auto place = static_cast<double>(static_cast<const unsigned char*>(t.data) - arena);
  const Reach r = reach_of(t);
  return place + r.low >= 0 && place + r.high <= static_cast<double>(arena_bytes) &&
         (static_cast<const unsigned char*>(t.data) - arena) % rmsnorm::size_in_bytes(t.dtype) == 0;
}

rmsnorm::DType dtype_from(Bytes& in) {
  const std::uint8_t b = in.byte();
  return b == 255 ? static_cast<rmsnorm::DType>(in.byte()) : static_cast<rmsnorm::DType>(b % 4);
}

// Sizes given, strides of one of the usual forms or any small numbers.
rmsnorm::Tensor tensor_from(Bytes& in, unsigned char* arena, const std::int64_t* sizes, int rank) {
  rmsnorm::Tensor t;
  const std::uint8_t form = in.byte();
  t.dtype = dtype_from(in);
  t.rank = form == 255 ? static_cast<std::int32_t>(in.byte()) - 3 : rank;
  std::int64_t step = form % 8 == 1 ? 2 : 1;
  for (int d = rank - 1; d >= 0; --d) {
    t.sizes[d] = form == 254 ? in.below(9) - 1 : sizes[d];
    t.strides[d] = form % 8 == 2 ? in.below(7) - 3 : step;
    if (form % 8 == 3) t.strides[d] = -step;
    step *= t.sizes[d] > 0 ? t.sizes[d] : 1;
    if (form % 8 == 4) step += in.below(5);
  }
  if (form == 253 && rank > 0) t.strides[in.below(rank)] = in.raw<std::int64_t>();
  if (form == 252 && rank > 0) t.sizes[in.below(rank)] = in.raw<std::int64_t>();
  const std::int64_t wanted = in.byte() * 256 + in.byte();
  // No memory, which a tensor without elements may have.
  if (form == 251 || (form % 4 == 0 && is_empty(t))) return t;
  t.data = arena;
  if (!rmsnorm::is_valid(t.dtype)) return t;
  // Anywhere that it fits, aligned to the element; callers drop what does not.
  const Reach r = reach_of(t);
  const double room = static_cast<double>(arena_bytes) - (r.high - r.low);
  if (room < 0) return t;
  const std::int64_t size = rmsnorm::size_in_bytes(t.dtype);
  const std::int64_t place = wanted % (static_cast<std::int64_t>(room) + 1);
  t.data = arena + (place - static_cast<std::int64_t>(r.low)) / size * size;
  return t;
}

double option_from(Bytes& in, double usual) {
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

rmsnorm::ForwardParams params_from(Bytes& in, unsigned char* arena) {
  rmsnorm::ForwardParams p;
  std::int64_t sizes[rmsnorm::max_rank] = {};
  const int rank = 1 + static_cast<int>(in.below(4)) + (in.byte() == 7 ? 4 : 0);
  for (int d = 0; d < rank; ++d) {
    sizes[d] = d + 1 < rank       ? in.below(4) + 1
               : in.below(8) == 1 ? in.below(256) + 200
                                  : in.below(70);
    if (in.byte() % 32 == 9) sizes[d] = 0;
  }
  const std::uint16_t present = in.raw<std::uint16_t>();
  const auto has = [present](int bit) { return ((present >> bit) & 1) != 0; };
  p.axis = has(8) ? static_cast<std::int32_t>(in.below(2 * rank + 1)) - rank : -1;
  const int first = p.axis < 0 ? p.axis + rank : p.axis;
  const int rows = first >= 0 && first <= rank ? first : 0;
  p.x = tensor_from(in, arena, sizes, rank);
  p.y = has(7) ? tensor_from(in, arena, sizes, rank) : rmsnorm::Tensor{};
  if (!has(7) || in.byte() % 8 == 1) {
    // In place.
    p.y.data = const_cast<void*>(p.x.data);
    p.y.dtype = p.x.dtype;
    p.y.rank = p.x.rank;
    std::memcpy(p.y.sizes, p.x.sizes, sizeof p.y.sizes);
    std::memcpy(p.y.strides, p.x.strides, sizeof p.y.strides);
  }
  if (has(0)) p.residual = tensor_from(in, arena, sizes, rank);
  if (has(1)) {
    const int extra = static_cast<int>(in.below(rows + 1));
    p.weight = tensor_from(in, arena, sizes + rows - extra, rank - rows + extra);
  }
  if (has(2)) p.bias = tensor_from(in, arena, sizes + rows, rank - rows);
  if (has(3) && has(4)) p.mean_square = tensor_from(in, arena, sizes, rows);
  if (has(5)) p.residual_out = tensor_from(in, arena, sizes, rank);
  if (has(6)) {
    p.rstd = tensor_from(in, arena, sizes, rows);
    if (!has(9)) p.rstd.dtype = compute_type(p);
  }
  p.rounding = static_cast<rmsnorm::Rounding>(in.below(32) == 1 ? in.below(256) : in.below(3));
  p.eps = option_from(in, 1e-6);
  p.weight_offset = option_from(in, 0);
  p.partial = option_from(in, 1);
  p.round_residual = has(10);
  return p;
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

// Gives every NaN the same bits: payloads are not promised.
void forget_payload(rmsnorm::DType t, unsigned char* p, std::int64_t size) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, p, static_cast<std::size_t>(size));
  const std::uint64_t infinity = t == rmsnorm::DType::f16    ? 0x7c00u
                                 : t == rmsnorm::DType::bf16 ? 0x7f80u
                                 : t == rmsnorm::DType::f32  ? 0x7f800000u
                                                             : 0x7ff0000000000000u;
  const std::uint64_t sign = std::uint64_t{1} << (8 * size - 1);
  if ((bits & (sign - 1)) > infinity) std::memset(p, 0xff, static_cast<std::size_t>(size));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes in(data, size);
  // On the heap and of exactly this size, so that AddressSanitizer fences it.
  std::vector<unsigned char> memory(arena_bytes);
  unsigned char* arena = memory.data();
  const rmsnorm::ForwardParams p = params_from(in, arena);
  const rmsnorm::ConstTensor tensors[] = {p.x,           p.residual, p.weight,       p.bias,
                                          p.mean_square, p.y,        p.residual_out, p.rstd};
  for (const rmsnorm::ConstTensor& t : tensors) {
    if (!is_memory(t, arena)) return 0;
  }
  const rmsnorm::Status checked = check(p);
  const std::int64_t rows = checked.ok() ? row_count(p.x, p.axis) : 1;
  const bool in_parts = in.below(4) == 1;
  const std::int64_t begin = in_parts ? in.below(9) - 1 : 0;
  const std::int64_t end = in_parts ? begin + in.below(12) : rows;
  // The rest of the input is what the tensors hold, again and again.
  std::vector<unsigned char> content;
  while (in.left() > 0) content.push_back(in.byte());
  for (std::size_t i = 0; i < memory.size(); ++i) {
    memory[i] =
        content.empty() ? static_cast<unsigned char>(i * 37 % 64) : content[i % content.size()];
  }

  const std::vector<unsigned char> before = memory;
  std::vector<unsigned char> scalar_result;
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::neon}) {
    if (!rmsnorm::cpu::available(isa)) continue;
    std::memcpy(arena, before.data(), memory.size());
    const rmsnorm::Status status = rmsnorm::cpu::forward(p, begin, end, isa);
    const bool range_is_good = begin >= 0 && begin <= end && end <= rows;
    if (status.ok() != (checked.ok() && range_is_good))
      fail("a status that check() contradicts", isa);
    if (!status.ok()) {
      if (memory != before) fail("a refused call wrote", isa);
      continue;
    }
    const int row_rank = p.axis < 0 ? p.axis + p.x.rank : p.axis;
    std::vector<unsigned char> expected = before;
    for (const rmsnorm::Tensor& t : {p.y, p.residual_out, p.rstd}) {
      for_each_element(t, row_rank, begin, end, arena, [&](std::int64_t place, std::int64_t bytes) {
        forget_payload(t.dtype, arena + place, bytes);
        std::memcpy(expected.data() + place, arena + place, static_cast<std::size_t>(bytes));
      });
    }
    if (memory != expected) fail("a byte outside of the outputs changed", isa);
    if (isa == Isa::scalar) {
      scalar_result = memory;
    } else if (memory != scalar_result) {
      fail("other bits than the scalar code", isa);
    }
  }
  return 0;
}
