// The test is that it compiles and links; there need not be a GPU to run anything on.
#include <rmsnorm/cuda.cuh>

rmsnorm::Status normalise_with_headers(const float* x, float* y, std::int64_t rows, std::int64_t n,
                                       const rmsnorm::cuda::LaunchOptions& options);

int main() {
  rmsnorm::cuda::LaunchOptions options;
  options.device = 1000;
  float x[4] = {}, y[4] = {};
  const rmsnorm::Status status = normalise_with_headers(x, y, 2, 2, options);
  if (status.code != rmsnorm::Code::cuda_error) return 1;
  double mean_square = 0;
  rmsnorm::MeanSquareParams m;
  m.x = rmsnorm::vector(&mean_square, 1);
  const rmsnorm::Status missing = rmsnorm::cuda::mean_square(m, nullptr);
  return missing.code == rmsnorm::Code::missing ? 0 : 2;
}
