// What a step remembers of a group's tensors, and whether it is still so. In Python this is most of what the host does in a step
// of a small model.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

#include "common.h"

namespace {

// To objects that nobody else keeps.
class Reference {
 public:
  Reference() = default;
  explicit Reference(PyObject* object) : object_(object) { Py_XINCREF(object_); }
  Reference(Reference&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Reference& operator=(Reference&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Reference() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_ = nullptr;
};

// A parameter of the group. The others but `param` are set where it has a gradient.
//
// The objects are kept by the plan, in Python. References to tensors here would be in the way of module.to(), which swaps only
// those that nobody else holds; and those to objects in the way of the garbage collector, which does not see them here.
struct Watched {
  PyObject *param = nullptr, *state = nullptr;
  std::vector<PyObject*> values;        // of the state: those of the keys, in their order,
  std::vector<PyObject*> all_values;    // and all, as they stand
  std::vector<const void*> data;        // of the parameter, then of the slots
  std::vector<int64_t> param_strides;
  std::vector<int64_t> sizes, strides;  // of the gradient, as what follows
  c10::DispatchKeySet kind;
  at::ScalarType dtype = at::kFloat;
  bool has_grad = false, contiguous = true;
};

// A gradient like the one that was there at first: its key set tells device, layout, and whether something of torch's is left to be
// done to it.
bool is_taken(const Tensor& g, const Watched& w, const Tensor& p) {
  return g.key_set() == w.kind && g.scalar_type() == w.dtype && g.device() == p.device() &&
      g.sizes() == at::IntArrayRef(w.sizes) &&
      (g.strides() == at::IntArrayRef(w.strides) || (w.contiguous && g.is_contiguous()));
}

// Whether the dict has these values, in this order: quicker than to look them up.
bool has_values(PyObject* dict, const std::vector<PyObject*>& values) {
  if (PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(values.size())) return false;
  Py_ssize_t place = 0;
  PyObject *key, *value;
  for (size_t k = 0; PyDict_Next(dict, &place, &key, &value); ++k) {
    if (value != values[k]) return false;
  }
  return true;
}

struct Watch {
  std::vector<Watched> all;
  Reference keys;     // a tuple; the last may be a count, which is looked at as an object only
  bool aligned = true;
  std::vector<int64_t> addresses;  // of the gradients

  // Whether a step finds what the last one found; where the gradients are is in `addresses`.
  bool holds(PyObject* params) {
    if (!PyList_Check(params) || PyList_GET_SIZE(params) != static_cast<Py_ssize_t>(all.size())) return false;
    size_t next = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      const Watched& w = all[i];
      PyObject* const param = PyList_GET_ITEM(params, static_cast<Py_ssize_t>(i));
      if (param != w.param) return false;
      const Tensor& p = THPVariable_Unpack(param);
      const Tensor& g = p.grad();
      if (g.defined() != w.has_grad) return false;
      if (!w.has_grad) continue;
      if (!is_taken(g, w, p) || !lies(p, w)) return false;
      const int64_t address = reinterpret_cast<int64_t>(g.const_data_ptr());
      if (aligned && (address & 15) != 0) return false;
      moved_ = moved_ || address != addresses[next];
      addresses[next++] = address;
    }
    return true;
  }

  // The addresses as a tuple, the same one while they are the same.
  PyObject* tuple() {
    if (moved_) {
      PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(addresses.size()));
      for (size_t i = 0; tuple && i < addresses.size(); ++i) PyTuple_SET_ITEM(tuple, i, PyLong_FromLongLong(addresses[i]));
      if (!tuple) return nullptr;
      known_ = Reference(tuple);
      Py_DECREF(tuple);
      moved_ = false;
    }
    return known_.get();
  }

 private:
  // The parameter and its state lie where they did.
  bool lies(const Tensor& p, const Watched& w) const {
    if (p.scalar_type() != w.dtype || p.sizes() != at::IntArrayRef(w.sizes) ||
        p.strides() != at::IntArrayRef(w.param_strides) || p.mutable_data_ptr() != w.data[0]) {
      return false;
    }
    const bool same = has_values(w.state, w.all_values);
    for (size_t k = 0; k < w.values.size(); ++k) {
      PyObject* const value = w.values[k];
      if (!same && PyDict_GetItem(w.state, PyTuple_GET_ITEM(keys.get(), static_cast<Py_ssize_t>(k))) != value) return false;
      if (k + 1 < w.data.size() && THPVariable_Unpack(value).mutable_data_ptr() != w.data[k + 1]) return false;
    }
    return true;
  }

