// Which outputs may share memory with what.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "forward_problem.hpp"
#include "instruction_sets.hpp"

namespace rmsnorm_test {
namespace {

using rmsnorm::Argument;
using rmsnorm::Code;
using rmsnorm::ForwardParams;
using rmsnorm::Status;

constexpr std::int64_t rows = 4, n = 40;

rmsnorm::Tensor view(float* data, std::int64_t r, std::int64_t s) {
  rmsnorm::Tensor t = rmsnorm::matrix(data, rows, n, r);
  t.strides[1] = s;
  return t;
}

std::vector<float> numbers(std::size_t count) {
  std::vector<float> v(count);
  Random random(31);
  for (float& f : v) f = static_cast<float>(random.bell());
  return v;
}

void expect_overlap(const ForwardParams& p, Argument output, std::vector<float>& memory,
                    const char* what) {
  const std::vector<float> before = memory;
  EXPECT_EQ(check(p).code, Code::overlap) << what;
  EXPECT_EQ(check(p).argument, output) << what;
  EXPECT_EQ(rmsnorm::cpu::forward(p, 0, rows).code, Code::overlap) << what;
  EXPECT_EQ(memory, before) << what;
}

TEST(Aliasing, ExactAliasesGiveTheSameBits) {
  for (const DType t : all_dtypes) {
    for (const Layout layout : output_layouts) {
      Case apart;
      apart.sizes = {2, 3, 5, 11};
      apart.axis = 2;
      apart.x = apart.residual = apart.y = apart.residual_out = apart.weight = tensor(t, layout);
      apart.rstd = tensor(apart.rstd_type());
      const Results expected = ForwardProblem(apart).run(Isa::scalar);
      for (const Alias y_over : {Alias::none, Alias::x, Alias::residual}) {
        for (const Alias sum_over : {Alias::none, Alias::x, Alias::residual}) {
          if (y_over == sum_over && y_over != Alias::none) continue;
          Case over = apart;
          over.y_over = y_over;
          over.residual_out_over = sum_over;
          for (const Isa isa : available_isas()) {
            expect_same(over, expected, ForwardProblem(over).run(isa), name(isa));
          }
        }
      }
    }
  }
}

// f16 over bf16: the same elements, another format. An f32 residual makes the general path take it.
TEST(Aliasing, AnAliasMayHaveAnotherDtypeOfTheSameSize) {
  for (const bool with_residual : {false, true}) {
    Case apart;
    apart.sizes = {3, 333};
    apart.x = apart.weight = tensor(DType::bf16);
    apart.y = tensor(DType::f16);
    if (with_residual) apart.residual = tensor(DType::f32);
    const Results expected = ForwardProblem(apart).run(Isa::scalar);
    Case over = apart;
    over.y_over = Alias::x;
    for (const Isa isa : available_isas()) {
      expect_same(over, expected, ForwardProblem(over).run(isa), name(isa));
    }
  }
}

// x and residual one and the same tensor, and y over both.
TEST(Aliasing, InputsMayBeTheSameTensor) {
  std::vector<float> memory = numbers(rows * n), apart(rows * n);
  ForwardParams p;
  p.x = p.residual = rmsnorm::matrix<const float>(memory.data(), rows, n);
  p.weight = rmsnorm::vector<const float>(memory.data() + 7, n);
  p.y = rmsnorm::matrix(apart.data(), rows, n);
  ASSERT_TRUE(rmsnorm::cpu::forward(p, 0, rows).ok());
  p.weight = {};
  ASSERT_TRUE(rmsnorm::cpu::forward(p, 0, rows).ok());
  p.y = rmsnorm::matrix(memory.data(), rows, n);
  ASSERT_TRUE(rmsnorm::cpu::forward(p, 0, rows).ok());
  EXPECT_EQ(memory, apart);
}

TEST(Aliasing, PartialOverlapIsRefused) {
  std::vector<float> memory = numbers(4 * rows * n);
  float* x = memory.data() + rows * n;
  for (const std::int64_t shift : {1, 2, 39, 40, 41, 159, -1, -40, -159}) {
    ForwardParams p;
    p.x = view(x, n, 1);
    p.y = view(x + shift, n, 1);
    expect_overlap(p, Argument::y, memory, "shifted");
  }
  for (const std::int64_t shift : {160, -160}) {
    ForwardParams p;
    p.x = view(x, n, 1);
    p.y = view(x + shift, n, 1);
    EXPECT_TRUE(check(p).ok()) << shift;
  }
  ForwardParams p;
  p.x = view(x, n, 1);
  p.y = view(x, n + 1, 1);
  expect_overlap(p, Argument::y, memory, "other row stride");
  p.y = view(x + (rows * n - 1), -n, -1);
  expect_overlap(p, Argument::y, memory, "backwards");
  p.x = view(x, 0, 1);
  p.y = view(x, n, 1);
  expect_overlap(p, Argument::y, memory, "over the row that is broadcast");
}

TEST(Aliasing, OutputsOverOtherInputsAreRefused) {
  std::vector<float> memory = numbers(8 * rows * n);
  float* const place = memory.data();
  constexpr std::int64_t size = rows * n;
  ForwardParams p;
  p.x = view(place, n, 1);
  p.residual = view(place + size, n, 1);
  p.weight = rmsnorm::vector<const float>(place + 2 * size, n);
  p.bias = rmsnorm::vector<const float>(place + 3 * size, n);
  p.y = view(place + 4 * size, n, 1);
  p.residual_out = view(place + 5 * size, n, 1);
  p.rstd = rmsnorm::vector(place + 6 * size, rows);
  ASSERT_TRUE(check(p).ok());

  ForwardParams q = p;
  q.y = view(place + 2 * size, n, 1);
  expect_overlap(q, Argument::y, memory, "y over weight");
  q = p;
  q.y.data = place + 3 * size + 39;
  expect_overlap(q, Argument::y, memory, "y over the end of bias");
  q = p;
  q.y.data = q.residual_out.data;
  const Status status = check(q);
  EXPECT_EQ(status.code, Code::overlap);
  EXPECT_TRUE(status.argument == Argument::y || status.argument == Argument::residual_out);
  q = p;
  q.residual_out.data = place + 2 * size;
  expect_overlap(q, Argument::residual_out, memory, "residual_out over weight");
  for (const std::int64_t input : {0, 1, 2, 3}) {
    q = p;
    q.rstd.data = place + input * size + 20;
    expect_overlap(q, Argument::rstd, memory, "rstd over an input");
  }
  q = p;
  q.rstd.data = place + 4 * size;
  EXPECT_EQ(check(q).code, Code::overlap) << "rstd over y";

  q = p;
  q.residual = {};
  q.residual_out = {};
  q.mean_square = rmsnorm::vector<const float>(place + 4 * size + 5, rows);
  expect_overlap(q, Argument::y, memory, "y over mean_square");
  q.mean_square.data = place + 6 * size;
  expect_overlap(q, Argument::rstd, memory, "rstd over mean_square");

  rmsnorm::MeanSquareParams m;
  m.x = p.x;
  m.mean_square = rmsnorm::vector(place + 3, rows);
  EXPECT_EQ(check(m).code, Code::overlap);
  EXPECT_EQ(check(m).argument, Argument::mean_square);
}

// Columns of one wider buffer lie between each other without touching.
TEST(Aliasing, InterleavedSlicesAreAllowed) {
  std::vector<float> packed = numbers(3 * rows * n), apart(rows * n);
  const std::vector<float> before = packed;
  ForwardParams p;
  p.x = view(packed.data(), 3 * n, 1);
  p.residual = view(packed.data() + n, 3 * n, 1);
  p.y = view(apart.data(), n, 1);
  ASSERT_TRUE(rmsnorm::cpu::forward(p, 0, rows).ok());
  p.y = view(packed.data() + 2 * n, 3 * n, 1);
  ASSERT_TRUE(rmsnorm::cpu::forward(p, 0, rows).ok());
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t i = 0; i < 3 * n; ++i) {
      const auto place = static_cast<std::size_t>(row * 3 * n + i);
      const auto result = static_cast<std::size_t>(row * n + i - 2 * n);
      ASSERT_EQ(packed[place], i < 2 * n ? before[place] : apart[result]);
    }
  }
  // One column too far.
  p.y = view(packed.data() + 2 * n + 1, 3 * n, 1);
  EXPECT_EQ(check(p).code, Code::overlap);
  // Even and odd elements of one buffer.
  std::vector<float> woven = numbers(2 * rows * n);
  p = {};
  p.x = view(woven.data(), 2 * n, 2);
  p.y = view(woven.data() + 1, 2 * n, 2);
  EXPECT_TRUE(check(p).ok());
  p.y = view(woven.data() + 2, 2 * n, 2);
  EXPECT_EQ(check(p).code, Code::overlap);
}

