// Every order in which a kernel may take its rows, on every CPU: calls only take those that suit
// the CPU that they run on. Compiled from the headers, since the compiled library exports no
// kernels.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <rmsnorm/rmsnorm.hpp>
#include <string>
#include <vector>

namespace {

using rmsnorm::DType;
using namespace rmsnorm::cpu;
using detail::NormKernel;
using detail::NormProgress;
using detail::NormRows;
using detail::RowWalk;

constexpr DType dtypes[] = {DType::f16, DType::bf16, DType::f32, DType::f64};
constexpr std::int64_t lengths[] = {1,  5,  8,   16,  31,  32,  33,  48,
                                    64, 96, 100, 128, 200, 256, 257, 520};
constexpr std::int64_t row_counts[] = {1, 3, 16, 21, 37};
constexpr char canary = 0x5a;
constexpr std::int64_t line = 64;

// Rows from a 64-byte boundary on, with a gap behind each of them.
class Rows {
 public:
  Rows(DType t, std::int64_t rows, std::int64_t n)
      : dtype_(t), stride_((n * rmsnorm::size_in_bytes(t) + 2 * line - 1) / line * line) {
    Line empty;
    std::memset(empty.bytes, canary, line);
    lines_.assign(static_cast<std::size_t>(rows * stride_ / line), empty);
  }
  char* data() { return lines_.data()->bytes; }
  std::int64_t stride() const { return stride_; }
  // Numbers around one, whose squares neither overflow nor vanish.
  void fill(std::int64_t rows, std::int64_t n, unsigned seed) {
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t i = 0; i < n; ++i) {
        seed = seed * 1664525u + 1013904223u;
        set(r, i, static_cast<double>(static_cast<int>(seed >> 16) % 4001 - 2000) / 1024);
      }
    }
  }
  void set(std::int64_t r, std::int64_t i, double value) {
    char* p = data() + r * stride_ + i * rmsnorm::size_in_bytes(dtype_);
    if (dtype_ == DType::f64) {
      std::memcpy(p, &value, sizeof(value));
      return;
    }
    const auto narrow = static_cast<float>(value);
    if (dtype_ == DType::f32) {
      std::memcpy(p, &narrow, sizeof(narrow));
    } else if (dtype_ == DType::bf16) {
      const auto v = rmsnorm::detail::narrow<rmsnorm::bfloat16>::from(narrow);
      std::memcpy(p, &v, sizeof(v));
    } else {
      const auto v = rmsnorm::detail::narrow<rmsnorm::float16>::from(narrow);
      std::memcpy(p, &v, sizeof(v));
    }
  }
  bool has_bytes_of(Rows& other, std::int64_t first, std::int64_t last) {
    return std::memcmp(data() + first * stride_, other.data() + first * stride_,
                       static_cast<std::size_t>((last - first) * stride_)) == 0;
  }

 private:
  struct alignas(line) Line {
    char bytes[line];
  };

  DType dtype_;
  std::int64_t stride_;
  std::vector<Line> lines_;
};

// A kernel with its tensors but for the outputs.
struct Problem {
  NormKernel kernel;
  DType t, weight_dtype;
  std::int64_t rows, n;
  bool has_weight, adds;
  double offset;
  Rows x, residual, w;

  Problem(NormKernel norm, DType dtype, int kind, std::int64_t row_count, std::int64_t length,
          bool with_residual, double weight_offset)
      : kernel(norm),
        t(dtype),
        weight_dtype(kind == 2 ? DType::f32 : dtype),
        rows(row_count),
        n(length),
        has_weight(kind != 0),
        adds(with_residual),
        offset(weight_offset),
        x(t, rows, n),
        residual(t, rows, n),
        w(weight_dtype, 1, n) {
    x.fill(rows, n, 1);
    residual.fill(rows, n, 2);
    w.fill(1, n, 3);
  }
};

struct Outputs {
  Rows y, out, rstd;
  explicit Outputs(const Problem& p)
      : y(p.t, p.rows, p.n),
        out(p.t, p.rows, p.n),
        rstd(p.t == DType::f64 ? DType::f64 : DType::f32, p.rows, 1) {}
};

struct Way {
  RowWalk walk;
  int group;
  bool fetches, streams;
};
constexpr Way reference = {RowWalk::groups, 1, false, false};
std::vector<Way> ways() {
  std::vector<Way> all;
  for (const bool fetches : {false, true}) {
    for (const bool streams : {false, true}) {
      all.push_back({RowWalk::groups, 5, fetches, streams});
      for (const RowWalk walk :
           {RowWalk::groups, RowWalk::short_rows, RowWalk::one_by_one, RowWalk::side_by_side}) {
        all.push_back({walk, detail::max_group, fetches, streams});
      }
    }
  }
  return all;
}

