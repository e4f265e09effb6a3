// Norms in torch's graph. On CPU the kernels of rms_norm and layer_norm are ours; elsewhere, and for group_norm, they are torch's.
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

// A weight or a bias that is taken beside x: of its dtype, or on CPU float32 beside 16 bits.
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

// The tensors of a call, as the kernel reads them.
struct NormArrays {
  torchcalc::Norm rows;  // first, for the others write into it
  Tensor x, weight, bias;

  NormArrays(const Tensor& from, const Tensor& w, const Tensor& b, const Tensor& mean, const Tensor& rstd, int64_t dims)
      : x(in_rows(from, dims, rows.of_x)), weight(computed_of(w)), bias(computed_of(b)) {
    number_of(x.scalar_type(), rows.number);
    rows.x = bytes(x);
    rows.weight = bytes(weight);
    rows.bias = bytes(bias);
    rows.mean = own_bytes(mean);
    rows.rstd = own_bytes(rstd);
    rows.n = c10::multiply_integers(last(x, dims));
    rows.rows = x.numel() / rows.n;
  }

 private:
  Tensor computed_of(const Tensor& w) const { return w.defined() ? w.to(computed(x.scalar_type())).contiguous() : w; }
};

// What every norm keeps.
struct AnyNormBackward : public KernelNode {
  SavedVariable saved_x, saved_weight, saved_bias;
  Tensor mean, rstd;
  double eps = 0;
  bool has_weight = false, has_bias = false;

  std::vector<SavedVariable*> kept() override {
    std::vector<SavedVariable*> all{&saved_x};
    if (has_weight) all.push_back(&saved_weight);
    if (has_bias) all.push_back(&saved_bias);
    return all;
  }

  // All but x.
  void keep(const Tensor& weight, const Tensor& bias, Tensor&& m, Tensor&& r, double e) {
    has_weight = weight.defined();
    has_bias = bias.defined();
    if (has_weight) saved_weight = SavedVariable(weight, false);
    if (has_bias) saved_bias = SavedVariable(bias, false);
    mean = std::move(m);
    rstd = std::move(r);
    eps = e;
  }
};

// rms_norm(x), add_rms_norm(x, residual), whose x here is the sum, or layer_norm(x), which alone has a mean.
struct NormBackward : public AnyNormBackward {
  int64_t dims = 1;
  bool has_residual = false;

  std::string name() const override {
    return mean.defined() ? "LayerNormFunctionBackward" : has_residual ? "AddRMSNormFunctionBackward" : "RMSNormFunctionBackward";
  }

