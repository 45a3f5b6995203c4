#include "xla_handlers.hpp"

#include <cstddef>
#include <cuda_devices.hpp>
#include <exception>
#include <initializer_list>
#include <new>
#include <rmsnorm/cuda.cuh>
#include <rmsnorm/rmsnorm.hpp>
#include <string>
#include <string_view>
#include <type_traits>

#include "call.hpp"
#include "errors.hpp"
#include "parameters.hpp"
#include "steps.hpp"
#include "xla_ffi.hpp"
#include "xla_threads.hpp"

namespace rmsnorm::python::xla {
namespace {

struct Refusal {
  ErrorCode code;
  std::string message;
};

// An error that XLA returned, to be handed back to it.
struct Failure {
  Error* error;
};

void require_success(Error* error) {
  if (error != nullptr) throw Failure{error};
}

// Of a program that rmsnorm.jax did not write, or of an XLA that this build does not understand.
[[noreturn]] void refuse(std::string message) { throw Refusal{ErrorCode::internal, message}; }

void require_size(std::size_t size, std::size_t needed, const char* what) {
  if (size < needed)
    refuse(std::string(what) + " of " + std::to_string(size) + " bytes, expected " +
           std::to_string(needed) + "; this version of XLA is not supported");
}

// ---- attributes ----

const void* attribute(const Attributes& attributes, std::string_view name, AttributeType type) {
  for (std::int64_t i = 0; i < attributes.count; ++i) {
    const Text& text = *attributes.names[i];
    if (std::string_view(text.data, text.size) != name) continue;
    if (attributes.types[i] != type) break;
    return attributes.values[i];
  }
  refuse("no attribute " + std::string(name) + " of the kind expected");
}

template <class Value>
Value scalar(const Attributes& attributes, std::string_view name, DataType dtype) {
  const auto* found =
      static_cast<const Scalar*>(attribute(attributes, name, AttributeType::scalar));
  if (found->dtype != dtype) refuse("attribute " + std::string(name) + " of an unexpected dtype");
  return *static_cast<const Value*>(found->value);
}

std::string_view text(const Attributes& attributes, std::string_view name) {
  const auto* found = static_cast<const Text*>(attribute(attributes, name, AttributeType::string));
  return {found->data, found->size};
}

Rounding rounding_named(std::string_view name) {
  if (name == "once") return Rounding::once;
  if (name == "before_weight") return Rounding::before_weight;
  if (name == "rstd") return Rounding::rstd;
  refuse("rounding " + std::string(name));
}

std::int32_t axis_in(const Attributes& attributes) {
  const auto axis = scalar<std::int64_t>(attributes, "axis", DataType::i64);
  if (axis < INT32_MIN || axis > INT32_MAX) refuse("axis " + std::to_string(axis));
  return static_cast<std::int32_t>(axis);
}

void read_options(const Attributes& attributes, Call& call) {
  require_size(attributes.struct_size, sizeof(Attributes), "a list of attributes");
  call.axis = axis_in(attributes);
  call.eps = scalar<double>(attributes, "eps", DataType::f64);
  call.weight_offset = scalar<double>(attributes, "weight_offset", DataType::f64);
  call.partial = scalar<double>(attributes, "partial", DataType::f64);
  call.rounding = rounding_named(text(attributes, "rounding"));
  call.round_residual = scalar<bool>(attributes, "round_residual", DataType::boolean);
}

// ---- arguments and results ----

DType dtype_of(DataType dtype) {
  switch (dtype) {
    case DataType::f16: return DType::f16;
    case DataType::bf16: return DType::bf16;
    case DataType::f32: return DType::f32;
    case DataType::f64: return DType::f64;
    default: refuse("dtype " + std::to_string(static_cast<int>(dtype)));
  }
}

void read_buffer(const Buffer& buffer, ArrayView& view) {
  require_size(buffer.struct_size, sizeof(Buffer), "a buffer");
  if (buffer.rank < 0 || buffer.rank > max_dimensions)
    refuse(std::to_string(buffer.rank) + " dimensions");
  view.dtype = dtype_of(buffer.dtype);
  view.data = buffer.data;
  view.rank = static_cast<int>(buffer.rank);
  for (int d = 0; d < view.rank; ++d) {
    if (buffer.sizes[d] < 0) refuse("a dimension of size " + std::to_string(buffer.sizes[d]));
    view.sizes[d] = buffer.sizes[d];
  }
  set_compact_strides(view);
}

bool is_result(Argument argument, const Call& call) {
  switch (argument) {
    case Argument::y:
    case Argument::residual_out:
    case Argument::dx:
    case Argument::dweight:
    case Argument::dbias: return true;
    case Argument::rstd: return call.gradients == nullptr;
    default: return false;
  }
}

// A result may not stand among the arguments, whose memory must not be written, nor they among the
// results, whose memory would be read.
ArrayView& array_named(std::string_view name, bool among_results, Call& call) {
  for (const Argument argument :
       {Argument::x, Argument::residual, Argument::weight, Argument::bias, Argument::rstd,
        Argument::y, Argument::residual_out, Argument::dy, Argument::d_residual, Argument::dx,
        Argument::dweight, Argument::dbias}) {
    ArrayView* view = call.array(argument);
    if (view != nullptr && !view->present() && name == rmsnorm::name(argument) &&
        is_result(argument, call) == among_results)
      return *view;
  }
  refuse((among_results ? "result " : "argument ") + std::string(name));
}

// `names` are those of the values, in order, with a space between them.
void read_values(const Values& values, std::string_view names, bool are_results, Call& call) {
  require_size(values.struct_size, sizeof(Values), "a list of values");
  for (std::int64_t i = 0; i < values.count; ++i) {
    const std::size_t length = names.find(' ');
    if (values.types[i] != ValueType::buffer) refuse("a value that is no buffer");
    read_buffer(*static_cast<const Buffer*>(values.values[i]),
                array_named(names.substr(0, length), are_results, call));
    names.remove_prefix(length == names.npos ? names.size() : length + 1);
  }
  if (!names.empty()) refuse("fewer values than names");
}

// Repeats what has one element along a dimension of `like`, in which the first dimensions of both
// agree. jax.vmap leaves such dimensions where it maps over some of the arguments.
void stretch(ArrayView& view, const ArrayView& like) {
  for (int d = 0; d < view.rank && d < like.rank; ++d) {
    if (view.sizes[d] != 1 || like.sizes[d] == 1) continue;
    view.sizes[d] = like.sizes[d];
    view.strides[d] = 0;
  }
}

void read_call(const CallFrame& frame, Call& call) {
  read_options(frame.attributes, call);
  read_values(frame.arguments, text(frame.attributes, "arguments"), false, call);
  read_values(frame.results, text(frame.attributes, "results"), true, call);
  if (call.gradients == nullptr) {
    stretch(call.x, call.y);
    stretch(call.residual, call.y);
    return;
  }
  Gradients& gradients = *call.gradients;
  for (ArrayView* view :
       {&gradients.dy, &call.x, &call.residual, &call.rstd, &gradients.d_residual})
    stretch(*view, gradients.dx);
  stretch(call.weight, gradients.dweight);
}

// ---- memory for one call ----

constexpr std::size_t workspace_alignment = 64;

class HostWorkspace {
 public:
  explicit HostWorkspace(std::int64_t bytes)
      : memory_(bytes == 0 ? nullptr : ::operator new(static_cast<std::size_t>(bytes), alignment)) {
  }
  HostWorkspace(const HostWorkspace&) = delete;
  HostWorkspace& operator=(const HostWorkspace&) = delete;
  ~HostWorkspace() { ::operator delete(memory_, alignment); }
  void* data() const { return memory_; }