NormProgress run(Problem& p, const Way& way, Outputs* to) {
  NormRows a;
  a.x = p.x.data();
  a.x_stride = a.x_ahead = p.x.stride();
  if (p.adds) {
    a.residual = p.residual.data();
    a.residual_stride = a.residual_ahead = p.residual.stride();
    a.out = to->out.data();
    a.out_stride = a.out_ahead = to->out.stride();
  }
  if (p.has_weight) a.w = p.w.data();
  a.y = to->y.data();
  a.y_stride = a.y_ahead = to->y.stride();
  a.rstd = to->rstd.data();
  a.rstd_stride = to->rstd.stride();
  a.n = a.counted = p.n;
  a.rows = p.rows;
  a.eps = 1e-6;
  a.offset = p.offset;
  a.fetches = way.fetches;
  a.streams = way.streams;
  a.walk = way.walk;
  a.group = way.group;
  const NormProgress progress = p.kernel(a);
  if (way.streams) detail::finish_streams();
  return progress;
}

// Calls test(problem, about) for the kernels of all ISAs that can run here.
template <class Test>
void for_each_problem(Test test) {
  for (const Isa isa : every_isa) {
    if (!available(isa)) continue;
    const detail::KernelTable& table = detail::kernels({isa, true});
    for (const DType t : dtypes) {
      for (int kind = 0; kind < detail::weight_kind_count; ++kind) {
        for (int rounds = 0; rounds < 2; ++rounds) {
          const NormKernel norm = table.norm[static_cast<int>(t)][kind][rounds];
          if (norm == nullptr) continue;
          for (const std::int64_t n : lengths) {
            for (const std::int64_t rows : row_counts) {
              const bool adds = (n + rows + rounds) % 2 == 0;
              for (const double offset : {-0.0, 1.0}) {
                Problem p(norm, t, kind, rows, n, adds, offset);
                test(p, std::string(name(isa)) + ' ' + rmsnorm::name(t) + ' ' +
                            std::to_string(rows) + " x " + std::to_string(n) + " weight " +
                            std::to_string(kind) + (adds ? " add" : ""));
              }
            }
          }
        }
      }
    }
  }
}

TEST(RowWalk, AllGiveTheSameBits) {
  for_each_problem([](Problem& p, const std::string& about) {
    Outputs expected(p);
    ASSERT_EQ(run(p, reference, &expected).done, p.rows) << about;
    for (const Way& way : ways()) {
      Outputs found(p);
      ASSERT_EQ(run(p, way, &found).done, p.rows) << about;
      const std::string which = about + " walk " + std::to_string(static_cast<int>(way.walk));
      EXPECT_TRUE(found.y.has_bytes_of(expected.y, 0, p.rows)) << which;
      EXPECT_TRUE(found.out.has_bytes_of(expected.out, 0, p.rows)) << which;
      EXPECT_TRUE(found.rstd.has_bytes_of(expected.rstd, 0, p.rows)) << which;
    }
  });
}

TEST(RowWalk, RowsThatAreNotSafeAreLeft) {
  for_each_problem([](Problem& p, const std::string& about) {
    if (p.t == DType::f16) return;  // all of its numbers are safe
    Outputs expected(p), untouched(p);
    run(p, reference, &expected);
    for (const std::int64_t bad : {std::int64_t{0}, p.rows / 2, p.rows - 1}) {
      Problem with_bad = p;
      with_bad.x.set(bad, p.n / 2, p.t == DType::f64 ? 1e200 : 1e30);
      for (const Way& way : ways()) {
        Outputs found(p);
        const NormProgress progress = run(with_bad, way, &found);
        const std::string which = about + " walk " + std::to_string(static_cast<int>(way.walk)) +
                                  " row " + std::to_string(bad);
        ASSERT_LE(progress.done, bad) << which;
        ASSERT_GT(progress.measured, bad) << which;
        ASSERT_LE(progress.measured, p.rows) << which;
        EXPECT_TRUE(found.y.has_bytes_of(expected.y, 0, progress.done)) << which;
        EXPECT_TRUE(found.rstd.has_bytes_of(expected.rstd, 0, progress.done)) << which;
        EXPECT_TRUE(found.y.has_bytes_of(untouched.y, progress.done, p.rows)) << which;
        EXPECT_TRUE(found.rstd.has_bytes_of(untouched.rstd, progress.done, p.rows)) << which;
      }
    }
  });
}

}  // namespace