TEST(Aliasing, SlicesOfAPackedProjectionAreAllowed) {
  constexpr std::int64_t tokens = 3, heads = 4, head = 16, width = 3 * heads * head;
  std::vector<float> qkv = numbers(tokens * width);
  const auto slice = [&](std::int64_t which) {
    rmsnorm::Tensor t;
    t.data = qkv.data() + which * heads * head;
    t.rank = 3;
    const std::int64_t sizes[] = {tokens, heads, head}, strides[] = {width, head, 1};
    std::copy(sizes, sizes + 3, t.sizes);
    std::copy(strides, strides + 3, t.strides);
    return t;
  };
  ForwardParams p;
  p.x = slice(0);
  p.y = slice(1);
  EXPECT_TRUE(check(p).ok());
  p.y = slice(0);
  EXPECT_TRUE(check(p).ok());
  p.y.data = qkv.data() + heads * head - head;
  EXPECT_EQ(check(p).code, Code::overlap);
}

// y in f64 over an f32 x: the same address, elements of another size.
TEST(Aliasing, ElementsOfAnotherSizeAreNoAlias) {
  std::vector<double> memory(rows * n);
  ForwardParams p;
  p.x = rmsnorm::matrix<const float>(reinterpret_cast<const float*>(memory.data()), rows, n);
  p.y = rmsnorm::matrix(memory.data(), rows, n);
  EXPECT_EQ(check(p).code, Code::overlap);
  EXPECT_EQ(check(p).argument, Argument::y);
}

