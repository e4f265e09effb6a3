// Pointwise functions and losses in torch's graph: forward and backward call the kernels of the other library, without
// Python in between. A Python backward costs 15 to 30 µs, as much as torch's whole call of a small tensor.
//
// This file is compiled against torch's and Python's ordinary headers, and so for one release of each; the kernels are not.
//
// Each function returns None, before anything is computed, for tensors that no kernel takes.
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include <cstring>
#include <limits>

#include "attention.h"
#include "common.h"
#include "gpu.h"
#include "layers.h"
#include "linear.h"
#include "mlp.h"
#include "norms.h"
#include "pointwise.h"
#include "rows.h"
#include "rows_gpu.h"
#include "watch.h"

namespace {

// Python. What is not taken is None: the caller then runs the formula on tensors.

// The tensors of a call, if they are torch's own type and nothing wants to see the operations of the formula.
bool read_inputs(PyObject* const* args, Py_ssize_t count, c10::SmallVector<Tensor, max_inputs>& inputs) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!THPVariable_CheckExact(args[i])) return false;
    const Tensor& x = THPVariable_Unpack(args[i]);
    if (!is_plain(x) || x._fw_grad(0).defined()) return false;
    inputs.push_back(x);
  }
  return true;
}

bool read_numbers(PyObject* const* args, Py_ssize_t count, Numbers& numbers) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!PyFloat_Check(args[i]) && !PyLong_Check(args[i])) return false;
    numbers.push_back(PyFloat_AsDouble(args[i]));
    if (PyErr_Occurred()) throw python_error();
  }
  return true;
}

PyObject* wrapped(std::optional<Tensor>&& y) {
  if (!y) Py_RETURN_NONE;
  return THPVariable_Wrap(*std::move(y));
}

// elementwise(place, *inputs, *numbers)
PyObject* py_elementwise(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const int64_t place = PyLong_AsLongLong(args[0]);
  const int n = table->formulas[place].inputs;
  c10::SmallVector<Tensor, max_inputs> inputs;
  Numbers numbers;
  if (count < 1 + n || is_observed() || !read_inputs(args + 1, n, inputs) ||
      !read_numbers(args + 1 + n, count - 1 - n, numbers)) {
    Py_RETURN_NONE;
  }
  std::optional<Tensor> y;
  {
    const pybind11::gil_scoped_release without_gil;
    y = elementwise(place, inputs, numbers);
  }
  return wrapped(std::move(y));
  END_HANDLE_TH_ERRORS
}

// in_place(place, input, *numbers)
PyObject* py_in_place(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  c10::SmallVector<Tensor, max_inputs> inputs;
  Numbers numbers;
  if (count < 2 || is_observed() || !read_inputs(args + 1, 1, inputs) || !read_numbers(args + 2, count - 2, numbers)) {
    Py_RETURN_NONE;
  }
  const int64_t place = PyLong_AsLongLong(args[0]);
  std::optional<Tensor> y;
  {
    const pybind11::gil_scoped_release without_gil;
    y = in_place(place, inputs[0], numbers);
  }
  return wrapped(std::move(y));
  END_HANDLE_TH_ERRORS
}

// of_halves(place, input, dim, *numbers)
PyObject* py_of_halves(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  c10::SmallVector<Tensor, max_inputs> inputs;
  Numbers numbers;
  if (count < 3 || is_observed() || !read_inputs(args + 1, 1, inputs) || !read_numbers(args + 3, count - 3, numbers)) {
    Py_RETURN_NONE;
  }
  const int64_t place = PyLong_AsLongLong(args[0]), dim = PyLong_AsLongLong(args[2]);
  if (dim == -1 && PyErr_Occurred()) throw python_error();
  std::optional<Tensor> y;
  {
    const pybind11::gil_scoped_release without_gil;
    y = of_halves(place, inputs[0], dim < 0 ? dim + inputs[0].dim() : dim, numbers);
  }
  return wrapped(std::move(y));
  END_HANDLE_TH_ERRORS
}

