// The short way to check and lay out the usual call: it takes what it is there for, and nothing
// that check() would refuse or lay_out() would see otherwise. No memory is touched: addresses are
// numbers.
#include <gtest/gtest.h>

#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "float_formats.hpp"
#include "rmsnorm/cpu/call_layout.hpp"
#include "wrong_calls.hpp"

namespace rmsnorm_test {
namespace {

using rmsnorm::ConstTensor;
using rmsnorm::DType;
using rmsnorm::ForwardParams;
using rmsnorm::max_rank;
using rmsnorm::MeanSquareParams;
using rmsnorm::Rounding;
using rmsnorm::Tensor;
using rmsnorm::cpu::detail::lay_out;
using rmsnorm::cpu::detail::lay_out_matrices;
using rmsnorm::detail::Operand;
using rmsnorm::detail::Role;
using rmsnorm::detail::RowLayout;

constexpr auto most = std::numeric_limits<std::int64_t>::max();
constexpr auto least = std::numeric_limits<std::int64_t>::min();

void* address(std::uintptr_t a) { return reinterpret_cast<void*>(a); }

// A view of `rank` of these sizes, in rows of `gap` elements more than they need.
Tensor view(DType t, const std::int64_t* sizes, int rank, int row_rank, std::int64_t gap = 0) {
  Tensor v;
  v.dtype = t;
  v.rank = rank;
  std::int64_t stride = 1;
  for (int d = rank - 1; d >= 0; --d) {
    if (d == row_rank - 1) stride += gap;
    v.sizes[d] = sizes[d];
    v.strides[d] = stride;
    stride *= sizes[d];
  }
  return v;
}

// A call as most are, at addresses of its own.
struct UsualCall {
  UsualCall(Random& random, int rank) {
    for (int d = 0; d < rank; ++d) sizes[d] = random.below(rank > 4 ? 2 : 5) + 1;
    row_rank = static_cast<int>(random.below(rank));
    const auto some = [&] { return random.below(2) == 0; };
    const auto dtype = [&] { return static_cast<DType>(random.below(4)); };
    const auto place = [&](Tensor v) {
      v.data = address(next);
      next += 4096 * 8 * 8;
      return v;
    };
    const auto matrix = [&] {
      return place(view(dtype(), sizes, rank, row_rank, some() ? 0 : random.below(9)));
    };
    const auto row = [&] { return place(view(dtype(), sizes + row_rank, rank - row_rank, 0)); };
    const auto column = [&](DType t) {
      return place(view(t, sizes, row_rank, row_rank, some() ? 0 : 3));
    };
    p.x = matrix();
    p.y = matrix();
    if (some()) p.residual = matrix();
    if (p.residual.present() && some()) p.residual_out = matrix();
    if (some()) p.weight = row();
    if (some()) p.bias = row();
    if (some()) p.mean_square = column(some() ? DType::f32 : DType::f64);
    if (some()) p.rstd = column(compute_type(p));
    p.axis = some() ? row_rank : row_rank - rank;
    if (p.weight.present() && some()) p.weight_offset = 1;
    p.rounding = static_cast<Rounding>(random.below(3));
    if (some()) {
      // An output over an input.
      const ConstTensor& input = p.residual.present() && some() ? p.residual : p.x;
      Tensor& output = p.residual_out.present() && some() ? p.residual_out : p.y;
      output = {};
      output.data = const_cast<void*>(input.data);
      output.dtype = input.dtype;
      output.rank = input.rank;
      for (int d = 0; d < rank; ++d) {
        output.sizes[d] = input.sizes[d];
        output.strides[d] = input.strides[d];
      }
      if (p.rstd.present()) p.rstd.dtype = compute_type(p);
    }
  }

