// One call of forward: what it is asked to do, memory for it, and what came out.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "guarded_tensor.hpp"
#include "rmsnorm/rmsnorm.hpp"

namespace rmsnorm_test {

using rmsnorm::Rounding;
using rmsnorm::cpu::Isa;

struct TensorSpec {
  bool present = false;
  DType dtype = DType::f32;
  Layout layout = Layout::contiguous;
  int offset = 0;  // elements from a 64-byte boundary
  int shift = 0;   // bytes beyond that
};

inline TensorSpec tensor(DType t, Layout layout = Layout::contiguous, int offset = 0) {
  return TensorSpec{true, t, layout, offset, 0};
}

// Which tensor an output is written over.
enum class Alias { none, x, residual };

// Over which leading dimensions weight and bias vary.
enum class Broadcast {
  shared,      // sizes of the normalised axes only
  per_head,    // one for each index of the last row dimension
  per_sample,  // one for each index of the first row dimension
};

struct Case {
  std::vector<std::int64_t> sizes;
  std::int32_t axis = -1;
  TensorSpec x = tensor(DType::f32);
  TensorSpec residual, weight, bias, mean_square;
  TensorSpec y = tensor(DType::f32);
  TensorSpec residual_out, rstd;
  Broadcast broadcast = Broadcast::shared;
  Alias y_over = Alias::none;
  Alias residual_out_over = Alias::none;
  Rounding rounding = Rounding::once;
  double eps = 1e-6;
  double weight_offset = 0;
  double partial = 1;
  bool round_residual = true;

  std::int64_t rows() const;
  std::int64_t n() const;
  int outer() const;  // number of row dimensions
  bool computes_in_double() const;
  DType compute_type() const { return computes_in_double() ? DType::f64 : DType::f32; }
  DType rstd_type() const { return compute_type(); }
};

std::string describe(const Case& c);

// False for a case with an f16 tensor under RMSNORM_TEST_F16=unchecked: Bochs 2.7 rounds exact ties
// of the conversion to f16 away from zero. Such a case still runs, within its memory bounds.
bool result_is_checked(const Case& c);
// The same of these tensors.
bool result_is_checked(std::initializer_list<TensorSpec> tensors);

// Sizes of weight and bias of the case.
std::vector<std::int64_t> weight_sizes(const Case& c, Broadcast broadcast);
inline std::vector<std::int64_t> weight_sizes(const Case& c) {
  return weight_sizes(c, c.broadcast);
}

// Position of the weight row that belongs to a row of x, times n.
std::int64_t weight_start(const Case& c, std::int64_t row, Broadcast broadcast);
inline std::int64_t weight_start(const Case& c, std::int64_t row) {
  return weight_start(c, row, c.broadcast);
}

// Memory of these sizes, the first `outer` of which are dimensions of rows, with `margin` elements
// of canary around it.
GuardedTensor allocate(const TensorSpec& spec, const std::vector<std::int64_t>& sizes, int outer,
                       int margin);

// All elements, by their row-major position.
std::vector<double> values_of(const GuardedTensor& t);
std::vector<std::uint64_t> bits_of(const GuardedTensor& t);

// " what=dtype/layout", nothing for an absent tensor.
std::string describe(const char* what, const TensorSpec& spec);

// Longer than the widest vector of the narrowest type, twice.
constexpr int canary_margin = 64;

// Values in row-major order; empty when absent.
struct Inputs {
  std::vector<double> x, residual, weight, bias, mean_square;
};

// Bit patterns in row-major order; empty when absent.
struct Results {
  std::vector<std::uint64_t> y, residual_out, rstd;
};

class ForwardProblem {
 public:
  // Fills the inputs with ordinary numbers that depend on the case and the seed alone.
  explicit ForwardProblem(const Case& c, std::uint64_t seed = 1);

  const Case& description() const { return case_; }
  rmsnorm::ForwardParams params();
  Inputs inputs() const;

  // For other contents than the ordinary ones; call `keep` when done.
  GuardedTensor x, residual, weight, bias, mean_square;
  void keep();

  // Runs forward on fresh outputs, each range in turn, and reports as test failures: a status other
  // than ok, and any byte changed that does not belong to an output element of these rows.
  Results run(Isa isa, const std::vector<Range>& row_ranges);
  Results run(Isa isa) { return run(isa, {{0, case_.rows()}}); }

  // The same for another way to compute forward on all rows; `what` names it in failures.
  using Compute = std::function<rmsnorm::Status(const rmsnorm::ForwardParams&)>;
  Results run(const Compute& compute, const std::string& what);

  // The memory of all tensors.
  std::vector<GuardedTensor*> memories();

  // The outputs as they are.
  Results results();

 private:
  void restore();
  Results collect(const std::vector<Range>& row_ranges, const std::string& what);
  GuardedTensor& y_memory();
  GuardedTensor& residual_out_memory();

  Case case_;
  GuardedTensor y_, residual_out_, rstd_;
};

// Test failure with the place of the first difference; NaN equals NaN.
void expect_same(const Case& c, const Results& expected, const Results& got,
                 const std::string& what);

}  // namespace rmsnorm_test