// reduced(place, *inputs, weight or None, reduction, by_weight, *numbers)
PyObject* py_reduced(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const int64_t place = PyLong_AsLongLong(args[0]);
  const int n = table->formulas[place].inputs;
  c10::SmallVector<Tensor, max_inputs> inputs, weight;
  Numbers numbers;
  if (count < 4 + n || is_observed() || !read_inputs(args + 1, n, inputs) ||
      !(args[1 + n] == Py_None || read_inputs(args + 1 + n, 1, weight)) ||
      !read_numbers(args + 4 + n, count - 4 - n, numbers)) {
    Py_RETURN_NONE;
  }
  const int64_t how = PyLong_AsLongLong(args[2 + n]);
  const bool by_weight = PyObject_IsTrue(args[3 + n]);
  std::optional<Tensor> y;
  {
    const pybind11::gil_scoped_release without_gil;
    y = reduced(place, inputs, weight.empty() ? std::nullopt : std::optional<Tensor>(weight[0]), numbers, how, by_weight);
  }
  return wrapped(std::move(y));
  END_HANDLE_TH_ERRORS
}

// cross_entropy(input, target, weight or None, ignore_index, reduction, label_smoothing, z_loss)
PyObject* py_cross_entropy(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  c10::SmallVector<Tensor, max_inputs> x, weight;
  if (count != 7 || is_observed() || !read_inputs(args, 1, x) || !THPVariable_CheckExact(args[1]) ||
      !(args[2] == Py_None || read_inputs(args + 2, 1, weight)) || !PyLong_Check(args[3]) || !PyFloat_Check(args[5]) || !PyFloat_Check(args[6])) {
    Py_RETURN_NONE;
  }
  const Tensor& target = THPVariable_Unpack(args[1]);
  Ways ways;
  ways.ignored = PyLong_AsLongLong(args[3]);
  ways.reduction = static_cast<Reduction>(PyLong_AsLongLong(args[4]));
  ways.smoothing = PyFloat_AsDouble(args[5]);
  ways.z_loss = PyFloat_AsDouble(args[6]);
  if (PyErr_Occurred()) throw python_error();
  std::optional<Tensor> loss;
  {
    const pybind11::gil_scoped_release without_gil;
    loss = cross_entropy(x[0], target, weight.empty() ? Tensor() : weight[0], ways);
  }
  return wrapped(std::move(loss));
  END_HANDLE_TH_ERRORS
}

// cross_entropy_in_place(logits, target, weight or None, ignore_index, label_smoothing, z_loss, share or None) -> losses
PyObject* py_cross_entropy_in_place(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  c10::SmallVector<Tensor, max_inputs> x, weight, share;
  if (count != 7 || is_observed() || !read_inputs(args, 1, x) || !THPVariable_CheckExact(args[1]) ||
      !(args[2] == Py_None || read_inputs(args + 2, 1, weight)) || !(args[6] == Py_None || read_inputs(args + 6, 1, share))) {
    Py_RETURN_NONE;
  }
  const Tensor& target = THPVariable_Unpack(args[1]);
  Ways ways;
  ways.ignored = PyLong_AsLongLong(args[3]);
  ways.reduction = none;
  ways.smoothing = PyFloat_AsDouble(args[4]);
  ways.z_loss = PyFloat_AsDouble(args[5]);
  if (PyErr_Occurred()) throw python_error();
  std::optional<Tensor> losses;
  {
    const pybind11::gil_scoped_release without_gil;
    losses = cross_entropy_in_place(
        x[0], target, weight.empty() ? Tensor() : weight[0], ways, share.empty() ? std::nullopt : std::optional<Tensor>(share[0]));
  }
  return wrapped(std::move(losses));
  END_HANDLE_TH_ERRORS
}

