// The binary interface between XLA and the functions that its custom calls name, as far as these
// bindings use it: version 0.1 to 0.3, of jaxlib 0.4.35 and later. Written from XLA's description
// of it (https://openxla.org/xla/custom_call), so that a build needs no JAX.
//
// Versions of the interface differ by what is added at the end of a struct, whose size is in front.
// A struct from XLA must have all members that are declared here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rmsnorm::python::xla {

constexpr int major_version = 0;
constexpr int oldest_minor_version = 1;
constexpr int newest_minor_version = 3;

struct Error;    // XLA's
struct Context;  // XLA's, of one execution

enum class ExtensionType : std::int32_t { metadata = 1 };

struct Extension {
  std::size_t struct_size;
  ExtensionType type;
  Extension* next;
};

struct Version {
  std::size_t struct_size;
  Extension* extensions;
  int major;
  int minor;
};

// What XLA asks of a handler at its registration, by a call with this extension and nothing else.
struct Metadata {
  std::size_t struct_size;
  Version version;
  std::uint32_t traits;
};

// The handler launches the same work on the stream at every call, which may be captured into a
// graph and replayed.
constexpr std::uint32_t trait_command_buffer_compatible = 1;

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

// Numbered as the codes of absl::Status.
enum class ErrorCode : std::int32_t {
  invalid_argument = 3,
  resource_exhausted = 8,
  failed_precondition = 9,
  internal = 13,
};

enum class DataType : std::int32_t {
  boolean = 1,
  i64 = 5,
  f16 = 10,
  f32 = 11,
  f64 = 12,
  bf16 = 16,
};

// Dense and row-major, unless the program asked for another layout.
struct Buffer {
  std::size_t struct_size;
  Extension* extensions;
  DataType dtype;
  void* data;
  std::int64_t rank;
  std::int64_t* sizes;
};

enum class ValueType : std::int32_t { buffer = 1 };

// Arguments or results. With ValueType::buffer a value is a Buffer.
struct Values {
  std::size_t struct_size;
  Extension* extensions;
  std::int64_t count;
  ValueType* types;
  void** values;
};

struct Text {
  const char* data;
  std::size_t size;
};

struct Scalar {
  DataType dtype;
  void* value;
};

enum class AttributeType : std::int32_t { scalar = 3, string = 4 };

// With AttributeType::scalar a value is a Scalar, with string a Text.
struct Attributes {
  std::size_t struct_size;
  Extension* extensions;
  std::int64_t count;
  AttributeType* types;
  Text** names;
  void** values;
};

enum class Stage : std::int32_t { instantiate = 0, prepare = 1, initialize = 2, execute = 3 };

struct Api;

// One call of a handler.
struct CallFrame {
  std::size_t struct_size;
  Extension* extensions;
  const Api* api;
  Context* context;
  Stage stage;
  Values arguments;
  Values results;
  Attributes attributes;
};

using Handler = Error* (*)(CallFrame*);

struct CreateError {
  std::size_t struct_size;
  Extension* extensions;
  const char* message;
  ErrorCode code;
};

struct DestroyError {
  std::size_t struct_size;
  Extension* extensions;
  Error* error;
};

struct GetStream {
  std::size_t struct_size;
  Extension* extensions;
  Context* context;
  void* stream;  // out: a CUstream
};

struct AllocateDeviceMemory {
  std::size_t struct_size;
  Extension* extensions;
  Context* context;
  std::size_t size;
  std::size_t alignment;
  void* data;  // out
};

struct FreeDeviceMemory {
  std::size_t struct_size;
  Extension* extensions;
  Context* context;
  std::size_t size;
  void* data;
};

// The task runs on a thread of XLA's, or at once on this one.
struct ScheduleTask {
  std::size_t struct_size;
  Extension* extensions;
  Context* context;
  void (*task)(void*);
  void* data;
};

// XLA's functions. Those that return an Error return null for success.
struct Api {
  std::size_t struct_size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*create_error)(CreateError*);
  void (*error_message)();
  void (*destroy_error)(DestroyError*);
  void (*register_handler)();
  Error* (*get_stream)(GetStream*);
  void (*register_type)();
  void (*get_context)();
  void (*set_state)();
  void (*get_state)();
  Error* (*allocate_device_memory)(AllocateDeviceMemory*);
  Error* (*free_device_memory)(FreeDeviceMemory*);
  Error* (*schedule_task)(ScheduleTask*);
};

}  // namespace rmsnorm::python::xla
