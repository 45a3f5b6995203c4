// Arrays out: memory for a result, in the framework of the array that it answers.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>
#include <rmsnorm/contract.hpp>

#include "array_view.hpp"
#include "placement.hpp"

namespace rmsnorm::python {

// An output of a call: either the caller's array or a new one like x. Writing goes through `view`;
// the Python object is complete only after take(), since JAX arrays must not change once they
// exist.
class Output {
 public:
  // `view` is where the call, or its scratch memory, has the output.
  Output(const Call& call, ArrayView& view) : call_(call), view_(view) {}

  // Reads the caller's array, unless it is None.
  void accept(nb::handle out, const char* name);
  bool accepted() const { return array_.is_valid(); }

  // Allocates an array like x, of this dtype and these sizes, compact in row-major order. The
  // arrays of the call, whose memory has been read, must not have moved meanwhile.
  void allocate(const Placement& placement, DType dtype, const std::int64_t* sizes, int rank);

  nb::object take();

  // Whether another library makes the array that take() returns of memory of ours.
  bool is_imported() const { return importer_.is_valid() && !importer_.is_none(); }

  // Has that library make an array as take() will, and gives it up. Raises what it raises.
  void try_import() const;

  // The caller's torch tensor, null for any other output.
  PyObject* written_tensor() const;

 private:
  // Raises RuntimeError where the array is not what was asked for: a mode of torch's or a patch of
  // the user's may have answered.
  void adopt(nb::object array, DType dtype, const std::int64_t* sizes, int rank);

  const Call& call_;
  ArrayView& view_;
  nb::object array_;
  bool allocated_ = false;
  // Makes an array of the kind of x out of memory of ours; None: an ExportedArray is the result.
  nb::object importer_;
  Placement placement_;
};

// For calls that write to memory of the caller's and have results that another library makes of
// memory of ours: whether it can is found out before anything is written.
void try_imports(const Call& call, std::initializer_list<const Output*> outputs);

// Counts the writes to the callers' torch tensors among these, once they were written. Autograd
// finds by a tensor's version that a value saved for the backward pass was overwritten, and raises
// instead of returning a wrong gradient.
void count_writes(std::initializer_list<const Output*> outputs);

}  // namespace rmsnorm::python
