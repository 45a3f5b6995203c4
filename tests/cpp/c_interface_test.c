/* The C ABI from C: parameters, results, statuses. Exits with the number of failed checks. */
#include <rmsnorm/rmsnorm.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

#define CHECK(condition)                                              \
  do {                                                                \
    if (!(condition)) {                                               \
      ++failures;                                                     \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                 \
  } while (0)

enum { rows = 3, n = 50 };

static void forward_matches_the_formula(void) {
  float x[rows * n], residual[rows * n], weight[n], y[rows * n], residual_out[rows * n], rstd[rows];
  rmsnorm_forward_params p;
  rmsnorm_status s;
  int row, i;
  for (i = 0; i < rows * n; ++i) {
    x[i] = (float)(i % 7) - 3.0f;
    residual[i] = (float)(i % 5) * 0.25f;
    y[i] = 0;
  }
  for (i = 0; i < n; ++i) weight[i] = 0.01f * (float)i;
  rmsnorm_forward_params_init(&p);
  CHECK(p.axis == -1 && p.eps == 1e-6 && p.partial == 1.0 && p.weight_offset == 0.0);
  CHECK(p.rounding == RMSNORM_ROUNDING_ONCE && p.round_residual == 1);
  CHECK(p.x.rank == -1 && p.rstd.rank == -1 && p.mean_square.rank == -1);
  p.x = rmsnorm_matrix(x, RMSNORM_F32, rows, n, n);
  p.residual = rmsnorm_matrix(residual, RMSNORM_F32, rows, n, n);
  p.weight = rmsnorm_vector(weight, RMSNORM_F32, n);
  p.y = rmsnorm_matrix(y, RMSNORM_F32, rows, n, n);
  p.residual_out = rmsnorm_matrix(residual_out, RMSNORM_F32, rows, n, n);
  p.rstd = rmsnorm_vector(rstd, RMSNORM_F32, rows);
  p.weight_offset = 1.0;
  p.eps = 0.5;
  s = rmsnorm_cpu_forward(&p, 0, 2);
  CHECK(s.code == 0 && s.argument == 0);
  CHECK(y[2 * n] == 0);
  s = rmsnorm_cpu_forward(&p, 2, rows);
  CHECK(s.code == 0);
  for (row = 0; row < rows; ++row) {
    double sum = 0, r;
    for (i = 0; i < n; ++i) {
      const double v = (double)x[row * n + i] + (double)residual[row * n + i];
      sum += v * v;
      CHECK(residual_out[row * n + i] == (float)v);
    }
    r = 1 / sqrt(sum / n + 0.5);
    CHECK(fabs(rstd[row] - r) < 1e-6);
    for (i = 0; i < n; ++i) {
      const double v = residual_out[row * n + i];
      CHECK(fabs(y[row * n + i] - v * r * (1 + (double)weight[i])) < 1e-5);
    }
  }
}

static void options_arrive(void) {
  const uint16_t x[4] = {0x3c00, 0x4000, 0x4200, 0x4400}; /* 1 2 3 4 in f16 */
  uint16_t y[4] = {0, 0, 0, 0};
  const double mean_square = 4.0;
  rmsnorm_forward_params p;
  rmsnorm_forward_params_init(&p);
  p.x = rmsnorm_vector(x, RMSNORM_F16, 4);
  p.y = rmsnorm_vector(y, RMSNORM_F16, 4);
  p.mean_square = rmsnorm_vector(&mean_square, RMSNORM_F64, 1);
  p.mean_square.rank = 0;
  p.axis = 0;
  p.eps = 0.0;
  p.rounding = RMSNORM_ROUNDING_RSTD;
  CHECK(rmsnorm_cpu_forward(&p, 0, 1).code == 0);
  CHECK(y[0] == 0x3800 && y[1] == 0x3c00 && y[2] == 0x3e00 && y[3] == 0x4000);
}

static void mean_square_of_a_part(void) {
  const double x[4] = {1, 2, 3, 4};
  double out = 0;
  rmsnorm_mean_square_params p;
  rmsnorm_mean_square_params_init(&p);
  CHECK(p.axis == -1 && p.partial == 1.0 && p.x.rank == -1);
  p.x = rmsnorm_matrix(x, RMSNORM_F64, 1, 4, 4);
  p.mean_square = rmsnorm_vector(&out, RMSNORM_F64, 1);
  CHECK(rmsnorm_cpu_mean_square(&p, 0, 1).code == 0);
  CHECK(out == 7.5);
  p.partial = 0.5;
  CHECK(rmsnorm_cpu_mean_square(&p, 0, 1).code == 0);
  CHECK(out == 2.5);
  CHECK(rmsnorm_cpu_mean_square(&p, 0, 2).code != 0);
}

/* One row of ones, of which dx, every option and each output can be computed by hand. */
static void backward_matches_the_formula(void) {
  const float x[4] = {1, 1, 1, 1}, dy[4] = {1, 2, 3, 4}, w[4] = {0, 1, 0, 1},
              ones[4] = {1, 1, 1, 1};
  const float rstd = 2, mean_square = 9;
  float dx[4] = {0, 0, 0, 0}, dweight[4] = {0, 0, 0, 0}, dbias[4] = {0, 0, 0, 0};
  float d_mean_square = 0;
  void* memory = NULL;
  unsigned char space[192];
  rmsnorm_backward_params p;
  int i;
  rmsnorm_backward_params_init(&p);
  CHECK(p.axis == -1 && p.eps == 1e-6 && p.weight_offset == 0.0 && p.partial == 1.0);
  CHECK(p.dy.rank == -1 && p.d_mean_square.rank == -1 && p.workspace == NULL);
  CHECK(rmsnorm_cpu_backward(&p, 0, 1).code == RMSNORM_MISSING);
  CHECK(rmsnorm_cpu_backward_blocks(&p) == 0);
  p.x = rmsnorm_matrix(x, RMSNORM_F32, 1, 4, 4);
  p.dy = rmsnorm_matrix(dy, RMSNORM_F32, 1, 4, 4);
  p.weight = rmsnorm_vector(w, RMSNORM_F32, 4);
  p.d_residual = rmsnorm_matrix(ones, RMSNORM_F32, 1, 4, 4);
  p.rstd = rmsnorm_vector(&rstd, RMSNORM_F32, 1);
  p.dx = rmsnorm_matrix(dx, RMSNORM_F32, 1, 4, 4);
  p.weight_offset = 1.0;
  p.partial = 0.5;
  CHECK(rmsnorm_cpu_backward_workspace(&p) == 0);
  CHECK(rmsnorm_cpu_backward(&p, 0, 1).code == 0);
  /* g = 1 4 3 8, xhat = 2: c = 2 * 16 / 2 = 16, of the first two elements. */
  CHECK(dx[0] == 2 * (1 - 32) + 1 && dx[1] == 2 * (4 - 32) + 1);
  CHECK(dx[2] == 2 * 3 + 1 && dx[3] == 2 * 8 + 1);

  p.partial = 1.0;
  p.d_residual.rank = -1;
  p.rstd.rank = -1;
  p.residual = rmsnorm_matrix(ones, RMSNORM_F32, 1, 4, 4);
  p.mean_square = rmsnorm_vector(&mean_square, RMSNORM_F32, 1);
  p.d_mean_square = rmsnorm_vector(&d_mean_square, RMSNORM_F32, 1);
  p.dweight = rmsnorm_vector(dweight, RMSNORM_F32, 4);
  p.dbias = rmsnorm_vector(dbias, RMSNORM_F32, 4);
  p.eps = 7.0;
  CHECK(rmsnorm_cpu_backward_workspace(&p) == 2 * 128);
  p.workspace_bytes = rmsnorm_cpu_backward_workspace(&p);
  memory = malloc(256 + 64);
  p.workspace = (unsigned char*)memory + (64 - (uintptr_t)memory % 64) % 64;
  CHECK(rmsnorm_cpu_backward(&p, 0, rmsnorm_cpu_backward_blocks(&p)).code == 0);
  CHECK(rmsnorm_cpu_backward_reduce(&p, 0, 4).code == 0);
  /* rstd = 1/4, x + residual = 2, xhat = 1/2; d_mean_square = -1/32 * (1 + 4 + 3 + 8) / 2 */
  for (i = 0; i < 4; ++i) {
    CHECK(dx[i] == dy[i] * (1 + w[i]) / 4);
    CHECK(dweight[i] == dy[i] / 2 && dbias[i] == dy[i]);
  }
  CHECK(d_mean_square == -0.25f);
  p.axis = 2;
  CHECK(strcmp(rmsnorm_argument_name(rmsnorm_cpu_backward(&p, 0, 1)), "axis") == 0);
  p.axis = -1;
  p.workspace = space;
  p.workspace_bytes = sizeof space;
  CHECK(strcmp(rmsnorm_argument_name(rmsnorm_cpu_backward(&p, 0, 1)), "workspace") == 0);
  free(memory);
}

static void errors_have_names(void) {
  float x[4] = {1, 2, 3, 4}, y[4] = {0, 0, 0, 0};
  rmsnorm_forward_params p;
  rmsnorm_status s;
  rmsnorm_forward_params_init(&p);
  s = rmsnorm_cpu_forward(&p, 0, 1);
  CHECK(s.code != 0 && strcmp(rmsnorm_argument_name(s), "x") == 0);
  p.x = rmsnorm_vector(x, RMSNORM_F32, 4);
  p.y = rmsnorm_vector(y, RMSNORM_F32, 4);
  p.eps = -1.0;
  s = rmsnorm_cpu_forward(&p, 0, 1);
  CHECK(s.code != 0 && strcmp(rmsnorm_argument_name(s), "eps") == 0);
  CHECK(strlen(rmsnorm_status_text(s)) > 0);
  p.eps = 0.0;
  p.x.dtype = 17;
  s = rmsnorm_cpu_forward(&p, 0, 1);
  CHECK(s.code != 0 && strcmp(rmsnorm_argument_name(s), "x") == 0);
  p.x.dtype = RMSNORM_F32;
  s = rmsnorm_cpu_forward(&p, 0, 2);
  CHECK(s.code != 0);
  CHECK(y[0] == 0);
  CHECK(rmsnorm_cpu_forward(&p, 0, 1).code == 0);
  CHECK(y[0] != 0);
}

/* Without a GPU: what is wrong with the parameters comes first, then what is wrong with the
 * machine, here that no machine has so many devices. */
static void cuda_says_what_is_wrong(void) {
  double x[4] = {1, 2, 3, 4}, y[4] = {0, 0, 0, 0};
  rmsnorm_forward_params p;
  rmsnorm_backward_params b;
  rmsnorm_mean_square_params m;
  rmsnorm_cuda_launch_options options;
  rmsnorm_status s;
  rmsnorm_forward_params_init(&p);
  rmsnorm_mean_square_params_init(&m);
  s = rmsnorm_cuda_forward(&p, NULL, NULL);
  CHECK(s.code == RMSNORM_MISSING && strcmp(rmsnorm_argument_name(s), "x") == 0);
  s = rmsnorm_cuda_mean_square(&m, NULL, NULL);
  CHECK(s.code == RMSNORM_MISSING && s.cuda_error == 0);
  rmsnorm_backward_params_init(&b);
  s = rmsnorm_cuda_backward(&b, NULL, NULL);
  CHECK(s.code == RMSNORM_MISSING && strcmp(rmsnorm_argument_name(s), "x") == 0);
  CHECK(rmsnorm_cuda_backward_workspace(&b) == 0);
  rmsnorm_cuda_launch_options_init(&options);
  CHECK(options.device == RMSNORM_CUDA_CURRENT_DEVICE);
  CHECK(options.programmatic == 0 && options.constant_weight == 0);
  options.device = 1000;
  p.x = rmsnorm_vector(x, RMSNORM_F64, 4);
  p.y = rmsnorm_vector(y, RMSNORM_F64, 4);
  s = rmsnorm_cuda_forward(&p, NULL, &options);
  CHECK(s.code == RMSNORM_CUDA_ERROR || s.code == RMSNORM_CUDA_UNAVAILABLE);
  CHECK((s.code == RMSNORM_CUDA_ERROR) == (s.cuda_error != 0));
  CHECK(strlen(rmsnorm_status_text(s)) > 0 && strlen(rmsnorm_argument_name(s)) == 0);
  m.x = rmsnorm_matrix(x, RMSNORM_F64, 1, 4, 4);
  m.mean_square = rmsnorm_vector(y, RMSNORM_F64, 1);
  CHECK(rmsnorm_cuda_mean_square(&m, NULL, &options).code == s.code);
  b.x = b.dy = m.x;
  b.dx = rmsnorm_matrix(y, RMSNORM_F64, 1, 4, 4);
  CHECK(rmsnorm_cuda_backward(&b, NULL, &options).code == s.code);
  CHECK(y[0] == 0);
}

int main(void) {
  forward_matches_the_formula();
  options_arrive();
  mean_square_of_a_part();
  backward_matches_the_formula();
  errors_have_names();
  cuda_says_what_is_wrong();
  CHECK(strlen(rmsnorm_version()) >= 5);
  CHECK(strlen(rmsnorm_cpu_isa()) > 0);
  printf("C interface of rmsnorm %s on %s: %d failures\n", rmsnorm_version(), rmsnorm_cpu_isa(),
         failures);
  return failures;
}
