#include "steps.hpp"

#include <cstdint>

namespace rmsnorm::python {
namespace {

double element_count(const ArrayView& view) {
  double count = 1;
  for (int d = 0; d < view.rank; ++d) count *= static_cast<double>(view.sizes[d]);
  return count;
}

// What the operation reads and writes for each element of x, times the elements. Weights stay in
// cache and statistics are one number a row.
double bytes_moved(const Call& call) {
  std::int64_t bytes = 0;
  const auto add = [&](const ArrayView& view) {
    if (view.present()) bytes += size_in_bytes(view.dtype);
  };
  add(call.x);
  add(call.residual);
  add(call.y);
  add(call.residual_out);
  if (call.gradients != nullptr) {
    add(call.gradients->dy);
    add(call.gradients->d_residual);
    add(call.gradients->dx);
  }
  return static_cast<double>(bytes) * element_count(call.x);
}

Status rows_on_cpu(const ForwardParams& p, std::int64_t begin, std::int64_t end) {
  return cpu::forward(p, begin, end);
}
Status rows_on_cpu(const MeanSquareParams& p, std::int64_t begin, std::int64_t end) {
  return cpu::mean_square(p, begin, end);
}

template <class Params>
Step row_step_of(const Call& call, const Params& params) {
  const auto rows = [](const void* p, std::int64_t begin, std::int64_t end) {
    return rows_on_cpu(*static_cast<const Params*>(p), begin, end);
  };
  return {rows, row_count(params.x, params.axis), bytes_moved(call)};
}

}  // namespace

Step row_step(const Call& call, const ForwardParams& params) { return row_step_of(call, params); }
Step row_step(const Call& call, const MeanSquareParams& params) {
  return row_step_of(call, params);
}

BackwardSteps backward_steps(const Call& call, const cpu::BackwardPass& pass) {
  const auto blocks = [](const void* p, std::int64_t begin, std::int64_t end) {
    return static_cast<const cpu::BackwardPass*>(p)->run(begin, end);
  };
  const auto columns = [](const void* p, std::int64_t begin, std::int64_t end) {
    return static_cast<const cpu::BackwardPass*>(p)->reduce(begin, end);
  };
  const double sums = static_cast<double>(pass.workspace_bytes());
  const bool reduces = call.gradients->dweight.present() || call.gradients->dbias.present();
  return {{{blocks, pass.blocks(), bytes_moved(call) + sums}, {columns, pass.columns(), sums}},
          reduces ? 2 : 1};
}

}  // namespace rmsnorm::python
