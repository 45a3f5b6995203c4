// Memory of ours as a DLPack producer: what from_dlpack of other libraries is given, and the result
// itself where x's library has none.
#pragma once

#include <nanobind/nanobind.h>

#include "array_view.hpp"
#include "placement.hpp"

namespace rmsnorm::python {

// An ExportedArray of the view's memory, which it keeps alive by view.owner. On CUDA its consumers
// wait for what the call's stream has been given to do.
nb::object export_array(const ArrayView& view, const Placement& placement);

// One of memory that nobody has written yet, to be looked at and not read.
nb::object export_unwritten(const ArrayView& view);

// The from_dlpack with which a producer's library makes arrays like it: that of its array
// namespace, of its type, or of the package that defines the type. None where there is none of
// them.
nb::object importer_of(nb::handle source);

// The array that the importer makes of an ExportedArray; the ExportedArray where importer is None.
// RuntimeError where the importer raises.
nb::object imported_array(nb::handle importer, nb::object exported);

void define_exported_array(nb::module_& m);

}  // namespace rmsnorm::python
