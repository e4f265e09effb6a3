// Norms in torch's graph: rms_norm, whose kernels on CPU are ours; layer_norm and group_norm, whose kernels are torch's.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/ops/_fused_rms_norm.h>
#include <ATen/ops/_fused_rms_norm_backward.h>
#include <ATen/ops/add.h>
#include <ATen/ops/native_group_norm.h>
#include <ATen/ops/native_group_norm_backward.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/ones.h>

#include "../rows.h"
#include "common.h"

namespace {

bool is_half(const Tensor& x) { return x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16; }

at::IntArrayRef last(const Tensor& x, int64_t dims) { return x.sizes().slice(x.dim() - dims); }

// A weight or a bias that the kernels take beside x: of its dtype, or on CPU float32 beside 16 bits.
bool goes_with(const Tensor& w, const Tensor& x, at::IntArrayRef size) {
  return !w.defined() ||
      (w.sizes() == size && w.device() == x.device() &&
       (w.scalar_type() == x.scalar_type() || (w.scalar_type() == at::kFloat && is_half(x) && x.is_cpu())));
}

// Whether the last dimensions are rows of numbers side by side, each as far from the one before.
bool lies_in_rows(const Tensor& x, int64_t dims, int64_t& apart) {
  int64_t expected = 1, rows = 1, d = x.dim() - 1;
  for (; d >= x.dim() - dims; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  apart = expected;
  for (; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (rows == 1) {
      apart = x.stride(d);
    } else if (x.stride(d) != rows * apart) {
      return false;
    }
    rows *= x.size(d);
  }
  return true;
}

Tensor in_rows(const Tensor& x, int64_t dims, int64_t& apart) {
  if (lies_in_rows(x, dims, apart)) return x;
  Tensor y = x.contiguous();
  lies_in_rows(y, dims, apart);
  return y;
}

// The gradients that are needed, by operations that have derivatives.
variable_list by_operations(const char* name, torch::jit::Stack&& stack, const c10::List<bool>& needed) {
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(&stack);
  const auto found = stack.at(0).toTensorVector();
  variable_list grads(needed.size());
  size_t next = 0;
  for (size_t i = 0; i < needed.size(); ++i) {
    if (needed[i]) grads[i] = found.at(next++);
  }
  return grads;
}

std::optional<Tensor> if_defined(const Tensor& x) { return x.defined() ? std::optional<Tensor>(x) : std::nullopt; }

Tensor like(const Tensor& grad, const Tensor& x) { return grad.defined() ? grad.to(x.scalar_type()) : grad; }

// rms_norm, and with a residual (rms_norm of the sum, the sum): x is the sum then.
struct RMSNormBackward : public KernelNode {
  SavedVariable saved_x, saved_weight;
  Tensor rstd;
  int64_t dims = 1;
  double eps = 0;
  bool has_weight = false, has_residual = false;

  std::string name() const override { return has_residual ? "AddRMSNormFunctionBackward" : "RMSNormFunctionBackward"; }

  std::vector<SavedVariable*> kept() override {
    std::vector<SavedVariable*> all{&saved_x};
    if (has_weight) all.push_back(&saved_weight);
    return all;
  }

  variable_list apply(variable_list&& incoming) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& g = incoming[0];
    const Tensor added = has_residual ? incoming[1] : Tensor();
    variable_list grads(3);  // of x, residual, weight
    const bool need_x = task_should_compute_output(0), need_residual = task_should_compute_output(1);
    const bool need_weight = task_should_compute_output(2);
    if (!g.defined()) {
      if (need_x) grads[0] = added;
      if (need_residual) grads[1] = added;
      return grads;
    }
    const auto self = self_of(static_cast<Node*>(this));
    const Tensor x = saved_x.unpack(self), weight = has_weight ? saved_weight.unpack(self) : Tensor();
    Tensor grad, grad_weight;
    if (!is_plain(g) || !is_plain(x) || (has_weight && !is_plain(weight)) || (added.defined() && !is_plain(added)) ||
        at::GradMode::is_enabled()) {
      const c10::List<bool> needed({need_x || need_residual, need_weight});
      variable_list found = by_operations(
          "torchcalc_nodes::rms_norm_backward",
          {g, if_defined(added), x, rstd, if_defined(weight), dims, eps, needed}, needed);
      grad = found[0];
      grad_weight = found[1];
    } else {
      const at::AutoDispatchBelowADInplaceOrView guard;
      if (x.is_cpu()) {
        compute(g, added, x, weight, need_x || need_residual ? &grad : nullptr, need_weight ? &grad_weight : nullptr);
      } else {
        std::tie(grad, grad_weight) = at::_fused_rms_norm_backward(
            g.contiguous(), x, last(x, dims), rstd, if_defined(weight), {need_x || need_residual, need_weight});
        if (added.defined() && grad.defined()) grad = at::add(grad, added);
      }
      if (need_weight) grad_weight = like(grad_weight, weight);
    }
    if (need_x) grads[0] = grad;
    if (need_residual) grads[1] = grad;
    grads[2] = grad_weight;
    return grads;
  }

  void compute(const Tensor& g, const Tensor& added, const Tensor& x, const Tensor& weight, Tensor* grad, Tensor* grad_weight) const;
};

// The tensors of a call, as the kernel reads them.
struct Rows {
  torchcalc::RmsNorm rows;  // first, for x writes into it
  Tensor x, weight;

