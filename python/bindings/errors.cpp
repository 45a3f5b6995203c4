#include "errors.hpp"

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda_devices.hpp>
#include <rmsnorm/cuda.cuh>
#include <rmsnorm/rmsnorm.hpp>

#include "call.hpp"

namespace rmsnorm::python {
namespace {

std::string formatted(const char* format, va_list arguments) {
  va_list measured;
  va_copy(measured, arguments);
  const int length = std::vsnprintf(nullptr, 0, format, measured);
  va_end(measured);
  std::string text(static_cast<std::size_t>(length) + 1, '\0');
  std::vsnprintf(text.data(), text.size(), format, arguments);
  text.resize(static_cast<std::size_t>(length));
  return text;
}

// As Python prints a tuple of integers; of a long one the beginning and its length.
std::string tuple_text(const std::int64_t* values, int count) {
  constexpr std::size_t longest = 32;
  std::string text = "(";
  for (int i = 0; i < count; ++i) {
    if (i > 0) text += ", ";
    if (text.size() > longest) return text + "...), " + std::to_string(count) + " dimensions";
    text += std::to_string(values[i]);
  }
  return text + (count == 1 ? ",)" : ")");
}

std::string shape_text(const ArrayView& view) { return tuple_text(view.sizes, view.rank); }

std::string strides_text(const ArrayView& view) { return tuple_text(view.strides, view.rank); }

// First and one past the last byte of a view; equal for a view without elements.
struct ByteRange {
  std::uintptr_t begin;
  std::uintptr_t end;
};

ByteRange byte_range(const ArrayView& view) {
  const std::int64_t itemsize = size_in_bytes(view.dtype);
  const auto data = reinterpret_cast<std::uintptr_t>(view.data);
  std::int64_t below = 0;
  std::int64_t above = itemsize;
  for (int d = 0; d < view.rank; ++d) {
    if (view.sizes[d] == 0) return {data, data};
    const std::int64_t reach = view.strides[d] * (view.sizes[d] - 1) * itemsize;
    (reach < 0 ? below : above) += reach;
  }
  return {data + static_cast<std::uintptr_t>(below), data + static_cast<std::uintptr_t>(above)};
}

// The arguments whose memory may be what `output` overlaps: "x, weight".
std::string overlapped_text(Argument output, const Call& call) {
  const ByteRange mine = byte_range(*call.array(output));
  std::string text;
  for (const Argument other : call.array_arguments()) {
    const ArrayView& view = *call.array(other);
    if (other == output || !view.present()) continue;
    const ByteRange range = byte_range(view);
    if (range.begin >= mine.end || mine.begin >= range.end) continue;
    if (!text.empty()) text += ", ";
    text += call.python_name(other);
  }
  return text;
}

std::string expected_shape_text(Argument argument, const Call& call) {
  const int axis = call.first_axis();
  const ArrayView& x = call.x;
  switch (argument) {
    case Argument::dweight: return shape_text(call.weight);
    case Argument::weight:
    case Argument::bias:
    case Argument::dbias:
      return tuple_text(x.sizes + axis, x.rank - axis) +
             (axis > 0 ? ", or with leading dimensions that broadcast against " +
                             tuple_text(x.sizes, axis)
                       : "");
    case Argument::mean_square:
    case Argument::d_mean_square:
    case Argument::rstd: return tuple_text(x.sizes, axis);
    default: return shape_text(x);
  }
}

[[noreturn]] void raise_rank_of_x(const Call& call) {
  if (call.x.rank == 0) raise(PyExc_ValueError, "x: expected at least one dimension, got shape ()");
  raise(
      PyExc_ValueError,
      "x: shape %s has more than %d dimensions, which must merge into %d or fewer; the strides of "
      "x, %s, or of another array do not allow that",
      shape_text(call.x).c_str(), max_rank, max_rank, strides_text(call.x).c_str());
}

[[noreturn]] void raise_shape(Argument argument, const Call& call) {
  const ArrayView& view = *call.array(argument);
  if (argument == Argument::x)
    raise(PyExc_ValueError, "x: expected sizes >= 0, got shape %s", shape_text(view).c_str());
  const Argument decisive = argument == Argument::dweight ? Argument::weight : Argument::x;
  raise(PyExc_ValueError, "%s: expected shape %s for %s of shape %s, got %s",
        call.python_name(argument), expected_shape_text(argument, call).c_str(),
        call.python_name(decisive), shape_text(*call.array(decisive)).c_str(),
        shape_text(view).c_str());
}

// The arguments whose memory an output may be exactly; null where there are none.
const char* aliases_text(const Call& call) {
  if (call.mean_square_is_output) return nullptr;
  if (call.gradients != nullptr) return "dx_out exactly dy, x, residual or d_residual";
  if (call.residual.present()) return "out and residual_out exactly x or residual";
  return "out exactly x";
}

[[noreturn]] void raise_overlap(Argument argument, const Call& call) {
  const char* aliases = aliases_text(call);
  const std::string alternative =
      aliases == nullptr
          ? ""
          : std::string(", or for ") + aliases + " (same address, strides and element size)";
  raise(PyExc_ValueError, "%s: overlaps the memory of %s; expected separate memory%s",
        call.python_name(argument), overlapped_text(argument, call).c_str(), alternative.c_str());
}

[[noreturn]] void raise_value(Argument argument, const Call& call) {
  switch (argument) {
    case Argument::axis:
      raise(PyExc_ValueError, "axis: expected %d <= axis < %d for x of shape %s, got %d",
            -call.x.rank, call.x.rank, shape_text(call.x).c_str(), static_cast<int>(call.axis));
    case Argument::eps:
      raise(PyExc_ValueError, "eps: expected a finite number >= 0, got %s",
            number_text(call.eps).c_str());
    case Argument::weight_offset:
      raise(PyExc_ValueError, "weight_offset: expected a finite number, got %s",
            number_text(call.weight_offset).c_str());
    case Argument::partial:
      raise(PyExc_ValueError, "partial: expected a number in (0, 1], got %s",
            number_text(call.partial).c_str());
    default: raise(PyExc_ValueError, "%s: is outside its range", call.python_name(argument));
  }
}

}  // namespace

std::string device_text(const dlpack::Device& device) {
  switch (device.type) {
    case dlpack::cpu: return "cpu";
    case dlpack::cuda_host: return "cpu (pinned for CUDA)";
    case dlpack::rocm_host: return "cpu (pinned for ROCm)";
    case dlpack::cuda: return "cuda:" + std::to_string(device.id);
    case dlpack::cuda_managed: return "cuda:" + std::to_string(device.id) + " (managed)";
    case dlpack::rocm: return "rocm:" + std::to_string(device.id);
    default:
      return "DLPack device " + std::to_string(device.type) + ":" + std::to_string(device.id);
  }
}

void raise(PyObject* type, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string text = formatted(format, arguments);
  va_end(arguments);
  PyErr_SetString(type, text.c_str());
  throw nb::python_error();
}

void raise_from(nb::python_error& cause, PyObject* type, const char* format, ...) {
  if (!cause.matches(PyExc_Exception) || cause.matches(PyExc_RecursionError)) throw cause;
  va_list arguments;
  va_start(arguments, format);
  const std::string text = formatted(format, arguments);
  va_end(arguments);
  nb::raise_from(cause, type, "%s", text.c_str());
}

const char* cuda_text(int error) {
  Status status;
  status.code = Code::cuda_error;
  status.cuda_error = error;
  return cuda::error_text(status);
}

void raise_unsupported_dtype(const std::string& dtype, const ArrayView& view) {
  const bool all = view.accepted_dtypes == Dtypes::all;
  raise(PyExc_TypeError, "%s: expected dtype %sfloat32 or float64 in native byte order, got %s",
        view.name, all ? "float16, bfloat16, " : "", dtype.c_str());
}

std::string isa_error_text() {
  std::string runnable;
  for (const cpu::Isa isa : cpu::every_isa) {
    if (!cpu::available(isa)) continue;
    if (!runnable.empty()) runnable += ", ";
    runnable += cpu::name(isa);
  }
  const char* wanted = std::getenv("RMSNORM_ISA");
  cpu::Isa isa = cpu::Isa::scalar;
  const bool known = wanted != nullptr && cpu::find_isa(wanted, &isa);
  if (wanted == nullptr || *wanted == '\0' || (known && cpu::available(isa)))
    return "RMSNORM_ISA: was changed during the call, which it named no instruction set for; call "
           "again";
  return "RMSNORM_ISA: " + environment_text("RMSNORM_ISA") +
         (known ? " cannot run here" : " is the name of no instruction set") +
         "; expected one of: " + runnable;
}

void raise_device(const Call& call) {
  Argument first = Argument::none;
  for (const Argument argument : call.array_arguments()) {
    const ArrayView& view = *call.array(argument);
    if (!view.present()) continue;
    if (first == Argument::none) {
      first = argument;
      continue;
    }
    const dlpack::Device &device = view.device, &expected = call.array(first)->device;
    if (device.type == expected.type && device.id == expected.id) continue;
    // Named is the one that is not where the rest of the world is: not on the CPU.
    const bool swap = view.on_cpu() && !call.array(first)->on_cpu();
    const Argument named = swap ? first : argument, other = swap ? argument : first;
    raise(PyExc_ValueError, "%s: is on %s while %s is on %s; expected all arrays on one device",
          call.python_name(named), device_text(call.array(named)->device).c_str(),
          call.python_name(other), device_text(call.array(other)->device).c_str());
  }
  raise(PyExc_RuntimeError, "%s: is on %s; rmsnorm computes on the CPU and on CUDA devices",
        call.python_name(first), device_text(call.array(first)->device).c_str());
}

void raise_without_cuda(const Call& call) {
  const Argument on_cuda = call.argument_on_cuda();
  raise(PyExc_RuntimeError,
        "%s: is on %s, and this build of rmsnorm has no CUDA; install one that has (see the "
        "README), or pass CPU arrays",
        call.python_name(on_cuda), device_text(call.array(on_cuda)->device).c_str());
}

std::string cuda_version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string cuda_failure_text(int error) {
  const std::string number = " (error " + std::to_string(error) + ")";
  if (error == cuda::insufficient_driver) {
    const int driver = cuda::driver_version();
    const std::string needed = cuda_version_text(cuda::build_info().toolkit);
    return (driver == 0
                ? "and there is no NVIDIA driver here"
                : "and the NVIDIA driver here is one for CUDA " + cuda_version_text(driver)) +
           number + "; install one for CUDA " + needed + ", or pass CPU arrays";
  }
  if (error == cuda::no_device)
    return "and CUDA finds no device here" + number +
           "; make one visible (CUDA_VISIBLE_DEVICES), or pass CPU arrays";
  return "where CUDA failed: " + std::string(cuda_text(error)) + number;
}

void raise_status(const Status& status, const Call& call) {
  const Argument argument = status.argument;
  const char* name = call.python_name(argument);
  const ArrayView* view = call.array(argument);
  switch (status.code) {
    case Code::invalid_rank:
      if (argument == Argument::x) raise_rank_of_x(call);
      raise_shape(argument, call);
    case Code::invalid_size: raise_shape(argument, call);
    case Code::too_many_elements:
      raise(PyExc_ValueError, "%s: shape %s has more than 2**59 elements", name,
            shape_text(*view).c_str());
    case Code::unaddressable:
      raise(PyExc_ValueError,
            "%s: shape %s with strides %s (in elements) reaches further than addresses do", name,
            shape_text(*view).c_str(), strides_text(*view).c_str());
    case Code::invalid_value: raise_value(argument, call);
    case Code::invalid_dtype: raise_unsupported_dtype(rmsnorm::name(view->dtype), *view);
    case Code::unexpected:
      if (argument == Argument::weight_offset)
        raise(PyExc_ValueError, "weight_offset: %s was given without weight; expected a weight",
              number_text(call.weight_offset).c_str());
      if (argument == Argument::partial)
        raise(PyExc_ValueError, "partial: %s was given with mean_square; expected 1",
              number_text(call.partial).c_str());
      break;
    case Code::null_data:
      raise(PyExc_ValueError, "%s: has shape %s and no memory behind it", name,
            shape_text(*view).c_str());
    case Code::self_overlap:
      raise(PyExc_ValueError,
            "%s: its elements share memory, as those of a broadcast array do, or its dimensions "
            "interleave (shape %s, strides %s); expected one place for each element",
            name, shape_text(*view).c_str(), strides_text(*view).c_str());
    case Code::overlap: raise_overlap(argument, call);
    case Code::isa_unavailable: raise(PyExc_RuntimeError, "%s", isa_error_text().c_str());
    default: break;
  }
  raise(PyExc_ValueError, "%s: %s", name, text(status.code));
}

}  // namespace rmsnorm::python
