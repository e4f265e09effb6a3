// Functions of rows in torch's graph: cross-entropy, whose kernels are ours, and softmax, whose kernels are torch's.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>

#include "../rows.h"
#include "common.h"

namespace {

using torchcalc::CrossEntropy;

// How a cross-entropy is taken.
struct Ways {
  int64_t ignored = -100;
  Reduction reduction = mean;
  double smoothing = 0, z_loss = 0;

  bool by_row() const { return reduction == none || reduction == wide; }
};

// The logits as (outer, classes, inner); false where they have to be made contiguous first.
bool lay_out(const Tensor& x, CrossEntropy& rows) {
  const int64_t axis = x.dim() == 1 ? 0 : 1;
  rows.classes = x.size(axis);
  rows.of_class = x.stride(axis);
  rows.outer = axis == 0 ? 1 : x.size(0);
  rows.of_outer = axis == 0 ? 0 : x.stride(0);
  rows.inner = rows.of_inner = 1;
  for (int64_t d = x.dim() - 1; d > axis; --d) {
    if (x.size(d) == 1) continue;
    if (rows.inner == 1) {
      rows.of_inner = x.stride(d);
    } else if (x.stride(d) != rows.inner * rows.of_inner) {
      return false;
    }
    rows.inner *= x.size(d);
  }
  if (rows.inner == 1) {  // the samples of a batch, then, are what is one after the other
    std::swap(rows.inner, rows.outer);
    std::swap(rows.of_inner, rows.of_outer);
  }
  return rows.classes == 1 || rows.of_class == 1 || rows.inner == 1 || rows.of_inner == 1;
}

// The tensors of a call, as a kernel reads them.
struct Arrays {
  Tensor x, target, weight;
  CrossEntropy rows;

  Arrays(const Tensor& logits, const Tensor& t, const Tensor& w, const Ways& ways)
      : x(logits), target(t), weight(w.defined() ? w.to(computed(logits.scalar_type())).contiguous() : w) {
    if (!x.is_non_overlapping_and_dense() || !lay_out(x, rows)) {
      x = x.contiguous();
      lay_out(x, rows);
    }
    number_of(x.scalar_type(), rows.number);
    rows.logits = static_cast<const char*>(x.const_data_ptr());
    if (target.scalar_type() == at::kLong) {
      target = target.contiguous();
      rows.target = target.const_data_ptr<int64_t>();
    } else {
      if (!lies_like(target, x)) target = at::empty_like(x).copy_(target);
      rows.probabilities = static_cast<const char*>(target.const_data_ptr());
    }
    if (weight.defined()) rows.weight = weight.const_data_ptr();
    rows.smoothing = ways.smoothing;
    rows.z_loss = ways.z_loss;
    rows.ignored = ways.ignored;
  }

  // What the mean divides by; 1 where every sample is ignored.
  double divisor() const {
    if (!rows.target) return static_cast<double>(rows.samples());
    double sum = 0;
    bool any = false;
    for (int64_t i = 0; i < rows.samples(); ++i) {
      const int64_t y = rows.target[i];
      if (y == rows.ignored) continue;
      any = true;
      sum += !weight.defined()                         ? 1
             : weight.scalar_type() == at::kDouble ? weight.const_data_ptr<double>()[y]
                                                       : static_cast<double>(weight.const_data_ptr<float>()[y]);
    }
    return any ? sum : 1;
  }
};

// On a GPU: rows_gpu.h.
std::optional<Tensor> gpu_cross_entropy(
    const Tensor& x, const Tensor& target, const Tensor& weight, const Ways& ways, Tensor& kept);
Tensor gpu_cross_entropy_gradient(
    const Tensor& incoming, const Tensor& x, const Tensor& target, const Tensor& weight, const Ways& ways, const Tensor& kept);

struct CrossEntropyBackward : public KernelNode {
  SavedVariable saved_x, saved_target, saved_weight;
  Tensor statistics;
  Ways ways;
  bool has_weight = false;
  double divisor = 1;

  std::string name() const override { return "CrossEntropyFunctionBackward"; }

