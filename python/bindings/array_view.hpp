// Arrays in: reads address, dtype, shape and strides from whatever array object the caller passed,
// without a copy.
//
// Code of the caller's that runs while a call is read (an array's __dlpack__, an option's
// __float__, a mode of torch's) may resize its NumPy arrays and torch tensors in place. So an array
// is read in two steps. First, in the order of a function's parameters and with its options,
// read_array recognises each and exports those that speak DLPack, whose exports are held. Then
// read_memory takes what NumPy's and torch's structs say, which runs no such code. Where code of
// the caller's can run after that, as when a result is allocated, require_unmoved is asked again.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <rmsnorm/contract.hpp>

#include "dlpack.hpp"

namespace rmsnorm::python {

namespace nb = nanobind;

enum class Framework { numpy, torch, cupy, jax, other };
enum class Access { read, write };

// What dtypes an array may have: the four, or of statistics (mean_square, rstd) float32 and
// float64.
enum class Dtypes { all, of_statistics };

// What of an array is still to be read: the memory of a NumPy array or torch tensor, or the export
// of an array on CUDA to a stream. Only source, framework and, for `stream`, device are known then.
enum class Pending { nothing, memory, stream };

// NumPy's limit, and the largest of the frameworks' that has one.
constexpr int max_dimensions = 64;

// Sizes and strides are not initialised: that would write two kilobytes at every call for nothing.
struct ArrayView {
  explicit ArrayView(Dtypes accepted_dtypes = Dtypes::all) : accepted_dtypes(accepted_dtypes) {}

  nb::handle source;
  const char* name = nullptr;  // the argument's, for messages
  Framework framework = Framework::numpy;
  dlpack::Device device = {dlpack::cpu, 0};
  Dtypes accepted_dtypes;  // for messages; the library checks it
  DType dtype;
  void* data;
  int rank = -1;  // -1: absent
  std::int64_t sizes[max_dimensions];
  std::int64_t strides[max_dimensions];  // in elements
  nb::object owner;                      // what keeps the memory alive, where source does not
  Pending pending = Pending::nothing;
  Access access = Access::read;
  bool requires_grad = false;   // of a torch tensor, where grad mode is on
  bool may_be_negated = false;  // of a torch tensor; refuse_negative_bit asks

  bool present() const { return rank >= 0; }
  bool on_cpu() const {
    return device.type == dlpack::cpu || device.type == dlpack::cuda_host ||
           device.type == dlpack::rocm_host;
  }
  bool on_cuda() const {
    return device.type == dlpack::cuda || device.type == dlpack::cuda_managed;
  }
};

// The first step. Raises TypeError for what is no array or has an unsupported dtype, ValueError for
// memory that cannot be used as asked; `name` is the argument's. The view may be left pending; that
// of an array on another device than CPU and CUDA has no data.
void read_array(nb::handle source, const char* name, Access access, ArrayView& view);

// As read_array, but None leaves the view absent.
inline void read_optional(nb::handle source, const char* name, Access access, ArrayView& view) {
  if (!source.is_none()) read_array(source, name, access, view);
}

// The second step, of a view that is pending for it; raises as the first. True where
// refuse_negative_bit has to ask.
bool read_memory(ArrayView& view);

// ValueError where a NumPy array or torch tensor that was read is no longer what the view says.
void require_unmoved(const ArrayView& view);

// Completes a view that is pending for a stream (a cudaStream_t): the producer makes it wait for
// what is still being written to the array.
void read_on_stream(ArrayView& view, std::uintptr_t stream);

// One reader per protocol, of a view that has source, name and access.
void read_numpy(ArrayView& view);
void recognise_torch(ArrayView& view);
void read_torch(ArrayView& view);
// Asks torch, whose modes hear of it.
void refuse_negative_bit(const ArrayView& view);
void read_dlpack(nb::handle source, ArrayView& view);

// The part that torch's C exchange API and __dlpack__ share: checks every field before its use.
void read_tensor_view(const dlpack::TensorView& tensor, ArrayView& view);

// Sets the strides of the view's sizes in row-major order. They wrap around where sizes are too
// large for any memory, which the library refuses.
void set_compact_strides(ArrayView& view);

}  // namespace rmsnorm::python