// Against the bytes themselves: small tensors of any layout in one buffer. An output that is
// refused for itself must share bytes with itself or have dimensions that interleave.
TEST(Aliasing, RefusesWhatTheBytesSay) {
  constexpr std::int64_t size = 4, buffer = 4096;
  alignas(64) static char memory[buffer];
  Random random(47);
  const auto pick = [&](std::int64_t least, std::int64_t most) {
    return least + random.below(most - least + 1);
  };
  int refused = 0, allowed = 0, exact = 0, interleaved = 0;
  for (int round = 0; round < 60000; ++round) {
    rmsnorm::Tensor x, y;
    x.rank = y.rank = static_cast<std::int32_t>(pick(1, 3));
    const bool ordered = pick(0, 1) == 0, alike = pick(0, 3) == 0;
    std::int64_t compact = 1;
    for (int d = x.rank - 1; d >= 0; --d) {
      x.sizes[d] = y.sizes[d] = pick(0, 30) == 0 ? 0 : pick(1, 3);
      x.strides[d] = ordered ? compact : pick(-9, 9);
      y.strides[d] = alike ? x.strides[d] : pick(0, 2) == 0 ? -compact : pick(-9, 9);
      compact *= x.sizes[d];
    }
    // Bytes apart from a multiple of the element size, as in packed records.
    const std::int64_t shift = pick(0, 3) == 0 ? 0 : pick(-120, 120);
    x.data = memory + buffer / 2;
    y.data = memory + buffer / 2 + shift;
    const auto offsets = [&](const rmsnorm::Tensor& t) {
      std::vector<std::int64_t> found = {static_cast<char*>(t.data) - memory};
      for (int d = 0; d < t.rank; ++d) {
        std::vector<std::int64_t> next;
        for (const std::int64_t at : found)
          for (std::int64_t i = 0; i < t.sizes[d]; ++i)
            next.push_back(at + i * t.strides[d] * size);
        found = next;
      }
      return found;
    };
    const auto share = [](const std::vector<std::int64_t>& a, const std::vector<std::int64_t>& b) {
      for (const std::int64_t& i : a)
        for (const std::int64_t& j : b)
          if (&i != &j && i - j < size && j - i < size) return true;
      return false;
    };
    const std::vector<std::int64_t> of_x = offsets(x), of_y = offsets(y);
    ForwardParams p;
    p.x = x;
    p.y = y;
    const Status status = check(p);
    if (share(of_y, of_y)) {
      ASSERT_EQ(status.code, Code::self_overlap) << round;
    } else if (status.code == Code::self_overlap) {
      ++interleaved;
    } else if (of_x == of_y) {
      ASSERT_TRUE(status.ok()) << round;
      ++exact;
    } else {
      ASSERT_EQ(status.code, share(of_x, of_y) ? Code::overlap : Code::ok) << round;
      ++(status.ok() ? allowed : refused);
    }
  }
  // Each outcome was met.
  EXPECT_GT(refused, 1000);
  EXPECT_GT(allowed, 1000);
  EXPECT_GT(exact, 1000);
  EXPECT_LT(interleaved, 6000);
}

