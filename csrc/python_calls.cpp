// Calls of the ops from Python that skip torch's dispatcher. For small tensors its boxing of a dozen arguments costs
// more than the kernels: a whole draft_step takes 40 % less without it.
//
// Tensors cross by DLPack's exchange API, a table of C functions that torch publishes: like the stable ABI, it does not
// change with torch's version. What only the dispatcher can do right is handed to it (`Entry::overload`): other
// devices, tensor subclasses, autograd, modes and tracers that want to see the call, and every wrong argument, which it
// refuses.
#include "python_calls.h"

#include <ATen/dlpack.h>
#include <dlfcn.h>

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "calls.h"
#include "launchers.h"

namespace freedave {
namespace {

// What `connect` was given. Never released: torch and its functions live as long as the process.
struct Connection {
  const Launchers* launchers;
  const DLPackExchangeAPI* torch;
  PyTypeObject* tensor_type;
  PyObject* observers;  // tuple of functions: a call goes to the dispatcher while one of them returns something true
  PyObject *requires_grad, *is_neg;
};
Connection connection;

DType dtype_of(DLDataType type) {
  if (type.lanes != 1) return DType::kOther;
  const auto is = [type](DLDataTypeCode code, int bits) { return type.code == code && type.bits == bits; };
  if (is(kDLInt, 64)) return DType::kInt64;
  if (is(kDLFloat, 32)) return DType::kFloat32;
  if (is(kDLBool, 8)) return DType::kBool;
  if (is(kDLInt, 32)) return DType::kInt32;
  if (is(kDLBfloat, 16)) return DType::kBFloat16;
  if (is(kDLFloat, 16)) return DType::kFloat16;
  if (is(kDLFloat, 64)) return DType::kFloat64;
  return DType::kOther;
}

DLDataType dlpack(DType dtype) {
  switch (dtype) {
    case DType::kBool:
      return {kDLBool, 8, 1};
    case DType::kInt32:
      return {kDLInt, 32, 1};
    case DType::kInt64:
      return {kDLInt, 64, 1};
    case DType::kFloat32:
      return {kDLFloat, 32, 1};
    case DType::kFloat64:
      return {kDLFloat, 64, 1};
    default:
      throw std::invalid_argument("no op returns this type");
  }
}

size_t bytes_of(DLDataType type) { return type.bits / 8; }

// A new contiguous tensor on the CPU, in one piece of memory: what DLPack says about it, its sizes and strides, its
// values. Torch's own allocator, asked through DLPack, takes twice as long.
class PythonOutput {
 public:
  PythonOutput(DType dtype, const Argument&, const int64_t* sizes, int64_t dims) {
    const DLDataType type = dlpack(dtype);
    int64_t bytes = static_cast<int64_t>(bytes_of(type));
    bool too_many = false;
    for (int64_t d = 0; d < dims; ++d) too_many |= __builtin_mul_overflow(bytes, sizes[d], &bytes);
    const size_t head = sizeof(DLManagedTensorVersioned) + 2 * static_cast<size_t>(dims) * sizeof(int64_t);
    const size_t values = (head + kAlignment - 1) / kAlignment * kAlignment;
    void* memory = nullptr;
    if (too_many || posix_memalign(&memory, kAlignment, values + static_cast<size_t>(bytes)) != 0) {
      throw std::bad_alloc();
    }
    auto* shape = reinterpret_cast<int64_t*>(static_cast<char*>(memory) + sizeof(DLManagedTensorVersioned));
    int64_t* strides = shape + dims;
    int64_t stride = 1;
    for (int64_t d = dims - 1; d >= 0; --d) {
      shape[d] = sizes[d];
      strides[d] = stride;
      stride *= sizes[d] > 0 ? sizes[d] : 1;
    }
    tensor_ = new (memory) DLManagedTensorVersioned{.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION},
                                                    .manager_ctx = nullptr,
                                                    .deleter = [](DLManagedTensorVersioned* tensor) { free(tensor); },
                                                    .flags = 0,
                                                    .dl_tensor = {.data = static_cast<char*>(memory) + values,
                                                                  .device = {kDLCPU, 0},
                                                                  .ndim = static_cast<int32_t>(dims),
                                                                  .dtype = type,
                                                                  .shape = shape,
                                                                  .strides = strides,
                                                                  .byte_offset = 0}};
  }
  PythonOutput(DType dtype, const Argument& like, std::initializer_list<int64_t> sizes)
      : PythonOutput(dtype, like, sizes.begin(), static_cast<int64_t>(sizes.size())) {}
  PythonOutput(DType dtype, const Argument& like) : PythonOutput(dtype, like, like.sizes, like.dims) {}
  PythonOutput(const PythonOutput&) = delete;
  PythonOutput& operator=(const PythonOutput&) = delete;
  ~PythonOutput() { free(tensor_); }

