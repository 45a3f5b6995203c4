#include <rmsnorm/rmsnorm.hpp>

#if !defined(RMSNORM_COMPILED)
#error "rmsnorm::rmsnorm should say that the kernels are in the library"
#endif

rmsnorm::Status normalise_with_headers(const float* x, float* y, std::int64_t rows, std::int64_t n);

int main() {
  const float x[4] = {3, -4, 5, 12};
  float y[4], z[4];
  if (!normalise_with_headers(x, y, 2, 2).ok()) return 1;
  rmsnorm::ForwardParams p;
  p.x = rmsnorm::matrix(x, 2, 2);
  p.y = rmsnorm::matrix(z, 2, 2);
  if (!rmsnorm::cpu::forward(p, 0, 2).ok()) return 2;
  for (int i = 0; i < 4; ++i) {
    if (y[i] != z[i]) return 3;
  }
  double mean_square = 0;
  rmsnorm::MeanSquareParams m;
  m.x = p.x;
  m.axis = 0;
  m.mean_square = rmsnorm::vector(&mean_square, 1);
  m.mean_square.rank = 0;
  if (!rmsnorm::cpu::mean_square(m, 0, 1).ok()) return 4;
  return mean_square == 48.5 ? 0 : 5;
}
