#include "function.hpp"

#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <new>

#include "errors.hpp"
#include "wrong_arguments.hpp"

#if PY_VERSION_HEX < 0x030C0000
#include <structmember.h>
#define Py_T_PYSSIZET T_PYSSIZET
#define Py_READONLY READONLY
#endif

namespace rmsnorm::python {
namespace {

constexpr const char* package = "rmsnorm";

struct Function {
  PyObject base;
  vectorcallfunc vectorcall;
  PyObject* weak_references;
  const Definition* definition;
  PyObject* names[max_parameters];     // interned
  PyObject* defaults[max_parameters];  // borrowed from the definition; null: required
};

const Definition& definition_of(PyObject* self) {
  return *reinterpret_cast<Function*>(self)->definition;
}

// ---- calls ----

// Names that the compiler of Python wrote are interned, and are found by their address.
int index_of(const Function& function, PyObject* keyword) {
  const int count = function.definition->count;
  for (int i = 0; i < count; ++i)
    if (function.names[i] == keyword) return i;
  for (int i = 0; i < count; ++i)
    if (PyUnicode_CompareWithASCIIString(keyword, function.definition->parameters[i].name) == 0)
      return i;
  raise_unknown_keyword(*function.definition, keyword);
}

// One value for each parameter. `given` arguments came by position, those of the keywords after
// them.
void bind(const Function& function, PyObject* const* arguments, Py_ssize_t given,
          PyObject* keywords, PyObject** values) {
  const Definition& definition = *function.definition;
  if (given > definition.positional) raise_too_many(definition, arguments, given);
  std::memcpy(values, function.defaults, sizeof(function.defaults));
  for (Py_ssize_t i = 0; i < given; ++i) values[i] = arguments[i];
  static_assert(max_parameters <= 32, "one bit for each");
  std::uint32_t named = 0;
  const Py_ssize_t keyword_count = keywords == nullptr ? 0 : NB_TUPLE_GET_SIZE(keywords);
  for (Py_ssize_t i = 0; i < keyword_count; ++i) {
    const int index = index_of(function, NB_TUPLE_GET_ITEM(keywords, i));
    if (index < given) raise_given_twice(definition, index, "by position and by keyword");
    const std::uint32_t bit = std::uint32_t{1} << index;
    if ((named & bit) != 0) raise_given_twice(definition, index, "twice by keyword");
    named |= bit;
    values[index] = arguments[given + i];
  }
  for (Py_ssize_t i = given; i < definition.positional; ++i)
    if (values[i] == nullptr) raise_missing(definition, static_cast<int>(i));
}

nb::object compute(const Definition& definition, PyObject* const* values, Py_ssize_t given) {
  try {
    return definition.compute(values);
  } catch (const nb::python_error& error) {
    if (error.matches(PyExc_TypeError)) explain_number(definition, values, given);
    throw;
  }
}

// For functions that the interpreter calls: null with an error set where `make` throws. What is no
// exception goes on: Python before 3.14 ends daemon threads by unwinding their stacks.
template <class Make>
PyObject* result_of(Make make) {
  try {
    return make().release().ptr();
  } catch (nb::python_error& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// A call keeps 10 to 25 KiB on the stack, which Python's own limit of 1000 nested calls does not
// take into account: an array's __dlpack__ may call the functions again. 384 KiB are 37 calls of
// rms_norm within each other, or 15 of rms_norm_backward, and fit a thread of 512 KiB.
class Nesting {
 public:
  Nesting() {
    const char here = 0;
    const auto address = reinterpret_cast<std::uintptr_t>(&here);
    if (outermost == 0) {
      outermost = address;
      is_outermost_ = true;
    } else if (address < outermost && outermost - address > most_bytes) {
      // Stacks grow downwards. Above the outermost call is none within it: greenlets switch stacks.
      raise(PyExc_RecursionError, "rmsnorm: calls within each other take more than %d KiB of stack",
            static_cast<int>(most_bytes / 1024));
    }
  }
  Nesting(const Nesting&) = delete;
  Nesting& operator=(const Nesting&) = delete;
  ~Nesting() {
    if (is_outermost_) outermost = 0;
  }

 private:
  static constexpr std::uintptr_t most_bytes = 384 * 1024;
  static inline thread_local std::uintptr_t outermost = 0;
  bool is_outermost_ = false;
};

PyObject* call(PyObject* self, PyObject* const* arguments, std::size_t count, PyObject* keywords) {
  return result_of([&] {
    const Nesting nesting;
    const auto& function = *reinterpret_cast<const Function*>(self);
    const Py_ssize_t given = NB_VECTORCALL_NARGS(count);
    PyObject* values[max_parameters];
    bind(function, arguments, given, keywords, values);
    return compute(*function.definition, values, given);
  });
}

// ---- attributes ----

// The names in an annotation are those of rmsnorm._typing.
nb::object evaluated(const char* annotation) {
  const nb::object names = nb::module_::import_("rmsnorm._typing").attr("__dict__");
  return nb::module_::import_("builtins").attr("eval")(annotation, names);
}

nb::object signature_of(const Definition& definition) {
  const nb::module_ inspect = nb::module_::import_("inspect");
  const nb::object type = inspect.attr("Parameter");
  nb::list parameters;
  for (int i = 0; i < definition.count; ++i) {
    const Parameter& parameter = definition.parameters[i];
    nb::dict options;
    options["annotation"] = evaluated(parameter.annotation);
    if (parameter.default_value.is_valid()) options["default"] = parameter.default_value;
    const bool positional = i < definition.positional;
    parameters.append(type(parameter.name,
                           type.attr(positional ? "POSITIONAL_OR_KEYWORD" : "KEYWORD_ONLY"),
                           **options));
  }
  return inspect.attr("Signature")(
      parameters, nb::arg("return_annotation") = evaluated(definition.texts.returns));
}

nb::object annotations_of(const Definition& definition) {
  nb::dict annotations;
  for (int i = 0; i < definition.count; ++i)
    annotations[definition.parameters[i].name] = evaluated(definition.parameters[i].annotation);
  annotations["return"] = evaluated(definition.texts.returns);
  return std::move(annotations);
}

PyObject* get_name(PyObject* self, void*) {
  return PyUnicode_FromString(definition_of(self).texts.name);
}

PyObject* get_doc(PyObject* self, void*) {
  return PyUnicode_FromString(definition_of(self).texts.doc);
}

PyObject* get_signature(PyObject* self, void*) {
  return result_of([&] { return signature_of(definition_of(self)); });
}

PyObject* get_annotations(PyObject* self, void*) {
  return result_of([&] { return annotations_of(definition_of(self)); });
}

// The type has this one as well, and a descriptor of the same name would hide it.
PyObject* get_attribute(PyObject* self, PyObject* name) {
  if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, "__module__") == 0)
    return PyUnicode_FromString(package);
  return PyObject_GenericGetAttr(self, name);
}

PyObject* repr(PyObject* self) {
  return PyUnicode_FromFormat("<function %s.%s>", package, definition_of(self).texts.name);
}

// pickle and copy take a string as the name of a global object.
PyObject* reduce(PyObject* self, PyObject*) { return get_name(self, nullptr); }

// As an attribute of a class a function stays one, like those of C. That there is a __get__ makes
// it a routine to inspect, help and doctest.
PyObject* get(PyObject* self, PyObject*, PyObject*) { return Py_NewRef(self); }

void deallocate(PyObject* self) {
  auto* function = reinterpret_cast<Function*>(self);
  if (function->weak_references != nullptr) PyObject_ClearWeakRefs(self);
  for (PyObject* name : function->names) Py_XDECREF(name);
  delete function->definition;
  PyTypeObject* type = Py_TYPE(self);
  PyObject_Free(self);
  Py_DECREF(type);
}

// ---- the type ----

PyMemberDef members[] = {
    {"__vectorcalloffset__", Py_T_PYSSIZET, offsetof(Function, vectorcall), Py_READONLY, nullptr},
    {"__weaklistoffset__", Py_T_PYSSIZET, offsetof(Function, weak_references), Py_READONLY,
     nullptr},
    {}};

PyGetSetDef properties[] = {{"__doc__", get_doc, nullptr, nullptr, nullptr},
                            {"__name__", get_name, nullptr, nullptr, nullptr},
                            {"__qualname__", get_name, nullptr, nullptr, nullptr},
                            {"__signature__", get_signature, nullptr, nullptr, nullptr},
                            {"__annotations__", get_annotations, nullptr, nullptr, nullptr},
                            {}};

PyMethodDef methods[] = {{"__reduce__", reduce, METH_NOARGS, nullptr}, {}};

template <class Pointer>
void* slot(Pointer pointer) {
  return reinterpret_cast<void*>(pointer);
}

nb::object new_type() {
  PyType_Slot slots[] = {{Py_tp_call, slot(PyVectorcall_Call)},
                         {Py_tp_dealloc, slot(deallocate)},
                         {Py_tp_descr_get, slot(get)},
                         {Py_tp_getattro, slot(get_attribute)},
                         {Py_tp_getset, properties},
                         {Py_tp_members, members},
                         {Py_tp_methods, methods},
                         {Py_tp_repr, slot(repr)},
                         {0, nullptr}};
  PyType_Spec spec = {"rmsnorm._core.Function", sizeof(Function), 0,
                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL |
                          Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
                      slots};
  PyObject* type = PyType_FromSpec(&spec);
  if (type == nullptr) throw nb::python_error();
  return nb::steal(type);
}

PyTypeObject* function_type() {
  static PyObject* const type = new_type().release().ptr();
  return reinterpret_cast<PyTypeObject*>(type);
}

}  // namespace

void add_function(nb::module_& m, const Definition& definition) {
  auto owned = std::make_unique<const Definition>(definition);
  PyObject* object = PyType_GenericAlloc(function_type(), 0);
  if (object == nullptr) throw nb::python_error();
  auto* function = reinterpret_cast<Function*>(object);
  function->vectorcall = call;
  function->definition = owned.release();
  const nb::object made = nb::steal(object);
  for (int i = 0; i < definition.count; ++i) {
    function->names[i] = PyUnicode_InternFromString(definition.parameters[i].name);
    if (function->names[i] == nullptr) throw nb::python_error();
    function->defaults[i] = definition.parameters[i].default_value.ptr();
  }
  m.attr(definition.texts.name) = made;
}

}  // namespace rmsnorm::python
