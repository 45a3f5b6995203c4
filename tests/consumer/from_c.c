#include <rmsnorm/rmsnorm.h>
#include <stdio.h>

int main(void) {
  const float x[4] = {2, -2, 2, -2};
  float y[4];
  rmsnorm_forward_params p;
  rmsnorm_status s;
  rmsnorm_forward_params_init(&p);
  p.x = rmsnorm_vector(x, RMSNORM_F32, 4);
  p.y = rmsnorm_vector(y, RMSNORM_F32, 4);
  p.eps = 0.0;
  s = rmsnorm_cpu_forward(&p, 0, 1);
  if (s.code != 0) {
    fprintf(stderr, "%s %s\n", rmsnorm_argument_name(s), rmsnorm_status_text(s));
    return 1;
  }
  return y[0] == 1 && y[1] == -1 && y[2] == 1 && y[3] == -1 ? 0 : 2;
}