  template <typename T>
  T* data() const {
    return static_cast<T*>(tensor_->dl_tensor.data);
  }

  DLManagedTensorVersioned* release() { return std::exchange(tensor_, nullptr); }

 private:
  static constexpr size_t kAlignment = 64;  // as torch aligns its own
  DLManagedTensorVersioned* tensor_ = nullptr;
};

struct PythonEdge {
  using Tensor = DLTensor;
  using Word = std::string_view;
  using Output = PythonOutput;
  using Released = DLManagedTensorVersioned*;

  // Sizes and strides are the tensor's own, and the caller holds the tensor.
  static Argument argument(const char* op, const char* name, const Tensor& tensor) {
    return {.op = op,
            .name = name,
            .dims = tensor.ndim,
            .sizes = tensor.shape,
            .strides = tensor.strides,
            .dtype = dtype_of(tensor.dtype),
            .device_type = tensor.device.device_type,
            .device_index = tensor.device.device_id,
            .data = static_cast<const char*>(tensor.data) + tensor.byte_offset};
  }

  static void launch(const Argument&, const PredictTokensParams& p) { run(connection.launchers->predict_tokens, p); }
  static void launch(const Argument&, const PartialPredictionsParams& p) {
    run(connection.launchers->partial_predictions, p);
  }
  static void launch(const Argument&, const MergePredictionsParams& p) {
    run(connection.launchers->merge_predictions, p);
  }
  static void launch(const Argument&, const RankPositionsParams& p) { run(connection.launchers->rank_positions, p); }
  static void launch(const Argument&, const SelectTransferParams& p) { run(connection.launchers->select_transfer, p); }
  static void launch(const Argument&, const BuildDraftsParams& p) { run(connection.launchers->build_drafts, p); }
  static void launch(const Argument&, const VerifyDraftsParams& p) { run(connection.launchers->verify_drafts, p); }
  static void launch(const Argument&, const DraftStepParams& p) { run(connection.launchers->draft_step, p); }

 private:
  template <typename Params>
  static void run(Launcher<Params> launcher, const Params& p) {
    PyThreadState* thread = PyEval_SaveThread();
    const bool succeeded = launcher(p);
    PyEval_RestoreThread(thread);
    if (!succeeded) throw std::runtime_error("the kernel failed");
  }
};

// Checks a call's arguments and leaves it there, for backends that are not native. Tensors may be anywhere.
struct CheckEdge {
  struct Tensor {
    DLTensor anywhere;
  };
  using Word = std::string_view;
  struct Released {};
  struct Output {
    template <typename... Arguments>
    Output(DType, const Argument&, const Arguments&...) {}
    Output(DType, const Argument&, std::initializer_list<int64_t>) {}
    template <typename T>
    T* data() const {
      return nullptr;
    }
    Released release() { return {}; }
  };
  static Argument argument(const char* op, const char* name, const Tensor& tensor) {
    return PythonEdge::argument(op, name, tensor.anywhere);
  }
  template <typename Params>
  static void launch(const Argument&, const Params&) {}
};

// Arguments from Python. False: not a plain value of this kind, which is for the dispatcher to convert or to refuse.

bool is_true(PyObject* owned) {
  const bool is = owned == nullptr || PyObject_IsTrue(owned) != 0;
  Py_XDECREF(owned);
  return is;
}

bool from_python(PyObject* object, CheckEdge::Tensor& tensor) {
  return Py_TYPE(object) == connection.tensor_type &&
         connection.torch->dltensor_from_py_object_no_sync(object, &tensor.anywhere) == 0;
}

bool from_python(PyObject* object, DLTensor& tensor) {
  if (Py_TYPE(object) != connection.tensor_type) return false;
  if (connection.torch->dltensor_from_py_object_no_sync(object, &tensor) != 0) return false;
  if (tensor.device.device_type != kDLCPU) return false;
  if (tensor.dtype.code != kDLFloat && tensor.dtype.code != kDLBfloat) return true;
  // Only these can be part of a graph, or a view that negates what is in memory.
  return !is_true(PyObject_GetAttr(object, connection.requires_grad)) &&
         !is_true(PyObject_CallMethodNoArgs(object, connection.is_neg));
}

bool from_python(PyObject* object, int64_t& number) {
  if (!PyLong_CheckExact(object)) return false;
  number = PyLong_AsLongLong(object);
  return number != -1 || PyErr_Occurred() == nullptr;
}

bool from_python(PyObject* object, double& number) {
  if (!PyFloat_CheckExact(object)) return false;
  number = PyFloat_AS_DOUBLE(object);
  return true;
}

bool from_python(PyObject* object, bool& value) {
  value = object == Py_True;
  return value || object == Py_False;
}

bool from_python(PyObject* object, std::string_view& word) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_CheckExact(object) ? PyUnicode_AsUTF8AndSize(object, &size) : nullptr;
  if (text != nullptr) word = {text, static_cast<size_t>(size)};
  return text != nullptr;
}

