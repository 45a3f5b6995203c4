// The module rmsnorm._core: the functions of the package, as users call them.
#include <nanobind/nanobind.h>

#include <cstdlib>
#include <cuda_devices.hpp>
#include <rmsnorm/rmsnorm.hpp>

#include "docstrings.hpp"
#include "errors.hpp"
#include "operations.hpp"
#include "options.hpp"
#include "results.hpp"
#include "threads.hpp"
#include "xla_handlers.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace rmsnorm::python {
namespace {

nb::object environment(const char* variable) {
  const char* value = std::getenv(variable);
  return value == nullptr ? nb::none() : nb::object(nb::str(value));
}

// CUDA's version numbers are 1000 major + 10 minor.
nb::object version_text(int version) {
  if (version == 0) return nb::none();
  return nb::str(cuda_version_text(version).c_str());
}

nb::dict cuda_info() {
  const cuda::BuildInfo build = cuda::build_info();
  nb::dict info;
  info["built"] = build.built;
  info["toolkit"] = version_text(build.toolkit);
  info["architectures"] = nb::str(build.architectures).attr("split")(";");
  if (!build.built) info["architectures"] = nb::list();
  info["driver"] = version_text(cuda::driver_version());
  nb::list devices;
  int error = 0;
  const int count = cuda::device_count(&error);
  for (int i = 0; i < count; ++i) {
    cuda::DeviceInfo device;
    if (cuda::describe_device(i, &device) != 0) continue;
    nb::dict described;
    described["name"] = device.name;
    described["compute_capability"] = nb::make_tuple(device.major, device.minor);
    described["multiprocessors"] = device.multiprocessors;
    described["memory"] = device.total_memory;
    devices.append(described);
  }
  info["devices"] = devices;
  return info;
}

nb::dict info() {
  nb::list runnable;
  for (const cpu::Isa isa : {cpu::Isa::avx512, cpu::Isa::avx2, cpu::Isa::neon, cpu::Isa::scalar})
    if (cpu::available(isa)) runnable.append(cpu::name(isa));
  const cpu::IsaChoice choice = cpu::active_isa();
  nb::dict variables;
  variables["RMSNORM_ISA"] = environment("RMSNORM_ISA");
  variables["RMSNORM_NUM_THREADS"] = environment("RMSNORM_NUM_THREADS");
  nb::dict result;
  result["version"] = RMSNORM_VERSION;
  result["cpu_isa"] = choice.ok ? nb::object(nb::str(cpu::name(choice.isa))) : nb::none();
  result["cpu_isas"] = runnable;
  result["num_threads"] = thread_limit();
  result["openmp"] = has_openmp();
  result["environment"] = variables;
  result["cuda"] = cuda_info();
  return result;
}

void set_num_threads(nb::handle n) {
  const std::int32_t threads = read_integer(n, "n");
  if (threads < 1 || threads > max_threads)
    raise(PyExc_ValueError, "n: expected an integer from 1 to %d, got %d", max_threads,
          static_cast<int>(threads));
  set_thread_limit(threads);
}

// Arguments accept None, so that one given in the wrong place is refused by name like any other
// value and not by a list of signatures.
void define(nb::module_& m) {
  m.doc() = doc::module;
  m.attr("__version__") = RMSNORM_VERSION;

  m.def("rms_norm", &rms_norm, "x"_a.none(), "weight"_a.none() = nb::none(),
        "bias"_a.none() = nb::none(), nb::kw_only(), "eps"_a.none() = 1e-6, "axis"_a.none() = -1,
        "weight_offset"_a.none() = 0.0, "rounding"_a.none() = "once", "partial"_a.none() = 1.0,
        "out"_a.none() = nb::none(), "out_dtype"_a.none() = nb::none(),
        "return_rstd"_a.none() = false, "stream"_a.none() = nb::none(), doc::rms_norm,
        nb::sig("def rms_norm(x: Array, weight: Array | None = None, bias: Array | None = None, *, "
                "eps: float = 1e-6, axis: int = -1, weight_offset: float = 0.0, "
                "rounding: Rounding = \"once\", partial: float = 1.0, out: Array | None = None, "
                "out_dtype: DTypeLike | None = None, return_rstd: bool = False, "
                "stream: Stream | None = None) -> Array | tuple[Array, Array]"));

  m.def("add_rms_norm", &add_rms_norm, "x"_a.none(), "residual"_a.none(),
        "weight"_a.none() = nb::none(), "bias"_a.none() = nb::none(), nb::kw_only(),
        "eps"_a.none() = 1e-6, "axis"_a.none() = -1, "weight_offset"_a.none() = 0.0,
        "rounding"_a.none() = "once", "round_residual"_a.none() = true, "out"_a.none() = nb::none(),
        "residual_out"_a.none() = nb::none(), "return_rstd"_a.none() = false,
        "stream"_a.none() = nb::none(), doc::add_rms_norm,
        nb::sig("def add_rms_norm(x: Array, residual: Array, weight: Array | None = None, "
                "bias: Array | None = None, *, eps: float = 1e-6, axis: int = -1, "
                "weight_offset: float = 0.0, rounding: Rounding = \"once\", "
                "round_residual: bool = True, "
                "out: Array | None = None, residual_out: Array | None = None, "
                "return_rstd: bool = False, stream: Stream | None = None) "
                "-> tuple[Array, Array] | tuple[Array, Array, Array]"));

  m.def("rms_norm_backward", &rms_norm_backward, "dy"_a.none(), "x"_a.none(),
        "weight"_a.none() = nb::none(), "rstd"_a.none() = nb::none(), nb::kw_only(),
        "eps"_a.none() = 1e-6, "axis"_a.none() = -1, "weight_offset"_a.none() = 0.0,
        "rounding"_a.none() = "once", "partial"_a.none() = 1.0, "residual"_a.none() = nb::none(),
        "mean_square"_a.none() = nb::none(), "d_residual"_a.none() = nb::none(),
        "has_bias"_a.none() = false, "needs_dweight"_a.none() = true,
        "dx_out"_a.none() = nb::none(), "dweight_out"_a.none() = nb::none(),
        "dbias_out"_a.none() = nb::none(), "stream"_a.none() = nb::none(), doc::rms_norm_backward,
        nb::sig("def rms_norm_backward(dy: Array, x: Array, weight: Array | None = None, "
                "rstd: Array | None = None, *, eps: float = 1e-6, axis: int = -1, "
                "weight_offset: float = 0.0, rounding: Rounding = \"once\", partial: float = 1.0, "
                "residual: Array | None = None, mean_square: Array | None = None, "
                "d_residual: Array | None = None, has_bias: bool = False, "
                "needs_dweight: bool = True, dx_out: Array | None = None, "
                "dweight_out: Array | None = None, dbias_out: Array | None = None, "
                "stream: Stream | None = None) "
                "-> tuple[Array, Array | None, Array | None] "
                "| tuple[Array, Array | None, Array | None, Array]"));

  m.def("mean_square", &mean_square, "x"_a.none(), nb::kw_only(), "out"_a.none() = nb::none(),
        "stream"_a.none() = nb::none(), doc::mean_square,
        nb::sig("def mean_square(x: Array, *, out: Array | None = None, "
                "stream: Stream | None = None) -> Array"));

  m.def("rms_norm_apply", &rms_norm_apply, "x"_a.none(), "mean_square"_a.none(),
        "weight"_a.none() = nb::none(), "bias"_a.none() = nb::none(), nb::kw_only(),
        "eps"_a.none() = 1e-6, "axis"_a.none() = -1, "weight_offset"_a.none() = 0.0,
        "rounding"_a.none() = "once", "out"_a.none() = nb::none(),
        "out_dtype"_a.none() = nb::none(), "stream"_a.none() = nb::none(), doc::rms_norm_apply,
        nb::sig("def rms_norm_apply(x: Array, mean_square: Array, weight: Array | None = None, "
                "bias: Array | None = None, *, eps: float = 1e-6, axis: int = -1, "
                "weight_offset: float = 0.0, rounding: Rounding = \"once\", "
                "out: Array | None = None, out_dtype: DTypeLike | None = None, "
                "stream: Stream | None = None) -> Array"));

  define_device_export(m);
  xla::define_handlers(m);
  m.def("info", &info, doc::info, nb::sig("def info() -> dict[str, Any]"));
  m.def("set_num_threads", &set_num_threads, "n"_a.none(), doc::set_num_threads,
        nb::sig("def set_num_threads(n: int) -> None"));
  m.def("get_num_threads", &thread_limit, doc::get_num_threads,
        nb::sig("def get_num_threads() -> int"));
}

}  // namespace
}  // namespace rmsnorm::python

NB_MODULE(_core, m) {
  rmsnorm::python::define(m);
  if (!rmsnorm::python::initialize_threads() &&
      PyErr_WarnFormat(PyExc_RuntimeWarning, 1,
                       "RMSNORM_NUM_THREADS: expected an integer from 1 to 1024, got '%s'; ignored",
                       std::getenv("RMSNORM_NUM_THREADS")) != 0)
    throw nb::python_error();
}
