// The binary layout of DLPack 1.x that the bindings read, written from its specification
// (https://dmlc.github.io/dlpack/latest/). Layouts are fixed within a major version.
#pragma once

#include <cstdint>

namespace rmsnorm::python::dlpack {

constexpr std::uint32_t major_version = 1;
constexpr std::uint32_t minor_version = 1;

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

enum DeviceType : std::int32_t {
  cpu = 1,
  cuda = 2,
  cuda_host = 3,
  rocm = 10,
  rocm_host = 11,
  cuda_managed = 13,
};

struct Device {
  std::int32_t type;
  std::int32_t id;
};

enum TypeCode : std::uint8_t {
  signed_integer = 0,
  unsigned_integer = 1,
  floating = 2,
  opaque = 3,
  bfloat = 4,
  complex = 5,
  boolean = 6,
  float8_e3m4 = 7,
  float8_e4m3 = 8,
  float8_e4m3b11fnuz = 9,
  float8_e4m3fn = 10,
  float8_e4m3fnuz = 11,
  float8_e5m2 = 12,
  float8_e5m2fnuz = 13,
  float8_e8m0fnu = 14,
  float6_e2m3fn = 15,
  float6_e3m2fn = 16,
  float4_e2m1fn = 17,
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct TensorView {
  void* data;
  Device device;
  std::int32_t rank;
  DataType dtype;
  std::int64_t* sizes;
  std::int64_t* strides;  // in elements; null means compact (before DLPack 1.2)
  std::uint64_t byte_offset;
};

struct ManagedTensor {  // the content of a capsule named "dltensor"
  TensorView tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

constexpr std::uint64_t flag_read_only = 1;
constexpr std::uint64_t flag_is_copied = 2;

struct VersionedTensor {  // the content of a capsule named "dltensor_versioned"
  Version version;
  void* context;
  void (*deleter)(VersionedTensor*);
  std::uint64_t flags;
  TensorView tensor;
};

// The C exchange API: a capsule named "dlpack_exchange_api" in the attribute
// __dlpack_c_exchange_api__ of a type. An owner of several major versions links the older ones
// through `previous`.
struct ExchangeApi {
  Version version;
  const ExchangeApi* previous;
  int (*allocate)(TensorView*, VersionedTensor**, void*, void (*)(void*, const char*, const char*));
  int (*managed_from_object)(void*, VersionedTensor**);
  int (*managed_to_object)(VersionedTensor*, void**);
  int (*view_from_object)(void*, TensorView*);  // may be null; sizes and strides are borrowed
  int (*current_stream)(DeviceType, std::int32_t, void**);
};

}  // namespace rmsnorm::python::dlpack