  std::int64_t sizes[max_rank];
  int row_rank;
  std::uintptr_t next = 1 << 20;
  ForwardParams p;
};

std::string words(const ForwardParams& p) {
  std::ostringstream out;
  out << "axis " << p.axis << " eps " << p.eps << " offset " << p.weight_offset << " partial "
      << p.partial << " rounding " << static_cast<int>(p.rounding);
  rmsnorm::detail::for_each_tensor(p, [&](rmsnorm::Argument argument, const auto& t) {
    out << '\n' << name(argument) << ": dtype " << static_cast<int>(t.dtype) << " at " << t.data;
    for (int d = 0; d < t.rank && d < max_rank; ++d) {
      out << ' ' << t.sizes[d] << " by " << t.strides[d];
    }
  });
  return out.str();
}

void expect_same_layout(const RowLayout& a, const RowLayout& b) {
  ASSERT_EQ(a.n(), b.n());
  ASSERT_EQ(a.rows(), b.rows());
  ASSERT_EQ(a.row_rank(), b.row_rank());
  ASSERT_EQ(a.count(), b.count());
  for (int d = 0; d < a.row_rank(); ++d) EXPECT_EQ(a.row_size(d), b.row_size(d));
  for (int role = 0; role < rmsnorm::detail::role_count; ++role) {
    const Operand& o = a.operand(static_cast<Role>(role));
    const Operand& other = b.operand(static_cast<Role>(role));
    ASSERT_EQ(o.present, other.present) << role;
    EXPECT_EQ(o.run_stride, other.run_stride) << role;
    if (!o.present) continue;
    EXPECT_EQ(o.dtype, other.dtype) << role;
    EXPECT_EQ(o.data, other.data) << role;
    for (int d = 0; d < a.row_rank(); ++d) EXPECT_EQ(o.row_strides[d], other.row_strides[d]);
    // Of tensors with one element a row nothing asks whether they have a stride of one.
    if (role != rmsnorm::detail::role_rstd && role != rmsnorm::detail::role_mean_square) {
      EXPECT_EQ(o.unit, other.unit) << role;
    }
  }
}

// Whether the call is recognised, and then good and laid out as by lay_out(); and lay_out() does
// what it does whatever was recognised before.
template <class Params>
bool is_recognised(const Params& p) {
  RowLayout tried;
  const bool recognised = lay_out_matrices(p, &tried);
  const bool good = check(p).ok();
  EXPECT_TRUE(good || !recognised);
  if (!good) return recognised;
  RowLayout made;
  lay_out(p, &made);
  if (recognised) expect_same_layout(tried, made);
  lay_out(p, &tried);
  expect_same_layout(tried, made);
  return recognised;
}

MeanSquareParams mean_square_of(const ForwardParams& p) {
  MeanSquareParams m;
  m.x = p.x;
  m.mean_square = p.rstd;
  m.axis = p.axis;
  m.partial = p.partial;
  return m;
}

TEST(CallLayout, TheUsualCallIsRecognised) {
  Random random(5);
  for (int i = 0; i < 20000; ++i) {
    const UsualCall call(random, 1 + i % max_rank);
    ASSERT_TRUE(is_recognised(call.p)) << words(call.p);
    ASSERT_TRUE(!call.p.rstd.present() || is_recognised(mean_square_of(call.p))) << words(call.p);
    if (HasFailure()) FAIL() << words(call.p);
  }
}

TEST(CallLayout, NoWrongCallIsRecognised) {
  for (const WrongCall& wrong : wrong_calls()) {
    GoodCall g;
    wrong.make(g);
    EXPECT_FALSE(is_recognised(g.p)) << wrong.what;
  }
  for (const WrongMeanSquare& wrong : wrong_mean_squares()) {
    const GoodCall g;
    MeanSquareParams p = good_mean_square(g);
    wrong.make(p);
    EXPECT_FALSE(is_recognised(p)) << wrong.what;
  }
}

// One thing after the other is made unusual, until the call is recognised by mistake or never.
class Spoiler {
 public:
  Spoiler(Random& random, UsualCall& call) : random_(random), call_(call), p_(call.p) {
    rmsnorm::detail::for_each_tensor(p_, [&](rmsnorm::Argument, auto& t) {
      if (t.present()) ++present_;
    });
  }

  void spoil() {
    switch (random_.below(12)) {
      case 0:
      case 1: return of_any([&](auto& t) { t.strides[dimension()] = stride(t); });
      case 2: return of_any([&](auto& t) { t.sizes[dimension()] = size(); });
      case 3: return size_of_all();
      case 4:
      case 5: return of_any([&](auto& t) { t.data = place(t); });
      case 6: return of_any([&](auto& t) { t.dtype = static_cast<DType>(random_.below(7) - 1); });
      case 7:
        return of_any(
            [&](auto& t) { t.rank = static_cast<std::int32_t>(random_.below(max_rank + 3) - 1); });
      case 8:
        p_.axis =
            pick<std::int32_t>({-1, 0, 1, 2, 7, 8, -8, -9, std::numeric_limits<std::int32_t>::max(),
                                std::numeric_limits<std::int32_t>::min()});
        return;
      case 9: p_.eps = option(); return;
      case 10: (random_.below(2) == 0 ? p_.weight_offset : p_.partial) = option(); return;
      default: p_.rounding = static_cast<Rounding>(random_.below(6) - 2); return;
    }
  }

 private:
  template <class T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[random_.below(static_cast<std::int64_t>(values.size()))];
  }

  template <class Change>
  void of_any(Change change) {
    std::int64_t left = random_.below(present_);
    rmsnorm::detail::for_each_tensor(p_, [&](rmsnorm::Argument, auto& t) {
      if (t.present() && left-- == 0) change(t);
    });
  }

