// Attention in torch's graph: value and first derivative by torch's fused kernels, what is beyond by layers/attention.py.
#pragma once

#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "common.h"
#include "gpu.h"

namespace {

// torch's numbers for its kernels.
enum class Fused : int64_t { flash = 1, efficient = 2, cudnn = 3 };

// Of fewer keys than its vectors hold, 16 at most, torch's kernel on CPU takes a row of NaN for one that is masked: then the row's
// log Σ exp is 0.
constexpr int64_t widest = 16;

bool has_zero(const Tensor& lse) {
  const auto in = [&](const auto* x) { return std::find(x, x + lse.numel(), 0) != x + lse.numel(); };
  return lse.scalar_type() == at::kDouble ? in(lse.const_data_ptr<double>()) : in(lse.const_data_ptr<float>());
}

bool is_finite(const Tensor& x) { return std::isfinite(x.sum(at::kDouble).item<double>()); }
bool is_nan(const Tensor& x) { return x.defined() && std::isnan(x.sum(at::kDouble).item<double>()); }

struct AttentionBackward : public KernelNode {
  SavedVariable saved_q, saved_k, saved_v, saved_mask, saved_y, saved_lse;
  Tensor seed, offset;  // of dropout, which there is none of: the kernels take them
  Tensor cumulated_q, cumulated_k;
  c10::SymInt longest_q, longest_k;
  Fused kernel = Fused::flash;
  bool causal = false, has_mask = false;
  double scale = 1;

  std::string name() const override { return "AttentionFunctionBackward"; }

  std::vector<SavedVariable*> kept() override {
    std::vector<SavedVariable*> all{&saved_q, &saved_k, &saved_v, &saved_y, &saved_lse};
    if (has_mask) all.push_back(&saved_mask);
    return all;
  }

  variable_list apply(variable_list&& incoming) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& g = incoming[0];
    if (!g.defined()) return variable_list(3);
    const auto self = self_of(static_cast<Node*>(this));
    const Tensor q = saved_q.unpack(self), k = saved_k.unpack(self), v = saved_v.unpack(self), y = saved_y.unpack(self);
    const Tensor lse = saved_lse.unpack(self), mask = has_mask ? saved_mask.unpack(self) : Tensor();
    const std::array<bool, 3> needs{task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2)};
    bool plain = g.scalar_type() == q.scalar_type();
    for (const Tensor& x : {g, q, k, v, y, lse}) plain = plain && is_plain(x);
    variable_list grads(3);
    if (!plain || at::GradMode::is_enabled()) {
      grads = by_operations(
          "torchcalc_nodes::attention_backward", {g, q, k, v, if_defined(mask), causal, scale},
          c10::List<bool>({needs[0], needs[1], needs[2]}));
    } else {
      const at::AutoDispatchBelowADInplaceOrView guard;
      std::tie(grads[0], grads[1], grads[2]) = compute(g, q, k, v, mask, y, lse, needs);
    }
    for (size_t i = 0; i < 3; ++i) {
      if (!needs[i]) grads[i] = Tensor();
    }
    return grads;
  }

  std::tuple<Tensor, Tensor, Tensor> compute(
      const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, const Tensor& y, const Tensor& lse,
      const std::array<bool, 3>& needs) const {
    if (q.is_cpu()) {
      return at::_scaled_dot_product_flash_attention_for_cpu_backward(
          g, q, k, v, y, lse, 0.0, causal, if_defined(mask), scale);
    }
    if (kernel == Fused::flash) {
      return at::_scaled_dot_product_flash_attention_backward_symint(
          g, q, k, v, y, lse, cumulated_q, cumulated_k, longest_q, longest_k, 0.0, causal, seed, offset, scale);
    }
    if (kernel == Fused::cudnn) {
      return at::_scaled_dot_product_cudnn_attention_backward_symint(
          g, q, k, v, y, lse, seed, offset, Tensor(), cumulated_q, cumulated_k, longest_q, longest_k, 0.0, causal, scale);
    }
    auto [of_q, of_k, of_v, of_mask] = at::_scaled_dot_product_efficient_attention_backward(
        g, q, k, v, mask, y, lse, seed, offset, 0.0, {needs[0], needs[1], needs[2], false}, causal, scale);
    return {of_q, of_k, of_v};
  }
};