template <typename T>
bool from_python(PyObject* object, std::optional<T>& value) {
  if (object == Py_None) return true;
  value.emplace();
  return from_python(object, *value);
}

// Results for Python; null with an error set.

PyObject* to_python(DLManagedTensorVersioned* tensor) {
  void* object = nullptr;
  connection.torch->managed_tensor_to_py_object_no_sync(tensor, &object);
  return static_cast<PyObject*>(object);
}

template <typename... Tensors>
PyObject* to_python(const std::tuple<Tensors...>& tensors) {
  PyObject* objects = PyTuple_New(sizeof...(Tensors));
  Py_ssize_t index = 0;
  bool failed = objects == nullptr;
  // Every tensor is converted, even after one has failed: this is what releases it.
  const auto add = [&](DLManagedTensorVersioned* tensor) {
    PyObject* object = to_python(tensor);
    failed |= object == nullptr;
    if (objects != nullptr) {
      PyTuple_SET_ITEM(objects, index++, object);
    } else {
      Py_XDECREF(object);
    }
  };
  std::apply([&](auto... each) { (add(each), ...); }, tensors);
  if (!failed) return objects;
  Py_XDECREF(objects);
  return nullptr;
}

bool observed() {
  for (Py_ssize_t index = 0; index < PyTuple_GET_SIZE(connection.observers); ++index) {
    if (is_true(PyObject_CallNoArgs(PyTuple_GET_ITEM(connection.observers, index)))) return true;
  }
  return false;
}

// Calls `Function` with Python's arguments. Returns nothing if they are not plain values of the right kinds, or if it
// throws.
template <auto Function>
struct Applied {
  template <typename Result, typename... Arguments>
  static std::optional<Result> to(PyObject* const* objects, Py_ssize_t count, Result (*)(Arguments...)) {
    if (count != sizeof...(Arguments)) return std::nullopt;
    return to<Result, std::decay_t<Arguments>...>(objects, std::index_sequence_for<Arguments...>());
  }
  static auto to(PyObject* const* objects, Py_ssize_t count) { return to(objects, count, Function); }

 private:
  template <typename Result, typename... Values, size_t... Index>
  static std::optional<Result> to(PyObject* const* objects, std::index_sequence<Index...>) {
    std::tuple<Values...> values;
    if (!(from_python(objects[Index], std::get<Index>(values)) && ...)) return std::nullopt;
    try {
      return std::apply(Function, values);
    } catch (const std::exception&) {
      return std::nullopt;
    }
  }
};

// What Python calls for one op.
template <auto Call, auto Check>
struct Entry {
  static inline const char* name = nullptr;
  static inline PyObject* overload = nullptr;

  static PyObject* call(PyObject*, PyObject* const* objects, Py_ssize_t count) {
    if (overload == nullptr) {
      PyErr_Format(PyExc_RuntimeError, "%s: connect() has not been called", name);
      return nullptr;
    }
    if (!observed()) {
      auto outputs = Applied<Call>::to(objects, count);
      if (outputs) return to_python(*outputs);
    }
    PyErr_Clear();
    return PyObject_Vectorcall(overload, objects, static_cast<size_t>(count), nullptr);
  }

  static PyObject* accepts(PyObject*, PyObject* const* objects, Py_ssize_t count) {
    const bool accepted = overload != nullptr && Applied<Check>::to(objects, count).has_value();
    PyErr_Clear();
    return PyBool_FromLong(accepted);
  }
};

using Call = Calls<PythonEdge>;
using Check = Calls<CheckEdge>;
using PredictTokens = Entry<Call::predict_tokens, Check::predict_tokens>;
using PartialPredictions = Entry<Call::partial_predictions, Check::partial_predictions>;
using MergePredictions = Entry<Call::merge_predictions, Check::merge_predictions>;
using RankPositions = Entry<Call::rank_positions, Check::rank_positions>;
using SelectTransfer = Entry<Call::select_transfer, Check::select_transfer>;
using BuildDrafts = Entry<Call::build_drafts, Check::build_drafts>;
using VerifyDrafts = Entry<Call::verify_drafts, Check::verify_drafts>;
using DraftStep = Entry<Call::draft_step, Check::draft_step>;

