// Decodes bytes into a call of backward on tensors that lie anywhere in one arena, and checks that
// the call either is refused and writes nothing, or writes every element of its outputs and, but
// for the workspace, nothing else, the same bits on every instruction set and for any split into
// blocks and columns.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <rmsnorm/rmsnorm.hpp>
#include <vector>

#include "arena.hpp"

namespace rmsnorm_fuzz {
namespace {

using rmsnorm::BackwardParams;
using rmsnorm::Status;
using rmsnorm::cpu::backward;
using rmsnorm::cpu::backward_blocks;
using rmsnorm::cpu::backward_reduce;
using rmsnorm::cpu::backward_workspace;
using rmsnorm::cpu::Isa;

BackwardParams params_from(Bytes& in, unsigned char* arena) {
  BackwardParams p;
  const Shape shape(in);
  const std::int64_t* sizes = shape.sizes;
  const int rank = shape.rank;
  const std::uint16_t present = in.raw<std::uint16_t>();
  const auto has = [present](int bit) { return ((present >> bit) & 1) != 0; };
  p.axis = has(0) ? static_cast<std::int32_t>(in.below(2 * rank + 1)) - rank : -1;
  const int rows = shape.row_rank(p.axis);
  p.x = tensor_from(in, arena, sizes, rank);
  p.dy = has(1) ? tensor_from(in, arena, sizes, rank) : over(p.x);
  if (has(2)) p.residual = tensor_from(in, arena, sizes, rank);
  if (has(3)) p.d_residual = tensor_from(in, arena, sizes, rank);
  const rmsnorm::ConstTensor inputs[] = {p.dy, p.x, p.residual, p.d_residual};
  const std::int64_t place = in.below(9);
  p.dx = place < 4 ? over(inputs[place]) : tensor_from(in, arena, sizes, rank);
  if (has(4)) p.weight = parameter_from(in, arena, shape, rows);
  if (has(5)) {
    const int weight_rank = std::min(std::max(p.weight.rank, 0), rmsnorm::max_rank);
    p.dweight = tensor_from(in, arena, p.weight.sizes, weight_rank);
  }
  if (has(6)) p.dbias = parameter_from(in, arena, shape, rows);
  if (has(7)) p.rstd = tensor_from(in, arena, sizes, rows);
  if (has(8) && has(9)) p.mean_square = tensor_from(in, arena, sizes, rows);
  if (has(8) && has(10)) p.d_mean_square = tensor_from(in, arena, sizes, rows);
  p.eps = option_from(in, 1e-6);
  p.weight_offset = option_from(in, 0);
  p.partial = option_from(in, 1);
  return p;
}

std::int64_t column_count(const BackwardParams& p) {
  std::int64_t n = 1;
  for (int d = p.axis < 0 ? p.axis + p.x.rank : p.axis; d < p.x.rank; ++d) {
    n = rmsnorm::detail::saturated_product(n, p.x.sizes[d]);
  }
  return n;
}

// Memory of exactly the bytes that backward asks for, which AddressSanitizer fences.
class Workspace {
 public:
  explicit Workspace(std::int64_t bytes)
      : bytes_(static_cast<std::size_t>(bytes)),
        memory_(bytes > 0 ? std::aligned_alloc(64, bytes_) : nullptr) {}
  ~Workspace() { std::free(memory_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* memory() const { return memory_; }
  void fill(int byte) {
    if (memory_ != nullptr) std::memset(memory_, byte, bytes_);
  }
  bool holds(int byte) const {
    const auto* bytes = static_cast<const unsigned char*>(memory_);
    return memory_ == nullptr ||
           std::all_of(bytes, bytes + bytes_, [byte](unsigned char b) { return b == byte; });
  }

 private:
  std::size_t bytes_;
  void* memory_;
};

// The whole in parts of some blocks and of some columns, the last ones first.
Status in_parts(const BackwardParams& p, std::int64_t blocks, std::int64_t blocks_a_part,
                std::int64_t columns, std::int64_t columns_a_part, Isa isa) {
  Status status;
  for (std::int64_t end = blocks; end > 0 && status.ok(); end -= blocks_a_part) {
    status = backward(p, std::max<std::int64_t>(end - blocks_a_part, 0), end, isa);
  }
  for (std::int64_t end = columns; end > 0 && status.ok(); end -= columns_a_part) {
    status = backward_reduce(p, std::max<std::int64_t>(end - columns_a_part, 0), end, isa);
  }
  return status;
}

class Judge {
 public:
  Judge(const BackwardParams& p, std::vector<unsigned char>* memory)
      : p_(p),
        memory_(*memory),
        before_(*memory),
        blocks_(backward_blocks(p)),
        columns_(column_count(p)),
        bytes_(backward_workspace(p)),
        workspace_(bytes_) {
    p_.workspace = workspace_.memory();
    p_.workspace_bytes = bytes_;
  }

  // Ranges that may lie outside of the blocks or columns, or be empty.
  void judge_range(std::int64_t begin, std::int64_t end) {
    const Isa isa = rmsnorm::cpu::active_isa().isa;
    const auto judge = [&](Status status, std::int64_t count, const rmsnorm::Tensor& one,
                           const rmsnorm::Tensor& other) {
      const bool good = begin >= 0 && begin <= end && end <= count;
      if (status.ok() != good) fail("a range is judged wrongly", isa);
      std::vector<unsigned char> expected = before_;
      if (good) copy_outputs({one, other}, expected.data());
      if (memory_ != expected) fail("a range wrote outside of its outputs", isa);
      if (!good && !workspace_.holds(0x5a)) fail("a refused range wrote to the workspace", isa);
    };
    start(before_, 0x5a);
    judge(backward(p_, begin, end, isa), blocks_, p_.dx, p_.d_mean_square);
    start(before_, 0x5a);
    judge(backward_reduce(p_, begin, end, isa), columns_, p_.dweight, p_.dbias);
  }

  // A workspace that is missing, short, unaligned or, at a byte of the arena, over a tensor or not.
  void judge_workspace(std::int64_t place) {
    if (bytes_ == 0) return;
    const Isa isa = rmsnorm::cpu::active_isa().isa;
    start(before_, 0x5a);
    BackwardParams wrong[] = {p_, p_, p_};
    wrong[0].workspace = nullptr;
    wrong[1].workspace_bytes = bytes_ - 1;
    wrong[2].workspace = static_cast<char*>(p_.workspace) + 32;
    for (const BackwardParams& p : wrong) {
      if (backward(p, 0, blocks_, isa).ok() || backward_reduce(p, 0, columns_, isa).ok()) {
        fail("a wrong workspace is accepted", isa);
      }
    }
    if (memory_ != before_ || !workspace_.holds(0x5a)) fail("a refused call wrote", isa);
    if (place + bytes_ > arena_bytes) return;
    const std::vector<unsigned char> expected = result(before_, blocks_, columns_, isa);
    const BackwardParams apart = p_;
    p_.workspace = memory_.data() + place;
    start(before_, 0);
    const bool accepted = in_parts(p_, blocks_, 3, columns_, 70, isa).ok();
    std::vector<unsigned char> got = before_;
    if (accepted) {
      copy_outputs({p_.dx, p_.dweight, p_.dbias, p_.d_mean_square}, got.data());
      if (got != expected) fail("other results with a workspace beside the tensors", isa);
      std::memcpy(got.data() + place, memory_.data() + place, static_cast<std::size_t>(bytes_));
    }
    if (memory_ != got) fail("a byte outside of outputs and workspace changed", isa);
    p_ = apart;
  }

  void judge_whole(std::int64_t blocks_a_part, std::int64_t columns_a_part) {
    const std::vector<unsigned char> expected = result(before_, blocks_, columns_, Isa::scalar);
    // What is not written shows.
    const std::vector<unsigned char> inverted = with_other_outputs();
    for (const Isa isa : rmsnorm::cpu::every_isa) {
      if (!rmsnorm::cpu::available(isa)) continue;
      const bool few = blocks_ < 1000 && columns_ < 1000;
      if (result(inverted, blocks_, columns_, isa) != expected ||
          (few && result(inverted, blocks_a_part, columns_a_part, isa) != expected) ||
          (few && result(inverted, 1, 1 + columns_a_part % 5, isa) != expected)) {
        fail("other bits than the scalar code on the whole, or not all written", isa);
      }
    }
  }

 private:
  void start(const std::vector<unsigned char>& content, int byte) {
    std::memcpy(memory_.data(), content.data(), memory_.size());
    workspace_.fill(byte);
  }

  void copy_outputs(std::initializer_list<rmsnorm::Tensor> outputs, unsigned char* to) {
    for (const rmsnorm::Tensor& t : outputs) copy_elements(t, 0, 0, 1, memory_.data(), to);
  }

  // The memory afterwards, in which nothing but the outputs differs from `content`.
  std::vector<unsigned char> result(const std::vector<unsigned char>& content,
                                    std::int64_t blocks_a_part, std::int64_t columns_a_part,
                                    Isa isa) {
    start(content, content == before_ ? 0xff : 0x17);
    const Status status = in_parts(p_, blocks_, std::max<std::int64_t>(blocks_a_part, 1), columns_,
                                   std::max<std::int64_t>(columns_a_part, 1), isa);
    if (!status.ok()) fail("a good call was refused", isa);
    std::vector<unsigned char> expected = content;
    copy_outputs({p_.dx, p_.dweight, p_.dbias, p_.d_mean_square}, expected.data());
    if (memory_ != expected) fail("a byte outside of the outputs changed", isa);
    return expected;
  }

  std::vector<unsigned char> with_other_outputs() {
    start(before_, 0);
    const auto invert = [this](std::int64_t place, std::int64_t bytes) {
      for (std::int64_t i = 0; i < bytes; ++i) {
        unsigned char& byte = memory_[static_cast<std::size_t>(place + i)];
        byte = static_cast<unsigned char>(~byte);
      }
    };
    bool over_input = false;
    for (const rmsnorm::ConstTensor& t : {p_.dy, p_.x, p_.residual, p_.d_residual}) {
      over_input = over_input || (t.present() && t.data == p_.dx.data);
    }
    for (const rmsnorm::Tensor& t : {p_.dx, p_.dweight, p_.dbias, p_.d_mean_square}) {
      if (t.data == p_.dx.data && over_input) continue;
      for_each_element(t, 0, 0, 1, memory_.data(), invert);
    }
    return memory_;
  }

  BackwardParams p_;
  std::vector<unsigned char>& memory_;
  const std::vector<unsigned char> before_;
  std::int64_t blocks_, columns_, bytes_;
  Workspace workspace_;
};

// The first byte at a multiple of 64.
std::int64_t first_line(const unsigned char* arena) {
  return static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(arena) % 64);
}

void expect_refused(const BackwardParams& p, const std::vector<unsigned char>& memory) {
  const std::vector<unsigned char> before = memory;
  if (backward_blocks(p) != 0 || backward_workspace(p) != 0) {
    fail("blocks of a call that check() refuses", Isa::scalar);
  }
  if (backward(p, 0, 0).ok() || backward_reduce(p, 0, 0).ok()) {
    fail("a call that check() refuses is accepted", Isa::scalar);
  }
  if (memory != before) fail("a refused call wrote", Isa::scalar);
}

}  // namespace
}  // namespace rmsnorm_fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace rmsnorm_fuzz;
  tally().input();
  Bytes in(data, size);
  // On the heap and of exactly this size, so that AddressSanitizer fences it.
  std::vector<unsigned char> memory(arena_bytes);
  const BackwardParams p = params_from(in, memory.data());
  const rmsnorm::ConstTensor tensors[] = {p.dy,      p.x,           p.residual,     p.weight,
                                          p.rstd,    p.mean_square, p.d_residual,   p.dx,
                                          p.dweight, p.dbias,       p.d_mean_square};
  for (const rmsnorm::ConstTensor& t : tensors) {
    if (!is_memory(t, memory.data())) return 0;
  }
  const std::int64_t begin = in.below(9) - 1, end = begin + in.below(12);
  const std::int64_t blocks_a_part = 1 + in.below(9), columns_a_part = 1 + in.below(200);
  const std::int64_t workspace_line = in.byte() * 2;
  tally().add_rank(p.x);
  fill(in, &memory);
  if (!check(p).ok()) {
    expect_refused(p, memory);
    return 0;
  }
  tally().add_good_call(p.x, p.axis, p.eps);
  Statistics statistics(data, size);
  statistics.set(p.rstd, memory.data());
  statistics.set(p.mean_square, memory.data());
  Judge judge(p, &memory);
  judge.judge_range(begin, end);
  judge.judge_workspace(first_line(memory.data()) + 64 * workspace_line);
  judge.judge_whole(blocks_a_part, columns_a_part);
  return 0;
}
