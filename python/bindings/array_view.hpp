// Arrays in: reads address, dtype, shape and strides from whatever array object the caller passed,
// without a copy.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <rmsnorm/contract.hpp>

#include "dlpack.hpp"

namespace rmsnorm::python {

namespace nb = nanobind;

enum class Framework { numpy, torch, cupy, jax, other };
enum class Access { read, write };

// NumPy's limit, and the largest of the frameworks' that has one.
constexpr int max_dimensions = 64;

// Valid while its source is alive and not resized in place, as arguments are during a call.
// Sizes and strides are not initialised: that would write two kilobytes at every call for nothing.
struct ArrayView {
  nb::handle source;
  Framework framework = Framework::numpy;
  dlpack::Device device = {dlpack::cpu, 0};
  DType dtype;
  void* data;
  int rank = -1;  // -1: absent
  std::int64_t sizes[max_dimensions];
  std::int64_t strides[max_dimensions];  // in elements
  nb::object owner;                      // what keeps the memory alive, where source does not
  // On CUDA and still to be exported to a stream, by read_on_stream: only source, device and access
  // are known.
  bool pending = false;
  Access access = Access::read;
  bool requires_grad = false;  // of a torch tensor, where grad mode is on

  bool present() const { return rank >= 0; }
  bool on_cpu() const {
    return device.type == dlpack::cpu || device.type == dlpack::cuda_host ||
           device.type == dlpack::rocm_host;
  }
  bool on_cuda() const {
    return device.type == dlpack::cuda || device.type == dlpack::cuda_managed;
  }
};

// Fills `view` from `source`. Raises TypeError for what is no array or has an unsupported dtype,
// ValueError for memory that cannot be used as asked; `name` is the argument's, for the message.
// An array on CUDA may be left pending; one on another device has no data in its view.
void read_array(nb::handle source, const char* name, Access access, ArrayView& view);

// As read_array, but None leaves the view absent.
inline void read_optional(nb::handle source, const char* name, Access access, ArrayView& view) {
  if (!source.is_none()) read_array(source, name, access, view);
}

// One reader per protocol.
void read_numpy(nb::handle source, const char* name, Access access, ArrayView& view);
void read_torch(nb::handle source, const char* name, ArrayView& view);
void read_dlpack(nb::handle source, const char* name, Access access, ArrayView& view);

// Completes a pending view: the producer makes `stream` (a cudaStream_t) wait for what is still
// being written to the array.
void read_on_stream(ArrayView& view, const char* name, std::uintptr_t stream);

// The part that torch's C exchange API and __dlpack__ share.
void read_tensor_view(const dlpack::TensorView& tensor, nb::handle source, const char* name,
                      ArrayView& view);

}  // namespace rmsnorm::python