  std::vector<SavedVariable*> kept() override {
    std::vector<SavedVariable*> all{&saved_x, &saved_target};
    if (has_weight) all.push_back(&saved_weight);
    return all;
  }

  variable_list apply(variable_list&& incoming) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& g = incoming[0];
    if (!g.defined() || !task_should_compute_output(0)) return variable_list(1);
    const auto self = self_of(static_cast<Node*>(this));
    const Tensor x = saved_x.unpack(self), target = saved_target.unpack(self);
    const Tensor weight = has_weight ? saved_weight.unpack(self) : Tensor();
    const bool plain = is_plain(g) && g.device() == x.device() && is_plain(x) && is_array(target) &&
        (!has_weight || is_plain(weight)) && !at::GradMode::is_enabled();
    if (plain && x.is_cuda()) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      if (Tensor grad = gpu_cross_entropy_gradient(g, x, target, weight, ways, statistics); grad.defined()) return {grad};
    }
    if (!plain || x.is_cuda()) {
      return {called("torchcalc_nodes::cross_entropy_backward",
                     {g, x, target, if_defined(weight), ways.ignored, static_cast<int64_t>(ways.reduction), ways.smoothing,
                      ways.z_loss})
                  .toTensor()};
    }
    Arrays arrays(x, target, weight, ways);
    arrays.rows.statistics = statistics.data_ptr();
    Tensor grad = at::detail::empty_strided_cpu(arrays.x.sizes(), arrays.x.strides(), x.scalar_type());
    Tensor share;
    double scale = 1 / divisor;
    if (ways.by_row()) {
      share = g.to(statistics.scalar_type()).contiguous();
    } else {
      scale *= g.item<double>();
    }
    table->rows->cross_entropy_backward(
        arrays.rows, share.defined() ? share.const_data_ptr() : nullptr, scale, static_cast<char*>(grad.mutable_data_ptr()));
    return {grad};
  }
};

// Sizes and dtypes that the kernels take; what is wrong besides is the reference's to say.
bool takes(const Tensor& x, const Tensor& target, const Tensor& weight, const Ways& ways) {
  if (!x.device().is_cpu() || x.dim() == 0 || x.numel() == 0 || !target.device().is_cpu() || !is_array(target)) return false;
  const int64_t classes = x.size(x.dim() == 1 ? 0 : 1);
  if (!(ways.smoothing >= 0 && ways.smoothing <= 1) || ways.reduction < none || ways.reduction > wide) {
    return false;
  }
  if (weight.defined() && (weight.dim() != 1 || weight.size(0) != classes || weight.scalar_type() != x.scalar_type() || weight.requires_grad())) {
    return false;
  }
  if (target.scalar_type() == x.scalar_type()) {
    return target.sizes() == x.sizes() && !target.requires_grad() && !target._fw_grad(0).defined() && ways.ignored < 0;
  }
  if (target.scalar_type() != at::kLong || target.dim() != std::max<int64_t>(x.dim() - 1, 0)) return false;
  for (int64_t d = 0; d < target.dim(); ++d) {
    if (target.size(d) != x.size(d == 0 ? 0 : d + 1)) return false;
  }
  return true;
}

