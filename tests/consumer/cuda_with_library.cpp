// No machine has so many devices: an error whether or not there is a GPU, a driver or CUDA at all.
#include <cstdio>
#include <cstring>
#include <rmsnorm/cuda.cuh>

int main() {
  float x[4] = {3, -4, 5, 12}, y[4] = {};
  rmsnorm::ForwardParams p;
  p.x = rmsnorm::matrix(x, 2, 2);
  p.y = rmsnorm::matrix(y, 2, 2);
  rmsnorm::cuda::LaunchOptions options;
  options.device = 1000;
  const rmsnorm::Status status = rmsnorm::cuda::forward(p, nullptr, options);
  const char* text = rmsnorm::cuda::error_text(status);
  std::printf("%s\n", text);
  if (status.code == rmsnorm::Code::cuda_unavailable) return 0;
  if (status.code != rmsnorm::Code::cuda_error || status.cuda_error == 0) return 1;
  return std::strlen(text) > 0 ? 0 : 2;
}
