#include "device_memory.hpp"

#include <gtest/gtest.h>

#include "formula.hpp"
#include "rmsnorm/bounds.hpp"
#include "rmsnorm/cuda/shape.hpp"

namespace rmsnorm_test {

class DeviceCopies::Copy {
 public:
  explicit Copy(const GuardedTensor& host) : host_(host) {
    EXPECT_EQ(cudaMalloc(&device_, host.bytes()), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(device_, host.memory(), host.bytes(), cudaMemcpyHostToDevice),
              cudaSuccess);
  }
  Copy(const Copy&) = delete;
  Copy& operator=(const Copy&) = delete;
  ~Copy() { cudaFree(device_); }

  bool holds(const void* p) const {
    const auto* byte = static_cast<const unsigned char*>(p);
    return byte >= host_.memory() && byte <= host_.memory() + host_.bytes();
  }
  void* translate(const void* p) const {
    return static_cast<unsigned char*>(device_) +
           (static_cast<const unsigned char*>(p) - host_.memory());
  }
  void copy_back() const {
    EXPECT_EQ(cudaMemcpy(host_.memory(), device_, host_.bytes(), cudaMemcpyDeviceToHost),
              cudaSuccess);
  }

 private:
  const GuardedTensor& host_;
  void* device_ = nullptr;
};

DeviceCopies::DeviceCopies(const std::vector<GuardedTensor*>& tensors) {
  for (const GuardedTensor* t : tensors) copies_.push_back(std::make_unique<Copy>(*t));
}

DeviceCopies::~DeviceCopies() = default;

template <class Tensor>
void DeviceCopies::translate(Tensor& t) const {
  if (t.present()) t.data = translated(t.data);
}

void* DeviceCopies::translated(const void* p) const {
  for (const auto& copy : copies_) {
    if (copy->holds(p)) return copy->translate(p);
  }
  return const_cast<void*>(p);
}

rmsnorm::ForwardParams DeviceCopies::translated(rmsnorm::ForwardParams p) const {
  translate(p.x), translate(p.residual), translate(p.weight), translate(p.bias);
  translate(p.mean_square), translate(p.y), translate(p.residual_out), translate(p.rstd);
  return p;
}

rmsnorm::MeanSquareParams DeviceCopies::translated(rmsnorm::MeanSquareParams p) const {
  translate(p.x), translate(p.mean_square);
  return p;
}

rmsnorm::BackwardParams DeviceCopies::translated(rmsnorm::BackwardParams p) const {
  translate(p.dy), translate(p.x), translate(p.residual), translate(p.weight), translate(p.rstd);
  translate(p.mean_square), translate(p.d_residual), translate(p.dx), translate(p.dweight);
  translate(p.dbias), translate(p.d_mean_square);
  p.workspace = translated(p.workspace);
  return p;
}

void DeviceCopies::copy_back() const {
  for (const auto& copy : copies_) copy->copy_back();
}

Results run_on_device(ForwardProblem& problem, const Implementation::Forward& forward) {
  return problem.run(
      [&](const rmsnorm::ForwardParams& p) {
        const DeviceCopies copies(problem.memories());
        const rmsnorm::Status status = forward(copies.translated(p));
        EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
        copies.copy_back();
        return status;
      },
      "cuda");
}

Results run_on_device(ForwardProblem& problem, const rmsnorm::cuda::LaunchOptions& options) {
  return run_on_device(problem, [&](const rmsnorm::ForwardParams& p) {
    return rmsnorm::cuda::forward(p, nullptr, options);
  });
}

std::vector<std::uint64_t> run_on_device(MeanSquareProblem& problem) {
  return problem.run([&](const rmsnorm::MeanSquareParams& p) {
    const DeviceCopies copies(problem.memories());
    const rmsnorm::Status status = rmsnorm::cuda::mean_square(copies.translated(p), nullptr);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    copies.copy_back();
    return status;
  });
}

GradientResults run_on_device(BackwardProblem& problem, const BackwardProblem::Compute& backward) {
  return problem.run(
      [&](const rmsnorm::BackwardParams& p) {
        const DeviceCopies copies(problem.memories());
        const rmsnorm::Status status = backward(copies.translated(p));
        EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
        copies.copy_back();
        return status;
      },
      "cuda");
}

GradientResults run_on_device(BackwardProblem& problem,
                              const rmsnorm::cuda::LaunchOptions& options) {
  return run_on_device(problem, [&](const rmsnorm::BackwardParams& p) {
    return rmsnorm::cuda::backward(p, nullptr, options);
  });
}

int device_version() {
  int device = 0, major = 0, minor = 0;
  EXPECT_EQ(cudaGetDevice(&device), cudaSuccess);
  EXPECT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), cudaSuccess);
  EXPECT_EQ(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), cudaSuccess);
  return 10 * major + minor;
}

namespace {

rmsnorm::cuda::detail::RowShape shape_of(const Case& c) {
  const std::int64_t width = vector_width(c);
  return rmsnorm::cuda::detail::row_shape((c.n() + width - 1) / width, device_version());
}

}  // namespace

std::int64_t vector_width(const Case& c) {
  return c.computes_in_double() ? 2 : 16 / rmsnorm::size_in_bytes(c.x.dtype);
}

bool sums_plainly(const Case& c) {
  return !c.mean_square.present && is_all_16_bit(c) && shape_of(c).vectors != 0;
}

const std::vector<Implementation>& implementations() {
  static const std::vector<Implementation> all = {
      {"cuda", [](const rmsnorm::ForwardParams& p) { return rmsnorm::cuda::forward(p, nullptr); },
       [](ForwardProblem& problem, const Implementation::Forward& forward) {
         return run_on_device(problem, forward);
       }}};
  return all;
}

const std::vector<GradientImplementation>& gradient_implementations() {
  static const std::vector<GradientImplementation> all = {
      {"cuda", rmsnorm::cuda::backward_workspace,
       [](const rmsnorm::BackwardParams& p) { return rmsnorm::cuda::backward(p, nullptr); },
       [](BackwardProblem& problem, const BackwardProblem::Compute& backward) {
         return run_on_device(problem, backward);
       }}};
  return all;
}

// The roundings of a plain sum that an element's square goes through: its multiplication and
// additions in the thread, and the merging of even and odd elements, of lanes and of warps.
double rstd_budget(const Case& c) {
  if (!sums_plainly(c)) return rmsnorm::cuda_rstd_bound(c.compute_type(), 0);
  const rmsnorm::cuda::detail::RowShape shape = shape_of(c);
  int roundings = static_cast<int>(shape.vectors * vector_width(c)) / 2 + 1;
  for (int lanes = 1; lanes < 32 && lanes < shape.threads; lanes *= 2) ++roundings;
  if (shape.threads > 32 || shape.cluster > 1) {
    const int warps = shape.threads / 32 * shape.cluster;
    roundings += (warps + 31) / 32 + 5;
  }
  return rmsnorm::cuda_rstd_bound(c.compute_type(), roundings);
}

// Of the mixes of dtypes: each takes a launch.
int sampling() { return 7; }

}  // namespace rmsnorm_test