// softmax(input, dim, log)
PyObject* py_softmax(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  c10::SmallVector<Tensor, max_inputs> x;
  if (count != 3 || is_observed() || !read_inputs(args, 1, x) || !PyLong_Check(args[1])) Py_RETURN_NONE;
  const int64_t dim = PyLong_AsLongLong(args[1]);
  if (PyErr_Occurred()) throw python_error();
  const bool log = PyObject_IsTrue(args[2]);
  std::optional<Tensor> y;
  {
    const pybind11::gil_scoped_release without_gil;
    y = softmax(x[0], dim, log);
  }
  return wrapped(std::move(y));
  END_HANDLE_TH_ERRORS
}

// Tensors or None, each plain.
bool read_optional(PyObject* const* args, Py_ssize_t count, Tensor* to) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    c10::SmallVector<Tensor, max_inputs> read;
    if (args[i] == Py_None) continue;
    if (!read_inputs(args + i, 1, read)) return false;
    to[i] = read[0];
  }
  return true;
}

bool read_shape(PyObject* object, c10::SmallVector<int64_t, 5>& shape) {
  if (!PyTuple_Check(object) && !PyList_Check(object)) return false;
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(object);
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* const size = PySequence_Fast_GET_ITEM(object, i);
    if (!PyLong_Check(size)) return false;
    shape.push_back(PyLong_AsLongLong(size));
    if (PyErr_Occurred()) throw python_error();
  }
  return true;
}

// rms_norm(input, residual or None, weight or None, normalized_shape, eps or None) -> y; with a residual (y, input + residual)
PyObject* py_rms_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor given[3];
  c10::SmallVector<int64_t, 5> shape;
  if (count != 5 || is_observed() || !read_optional(args, 3, given) || !given[0].defined() || !read_shape(args[3], shape)) {
    Py_RETURN_NONE;
  }
  const double eps = args[4] != Py_None                        ? PyFloat_AsDouble(args[4])
                     : given[0].scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                             : static_cast<double>(std::numeric_limits<float>::epsilon());
  if (PyErr_Occurred()) throw python_error();
  std::pair<Tensor, Tensor> found;
  {
    const pybind11::gil_scoped_release without_gil;
    found = norm(Kind::rms, given[0], given[1], given[2], Tensor(), shape, eps);
  }
  auto& [y, sum] = found;
  if (!y.defined()) Py_RETURN_NONE;
  if (!sum.defined()) return THPVariable_Wrap(std::move(y));
  return pybind11::make_tuple(std::move(y), std::move(sum)).release().ptr();
  END_HANDLE_TH_ERRORS
}

// layer_norm(input, weight or None, bias or None, normalized_shape, eps)
PyObject* py_layer_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor given[3];
  c10::SmallVector<int64_t, 5> shape;
  if (count != 5 || is_observed() || !read_optional(args, 3, given) || !given[0].defined() || !read_shape(args[3], shape)) {
    Py_RETURN_NONE;
  }
  const double eps = PyFloat_AsDouble(args[4]);
  if (PyErr_Occurred()) throw python_error();
  Tensor y;
  {
    const pybind11::gil_scoped_release without_gil;
    y = norm(Kind::layer, given[0], Tensor(), given[1], given[2], shape, eps).first;
  }
  return wrapped(if_defined(y));
  END_HANDLE_TH_ERRORS
}

// group_norm(input, weight or None, bias or None, num_groups, eps)
PyObject* py_group_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor given[3];
  if (count != 5 || is_observed() || !read_optional(args, 3, given) || !given[0].defined() || !PyLong_Check(args[3])) {
    Py_RETURN_NONE;
  }
  const int64_t groups = PyLong_AsLongLong(args[3]);
  const double eps = PyFloat_AsDouble(args[4]);
  if (PyErr_Occurred()) throw python_error();
  std::optional<Tensor> y;
  {
    const pybind11::gil_scoped_release without_gil;
    y = group_norm(given[0], given[1], given[2], groups, eps);
  }
  return wrapped(std::move(y));
  END_HANDLE_TH_ERRORS
}

