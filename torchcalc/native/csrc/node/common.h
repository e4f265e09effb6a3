// What the nodes share.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <vector>

#include "../pointwise.h"

namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torchcalc::Number;

const torchcalc::Table* table = nullptr;

// wide: none, in the dtype that is computed in.
enum Reduction : int64_t { none = 0, mean = 1, sum = 2, wide = 3 };

bool number_of(at::ScalarType type, Number& number) {
  switch (type) {
    case at::kFloat: number = Number::float32; return true;
    case at::kDouble: number = Number::float64; return true;
    case at::kBFloat16: number = Number::bfloat16; return true;
    case at::kHalf: number = Number::float16; return true;
    default: return false;
  }
}

// The dtype that kernels compute numbers of this one in.
at::ScalarType computed(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// In memory as it is, with nothing of torch's left to be done to it.
bool is_array(const Tensor& x) {
  return (x.device().is_cpu() || x.device().is_cuda()) && x.layout() == at::kStrided && !x.is_nested() && !x.is_neg() &&
      !x._is_zerotensor() && !at::isTensorSubclassLike(x);
}

// And of numbers that a kernel may read.
bool is_plain(const Tensor& x) {
  Number number;
  return is_array(x) && number_of(x.scalar_type(), number);
}

bool lies_like(const Tensor& x, const Tensor& like) { return x.sizes() == like.sizes() && x.strides() == like.strides(); }

// Nodes are counted by themselves from torch 2.13 on, and by std::shared_ptr before.
template <class N>
inline constexpr bool counts_itself = std::is_base_of_v<c10::intrusive_ptr_target, N>;

template <class N>
auto make_node() {
  if constexpr (counts_itself<N>) {
    return c10::make_intrusive<N>();
  } else {
    return std::make_shared<N>();
  }
}

template <class N>
auto self_of(N* node) {
  if constexpr (counts_itself<N>) {
    return c10::intrusive_ptr<N>::reclaim_copy(node);
  } else {
    return node->shared_from_this();
  }
}

bool is_observed() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || torch::jit::tracer::isTracing() ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

const char* bytes(const Tensor& x) { return x.defined() ? static_cast<const char*>(x.const_data_ptr()) : nullptr; }
char* own_bytes(const Tensor& x) { return x.defined() ? static_cast<char*>(x.mutable_data_ptr()) : nullptr; }

std::optional<Tensor> if_defined(const Tensor& x) { return x.defined() ? std::optional<Tensor>(x) : std::nullopt; }

Tensor like(const Tensor& grad, const Tensor& x) { return grad.defined() ? grad.to(x.scalar_type()) : grad; }

// What Python has registered under this name, of operations that have derivatives.
c10::IValue called(const char* name, torch::jit::Stack stack) {
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(&stack);
  return std::move(stack.at(0));
}

// The gradients that are needed, likewise.
variable_list by_operations(const char* name, torch::jit::Stack stack, const c10::List<bool>& needed) {
  stack.emplace_back(needed);
  const auto found = called(name, std::move(stack)).toTensorVector();
  variable_list grads(needed.size());
  size_t next = 0;
  for (size_t i = 0; i < needed.size(); ++i) {
    if (needed[i]) grads[i] = found.at(next++);
  }
  return grads;
}

// A node of this library.
struct KernelNode : public Node {
  // What is kept for backward.
  virtual std::vector<SavedVariable*> kept() = 0;

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* x : kept()) x->reset_data();
  }
};

}  // namespace
