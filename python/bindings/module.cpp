// The module rmsnorm._core: the functions of the package, as users call them.
#include <nanobind/nanobind.h>

#include <cstdlib>
#include <cuda_devices.hpp>
#include <rmsnorm/bounds.hpp>
#include <rmsnorm/rmsnorm.hpp>
#include <string_view>
#include <utility>

#include "docstrings.hpp"
#include "errors.hpp"
#include "exported_array.hpp"
#include "function.hpp"
#include "operations.hpp"
#include "options.hpp"
#include "threads.hpp"
#include "xla_handlers.hpp"

namespace nb = nanobind;

namespace rmsnorm::python {
namespace {

nb::object environment(const char* variable) {
  const char* value = std::getenv(variable);
  if (value == nullptr) return nb::none();
  // As os.environ has it: bytes that are not of the file system's encoding become surrogates.
  PyObject* text = PyUnicode_DecodeFSDefault(value);
  if (text == nullptr) throw nb::python_error();
  return nb::steal(text);
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

nb::object info() {
  nb::list runnable;
  for (const cpu::Isa isa : cpu::every_isa)
    if (cpu::available(isa)) runnable.insert(0, cpu::name(isa));
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
  return std::move(result);
}

nb::object get_num_threads() { return nb::int_(thread_limit()); }

nb::object set_num_threads(nb::handle n) {
  const std::int32_t threads = read_integer(n, "n");
  if (threads < 1 || threads > max_threads)
    raise(PyExc_ValueError, "n: expected an integer from 1 to %d, got %d", max_threads,
          static_cast<int>(threads));
  set_thread_limit(threads);
  return nb::none();
}

DType dtype_of_name(const char* name) {
  for (const ErrorBound& bound : error_bounds)
    if (std::string_view(name) == rmsnorm::name(bound.dtype)) return bound.dtype;
  raise(PyExc_ValueError, "expected float16, bfloat16, float32 or float64, got '%.40s'", name);
}

// For the self-check and the tests: what rmsnorm/bounds.hpp promises.
void define_bounds(nb::module_& m) {
  m.def(
      "error_bound",
      [](const char* dtype, const char* compute_dtype, bool rounded_weight, bool unrounded_sum) {
        return error_bound(dtype_of_name(dtype), dtype_of_name(compute_dtype), rounded_weight,
                           unrounded_sum);
      },
      nb::arg("dtype"), nb::arg("compute_dtype"), nb::arg("rounded_weight") = false,
      nb::arg("unrounded_sum") = false);
  m.def(
      "cpu_rstd_bound",
      [](const char* compute_dtype, bool sums_floats, std::int64_t count) {
        return cpu_rstd_bound(dtype_of_name(compute_dtype), sums_floats, count);
      },
      nb::arg("compute_dtype"), nb::arg("sums_floats"), nb::arg("count"));
}

nb::object interned(const char* text) {
  PyObject* object = PyUnicode_InternFromString(text);
  if (object == nullptr) throw nb::python_error();
  return nb::steal(object);
}

void define_norms(nb::module_& m) {
  const nb::object none = nb::none();
  const Parameter x = {"x", "Array"}, residual = {"residual", "Array"}, dy = {"dy", "Array"},
                  given_mean_square = {"mean_square", "Array"};
  const Parameter weight = {"weight", "Array | None", none}, bias = {"bias", "Array | None", none},
                  rstd = {"rstd", "Array | None", none}, out = {"out", "Array | None", none},
                  residual_out = {"residual_out", "Array | None", none},
                  summed_residual = {"residual", "Array | None", none},
                  optional_mean_square = {"mean_square", "Array | None", none},
                  d_residual = {"d_residual", "Array | None", none},
                  dx_out = {"dx_out", "Array | None", none},
                  dweight_out = {"dweight_out", "Array | None", none},
                  dbias_out = {"dbias_out", "Array | None", none};
  const Parameter eps = {"eps", "float", nb::float_(1e-6)}, axis = {"axis", "int", nb::int_(-1)},
                  weight_offset = {"weight_offset", "float", nb::float_(0.0)},
                  rounding = {"rounding", "Rounding", interned("once")},
                  partial = {"partial", "float", nb::float_(1.0)},
                  round_residual = {"round_residual", "bool", nb::bool_(true)},
                  out_dtype = {"out_dtype", "DTypeLike | None", none},
                  return_rstd = {"return_rstd", "bool", nb::bool_(false)},
                  has_bias = {"has_bias", "bool", nb::bool_(false)},
                  needs_dweight = {"needs_dweight", "bool", nb::bool_(true)},
                  stream = {"stream", "Stream | None", none};

  define_function<&rms_norm>(m, {"rms_norm", doc::rms_norm, "Array | tuple[Array, Array]"}, 3, x,
                             weight, bias, eps, axis, weight_offset, rounding, partial, out,
                             out_dtype, return_rstd, stream);
  define_function<&add_rms_norm>(
      m, {"add_rms_norm", doc::add_rms_norm, "tuple[Array, Array] | tuple[Array, Array, Array]"}, 4,
      x, residual, weight, bias, eps, axis, weight_offset, rounding, round_residual, out,
      residual_out, return_rstd, stream);
  define_function<&rms_norm_backward>(m,
                                      {"rms_norm_backward", doc::rms_norm_backward,
                                       "tuple[Array, Array | None, Array | None] | tuple[Array, "
                                       "Array | None, Array | None, Array]"},
                                      4, dy, x, weight, rstd, eps, axis, weight_offset, rounding,
                                      partial, summed_residual, optional_mean_square, d_residual,
                                      has_bias, needs_dweight, dx_out, dweight_out, dbias_out,
                                      stream);
  define_function<&mean_square>(m, {"mean_square", doc::mean_square, "Array"}, 1, x, out, stream);
  define_function<&rms_norm_apply>(m, {"rms_norm_apply", doc::rms_norm_apply, "Array"}, 4, x,
                                   given_mean_square, weight, bias, eps, axis, weight_offset,
                                   rounding, out, out_dtype, stream);
}

void define(nb::module_& m) {
  m.doc() = doc::module;
  m.attr("__version__") = RMSNORM_VERSION;
  define_norms(m);
  define_bounds(m);
  define_exported_array(m);
  xla::define_handlers(m);
  define_function<&info>(m, {"info", doc::info, "dict[str, Any]"}, 0);
  define_function<&set_num_threads>(m, {"set_num_threads", doc::set_num_threads, "None"}, 1,
                                    Parameter{"n", "int"});
  define_function<&get_num_threads>(m, {"get_num_threads", doc::get_num_threads, "int"}, 0);
}

}  // namespace
}  // namespace rmsnorm::python

NB_MODULE(_core, m) {
  rmsnorm::python::define(m);
  if (!rmsnorm::python::initialize_threads() &&
      PyErr_WarnFormat(PyExc_RuntimeWarning, 1,
                       "RMSNORM_NUM_THREADS: expected an integer from 1 to 1024, got %s; ignored",
                       rmsnorm::python::environment_text("RMSNORM_NUM_THREADS").c_str()) != 0)
    throw nb::python_error();
}