  Rows(const Tensor& from, const Tensor& w, const Tensor& rstd, int64_t dims)
      : x(in_rows(from, dims, rows.of_x)), weight(w.defined() ? w.to(computed(x.scalar_type())).contiguous() : w) {
    number_of(x.scalar_type(), rows.number);
    rows.x = static_cast<const char*>(x.const_data_ptr());
    if (weight.defined()) rows.weight = weight.const_data_ptr();
    rows.rstd = rstd.data_ptr();
    rows.n = c10::multiply_integers(last(x, dims));
    rows.rows = x.numel() / rows.n;
  }
};

void RMSNormBackward::compute(
    const Tensor& g, const Tensor& added, const Tensor& x, const Tensor& weight, Tensor* grad, Tensor* grad_weight) const {
  const Rows all(x, weight, rstd, dims);
  torchcalc::RmsNormGradient back;
  const Tensor rows_of_g = in_rows(g, dims, back.of_g);
  const Tensor rows_of_added = added.defined() ? in_rows(added, dims, back.of_added) : added;
  back.g = static_cast<const char*>(rows_of_g.const_data_ptr());
  if (added.defined()) back.added = static_cast<const char*>(rows_of_added.const_data_ptr());
  if (grad) {
    *grad = at::detail::empty_cpu(x.sizes(), x.scalar_type());
    back.grad = static_cast<char*>(grad->mutable_data_ptr());
  }
  if (grad_weight) {
    *grad_weight = at::detail::empty_cpu(weight.sizes(), computed(x.scalar_type()));
    back.grad_weight = grad_weight->mutable_data_ptr();
  }
  table->rows->rms_norm_backward(all.rows, back);
}

// (y, x + residual); the second undefined without a residual, the first where it is not taken.
std::pair<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, int64_t dims, double eps) {
  if (dims < 1 || dims > x.dim() || x.numel() == 0 || !goes_with(weight, x, last(x, dims)) ||
      (residual.defined() &&
       (residual.sizes() != x.sizes() || residual.scalar_type() != x.scalar_type() || residual.device() != x.device()))) {
    return {};
  }
  Tensor y, sum, rstd;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    if (x.is_cpu()) {
      std::vector<int64_t> size = x.sizes().vec();
      std::fill(size.end() - dims, size.end(), 1);
      rstd = at::detail::empty_cpu(size, computed(x.scalar_type()));
      Rows all(x, weight, rstd, dims);
      all.rows.eps = eps;
      Tensor other;
      if (residual.defined()) {
        other = in_rows(residual, dims, all.rows.of_residual);
        all.rows.residual = static_cast<const char*>(other.const_data_ptr());
        sum = at::detail::empty_cpu(x.sizes(), x.scalar_type());
      }
      y = at::detail::empty_cpu(x.sizes(), x.scalar_type());
      table->rows->rms_norm(
          all.rows, static_cast<char*>(y.mutable_data_ptr()),
          sum.defined() ? static_cast<char*>(sum.mutable_data_ptr()) : nullptr);
    } else {
      if (residual.defined()) sum = at::add(x, residual);
      std::tie(y, rstd) = at::_fused_rms_norm(sum.defined() ? sum : x, last(x, dims), if_defined(weight), eps);
    }
  }
  if (torch::autograd::compute_requires_grad(x, residual, weight)) {
    auto node = make_node<RMSNormBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, residual, weight));
    node->dims = dims;
    node->eps = eps;
    node->rstd = std::move(rstd);
    node->has_residual = residual.defined();
    node->has_weight = weight.defined();
    if (node->has_weight) node->saved_weight = SavedVariable(weight, false);
    torch::autograd::set_history(y, node);
    if (sum.defined()) torch::autograd::set_history(sum, node);
    node->saved_x = sum.defined() ? SavedVariable(sum, true) : SavedVariable(x, false);
  }
  return {y, sum};
}

// layer_norm over the last dims dimensions, or group_norm if there are groups.
struct NormBackward : public KernelNode {
  SavedVariable saved_x, saved_weight, saved_bias;
  Tensor mean, rstd;
  int64_t dims = 0, groups = 0;
  double eps = 0;
  bool has_weight = false, has_bias = false;

