// One call of backward: what it is asked to do, memory for it, and what came out.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "forward_problem.hpp"

namespace rmsnorm_test {

// Which tensor dx is written over.
enum class GradientAlias { none, dy, x, residual, d_residual };

// The forward call that is differentiated, and the tensors that only backward has. Of `forward` it
// uses x, residual (then the unrounded sum was normalised), weight, rstd and mean_square (given
// where present), and the options.
struct GradientCase {
  Case forward;
  TensorSpec dy = tensor(DType::f32);
  TensorSpec d_residual;
  TensorSpec dx = tensor(DType::f32);
  TensorSpec dweight, dbias, d_mean_square;
  Broadcast bias_broadcast = Broadcast::shared;
  GradientAlias dx_over = GradientAlias::none;

  bool computes_in_double() const;
  DType compute_type() const { return computes_in_double() ? DType::f64 : DType::f32; }
};

std::string describe(const GradientCase& c);

// The gradient of a case of the forward grid: dy in the layout of y, d_residual where there is a
// residual_out, dbias where there is a bias, rstd given where it was asked for; an output over an
// input becomes dx over one.
GradientCase gradient_of(const Case& c);

// Those of all_cases(), and weights and biases that vary over different dimensions.
const std::vector<GradientCase>& gradient_cases();

// Values in row-major order; empty when absent.
struct GradientInputs {
  std::vector<double> dy, x, residual, weight, rstd, mean_square, d_residual;
};

// Bit patterns in row-major order; empty when absent.
struct GradientResults {
  std::vector<std::uint64_t> dx, dweight, dbias, d_mean_square;
};

class BackwardProblem {
 public:
  using WorkspaceBytes = std::function<std::int64_t(const rmsnorm::BackwardParams&)>;
  using Compute = std::function<rmsnorm::Status(const rmsnorm::BackwardParams&)>;

  // Fills the inputs with ordinary numbers that depend on the case and the seed alone. A given rstd
  // is a quarter larger than that of x, so that one that is not used shows. The workspace has
  // exactly the bytes that are asked for, and contents that mean nothing.
  BackwardProblem(const GradientCase& c, const WorkspaceBytes& workspace_bytes,
                  std::uint64_t seed = 1);

  const GradientCase& description() const { return case_; }
  rmsnorm::BackwardParams params();
  GradientInputs inputs() const;

  // For other contents than the ordinary ones; call `keep` when done.
  GuardedTensor dy, x, residual, weight, rstd, mean_square, d_residual;
  void keep();

  // Computes all rows on fresh outputs and reports as test failures: a status other than ok, and
  // any byte changed that does not belong to an output or to the workspace.
  GradientResults run(const Compute& compute, const std::string& what);

  // The memory of all tensors and of the workspace.
  std::vector<GuardedTensor*> memories();
  // The outputs as they are.
  GradientResults results();

 private:
  GuardedTensor& dx_memory();

  GradientCase case_;
  GuardedTensor dx_, dweight_, dbias_, d_mean_square_, workspace_;
};

// Test failure with the place of the first difference; NaN equals NaN.
void expect_same(const GradientCase& c, const GradientResults& expected, const GradientResults& got,
                 const std::string& what);

// Computes the contract's formula in extended precision from the inputs and reports as a test
// failure any result that is further away than its bound, derived in gradient_oracle.cpp from the
// roundings that the contract lists.
void expect_gradients(const GradientCase& c, const GradientInputs& in, const GradientResults& got,
                      const std::string& what);

}  // namespace rmsnorm_test