  bool moved_ = true;
  Reference known_;
};

constexpr const char* watch_name = "torchcalc.watch";

// watch(params, states, keys, slots, aligned): states has None where a parameter has no gradient; the first so many keys are
// slots.
PyObject* py_watch(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *params, *states, *keys;
  Py_ssize_t slots;
  int aligned;
  if (!PyArg_ParseTuple(args, "O!O!O!np", &PyList_Type, &params, &PyList_Type, &states, &PyTuple_Type, &keys, &slots, &aligned)) {
    return nullptr;
  }
  auto watch = std::make_unique<Watch>();
  watch->keys = Reference(keys);
  watch->aligned = aligned != 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
    Watched w;
    w.param = PyList_GET_ITEM(params, i);
    PyObject* const state = PyList_GET_ITEM(states, i);
    const Tensor& p = THPVariable_Unpack(w.param);
    const Tensor& g = p.grad();
    w.has_grad = state != Py_None;
    if (w.has_grad) {
      TORCH_CHECK(g.defined(), "a parameter with a state has no gradient");
      w.state = state;
      w.param_strides = p.strides().vec();
      w.kind = g.key_set();
      w.dtype = g.scalar_type();
      w.sizes = g.sizes().vec();
      w.strides = g.strides().vec();
      w.contiguous = g.is_contiguous();
      w.data.push_back(p.mutable_data_ptr());
      for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(keys); ++k) {
        PyObject* const value = PyDict_GetItem(state, PyTuple_GET_ITEM(keys, k));
        TORCH_CHECK(value && THPVariable_Check(value), "a state has no tensor of that name");
        w.values.push_back(value);
        if (k < slots) w.data.push_back(THPVariable_Unpack(value).mutable_data_ptr());
      }
      watch->addresses.push_back(0);
    }
    if (w.has_grad) {
      Py_ssize_t place = 0;
      PyObject *key, *value;
      while (PyDict_Next(state, &place, &key, &value)) w.all_values.push_back(value);
    }
    watch->all.push_back(std::move(w));
  }
  return PyCapsule_New(watch.release(), watch_name, [](PyObject* capsule) {
    delete static_cast<Watch*>(PyCapsule_GetPointer(capsule, watch_name));
  });
  END_HANDLE_TH_ERRORS
}

// look(watch, params) -> the addresses of the gradients; None if something is not as it was
PyObject* py_look(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  auto* const watch = count == 2 ? static_cast<Watch*>(PyCapsule_GetPointer(args[0], watch_name)) : nullptr;
  if (!watch) return nullptr;
  PyObject* found = watch->holds(args[1]) ? watch->tuple() : Py_None;
  Py_XINCREF(found);
  return found;
  END_HANDLE_TH_ERRORS
}

// holds(watch, params) -> whether all is as it was
PyObject* py_holds(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  auto* const watch = count == 2 ? static_cast<Watch*>(PyCapsule_GetPointer(args[0], watch_name)) : nullptr;
  if (!watch) return nullptr;
  return PyBool_FromLong(watch->holds(args[1]));
  END_HANDLE_TH_ERRORS
}

// written(watch): autograd has not seen that these parameters were written.
PyObject* py_written(PyObject*, PyObject* capsule) {
  HANDLE_TH_ERRORS
  const auto* const watch = static_cast<const Watch*>(PyCapsule_GetPointer(capsule, watch_name));
  if (!watch) return nullptr;
  for (const Watched& w : watch->all) {
    const Tensor& p = THPVariable_Unpack(w.param);
    if (w.has_grad && !p.is_inference()) p.unsafeGetTensorImpl()->bump_version();
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// same(list, dict): whether the dict's values are the list's objects.
PyObject* py_same(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyList_Check(args[0]) || !PyDict_Check(args[1])) Py_RETURN_FALSE;
  if (PyList_GET_SIZE(args[0]) != PyDict_Size(args[1])) Py_RETURN_FALSE;
  Py_ssize_t place = 0, i = 0;
  PyObject *key, *value;
  while (PyDict_Next(args[1], &place, &key, &value)) {
    if (PyList_GET_ITEM(args[0], i++) != value) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

}  // namespace
