// A linear layer in torch's graph: layers/linear.py has the equations. The products are torch's, in one node where torch has three,
// and have derivatives of any order.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include "common.h"

namespace {

// No derivatives and no autocast of torch's own.
struct AsItIs {
  const at::AutoDispatchBelowADInplaceOrView without_derivatives;
  const c10::impl::ExcludeDispatchKeyGuard without_autocast{c10::autocast_dispatch_keyset};
};

Tensor as_rows(const Tensor& x) { return x.dim() == 2 ? x : x.reshape({-1, x.size(-1)}); }

std::vector<int64_t> with_last(const Tensor& x, int64_t size) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = size;
  return sizes;
}

struct LinearBackward : public KernelNode {
  SavedVariable saved_x, saved_w;
  bool has_x = false, has_w = false;  // kept where the other needs a gradient

  std::string name() const override { return "LinearFunctionBackward"; }

  std::vector<SavedVariable*> kept() override {
    std::vector<SavedVariable*> all;
    if (has_x) all.push_back(&saved_x);
    if (has_w) all.push_back(&saved_w);
    return all;
  }

  variable_list apply(variable_list&& incoming) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& g = incoming[0];
    if (!g.defined()) return variable_list(3);
    const auto self = self_of(static_cast<Node*>(this));
    const Tensor x = has_x ? saved_x.unpack(self) : Tensor(), w = has_w ? saved_w.unpack(self) : Tensor();
    if (at::GradMode::is_enabled() || !is_plain(g) || (has_x && !is_plain(x)) || (has_w && !is_plain(w))) return gradients(g, x, w);
    const AsItIs guard;
    return gradients(g, x, w);
  }

  variable_list gradients(const Tensor& g, const Tensor& x, const Tensor& w) {
    const Tensor rows = as_rows(g);
    variable_list grads(3);
    if (has_w && task_should_compute_output(0)) {
      grads[0] = at::mm(rows, w);
      if (g.dim() != 2) grads[0] = grads[0].view(with_last(g, w.size(1)));
    }
    if (has_x && task_should_compute_output(1)) grads[1] = at::mm(rows.t(), as_rows(x));
    if (task_should_compute_output(2)) grads[2] = rows.sum(0);
    return grads;
  }
};

std::optional<Tensor> linear(const Tensor& x, const Tensor& w, const Tensor& b) {
  if (!x.defined() || !w.defined() || x.dim() == 0 || w.dim() != 2 || x.size(-1) != w.size(1)) return std::nullopt;
  if (b.defined() && (b.dim() != 1 || b.size(0) != w.size(0))) return std::nullopt;
  for (const Tensor& each : {x, w, b}) {
    if (each.defined() && (each.scalar_type() != x.scalar_type() || each.device() != x.device() || each.numel() == 0)) return std::nullopt;
  }
  Tensor y;
  {
    const AsItIs guard;
    y = at::linear(x, w, if_defined(b));
  }
  if (torch::autograd::compute_requires_grad(x, w, b)) {
    auto node = make_node<LinearBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, w, b));
    if ((node->has_x = w.requires_grad())) node->saved_x = SavedVariable(x, false);
    if ((node->has_w = x.requires_grad())) node->saved_w = SavedVariable(w, false);
    torch::autograd::set_history(y, node);
  }
  return y;
}

}  // namespace
