// Test problems on the device: their memory is copied there, canaries included, and back.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <vector>

#include "gradient_implementations.hpp"
#include "implementations.hpp"
#include "mean_square_problem.hpp"
#include "rmsnorm/cuda.cuh"

namespace rmsnorm_test {

// Copies of the memory of some tensors, each at the same distance from a 64-byte boundary as the
// original and ending where that ends.
class DeviceCopies {
 public:
  explicit DeviceCopies(const std::vector<GuardedTensor*>& tensors);
  ~DeviceCopies();
  DeviceCopies(const DeviceCopies&) = delete;
  DeviceCopies& operator=(const DeviceCopies&) = delete;

  // The same views of the copies.
  rmsnorm::ForwardParams translated(rmsnorm::ForwardParams p) const;
  rmsnorm::MeanSquareParams translated(rmsnorm::MeanSquareParams p) const;
  rmsnorm::BackwardParams translated(rmsnorm::BackwardParams p) const;
  void copy_back() const;

 private:
  class Copy;
  template <class Tensor>
  void translate(Tensor& t) const;
  void* translated(const void* p) const;

  std::vector<std::unique_ptr<Copy>> copies_;
};

// Runs the function on copies of the problem's memory; errors of CUDA are test failures.
Results run_on_device(ForwardProblem& problem, const Implementation::Forward& forward);
Results run_on_device(ForwardProblem& problem, const rmsnorm::cuda::LaunchOptions& options = {});
std::vector<std::uint64_t> run_on_device(MeanSquareProblem& problem);
GradientResults run_on_device(BackwardProblem& problem, const BackwardProblem::Compute& backward);
GradientResults run_on_device(BackwardProblem& problem,
                              const rmsnorm::cuda::LaunchOptions& options = {});

// Ten times the compute capability of the current device.
int device_version();

// Elements of a row that make one 16-byte vector of x, or the two that double arithmetic takes.
std::int64_t vector_width(const Case& c);

// Whether the sum of squares is one of plain floats, as it is between 16-bit rows that fit in
// registers.
bool sums_plainly(const Case& c);

}  // namespace rmsnorm_test
