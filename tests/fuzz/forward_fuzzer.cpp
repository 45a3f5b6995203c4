// Decodes bytes into a call of forward on tensors that lie anywhere in one arena, and checks that
// the call either is refused and writes nothing, or writes every element of its outputs and nothing
// else, the same bits on every instruction set.
#include <cstdint>
#include <cstring>
#include <rmsnorm/rmsnorm.hpp>
#include <vector>

#include "arena.hpp"

namespace rmsnorm_fuzz {
namespace {

using rmsnorm::cpu::Isa;

rmsnorm::ForwardParams params_from(Bytes& in, unsigned char* arena) {
  rmsnorm::ForwardParams p;
  const Shape shape(in);
  const std::int64_t* sizes = shape.sizes;
  const int rank = shape.rank;
  const std::uint16_t present = in.raw<std::uint16_t>();
  const auto has = [present](int bit) { return ((present >> bit) & 1) != 0; };
  p.axis = has(8) ? static_cast<std::int32_t>(in.below(2 * rank + 1)) - rank : -1;
  const int rows = shape.row_rank(p.axis);
  p.x = tensor_from(in, arena, sizes, rank);
  p.y = has(7) ? tensor_from(in, arena, sizes, rank) : rmsnorm::Tensor{};
  if (!has(7) || in.byte() % 8 == 1) p.y = over(p.x);
  if (has(0)) p.residual = tensor_from(in, arena, sizes, rank);
  if (has(1)) p.weight = parameter_from(in, arena, shape, rows);
  if (has(2)) p.bias = parameter_from(in, arena, shape, rows);
  if (has(3)) {
    p.mean_square = tensor_from(in, arena, sizes, rows);
    if (!has(4)) p.mean_square.dtype = has(11) ? rmsnorm::DType::f64 : rmsnorm::DType::f32;
  }
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

}  // namespace
}  // namespace rmsnorm_fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace rmsnorm_fuzz;
  tally().input();
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
  tally().add_rank(p.x);
  const rmsnorm::Status checked = check(p);
  const std::int64_t rows = checked.ok() ? row_count(p.x, p.axis) : 1;
  const bool in_parts = in.below(4) == 1;
  const std::int64_t begin = in_parts ? in.below(9) - 1 : 0;
  const std::int64_t end = in_parts ? begin + in.below(12) : rows;
  fill(in, &memory);
  if (checked.ok()) {
    tally().add_good_call(p.x, p.axis, p.eps);
    Statistics(data, size).set(p.mean_square, arena);
  }

  const std::vector<unsigned char> before = memory;
  std::vector<unsigned char> scalar_result;
  for (const Isa isa : rmsnorm::cpu::every_isa) {
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
      copy_elements(t, row_rank, begin, end, arena, expected.data());
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