// The mask as numbers; for the efficient kernel of four dimensions, and in memory whose rows are multiples of 16.
Tensor as_added(const Tensor& mask, const Tensor& q, const Tensor& k, Fused kernel) {
  Tensor m = mask;
  if (m.scalar_type() == at::kBool) {
    m = at::zeros(m.sizes(), q.options()).masked_fill_(m.logical_not(), -std::numeric_limits<double>::infinity());
  }
  if (kernel == Fused::efficient) {
    while (m.dim() < 4) m = m.unsqueeze(0);
    const int64_t keys = m.size(-1);
    if (keys % 16 != 0) m = at::constant_pad_nd(m, {0, 16 - keys % 16}).slice(-1, 0, keys);
    m = m.expand({q.size(0), q.size(1), q.size(2), k.size(2)});
  }
  return m;
}

std::optional<Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, bool causal, std::optional<double> given, bool grouped) {
  if (k.dim() < 3 || v.dim() < 3 || k.size(-2) != v.size(-2)) return std::nullopt;  // of which torch's kernels read too much
  for (const Tensor& x : {q, k, v}) {
    if (x.dim() != 4 || x.numel() == 0 || x.scalar_type() != q.scalar_type() || x.device() != q.device()) return std::nullopt;
  }
  if (q.is_cuda() && (q.size(3) % 8 != 0 || v.size(3) != q.size(3) || !torchcalc::Gpu::is_current(q))) return std::nullopt;
  if (mask.defined() && (mask.device() != q.device() || (mask.scalar_type() != at::kBool && mask.scalar_type() != q.scalar_type()) ||
                         (mask.requires_grad() && at::GradMode::is_enabled()) || mask.dim() < 2 || causal)) {
    return std::nullopt;
  }
  auto kernel = static_cast<Fused>(at::_fused_sdp_choice(q, k, v, if_defined(mask), 0.0, causal, given, grouped));
  if (kernel == Fused::cudnn && mask.defined()) kernel = Fused::efficient;
  if (q.is_cpu() ? kernel != Fused::flash : kernel < Fused::flash || kernel > Fused::cudnn) return std::nullopt;
  const double scale = given ? *given : 1 / std::sqrt(static_cast<double>(q.size(3)));
  const bool recorded = torch::autograd::compute_requires_grad(q, k, v);
  auto node = recorded ? make_node<AttentionBackward>() : decltype(make_node<AttentionBackward>()){};
  Tensor y, lse, seed, offset, m;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    if (mask.defined()) m = as_added(mask, q, k, kernel);
    if (q.is_cpu()) {
      std::tie(y, lse) = at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, if_defined(m), scale);
      if (k.size(2) < widest && has_zero(lse) && !(is_finite(q) && is_finite(k) && !is_nan(m))) return std::nullopt;
    } else if (kernel != Fused::efficient) {
      auto [out, sums, cumulated_q, cumulated_k, longest_q, longest_k, s, o, debug] = kernel == Fused::flash
          ? at::_scaled_dot_product_flash_attention(q, k, v, 0.0, causal, false, scale)
          : at::_scaled_dot_product_cudnn_attention(q, k, v, std::nullopt, recorded, 0.0, causal, false, scale);
      y = out, lse = sums, seed = s, offset = o;
      if (recorded) {
        node->cumulated_q = cumulated_q, node->cumulated_k = cumulated_k;
        node->longest_q = longest_q, node->longest_k = longest_k;
      }
    } else {
      std::tie(y, lse, seed, offset) =
          at::_scaled_dot_product_efficient_attention(q, k, v, if_defined(m), recorded, 0.0, causal, scale);
    }
  }
  if (recorded) {
    node->set_next_edges(torch::autograd::collect_next_edges(q, k, v));
    node->kernel = kernel;
    node->causal = causal;
    node->scale = scale;
    node->has_mask = m.defined();
    node->seed = std::move(seed);
    node->offset = std::move(offset);
    node->saved_q = SavedVariable(q, false);
    node->saved_k = SavedVariable(k, false);
    node->saved_v = SavedVariable(v, false);
    node->saved_lse = SavedVariable(lse, false);
    if (node->has_mask) node->saved_mask = SavedVariable(m, false);
    torch::autograd::set_history(y, node);
    node->saved_y = SavedVariable(y, true);
  }
  return y;
}

}  // namespace