// attention(query, key, value, mask or None, causal, scale or None, grouped)
PyObject* py_attention(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor given[3], mask;
  if (count != 7 || is_observed() || !read_optional(args, 3, given)) Py_RETURN_NONE;
  for (const Tensor& x : given) {
    if (!x.defined()) Py_RETURN_NONE;
  }
  if (args[3] != Py_None) {
    if (!THPVariable_CheckExact(args[3]) || !is_array(mask = THPVariable_Unpack(args[3])) || mask._fw_grad(0).defined()) Py_RETURN_NONE;
  }
  std::optional<double> scale;
  if (args[5] != Py_None) scale = PyFloat_AsDouble(args[5]);
  const bool causal = PyObject_IsTrue(args[4]), grouped = PyObject_IsTrue(args[6]);
  if (PyErr_Occurred()) throw python_error();
  std::optional<Tensor> y;
  {
    const pybind11::gil_scoped_release without_gil;
    y = attention(given[0], given[1], given[2], mask, causal, scale, grouped);
  }
  return wrapped(std::move(y));
  END_HANDLE_TH_ERRORS
}

// linear(input, weight, bias or None)
PyObject* py_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor given[3];
  if (count != 3 || is_observed() || !read_optional(args, 3, given)) Py_RETURN_NONE;
  std::optional<Tensor> y;
  {
    const pybind11::gil_scoped_release without_gil;
    y = linear(given[0], given[1], given[2]);
  }
  return wrapped(std::move(y));
  END_HANDLE_TH_ERRORS
}

// mlp(place, input, weight, bias, up_weight or None, up_bias, down_weight, down_bias, recompute); biases may be None
PyObject* py_mlp(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor given[7];
  if (count != 9 || is_observed() || !read_optional(args + 1, 7, given)) Py_RETURN_NONE;
  const int64_t place = PyLong_AsLongLong(args[0]);
  const bool recompute = PyObject_IsTrue(args[8]);
  if (PyErr_Occurred()) throw python_error();
  std::optional<Tensor> y;
  {
    const pybind11::gil_scoped_release without_gil;
    y = mlp(place, given, recompute);
  }
  return wrapped(std::move(y));
  END_HANDLE_TH_ERRORS
}

// embedding(weight, index, padding or None, by_frequency, sparse, scale)
PyObject* py_embedding(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  c10::SmallVector<Tensor, max_inputs> w;
  if (count != 6 || is_observed() || !read_inputs(args, 1, w) || !THPVariable_CheckExact(args[1])) Py_RETURN_NONE;
  const Tensor& index = THPVariable_Unpack(args[1]);
  std::optional<int64_t> padding;
  if (args[2] != Py_None) padding = PyLong_AsLongLong(args[2]);
  const bool by_frequency = PyObject_IsTrue(args[3]), sparse = PyObject_IsTrue(args[4]);
  const double scale = PyFloat_AsDouble(args[5]);
  if (PyErr_Occurred()) throw python_error();
  std::optional<Tensor> y;
  {
    const pybind11::gil_scoped_release without_gil;
    y = embedding(w[0], index, padding, by_frequency, sparse, scale);
  }
  return wrapped(std::move(y));
  END_HANDLE_TH_ERRORS
}

// dropout(input, p)
PyObject* py_dropout(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  c10::SmallVector<Tensor, max_inputs> x;
  if (count != 2 || is_observed() || !read_inputs(args, 1, x)) Py_RETURN_NONE;
  const double p = PyFloat_AsDouble(args[1]);
  if (PyErr_Occurred()) throw python_error();
  std::optional<Tensor> y;
  {
    const pybind11::gil_scoped_release without_gil;
    y = dropout(x[0], p);
  }
  return wrapped(std::move(y));
  END_HANDLE_TH_ERRORS
}

// saved(grad_fn) -> what it keeps for backward, as torch's SavedTensor; None if it is not one of these nodes.
PyObject* py_saved(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  auto* node = dynamic_cast<KernelNode*>(reinterpret_cast<torch::autograd::THPCppFunction*>(object)->cdata.get());
  if (!node) Py_RETURN_NONE;
  pybind11::list all;
  for (SavedVariable* x : node->kept()) all.append(pybind11::cast(*x, pybind11::return_value_policy::reference));
  return all.release().ptr();
  END_HANDLE_TH_ERRORS
}