TEST(Aliasing, OutputsMustNotOverlapThemselves) {
  std::vector<float> x = numbers(4 * rows * n), y(4 * rows * n, -7.0f);
  const std::vector<float> untouched = y;
  struct Strides {
    std::int64_t row, inner;
  };
  for (const Strides s : {Strides{0, 1}, {1, 0}, {0, 0}, {39, 1}, {1, 1}, {-39, 1}, {2, 2}}) {
    ForwardParams p;
    p.x = view(x.data(), n, 1);
    p.y = view(y.data() + 2 * rows * n, s.row, s.inner);
    EXPECT_EQ(rmsnorm::cpu::forward(p, 0, rows).code, Code::self_overlap)
        << s.row << ',' << s.inner;
    EXPECT_EQ(check(p).argument, Argument::y);
    p.residual = p.x;
    p.residual_out = p.y;
    p.y = view(y.data(), n, 1);
    EXPECT_EQ(check(p).code, Code::self_overlap);
    EXPECT_EQ(check(p).argument, Argument::residual_out);
  }
  ForwardParams p;
  p.x = view(x.data(), n, 1);
  p.y = view(y.data(), n, 1);
  p.rstd = rmsnorm::vector(y.data() + 2 * rows * n, rows);
  p.rstd.strides[0] = 0;
  EXPECT_EQ(check(p).code, Code::self_overlap);
  EXPECT_EQ(check(p).argument, Argument::rstd);
  EXPECT_EQ(y, untouched);
  // A stride of a dimension of one does not count.
  p.rstd = {};
  p.x.sizes[0] = p.y.sizes[0] = 1;
  p.y.strides[0] = 0;
  EXPECT_TRUE(check(p).ok());
}

// Dimensions in another order than that of memory, and backwards: no element is shared.
TEST(Aliasing, OutputsMayBeTransposedAndReversed) {
  std::vector<float> x = numbers(rows * n), y(rows * n);
  float* const last = y.data() + rows * n - 1;
  for (const rmsnorm::Tensor& out :
       {view(y.data(), 1, rows), view(last, -1, -rows), view(last, -n, -1)}) {
    ForwardParams p;
    p.x = view(x.data(), n, 1);
    p.y = out;
    EXPECT_TRUE(check(p).ok());
    p.x = out;
    EXPECT_TRUE(check(p).ok());
    p.weight = rmsnorm::vector<const float>(y.data(), n);
    EXPECT_EQ(check(p).code, Code::overlap);
  }
}

// Nothing is written to an output without elements, wherever it lies.
TEST(Aliasing, EmptyTensorsOverlapNothing) {
  std::vector<float> memory = numbers(rows * n);
  ForwardParams p;
  p.x = rmsnorm::matrix<const float>(memory.data(), 0, n, 0);
  p.weight = rmsnorm::vector<const float>(memory.data(), n);
  p.y = rmsnorm::matrix(memory.data() + 1, 0, n, 0);
  EXPECT_TRUE(check(p).ok());
  p.x.sizes[0] = p.y.sizes[0] = rows;
  p.x.sizes[1] = p.y.sizes[1] = p.weight.sizes[0] = 0;
  EXPECT_TRUE(check(p).ok());
}

}  // namespace
}  // namespace rmsnorm_test