  std::string name() const override { return groups ? "GroupNormFunctionBackward" : "LayerNormFunctionBackward"; }

  std::vector<SavedVariable*> kept() override {
    std::vector<SavedVariable*> all{&saved_x};
    if (has_weight) all.push_back(&saved_weight);
    if (has_bias) all.push_back(&saved_bias);
    return all;
  }

  variable_list apply(variable_list&& incoming) override;
};

// The size of weight and bias.
at::IntArrayRef size_of(const Tensor& x, int64_t dims, int64_t groups) {
  return groups ? x.sizes().slice(1, 1) : last(x, dims);
}

// In 16 bits torch's kernels keep mean and rstd in 16 bits too, if weight and bias are not float32.
Tensor wide(const Tensor& w, const Tensor& x) { return w.defined() && is_half(x) && x.is_cpu() ? w.to(at::kFloat) : w; }

Tensor wide_weight(const Tensor& w, const Tensor& x, at::IntArrayRef size) {
  return !w.defined() && is_half(x) && x.is_cpu() ? at::ones(size, at::kFloat) : wide(w, x);
}

// As group_norm's kernels want it: dense, in x's own order of dimensions where these take that.
Tensor laid_out(const Tensor& x, const Tensor& as) {
  return x.contiguous(as.is_cpu() ? as.suggest_memory_format() : at::MemoryFormat::Contiguous);
}

variable_list NormBackward::apply(variable_list&& incoming) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Tensor& g = incoming[0];
  const std::array<bool, 3> needs{task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2)};
  if (!g.defined()) return variable_list(3);
  const auto self = self_of(static_cast<Node*>(this));
  const Tensor x = saved_x.unpack(self), weight = has_weight ? saved_weight.unpack(self) : Tensor();
  const Tensor bias = has_bias ? saved_bias.unpack(self) : Tensor();
  if (!is_plain(g) || !is_plain(x) || (has_weight && !is_plain(weight)) || (has_bias && !is_plain(bias)) ||
      at::GradMode::is_enabled()) {
    const c10::List<bool> needed({needs[0], needs[1], needs[2]});
    return by_operations(
        "torchcalc_nodes::norm_backward",
        {g, x, mean, rstd, if_defined(weight), if_defined(bias), dims, groups, eps, needed}, needed);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor w = wide_weight(weight, x, size_of(x, dims, groups)), b = wide(bias, x);
  Tensor grad, grad_weight, grad_bias;
  if (groups) {
    const int64_t batch = x.size(0), channels = x.size(1);
    std::tie(grad, grad_weight, grad_bias) = at::native_group_norm_backward(
        laid_out(g, x), laid_out(x, x), mean, rstd, if_defined(w), batch, channels, x.numel() / (batch * channels), groups, needs);
  } else {
    std::tie(grad, grad_weight, grad_bias) =
        at::native_layer_norm_backward(g.contiguous(), x, last(x, dims), mean, rstd, if_defined(w), if_defined(b), needs);
  }
  return {grad, needs[1] ? like(grad_weight, weight) : Tensor(), needs[2] ? like(grad_bias, bias) : Tensor()};
}

std::optional<Tensor> norm(
    const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t dims, int64_t groups, double eps) {
  if (x.numel() == 0 || x.dim() < (groups ? 2 : 1) || dims > x.dim() || (groups && x.size(1) % groups != 0)) return std::nullopt;
  const at::IntArrayRef size = size_of(x, dims, groups);
  if (!goes_with(weight, x, size) || !goes_with(bias, x, size) ||
      (weight.defined() && bias.defined() && weight.scalar_type() != bias.scalar_type())) {
    return std::nullopt;
  }
  Tensor y, mean, rstd;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto w = if_defined(wide_weight(weight, x, size)), b = if_defined(wide(bias, x));
    if (groups) {
      const int64_t batch = x.size(0), channels = x.size(1);
      std::tie(y, mean, rstd) = at::native_group_norm(
          laid_out(x, x), w, b, batch, channels, x.numel() / (batch * channels), groups, eps);
    } else {
      std::tie(y, mean, rstd) = at::native_layer_norm(x, size, w, b, eps);
    }
  }
  if (torch::autograd::compute_requires_grad(x, weight, bias)) {
    auto node = make_node<NormBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, weight, bias));
    node->dims = dims;
    node->groups = groups;
    node->eps = eps;
    node->mean = std::move(mean);
    node->rstd = std::move(rstd);
    node->saved_x = SavedVariable(x, false);
    node->has_weight = weight.defined();
    node->has_bias = bias.defined();
    if (node->has_weight) node->saved_weight = SavedVariable(weight, false);
    if (node->has_bias) node->saved_bias = SavedVariable(bias, false);
    torch::autograd::set_history(y, node);
  }
  return y;
}

}  // namespace
