#include <rmsnorm/rmsnorm.hpp>

rmsnorm::Status normalise_with_headers(const float* x, float* y, std::int64_t rows,
                                       std::int64_t n) {
  rmsnorm::ForwardParams p;
  p.x = rmsnorm::matrix(x, rows, n);
  p.y = rmsnorm::matrix(y, rows, n);
  return rmsnorm::cpu::forward(p, 0, rows);
}