  variable_list apply(variable_list&& incoming) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& g = incoming[0];
    const Tensor added = has_residual ? incoming[1] : Tensor();
    const bool need_x = task_should_compute_output(0), need_residual = task_should_compute_output(1);
    const std::array<bool, 3> needs{need_x || need_residual, task_should_compute_output(2), task_should_compute_output(3)};
    variable_list grads(3);  // of x, weight, bias
    if (!g.defined()) {
      grads[0] = added;
    } else {
      const auto self = self_of(static_cast<Node*>(this));
      const Tensor x = saved_x.unpack(self), weight = has_weight ? saved_weight.unpack(self) : Tensor();
      const Tensor bias = has_bias ? saved_bias.unpack(self) : Tensor();
      bool plain = is_plain(g) && is_plain(x);
      for (const Tensor& other : {added, weight, bias}) plain = plain && (!other.defined() || is_plain(other));
      grads = plain && !at::GradMode::is_enabled() ? compute(g, added, x, weight, bias, needs)
                                                   : differentiable(g, added, x, weight, bias, needs);
    }
    return {need_x ? grads[0] : Tensor(), need_residual ? grads[0] : Tensor(), grads[1], grads[2]};
  }

  variable_list differentiable(
      const Tensor& g, const Tensor& added, const Tensor& x, const Tensor& weight, const Tensor& bias,
      const std::array<bool, 3>& needs) const {
    if (mean.defined()) {
      return by_operations(
          "torchcalc_nodes::layer_norm_backward", {g, x, mean, rstd, if_defined(weight), if_defined(bias), dims, eps},
          c10::List<bool>({needs[0], needs[1], needs[2]}));
    }
    variable_list grads = by_operations(
        "torchcalc_nodes::rms_norm_backward", {g, if_defined(added), x, rstd, if_defined(weight), dims, eps},
        c10::List<bool>({needs[0], needs[1]}));
    grads.emplace_back();
    return grads;
  }

  variable_list compute(
      const Tensor& g, const Tensor& added, const Tensor& x, const Tensor& weight, const Tensor& bias,
      const std::array<bool, 3>& needs) const {
    const at::AutoDispatchBelowADInplaceOrView guard;
    Tensor grad, grad_weight, grad_bias;
    if (x.is_cpu()) {
      const NormArrays arrays(x, weight, Tensor(), mean, rstd, dims);
      torchcalc::NormGradient to;
      const Tensor rows_of_g = in_rows(g, dims, to.of_g);
      const Tensor rows_of_added = added.defined() ? in_rows(added, dims, to.of_added) : added;
      if (needs[0]) grad = at::detail::empty_cpu(x.sizes(), x.scalar_type());
      if (needs[1]) grad_weight = at::detail::empty_cpu(weight.sizes(), computed(x.scalar_type()));
      if (needs[2]) grad_bias = at::detail::empty_cpu(bias.sizes(), computed(x.scalar_type()));
      to.g = bytes(rows_of_g);
      to.added = bytes(rows_of_added);
      to.grad = own_bytes(grad);
      to.grad_weight = own_bytes(grad_weight);
      to.grad_bias = own_bytes(grad_bias);
      table->rows->norm_backward(arrays.rows, to);
    } else if (mean.defined()) {
      std::tie(grad, grad_weight, grad_bias) = at::native_layer_norm_backward(
          g.contiguous(), x, last(x, dims), mean, rstd, if_defined(weight), if_defined(bias), needs);
    } else {
      std::tie(grad, grad_weight) = at::_fused_rms_norm_backward(
          g.contiguous(), x, last(x, dims), rstd, if_defined(weight), {needs[0], needs[1]});
      if (added.defined() && grad.defined()) grad = at::add(grad, added);
    }
    return {grad, needs[1] ? like(grad_weight, weight) : Tensor(), needs[2] ? like(grad_bias, bias) : Tensor()};
  }
};

enum class Kind { rms, layer };

// (y, x + residual): the second undefined without a residual, both where they are not taken.
std::pair<Tensor, Tensor> norm(
    Kind kind, const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, at::IntArrayRef shape,
    double eps) {
  const auto dims = static_cast<int64_t>(shape.size());
  if (dims < 1 || dims > x.dim() || last(x, dims) != shape || x.numel() == 0 || !goes_with(weight, x, shape) || !goes_with(bias, x, shape)) {
    return {};
  }
  if (residual.defined() &&
      (residual.sizes() != x.sizes() || residual.scalar_type() != x.scalar_type() || residual.device() != x.device())) {
    return {};
  }
  if (weight.defined() && bias.defined() && weight.scalar_type() != bias.scalar_type()) return {};
  Tensor y, sum, mean, rstd;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    if (x.is_cpu()) {
      c10::SmallVector<int64_t, 5> size(x.sizes().begin(), x.sizes().end());
      std::fill(size.end() - dims, size.end(), 1);
      rstd = at::detail::empty_cpu(size, computed(x.scalar_type()));
      if (kind == Kind::layer) mean = at::detail::empty_cpu(size, computed(x.scalar_type()));
      NormArrays arrays(x, weight, bias, mean, rstd, dims);
      arrays.rows.eps = eps;
      Tensor other;
      if (residual.defined()) {
        other = in_rows(residual, dims, arrays.rows.of_residual);
        arrays.rows.residual = bytes(other);
        sum = at::detail::empty_cpu(x.sizes(), x.scalar_type());
      }
      y = at::detail::empty_cpu(x.sizes(), x.scalar_type());
      table->rows->norm(arrays.rows, own_bytes(y), own_bytes(sum));
    } else if (kind == Kind::layer) {
      std::tie(y, mean, rstd) = at::native_layer_norm(x, shape, if_defined(weight), if_defined(bias), eps);
    } else {
      if (residual.defined()) sum = at::add(x, residual);
      std::tie(y, rstd) = at::_fused_rms_norm(sum.defined() ? sum : x, shape, if_defined(weight), eps);
    }
  }
  if (torch::autograd::compute_requires_grad(x, residual, weight, bias)) {
    auto node = make_node<NormBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, residual, weight, bias));
    node->dims = dims;
    node->keep(weight, bias, std::move(mean), std::move(rstd), eps);
    node->has_residual = residual.defined();
    torch::autograd::set_history(y, node);
    if (sum.defined()) torch::autograd::set_history(sum, node);
    node->saved_x = sum.defined() ? SavedVariable(sum, true) : SavedVariable(x, false);
  }
  return {y, sum};
}