 private:
  static constexpr std::align_val_t alignment{workspace_alignment};
  void* memory_;
};

// From XLA's allocator, which gives the memory to nobody else before the stream has come to the end
// of this call.
class DeviceWorkspace {
 public:
  DeviceWorkspace(const CallFrame& frame, std::int64_t bytes)
      : frame_(frame), bytes_(static_cast<std::size_t>(bytes)) {
    if (bytes == 0) return;
    AllocateDeviceMemory request = {sizeof(AllocateDeviceMemory), nullptr, frame.context, bytes_,
                                    workspace_alignment,          nullptr};
    require_success(frame.api->allocate_device_memory(&request));
    data_ = request.data;
  }
  DeviceWorkspace(const DeviceWorkspace&) = delete;
  DeviceWorkspace& operator=(const DeviceWorkspace&) = delete;
  ~DeviceWorkspace() {
    if (data_ == nullptr) return;
    FreeDeviceMemory request = {sizeof(FreeDeviceMemory), nullptr, frame_.context, bytes_, data_};
    discard(frame_, frame_.api->free_device_memory(&request));
  }
  void* data() const { return data_; }

 private:
  const CallFrame& frame_;
  std::size_t bytes_;
  void* data_ = nullptr;
};

// ---- platforms ----

// Each has run(frame, call, params) for the parameters of every operation.
struct Cpu {
  template <class Params>
  static constexpr std::uint32_t traits = 0;

  static Status run(const CallFrame& frame, const Call& call, const ForwardParams& params) {
    return run_step(frame, &params, row_step(call, params));
  }

  static Status run(const CallFrame& frame, const Call& call, const BackwardParams& params) {
    cpu::BackwardPass pass(params);
    const HostWorkspace workspace(pass.workspace_bytes());
    Status status = pass.set_workspace(workspace.data(), pass.workspace_bytes());
    if (!status.ok()) return status;
    const BackwardSteps steps = backward_steps(call, pass);
    for (int i = 0; i < steps.count && status.ok(); ++i)
      status = run_step(frame, &pass, steps.step[i]);
    return status;
  }