std::optional<Tensor> cross_entropy(const Tensor& x, const Tensor& target, const Tensor& weight, const Ways& ways) {
  if (!x.is_cuda() && !takes(x, target, weight, ways)) return std::nullopt;
  const bool recorded = at::GradMode::is_enabled() && x.requires_grad();
  Tensor out, statistics;
  double divisor = 1;
  if (x.is_cuda()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto loss = gpu_cross_entropy(x, target, weight, ways, statistics);
    if (!loss) return std::nullopt;
    out = *loss;
  } else {
    at::AutoDispatchBelowADInplaceOrView guard;
    Arrays arrays(x, target, weight, ways);
    const int64_t samples = arrays.rows.samples();
    statistics = at::detail::empty_cpu({arrays.rows.probabilities ? 3 : 2, samples}, computed(x.scalar_type()));
    arrays.rows.statistics = statistics.mutable_data_ptr();
    std::vector<int64_t> size = x.sizes().vec();
    size.erase(size.begin() + (x.dim() == 1 ? 0 : 1));
    const Tensor losses = at::detail::empty_cpu(size, at::kDouble);
    double* const each = losses.mutable_data_ptr<double>();
    if (!table->rows->cross_entropy(arrays.rows, each)) return std::nullopt;
    if (ways.by_row()) {
      out = losses.to(ways.reduction == wide ? computed(x.scalar_type()) : x.scalar_type());
    } else {
      double total = 0;
      for (int64_t i = 0; i < samples; ++i) total += each[i];
      if (ways.reduction == mean) total /= divisor = arrays.divisor();
      out = at::detail::empty_cpu({}, x.scalar_type());
      out.fill_(total);
    }
  }
  if (recorded) {
    auto node = make_node<CrossEntropyBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(x));
    node->ways = ways;
    node->divisor = divisor;
    node->statistics = std::move(statistics);
    node->saved_x = SavedVariable(x, false);
    node->saved_target = SavedVariable(target, false);
    node->has_weight = weight.defined();
    if (node->has_weight) node->saved_weight = SavedVariable(weight, false);
    torch::autograd::set_history(out, node);
  }
  return out;
}

// For a chunk of rows whose logits nobody else sees: the losses, in the dtype that is computed in; and if there is a share,
// one number or one for each row, the gradient times that, in the logits' place.
std::optional<Tensor> cross_entropy_in_place(
    const Tensor& x, const Tensor& target, const Tensor& weight, const Ways& ways, const std::optional<Tensor>& share) {
  if (x.dim() != 2 || !x.is_contiguous() || !takes(x, target, weight, ways)) return std::nullopt;
  const at::AutoDispatchBelowADInplaceOrView guard;
  Arrays arrays(x, target, weight, ways);
  const at::ScalarType type = computed(x.scalar_type());
  Tensor statistics = at::detail::empty_cpu({3, x.size(0)}, type);
  Tensor losses = at::detail::empty_cpu({x.size(0)}, at::kDouble);
  arrays.rows.statistics = statistics.mutable_data_ptr();
  if (!table->rows->cross_entropy(arrays.rows, losses.mutable_data_ptr<double>())) return std::nullopt;
  if (share) {
    const Tensor each = share->to(type).contiguous();
    const bool one = each.dim() == 0;
    table->rows->cross_entropy_backward(
        arrays.rows, one ? nullptr : each.const_data_ptr(), one ? each.item<double>() : 0, static_cast<char*>(x.mutable_data_ptr()));
  }
  return losses.to(type);
}

struct SoftmaxBackward : public KernelNode {
  SavedVariable saved_y;
  int64_t dim = 0;
  bool log = false;
  at::ScalarType dtype = at::kFloat;

  std::string name() const override { return log ? "LogSoftmaxFunctionBackward" : "SoftmaxFunctionBackward"; }

  std::vector<SavedVariable*> kept() override { return {&saved_y}; }

  variable_list apply(variable_list&& incoming) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& g = incoming[0];
    if (!g.defined() || !task_should_compute_output(0)) return variable_list(1);
    const Tensor y = saved_y.unpack(self_of(static_cast<Node*>(this)));
    if (is_plain(g) && is_plain(y) && g.scalar_type() == dtype && !at::GradMode::is_enabled()) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      return {log ? at::_log_softmax_backward_data(g, y, dim, dtype) : at::_softmax_backward_data(g, y, dim, dtype)};
    }
    return {called("torchcalc_nodes::softmax_backward", {g, y, dim, log}).toTensor()};
  }
};

std::optional<Tensor> softmax(const Tensor& x, int64_t dim, bool log) {
  const int64_t dims = std::max<int64_t>(x.dim(), 1);
  if (dim < -dims || dim >= dims) return std::nullopt;
  Tensor y;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    y = log ? at::_log_softmax(x, dim, false) : at::_softmax(x, dim, false);
  }
  if (at::GradMode::is_enabled() && x.requires_grad()) {
    auto node = make_node<SoftmaxBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(x));
    node->dim = dim;
    node->log = log;
    node->dtype = x.scalar_type();
    torch::autograd::set_history(y, node);
    node->saved_y = SavedVariable(y, true);
  }
  return y;
}

}  // namespace