// find(name, hash) -> place, or -1
PyObject* py_find(PyObject*, PyObject* args) {
  const char *name, *hash;
  if (!PyArg_ParseTuple(args, "ss", &name, &hash)) return nullptr;
  for (int64_t i = 0; i < table->count; ++i) {
    if (std::strcmp(name, table->formulas[i].name) == 0 && std::strcmp(hash, table->formulas[i].hash) == 0) {
      return PyLong_FromLongLong(i);
    }
  }
  return PyLong_FromLong(-1);
}

// enter_launch(place, kind, dtype, device, function, threads, shared, block, parameters, numbers)
PyObject* py_enter_launch(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  long long place, function, block;
  int kind, device;
  unsigned threads, shared;
  PyObject *dtype, *given, *numbers;
  if (!PyArg_ParseTuple(
          args, "LiOiLIILOO", &place, &kind, &dtype, &device, &function, &threads, &shared, &block, &given, &numbers)) {
    return nullptr;
  }
  torchcalc::Launch launch;
  launch.function = reinterpret_cast<void*>(function);
  launch.threads = threads;
  launch.shared = shared;
  launch.block = block;
  const auto read = [](PyObject* tuple, std::vector<double>& to) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); ++i) to.push_back(PyFloat_AsDouble(PyTuple_GetItem(tuple, i)));
    if (PyErr_Occurred()) throw python_error();
  };
  read(given, launch.given);
  read(numbers, launch.numbers);
  const at::ScalarType type = reinterpret_cast<THPDtype*>(dtype)->scalar_type;
  torchcalc::Gpu::instance().enter(torchcalc::Gpu::key(place & 0xFFFF, kind, type, device), std::move(launch));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// A kernel that Python launches, with the types of its numbers: q, i (64 and 32 bits), d, f.
struct Launchable : torchcalc::Handle {
  std::string types;
};

constexpr const char* launchable_name = "torchcalc.launchable";

// launchable(function, threads, shared, types); None where Python launches
PyObject* py_launchable(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  auto kernel = std::make_unique<Launchable>();
  long long function;
  const char* types;
  if (!PyArg_ParseTuple(args, "LIIs", &function, &kernel->threads, &kernel->shared, &types)) return nullptr;
  if (!torchcalc::Gpu::instance().is_ready()) Py_RETURN_NONE;
  kernel->function = reinterpret_cast<void*>(function);
  kernel->types = types;
  return PyCapsule_New(kernel.release(), launchable_name, [](PyObject* capsule) {
    delete static_cast<Launchable*>(PyCapsule_GetPointer(capsule, launchable_name));
  });
  END_HANDLE_TH_ERRORS
}

// launch(launchable, device's index, programs, tensors, numbers) -> whether that is the current device: else nothing is done
PyObject* py_launch(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 5 && PyList_Check(args[3]) && PyTuple_Check(args[4]), "launch takes a list of tensors and a tuple");
  const auto* const kernel = static_cast<const Launchable*>(PyCapsule_GetPointer(args[0], launchable_name));
  if (!kernel) return nullptr;
  const int64_t device = PyLong_AsLongLong(args[1]), programs = PyLong_AsLongLong(args[2]);
  if (c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getDevice().index() != device) Py_RETURN_FALSE;
  torchcalc::Arguments arguments;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[3]); ++i) {
    arguments.add(THPVariable_Unpack(PyList_GET_ITEM(args[3], i)).data_ptr());
  }
  TORCH_CHECK(PyTuple_GET_SIZE(args[4]) == static_cast<Py_ssize_t>(kernel->types.size()), "a kernel got too few numbers");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[4]); ++i) {
    PyObject* const x = PyTuple_GET_ITEM(args[4], i);
    switch (kernel->types[i]) {
      case 'q': arguments.add(static_cast<int64_t>(PyLong_AsLongLong(x))); break;
      case 'i': arguments.add(static_cast<int32_t>(PyLong_AsLongLong(x))); break;
      case 'd': arguments.add(PyFloat_AsDouble(x)); break;
      default: arguments.add(static_cast<float>(PyFloat_AsDouble(x)));
    }
  }
  if (PyErr_Occurred()) return nullptr;
  torchcalc::Gpu::instance().launch(*kernel, programs, arguments);
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