  int dimension() {
    const int rank = p_.x.rank >= 1 && p_.x.rank <= max_rank ? p_.x.rank : max_rank;
    return static_cast<int>(random_.below(rank));
  }
  template <class View>
  std::int64_t stride(const View& t) {
    const std::int64_t found = t.strides[dimension()];
    // That is changed by one.
    const std::int64_t near = found == most || found == least ? 0 : found;
    const std::int64_t power = std::int64_t{1} << random_.below(63);
    return pick<std::int64_t>({0, 1, -1, near, near - 1, near + 1, -near, power, power - 1, -power,
                               most, most - 1, least});
  }
  std::int64_t size() {
    const std::int64_t power = std::int64_t{1} << random_.below(63);
    return pick<std::int64_t>({0, 1, 2, -1, power, power - 1, power + 1, most, least});
  }
  void ranks() {
    const auto rank = static_cast<std::int32_t>(random_.below(max_rank + 3) - 1);
    if (random_.below(2) == 0) return of_any([&](auto& t) { t.rank = rank; });
    p_.x.rank = p_.y.rank = rank;
    p_.residual = {};
    p_.residual_out = {};
  }
  // The same dimension of every tensor, whose strides grow with it or not.
  void size_of_all() {
    const int from_last = dimension() + 1;
    const std::int64_t to = size();
    const bool packed = random_.below(2) == 0;
    rmsnorm::detail::for_each_tensor(p_, [&](rmsnorm::Argument argument, auto& t) {
      const bool per_row =
          argument == rmsnorm::Argument::mean_square || argument == rmsnorm::Argument::rstd;
      const int normalised = per_row ? p_.x.rank - call_.row_rank : 0;
      const int d = t.rank - (from_last - normalised);
      if (!t.present() || t.rank > max_rank || d < 0 || d >= t.rank) return;
      t.sizes[d] = to;
      if (!packed) return;
      for (int i = d - 1; i >= 0; --i) {
        const auto product = static_cast<std::uint64_t>(t.sizes[i + 1]) *
                             static_cast<std::uint64_t>(t.strides[i + 1]);
        t.strides[i] = static_cast<std::int64_t>(product);
      }
    });
  }
  // At, before or behind another tensor, at no address or at one of the last.
  template <class View>
  void* place(const View& t) {
    std::uintptr_t other = 0;
    of_any([&](auto& o) { other = reinterpret_cast<std::uintptr_t>(o.data); });
    const auto own = reinterpret_cast<std::uintptr_t>(t.data);
    const auto some = static_cast<std::uintptr_t>(random_.below(300));
    return address(pick<std::uintptr_t>(
        {0, 8, own + 1, own + 2, own + 4, other, other + some * 8, other - some * 8, other + some,
         std::numeric_limits<std::uintptr_t>::max() - some,
         std::numeric_limits<std::uintptr_t>::max() - some * 8 - 7}));
  }
  double option() {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    return pick<double>({0, 0.5, 1, 2, -1, -0.0, std::numeric_limits<double>::quiet_NaN(), infinity,
                         -infinity, 1e-310});
  }

  Random& random_;
  UsualCall& call_;
  ForwardParams& p_;
  int present_ = 0;
};

TEST(CallLayout, WhatIsRecognisedIsGood) {
  Random random(6);
  int recognised = 0, good = 0, refused = 0;
  for (int i = 0; i < 300000; ++i) {
    UsualCall call(random, 1 + i % max_rank);
    Spoiler spoiler(random, call);
    for (std::int64_t changes = random.below(3); changes >= 0; --changes) spoiler.spoil();
    const bool is_known = is_recognised(call.p);
    if (call.p.rstd.present()) is_recognised(mean_square_of(call.p));
    if (HasFailure()) FAIL() << words(call.p);
    (is_known ? recognised : check(call.p).ok() ? good : refused)++;
  }
  // Calls of each kind were among them.
  EXPECT_GT(recognised, 30000);
  EXPECT_GT(good, 10000);
  EXPECT_GT(refused, 100000);
}

// Rows that lie far apart, up to where the arithmetic ends.
TEST(CallLayout, LargeStridesAndSizes) {
  for (const DType t : {DType::f16, DType::f32, DType::f64}) {
    for (int rows = 0; rows < 63; ++rows) {
      for (int stride = 0; stride < 63; ++stride) {
        for (const std::int64_t more : {-1, 0, 1}) {
          ForwardParams p;
          p.x = rmsnorm::matrix(static_cast<const float*>(address(1 << 20)),
                                std::int64_t{1} << rows, 4, (std::int64_t{1} << stride) + more);
          p.y = rmsnorm::matrix(static_cast<float*>(address(std::uintptr_t{3} << 62)),
                                std::int64_t{1} << rows, 4, (std::int64_t{1} << stride) - more);
          p.x.dtype = p.y.dtype = t;
          const bool usual = rows < 20 && stride > 2 && stride < 20;
          ASSERT_EQ(is_recognised(p) || !usual, true) << rows << ' ' << stride << ' ' << more;
          if (HasFailure()) FAIL() << words(p);
        }
      }
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
