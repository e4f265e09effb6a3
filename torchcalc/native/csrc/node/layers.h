// Embedding and dropout in torch's graph; the kernels are torch's, but for dropout's product on CPU.
#pragma once

#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_backward.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/native_dropout.h>
#include <ATen/ops/native_dropout_backward.h>

#include "../rows.h"
#include "common.h"

namespace {

struct EmbeddingBackward : public KernelNode {
  SavedVariable saved_index;
  int64_t rows = 0, padding = -1;
  bool by_frequency = false, sparse = false;
  double scale = 1;

  std::string name() const override { return "EmbeddingFunctionBackward"; }

  std::vector<SavedVariable*> kept() override { return {&saved_index}; }

  variable_list apply(variable_list&& incoming) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    Tensor g = incoming[0];
    if (!g.defined() || !task_should_compute_output(0)) return variable_list(1);
    const Tensor index = saved_index.unpack(self_of(static_cast<Node*>(this)));
    if (!is_plain(g) || at::GradMode::is_enabled()) {
      return {called("torchcalc_nodes::embedding_backward", {g, index, rows, padding, by_frequency, sparse, scale}).toTensor()};
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    const bool before = scale != 1 && (sparse || g.numel() < rows * g.size(-1));  // the smaller tensor is multiplied
    if (before) g = g.mul(scale);
    Tensor grad = at::embedding_backward(g, index, rows, padding, by_frequency, sparse);
    if (scale != 1 && !before) grad.mul_(scale);
    return {grad};
  }
};

std::optional<Tensor> embedding(
    const Tensor& w, const Tensor& index, std::optional<int64_t> padded, bool by_frequency, bool sparse, double scale) {
  if (w.dim() != 2 || !is_array(index) || (index.scalar_type() != at::kLong && index.scalar_type() != at::kInt)) return std::nullopt;
  if (index.device() != w.device()) return std::nullopt;
  const int64_t rows = w.size(0);
  if (padded && (*padded < -rows || *padded >= rows)) return std::nullopt;
  const int64_t padding = !padded ? -1 : *padded < 0 ? *padded + rows : *padded;
  Tensor y;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    y = at::embedding(w, index, padding, by_frequency, sparse);
    if (scale != 1) y.mul_(scale);
  }
  if (torch::autograd::compute_requires_grad(w)) {
    auto node = make_node<EmbeddingBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(w));
    node->rows = rows;
    node->padding = padding;
    node->by_frequency = by_frequency;
    node->sparse = sparse;
    node->scale = scale;
    node->saved_index = SavedVariable(index, false);
    torch::autograd::set_history(y, node);
  }
  return y;
}

// x·keep/(1 − p), where keep lies as x does.
Tensor kept_of(const Tensor& x, const Tensor& keep, double p) {
  if (!x.is_cpu()) return at::native_dropout_backward(x, keep, 1 / (1 - p));
  const Tensor from = lies_like(x, keep) ? x : at::empty_like(keep, x.scalar_type()).copy_(x);
  Tensor y = at::empty_like(from);
  Number number;
  number_of(x.scalar_type(), number);
  table->rows->dropout(
      number, x.numel(), bytes(from), static_cast<const uint8_t*>(keep.const_data_ptr()), p, own_bytes(y));
  return y;
}

struct DropoutBackward : public KernelNode {
  SavedVariable saved_keep;
  double p = 0;

  std::string name() const override { return "DropoutFunctionBackward"; }

  std::vector<SavedVariable*> kept() override { return {&saved_keep}; }

  variable_list apply(variable_list&& incoming) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& g = incoming[0];
    if (!g.defined() || !task_should_compute_output(0)) return variable_list(1);
    const Tensor keep = saved_keep.unpack(self_of(static_cast<Node*>(this)));
    if (is_plain(g) && !at::GradMode::is_enabled()) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      return {kept_of(g, keep, p)};
    }
    return {called("torchcalc_nodes::dropout_backward", {g, keep, p}).toTensor()};
  }
};

std::optional<Tensor> dropout(const Tensor& x, double p) {
  if (x.numel() == 0 || !x.is_non_overlapping_and_dense()) return std::nullopt;
  Tensor y, keep;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    if (x.is_cpu()) {
      keep = at::empty_like(x, at::kBool).bernoulli_(1 - p);
      y = kept_of(x, keep, p);
    } else {
      std::tie(y, keep) = at::native_dropout(x, p, true);
    }
  }
  if (torch::autograd::compute_requires_grad(x)) {
    auto node = make_node<DropoutBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(x));
    node->p = p;
    node->saved_keep = SavedVariable(keep, false);
    torch::autograd::set_history(y, node);
  }
  return y;
}

}  // namespace