// connect(address of the other library's table)
PyObject* py_connect(PyObject*, PyObject* address) {
  table = static_cast<const torchcalc::Table*>(PyLong_AsVoidPtr(address));
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"elementwise", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_elementwise)), METH_FASTCALL, nullptr},
    {"in_place", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_in_place)), METH_FASTCALL, nullptr},
    {"of_halves", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_of_halves)), METH_FASTCALL, nullptr},
    {"reduced", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_reduced)), METH_FASTCALL, nullptr},
    {"cross_entropy", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_cross_entropy)), METH_FASTCALL, nullptr},
    {"cross_entropy_in_place", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_cross_entropy_in_place)), METH_FASTCALL, nullptr},
    {"softmax", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_softmax)), METH_FASTCALL, nullptr},
    {"rms_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_rms_norm)), METH_FASTCALL, nullptr},
    {"layer_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_layer_norm)), METH_FASTCALL, nullptr},
    {"group_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_group_norm)), METH_FASTCALL, nullptr},
    {"attention", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_attention)), METH_FASTCALL, nullptr},
    {"embedding", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_embedding)), METH_FASTCALL, nullptr},
    {"dropout", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_dropout)), METH_FASTCALL, nullptr},
    {"linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_linear)), METH_FASTCALL, nullptr},
    {"mlp", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_mlp)), METH_FASTCALL, nullptr},
    {"saved", py_saved, METH_O, nullptr},
    {"find", py_find, METH_VARARGS, nullptr},
    {"connect", py_connect, METH_O, nullptr},
    {"enter_launch", py_enter_launch, METH_VARARGS, nullptr},
    {"enter_rows", py_enter_rows, METH_VARARGS, nullptr},
    {"launchable", py_launchable, METH_VARARGS, nullptr},
    {"launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_launch)), METH_FASTCALL, nullptr},
    {"watch", py_watch, METH_VARARGS, nullptr},
    {"look", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_look)), METH_FASTCALL, nullptr},
    {"holds", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_holds)), METH_FASTCALL, nullptr},
    {"written", py_written, METH_O, nullptr},
    {"same", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_same)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "torchcalc_nodes", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit_torchcalc_nodes() { return PyModule_Create(&module); }

TORCH_LIBRARY(torchcalc_nodes, m) {
  m.def("differentiable_backward(str formula, Tensor grad, Tensor?[] saved, float[] numbers, bool[] needed) -> Tensor[]");
  m.def("softmax_backward(Tensor grad, Tensor output, int dim, bool log) -> Tensor");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor? added, Tensor input, Tensor rstd, Tensor? weight, int dims, float eps, "
      "bool[] needed) -> Tensor[]");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int dims, float eps, "
      "bool[] needed) -> Tensor[]");
  m.def(
      "group_norm_backward(Tensor grad, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int groups, "
      "float eps, bool[] needed) -> Tensor[]");
  m.def(
      "embedding_backward(Tensor grad, Tensor index, int rows, int padding, bool by_frequency, bool sparse, float scale) -> Tensor");
  m.def("dropout_backward(Tensor grad, Tensor keep, float p) -> Tensor");
  m.def(
      "mlp_backward(str formula, Tensor grad, Tensor input, Tensor weight, Tensor? bias, Tensor? up_weight, Tensor? up_bias, "
      "Tensor down_weight, Tensor? down_bias, bool[] needed) -> Tensor[]");
  m.def(
      "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale, "
      "bool[] needed) -> Tensor[]");
  m.def(
      "cross_entropy_backward(Tensor grad, Tensor input, Tensor target, Tensor? weight, int ignored, int reduction, "
      "float smoothing, float z_loss) -> Tensor");
}