// Channels that lie side by side are taken apart on CPU: there torch's kernel takes E[x²] − μ², which loses all digits of what is
// far from zero, and has no gradient of the weight alone. What is returned lies as x did.
Tensor as_laid_out(Tensor y, const Tensor& x) { return x.is_cpu() ? y.contiguous(x.suggest_memory_format()) : y; }

// A weight or a bias for torch's kernels, which take it as contiguous. In 16 bits those on CPU keep mean and rstd in 16 bits too,
// unless there is a weight in float32.
Tensor for_groups(const Tensor& w, const Tensor& x) {
  if (!w.defined()) return w;
  return is_half(x) && x.is_cpu() ? w.to(at::kFloat).contiguous() : w.contiguous();
}

// And where there is a bias alone they fail.
Tensor weight_for_groups(const Tensor& w, const Tensor& b, const Tensor& x) {
  const bool half = is_half(x) && x.is_cpu();
  if (w.defined() || !(half || b.defined())) return for_groups(w, x);
  return at::ones({x.size(1)}, x.options().dtype(half ? at::kFloat : x.scalar_type()));
}

struct GroupNormBackward : public AnyNormBackward {
  int64_t groups = 1;

  std::string name() const override { return "GroupNormFunctionBackward"; }

  variable_list apply(variable_list&& incoming) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& g = incoming[0];
    if (!g.defined()) return variable_list(3);
    const std::array<bool, 3> needs{task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2)};
    const auto self = self_of(static_cast<Node*>(this));
    const Tensor x = saved_x.unpack(self), weight = has_weight ? saved_weight.unpack(self) : Tensor();
    const Tensor bias = has_bias ? saved_bias.unpack(self) : Tensor();
    bool plain = is_plain(g) && is_plain(x);
    for (const Tensor& other : {weight, bias}) plain = plain && (!other.defined() || is_plain(other));
    if (!plain || at::GradMode::is_enabled()) {
      return by_operations(
          "torchcalc_nodes::group_norm_backward", {g, x, mean, rstd, if_defined(weight), if_defined(bias), groups, eps},
          c10::List<bool>({needs[0], needs[1], needs[2]}));
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    const int64_t batch = x.size(0), channels = x.size(1);
    auto [grad, grad_weight, grad_bias] = at::native_group_norm_backward(
        g.contiguous(), x.contiguous(), mean, rstd, if_defined(weight_for_groups(weight, bias, x)), batch, channels,
        x.numel() / (batch * channels), groups, needs);
    if (grad.defined()) grad = as_laid_out(grad, x);
    return {grad, needs[1] ? like(grad_weight, weight) : Tensor(), needs[2] ? like(grad_bias, bias) : Tensor()};
  }
};

std::optional<Tensor> group_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps) {
  if (x.dim() < 2 || groups < 1 || x.size(1) % groups != 0 || x.numel() == 0 || x.numel() == groups) return std::nullopt;
  const int64_t batch = x.size(0), channels = x.size(1);
  if (!goes_with(weight, x, {channels}) || !goes_with(bias, x, {channels}) ||
      (weight.defined() && bias.defined() && weight.scalar_type() != bias.scalar_type())) {
    return std::nullopt;
  }
  Tensor y, mean, rstd;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor w = weight_for_groups(weight, bias, x), b = for_groups(bias, x);
    std::tie(y, mean, rstd) = at::native_group_norm(
        x.contiguous(), if_defined(w), if_defined(b), batch, channels, x.numel() / (batch * channels), groups, eps);
    y = as_laid_out(y, x);
  }
  if (torch::autograd::compute_requires_grad(x, weight, bias)) {
    auto node = make_node<GroupNormBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, weight, bias));
    node->groups = groups;
    node->keep(weight, bias, std::move(mean), std::move(rstd), eps);
    node->saved_x = SavedVariable(x, false);
    torch::autograd::set_history(y, node);
  }
  return y;
}

}  // namespace