  static const char* error_text(const Status& status) { return rmsnorm::text(status.code); }
};

struct Cuda {
  // A graph that is replayed would use the workspace of backward after it was freed.
  template <class Params>
  static constexpr std::uint32_t traits =
      std::is_same<Params, ForwardParams>::value ? trait_command_buffer_compatible : 0;

  static Status run(const CallFrame& frame, const Call&, const ForwardParams& params) {
    return cuda::forward(params, stream_of(frame));
  }

  static Status run(const CallFrame& frame, const Call&, BackwardParams& params) {
    params.workspace_bytes = cuda::backward_workspace(params);
    const DeviceWorkspace workspace(frame, params.workspace_bytes);
    params.workspace = workspace.data();
    return cuda::backward(params, stream_of(frame));
  }

  static const char* error_text(const Status& status) { return cuda::error_text(status); }

 private:
  // Of the device that XLA has made the current one.
  static cudaStream_t stream_of(const CallFrame& frame) {
    GetStream request = {sizeof(GetStream), nullptr, frame.context, nullptr};
    require_success(frame.api->get_stream(&request));
    return static_cast<cudaStream_t>(request.stream);
  }
};

// ---- handlers ----

template <class Platform>
void check_status(const Status& status) {
  if (status.ok()) return;
  if (status.code == Code::isa_unavailable)
    throw Refusal{ErrorCode::failed_precondition, isa_error_text()};
  throw Refusal{ErrorCode::invalid_argument,
                std::string(rmsnorm::name(status.argument)) + ": " + Platform::error_text(status)};
}

// Dimensions are counted from the axis before the library checks the call.
Status check_axis(const Call& call) {
  if (!call.x.present()) return {Code::missing, Argument::x};
  const int rank = call.x.rank;
  const bool outside = rank > 0 && (call.axis < -rank || call.axis >= rank);
  return outside ? Status{Code::invalid_value, Argument::axis} : Status{};
}

template <class Platform, class Params>
void execute(const CallFrame& frame) {
  require_size(frame.struct_size, sizeof(CallFrame), "a call");
  require_size(frame.api->struct_size, sizeof(Api), "an API");
  if (frame.stage != Stage::execute) refuse("a stage that was not registered");
  Call call;
  Gradients gradients;
  if (std::is_same<Params, BackwardParams>::value) call.gradients = &gradients;
  read_call(frame, call);
  Params params;
  Status status = check_axis(call);
  if (status.ok()) status = make_parameters(call, params);
  if (status.ok()) status = Platform::run(frame, call, params);
  check_status<Platform>(status);
}

// The newest version that XLA and this build both know. Without an API, as in the first versions,
// there is none to ask.
void describe(const CallFrame& frame, Metadata& metadata, std::uint32_t traits) {
  const int minor = frame.api == nullptr ? oldest_minor_version : frame.api->version.minor;
  metadata.version.major = major_version;
  metadata.version.minor = minor < newest_minor_version ? minor : newest_minor_version;
  metadata.traits = traits;
}

Error* error_of(const CallFrame& frame, ErrorCode code, const std::string& message) {
  const std::string full = "rmsnorm: " + message;
  CreateError request = {sizeof(CreateError), nullptr, full.c_str(), code};
  return frame.api->create_error(&request);
}

template <class Platform, class Params>
Error* handle(CallFrame* frame) {
  const Extension* extension = frame->extensions;
  if (extension != nullptr && extension->type == ExtensionType::metadata) {
    describe(*frame, *reinterpret_cast<const MetadataExtension*>(extension)->metadata,
             Platform::template traits<Params>);
    return nullptr;
  }
  try {
    execute<Platform, Params>(*frame);
    return nullptr;
  } catch (const Refusal& refusal) {
    return error_of(*frame, refusal.code, refusal.message);
  } catch (const Failure& failure) {
    return failure.error;
  } catch (const std::bad_alloc&) {
    return error_of(*frame, ErrorCode::resource_exhausted, "no memory for a workspace");
  } catch (const std::exception& error) {
    return error_of(*frame, ErrorCode::internal, error.what());
  }
}

nb::capsule capsule_of(Handler handler) {
  return nb::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET");
}

nb::dict handlers() {
  nb::dict on_cpu;
  on_cpu["rmsnorm_forward"] = capsule_of(handle<Cpu, ForwardParams>);
  on_cpu["rmsnorm_backward"] = capsule_of(handle<Cpu, BackwardParams>);
  nb::dict platforms;
  platforms["cpu"] = on_cpu;
  if (cuda::build_info().built) {
    nb::dict on_cuda;
    on_cuda["rmsnorm_forward"] = capsule_of(handle<Cuda, ForwardParams>);
    on_cuda["rmsnorm_backward"] = capsule_of(handle<Cuda, BackwardParams>);
    platforms["CUDA"] = on_cuda;
  }
  return platforms;
}

}  // namespace

void define_handlers(nb::module_& m) {
  m.def("xla_handlers", &handlers, nb::sig("def xla_handlers() -> dict[str, dict[str, Any]]"));
}

}  // namespace rmsnorm::python::xla