using Method = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
PyMethodDef method(const char* name, Method function, const char* description) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, description};
}

template <typename Op>
PyMethodDef call(const char* name) {
  Op::name = name;
  return method(name, Op::call,
                "The op's arguments, all by position; served by the CPU kernels, else by the op's overload.");
}

template <typename Op>
PyMethodDef accepts(const char* name) {
  return method(name, Op::accepts,
                "Whether these arguments of the op, all by position, are right; False also where this cannot tell.");
}

template <typename Op>
bool take_overload(PyObject* overloads) {
  PyObject* overload = PyDict_GetItemString(overloads, Op::name);
  if (overload == nullptr) {
    PyErr_Format(PyExc_KeyError, "%s", Op::name);
    return false;
  }
  Op::overload = Py_NewRef(overload);
  return true;
}

PyObject* connect(PyObject*, PyObject* arguments) {
  const char* path = nullptr;
  PyObject *tensor_type = nullptr, *overloads = nullptr, *observers = nullptr;
  if (!PyArg_ParseTuple(arguments, "sO!O!O!", &path, &PyType_Type, &tensor_type, &PyDict_Type, &overloads,
                        &PyTuple_Type, &observers)) {
    return nullptr;
  }
  void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  const auto launchers_of =
      library ? reinterpret_cast<const Launchers* (*)()>(dlsym(library, "freedave_launchers")) : nullptr;
  if (launchers_of == nullptr || launchers_of()->sizes != kParamsSizes) {
    PyErr_Format(PyExc_RuntimeError, "%s and _C are not of the same build", path);
    return nullptr;
  }
  PyObject* capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
  if (capsule == nullptr) return nullptr;
  const auto* torch = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (torch == nullptr) return nullptr;
  if (torch->header.version.major != DLPACK_MAJOR_VERSION || torch->dltensor_from_py_object_no_sync == nullptr) {
    PyErr_Format(PyExc_NotImplementedError, "torch speaks DLPack %d, not %d",
                 static_cast<int>(torch->header.version.major), DLPACK_MAJOR_VERSION);
    return nullptr;
  }
  connection = {.launchers = launchers_of(),
                .torch = torch,
                .tensor_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(tensor_type)),
                .observers = Py_NewRef(observers),
                .requires_grad = PyUnicode_InternFromString("requires_grad"),
                .is_neg = PyUnicode_InternFromString("is_neg")};
  const bool complete = take_overload<PredictTokens>(overloads) && take_overload<PartialPredictions>(overloads) &&
                        take_overload<MergePredictions>(overloads) && take_overload<RankPositions>(overloads) &&
                        take_overload<SelectTransfer>(overloads) && take_overload<BuildDrafts>(overloads) &&
                        take_overload<VerifyDrafts>(overloads) && take_overload<DraftStep>(overloads);
  if (!complete) return nullptr;
  Py_RETURN_NONE;
}

}  // namespace

void add_python_calls(PyObject* module) {
  static PyMethodDef methods[] = {call<PredictTokens>("predict_tokens"),
                                  accepts<PredictTokens>("accepts_predict_tokens"),
                                  call<PartialPredictions>("partial_predictions"),
                                  accepts<PartialPredictions>("accepts_partial_predictions"),
                                  call<MergePredictions>("merge_predictions"),
                                  accepts<MergePredictions>("accepts_merge_predictions"),
                                  call<RankPositions>("rank_positions"),
                                  accepts<RankPositions>("accepts_rank_positions"),
                                  call<SelectTransfer>("select_transfer"),
                                  accepts<SelectTransfer>("accepts_select_transfer"),
                                  call<BuildDrafts>("build_drafts"),
                                  accepts<BuildDrafts>("accepts_build_drafts"),
                                  call<VerifyDrafts>("verify_drafts"),
                                  accepts<VerifyDrafts>("accepts_verify_drafts"),
                                  call<DraftStep>("draft_step"),
                                  accepts<DraftStep>("accepts_draft_step"),
                                  {"connect", connect, METH_VARARGS,
                                   "connect(path, tensor_type, overloads, observers): the ops library that torch has "
                                   "loaded from path, torch.Tensor, each op's overload by name, and functions that "
                                   "return something true while a call must go through torch's dispatcher."},
                                  {nullptr, nullptr, 0, nullptr}};
  PyModule_AddFunctions(module, methods);
}

}  // namespace freedave
