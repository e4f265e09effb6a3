// Formulas in torch's graph, and losses of them: forward and backward call the kernels of the other library, or launch those that
// Triton compiled.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "common.h"
#include "gpu.h"

namespace {

using torchcalc::Formula;
using torchcalc::Kernel;
using torchcalc::max_inputs;
using torchcalc::Operand;
using Numbers = c10::SmallVector<double, 4>;

Operand operand(const Tensor& x, int64_t stride) {
  Operand o;
  number_of(x.scalar_type(), o.number);
  o.data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
  o.stride = stride;
  return o;
}

Operand flat(const Tensor& x) { return operand(x, static_cast<int64_t>(x.element_size())); }

// One number seen through strides of 0: what sum().backward() sends back.
bool is_one_number(const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.stride(d) != 0 && x.size(d) != 1) return false;
  }
  return true;
}

bool is_one_number(const Tensor& x, const Tensor& like) { return x.sizes() == like.sizes() && is_one_number(x); }

// The number of a formula, in the order of the table.
int64_t place_of(const Formula& formula) { return &formula - table->formulas; }

// On a GPU: one launch over tensors that are dense, alike, of one dtype and aligned; undefined where there is none for them. The
// result is a new tensor, or the one given.
Tensor launched(
    const Formula& formula, int kind, at::ArrayRef<Tensor> arguments, const double* scale, at::ArrayRef<double> numbers,
    const Tensor& given = {}) {
  torchcalc::Gpu& gpu = torchcalc::Gpu::instance();
  const Tensor* like = nullptr;
  for (const Tensor& x : arguments) {
    if (x.defined() && !like && (x.dim() > 0 || scale == nullptr)) like = &x;
  }
  if (!like) like = std::find_if(arguments.begin(), arguments.end(), [](const Tensor& x) { return x.defined(); });
  const at::ScalarType type = like->scalar_type();
  if (!like->is_non_overlapping_and_dense() || !torchcalc::Gpu::is_current(*like)) return {};
  c10::SmallVector<void*, max_inputs + 3> pointers;
  for (size_t k = 0; k < arguments.size(); ++k) {
    const Tensor& x = arguments[k];
    if (!x.defined()) continue;
    const bool one = scale != nullptr && k == 0;  // the gradient of a reduced loss
    if (x.scalar_type() != type || x.device() != like->device() || !torchcalc::Gpu::is_aligned(x)) return {};
    if (one ? x.numel() != 1 : !lies_like(x, *like)) return {};
    pointers.push_back(const_cast<void*>(x.const_data_ptr()));
  }
  const auto launch = gpu.find(torchcalc::Gpu::key(place_of(formula), kind, type, like->device().index()), numbers);
  if (!launch) return {};
  Tensor out = given.defined() ? given : at::empty_like(*like);
  const int64_t n = out.numel();
  if (n == 0) return out;
  pointers.push_back(out.mutable_data_ptr());
  gpu.run(*launch, (n + launch->block - 1) / launch->block, pointers, n, scale, type == at::kDouble);
  return out;
}

// The gradients of all inputs and the value, in one launch; empty where there is none for these tensors.
variable_list launched_whole(const Formula& formula, const Tensor& g, at::ArrayRef<Tensor> inputs) {
  torchcalc::Gpu& gpu = torchcalc::Gpu::instance();
  const at::ScalarType type = g.scalar_type();
  if (!g.is_non_overlapping_and_dense() || !torchcalc::Gpu::is_current(g) || !torchcalc::Gpu::is_aligned(g) || g.numel() == 0) return {};
  c10::SmallVector<void*, max_inputs + 3> pointers{const_cast<void*>(g.const_data_ptr())};
  for (const Tensor& x : inputs) {
    if (x.scalar_type() != type || x.device() != g.device() || !torchcalc::Gpu::is_aligned(x) || !lies_like(x, g)) return {};
    pointers.push_back(const_cast<void*>(x.const_data_ptr()));
  }
  const auto launch = gpu.find(torchcalc::Gpu::key(place_of(formula), torchcalc::whole, type, g.device().index()), {});
  if (!launch) return {};
  variable_list results;
  for (size_t k = 0; k <= inputs.size(); ++k) {
    results.push_back(at::empty_like(g));
    pointers.push_back(results.back().mutable_data_ptr());
  }
  gpu.run(*launch, (g.numel() + launch->block - 1) / launch->block, pointers, g.numel(), nullptr, type == at::kDouble);
  return results;
}

// Σ value·scale in one launch or two, likewise.
Tensor launched_total(const Formula& formula, TensorList inputs, double scale, at::ArrayRef<double> numbers) {
  torchcalc::Gpu& gpu = torchcalc::Gpu::instance();
  const Tensor& like = inputs[0];
  const at::ScalarType type = like.scalar_type();
  if (!like.is_non_overlapping_and_dense() || !torchcalc::Gpu::is_current(like) || like.numel() == 0) return {};
  c10::SmallVector<void*, max_inputs + 3> pointers;
  for (const Tensor& x : inputs) {
    if (x.device() != like.device() || !lies_like(x, like) || !torchcalc::Gpu::is_aligned(x)) return {};
    pointers.push_back(const_cast<void*>(x.const_data_ptr()));
  }
  const auto find = [&](int64_t place, int kind, at::ArrayRef<double> given) {
    return gpu.find(torchcalc::Gpu::key(place, kind, type, like.device().index()), given);
  };
  const int64_t n = like.numel(), place = place_of(formula);
  const auto whole = find(place, torchcalc::loss, numbers), part = find(place, torchcalc::partial, numbers);
  const auto total = find(-1 & 0xFFFF, torchcalc::value, {});  // Σ of partial sums, the same for every formula
  if (!whole || !part || !total) return {};
  Tensor out = at::empty({}, like.options());
  if (n <= whole->block) {
    pointers.push_back(out.mutable_data_ptr());
    gpu.run(*whole, 1, pointers, n, &scale, type == at::kDouble);
    return out;
  }
  const int64_t programs = std::min((n + part->block - 1) / part->block, total->block);
  const Tensor sums = at::empty({programs}, like.options().dtype(at::kDouble));
  pointers.push_back(sums.mutable_data_ptr());
  gpu.run(*part, programs, pointers, n, nullptr, type == at::kDouble);
  gpu.run(*total, 1, {sums.mutable_data_ptr(), out.mutable_data_ptr()}, programs, &scale, true);
  return out;
}

// What a kernel computes: one tensor, or the gradients of several inputs.
using Results = c10::SmallVector<Tensor, 2>;

// Memory for it where that is wanted, a bit for each. Without strides it is contiguous.
Results results_for(
    const Kernel& kernel, uint32_t wanted, at::IntArrayRef size, at::IntArrayRef strides, at::ScalarType dtype, Operand* out) {
  Results results(static_cast<size_t>(kernel.outputs));
  for (int k = 0; k < kernel.outputs; ++k) {
    if (!(wanted >> k & 1)) continue;
    results[k] = strides.empty() ? at::detail::empty_cpu(size, dtype) : at::detail::empty_strided_cpu(size, strides, dtype);
    out[k] = flat(results[k]);
  }
  return results;
}

// kernel(arguments), where undefined arguments are those that it does not use; its results have the dtype given. They are new
// tensors, or those given.
Results compute(
    const Kernel& kernel, at::ArrayRef<Tensor> arguments, at::ScalarType dtype, const double* numbers, uint32_t wanted = ~0u,
    Results given = {}) {
  const int count = static_cast<int>(arguments.size());
  const Tensor* like = nullptr;
  for (const Tensor& x : arguments) {
    if (x.defined() && (!like || is_one_number(*like))) like = &x;
  }
  Operand in[max_inputs + 2], out[max_inputs];
  bool together = like->is_non_overlapping_and_dense();
  for (const Tensor& x : given) together = together && lies_like(x, *like);
  for (int k = 0; k < count && together; ++k) {
    const Tensor& x = arguments[k];
    if (!x.defined()) continue;
    if (lies_like(x, *like)) {
      in[k] = flat(x);
    } else if (is_one_number(x, *like)) {
      in[k] = operand(x, 0);
    } else {
      together = false;
    }
  }
  if (together) {
    for (size_t k = 0; k < given.size(); ++k) out[k] = flat(given[k]);
    if (given.empty()) given = results_for(kernel, wanted, like->sizes(), like->strides(), dtype, out);
    table->apply(kernel, like->numel(), in, count, 1, out, numbers, false);
    return given;
  }
  // Other layouts and broadcasting.
  Results results = std::move(given);
  results.resize(static_cast<size_t>(kernel.outputs));
  at::TensorIteratorConfig config;
  config.set_check_mem_overlap(true).check_all_same_dtype(false).promote_inputs_to_common_dtype(false);
  config.declare_static_dtype(dtype).declare_static_device(at::kCPU);
  for (const Tensor& out : results) config.add_output(out);
  for (const Tensor& x : arguments) {
    if (x.defined()) config.add_const_input(x);
  }
  at::TensorIterator iterator = config.build();
  Number result;
  number_of(dtype, result);
  iterator.for_each([&](char** data, const int64_t* strides, int64_t n) {
    Operand each[max_inputs + 2], to[max_inputs];
    int place = kernel.outputs;
    for (int k = 0; k < count; ++k) {
      if (!arguments[k].defined()) continue;
      number_of(arguments[k].scalar_type(), each[k].number);
      each[k].data = data[place];
      each[k].stride = strides[place++];
    }
    for (int k = 0; k < kernel.outputs; ++k) to[k] = {data[k], strides[k], result};
    table->apply(kernel, n, each, count, 1, to, numbers, true);
  });
  for (int k = 0; k < kernel.outputs; ++k) results[k] = iterator.output(k);
  return results;
}

// One of the two halves along a dimension.
Tensor half_of(const Tensor& x, int64_t dim, int64_t which) {
  const int64_t n = x.size(dim) / 2;
  return x.narrow(dim, which * n, n);
}

// Memory in which both halves along a dimension take turns, n numbers of the one and n of the other. Of few numbers the turns
// are computed one by one, without views and an iterator over them, which take longer than the numbers.
struct Turns {
  int64_t count = 1, n = 1;
  bool serve;

  Turns(const Tensor& x, int64_t dim) : serve(x.is_contiguous() && x.numel() > 0 && x.numel() <= at::internal::GRAIN_SIZE) {
    for (int64_t d = 0; d < x.dim(); ++d) (d < dim ? count : n) *= x.size(d);
    n /= 2;
  }

  // An operand, and by how many bytes it advances in a turn.
  using Place = std::pair<Operand, int64_t>;

  Place half(const Tensor& x, int64_t which) const {
    Operand o = flat(x);
    o.data += which * n * o.stride;
    return {o, 2 * n * o.stride};
  }

  Place own(const Tensor& x) const {
    const Operand o = flat(x);
    return {o, n * o.stride};
  }

  void compute(const Kernel& kernel, std::initializer_list<Place> in, std::initializer_list<Place> out, const double* numbers) const {
    for (int64_t turn = 0; turn < count; ++turn) {
      Operand from[max_inputs + 2], to[max_inputs];
      const auto now = [turn](Place p) {
        if (p.first.data) p.first.data += turn * p.second;
        return p.first;
      };
      std::transform(in.begin(), in.end(), from, now);
      std::transform(out.begin(), out.end(), to, now);
      table->apply(kernel, n, from, static_cast<int>(in.size()), 1, to, numbers, true);
    }
  }
};

// All of one size, stretched where they broadcast, and contiguous where they do not lie alike: for reductions.
c10::SmallVector<Tensor, max_inputs + 1> aligned(TensorList inputs, const std::optional<Tensor>& weight) {
  c10::SmallVector<Tensor, max_inputs + 1> all(inputs.begin(), inputs.end());
  if (weight) all.push_back(*weight);
  bool alike = all[0].is_non_overlapping_and_dense();
  for (const Tensor& x : all) alike = alike && (lies_like(x, all[0]) || is_one_number(x, all[0]));
  if (alike) return all;
  std::vector<int64_t> size = all[0].sizes().vec();
  for (const Tensor& x : all) size = at::infer_size(size, x.sizes());
  for (Tensor& x : all) x = x.expand(size).contiguous();
  return all;
}

Operand operand_like(const Tensor& x, const Tensor& like) { return lies_like(x, like) ? flat(x) : operand(x, 0); }

// The gradient of a formula's inputs, in torch's graph.
struct Backward : public KernelNode {
  const Formula* formula = nullptr;
  Numbers numbers;
  SavedVariable saved[max_inputs];
  SavedVariable saved_y, saved_weight;
  bool has_y = false, has_weight = false;
  bool has[max_inputs] = {};
  int64_t halved = -1;  // the dimension along which saved[0] holds both inputs: then theirs are the halves of one gradient
  Reduction reduction = none;
  double divisor = 1;  // n of a mean
  c10::SmallVector<c10::SmallVector<int64_t, 5>, 2> sizes;
  c10::SmallVector<at::ScalarType, 2> dtypes;

  std::string name() const override { return std::string(formula->name) + "Backward"; }

  std::vector<SavedVariable*> kept() override {
    std::vector<SavedVariable*> all;
    for (int i = 0; i < formula->inputs; ++i) {
      if (has[i]) all.push_back(&saved[i]);
    }
    if (has_y) all.push_back(&saved_y);
    if (has_weight) all.push_back(&saved_weight);
    return all;
  }

  variable_list apply(variable_list&& incoming) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int n = formula->inputs;
    variable_list grads(halved < 0 ? static_cast<size_t>(n) : 1);
    const Tensor& g = incoming[0];
    if (!g.defined()) return grads;
    const auto self = self_of(static_cast<Node*>(this));
    Tensor arguments[max_inputs + 2];
    bool plain = is_plain(g);
    for (int i = 0; i < n; ++i) {
      if (has[i]) plain &= is_plain(arguments[1 + i] = saved[i].unpack(self));
    }
    if (has_y) plain &= is_plain(arguments[1 + n] = saved_y.unpack(self));
    Tensor weight, whole;
    if (halved >= 0) {
      whole = arguments[1];
      if (plain && !at::GradMode::is_enabled() && g.is_contiguous()) {
        if (const Turns turns(whole, halved); turns.serve) {
          Tensor grad = at::detail::empty_cpu(whole.sizes(), whole.scalar_type());
          turns.compute(
              formula->joint, {turns.own(g), turns.half(whole, 0), turns.half(whole, 1), {}},
              {turns.half(grad, 0), turns.half(grad, 1)}, numbers.data());
          return {grad};
        }
      }
      for (int i = 0; i < 2; ++i) arguments[1 + i] = half_of(whole, halved, i);
    }
    if (has_weight) plain &= is_plain(weight = saved_weight.unpack(self));
    if (!plain || at::GradMode::is_enabled()) return differentiable(g, arguments, weight);
    if (g.is_cuda()) return on_gpu(g, arguments);

    Tensor wide;  // of a weighted loss without reduction
    if (reduction == none && has_weight) wide = g.to(at::promote_types(g.scalar_type(), at::kFloat)).mul(weight);
    const auto compute_by = [&](const Kernel& kernel, at::ScalarType dtype, uint32_t wanted = ~0u) {
      Tensor used[max_inputs + 2];
      used[0] = wide.defined() ? wide : g;
      for (int k = 1; k < n + 2; ++k) {
        if (kernel.uses >> k & 1) used[k] = arguments[k];
      }
      return reduction == none ? compute(kernel, at::ArrayRef<Tensor>(used, n + 2), dtype, numbers.data(), wanted)
                               : spread(kernel, g, weight, used, dtype, wanted);
    };
    if (halved >= 0) {
      grads[0] = at::empty_like(whole);
      compute(
          formula->joint, {g, arguments[1], arguments[2], Tensor()}, dtypes[0], numbers.data(), ~0u,
          {half_of(grads[0], halved, 0), half_of(grads[0], halved, 1)});
      return grads;
    }
    if (const uint32_t wanted = wanted_together()) {
      Results found = compute_by(formula->joint, dtypes[0], wanted);
      for (int i = 0, k = 0; i < n; ++i) {
        if (formula->product[i].of_float == nullptr) continue;
        if (wanted >> k & 1) grads[static_cast<size_t>(i)] = std::move(found[k]);
        ++k;
      }
      return grads;
    }
    for (int i = 0; i < n; ++i) {
      if (!task_should_compute_output(static_cast<size_t>(i))) continue;
      const Kernel& kernel = formula->product[i];
      Tensor grad = compute_by(kernel, dtypes[i])[0];
      if (grad.sizes() != at::IntArrayRef(sizes[i])) {
        if (dtypes[i] != at::kDouble && dtypes[i] != at::kFloat) grad = compute_by(kernel, at::kFloat)[0];  // rounded once
        grad = at::sum_to(grad, at::IntArrayRef(sizes[i])).to(dtypes[i]);
      }
      grads[static_cast<size_t>(i)] = std::move(grad);
    }
    return grads;
  }

  // Which outputs of the joint kernel are needed, where these are several, and nothing is summed afterwards.
  uint32_t wanted_together() const {
    uint32_t wanted = 0;
    for (int i = 0, k = 0; i < formula->inputs; ++i) {
      if (sizes[i] != sizes[0]) return 0;
      if (formula->product[i].of_float == nullptr) continue;
      if (task_should_compute_output(static_cast<size_t>(i))) wanted |= 1u << k;
      ++k;
    }
    return (wanted & (wanted - 1)) != 0 ? wanted : 0;
  }

  variable_list on_gpu(const Tensor& g, const Tensor* arguments) {
    const int n = formula->inputs;
    const double scale = 1 / divisor;
    variable_list grads(static_cast<size_t>(n));
    for (int i = 0; i < n; ++i) {
      if (!task_should_compute_output(static_cast<size_t>(i))) continue;
      Tensor used[max_inputs + 2];
      for (int k = 1; k < n + 2; ++k) {
        if (formula->product[i].uses >> k & 1) used[k] = arguments[k];
      }
      const Tensor* const like = std::find_if(used + 1, used + n + 2, [](const Tensor& x) { return x.defined(); });
      used[0] = g;
      if (like != used + n + 2 && reduction == none && (!lies_like(g, *like) || !torchcalc::Gpu::is_aligned(g))) {
        used[0] = at::empty_like(*like).copy_(g);
      }
      const int kind = (reduction == none ? torchcalc::product : torchcalc::loss_product) + i;
      Tensor& grad = grads[static_cast<size_t>(i)];
      grad = launched(*formula, kind, at::ArrayRef<Tensor>(used, n + 2), reduction == none ? nullptr : &scale, numbers);
      if (!grad.defined()) return differentiable(g, arguments, {});
    }
    return grads;
  }

  // That of all inputs together; a slope may use fewer.
  std::vector<int64_t> size_of_loss(const Tensor& weight) const {
    std::vector<int64_t> size(sizes[0].begin(), sizes[0].end());
    for (const auto& s : sizes) size = at::infer_size(size, at::IntArrayRef(s));
    return weight.defined() ? at::infer_size(size, weight.sizes()) : size;
  }

  // g·weight/divisor·slope, where g is one number.
  Results spread(
      const Kernel& kernel, const Tensor& g, const Tensor& weight, Tensor* used, at::ScalarType dtype, uint32_t wanted) {
    const int count = formula->inputs + 2;
    c10::SmallVector<Tensor, max_inputs + 1> inputs(used + 1, used + count);
    const Tensor* like = weight.defined() ? &weight : nullptr;
    for (const Tensor& x : inputs) {
      if (!like && x.defined()) like = &x;
    }
    const std::vector<int64_t> size = size_of_loss(weight);
    bool alike = like && like->sizes() == at::IntArrayRef(size) && like->is_non_overlapping_and_dense();
    for (const Tensor& x : inputs) alike = alike && (!x.defined() || lies_like(x, *like));
    Tensor w = weight;
    if (!alike) {
      for (Tensor& x : inputs) x = x.defined() ? x.expand(size).contiguous() : x;
      if (w.defined()) w = w.expand(size).contiguous();
    }
    Operand in[max_inputs + 2], out[max_inputs];
    double factor = g.item<double>() / divisor;
    double one = 1;
    if (w.defined()) {
      in[0] = flat(w);
    } else {
      std::swap(one, factor);  // in[0] is the factor itself
      in[0].data = reinterpret_cast<char*>(&one);
      in[0].stride = 0;
      in[0].number = Number::float64;
    }
    for (int k = 1; k < count; ++k) {
      if (inputs[k - 1].defined()) in[k] = flat(inputs[k - 1]);
    }
    Results results = results_for(kernel, wanted, size, alike ? like->strides() : at::IntArrayRef(), dtype, out);
    table->apply(kernel, c10::multiply_integers(size), in, count, factor, out, numbers.data(), false);
    return results;
  }

  // The same by operations that torch can differentiate, transform and trace.
  variable_list differentiable(const Tensor& incoming, const Tensor* arguments, const Tensor& weight) {
    const int n = formula->inputs;
    Tensor g = incoming;
    if (reduction != none || has_weight) {
      g = g.to(at::promote_types(g.scalar_type(), at::kFloat));
      if (divisor != 1) g = g.div(divisor);
      if (has_weight) g = g.mul(weight);
      g = g.expand(size_of_loss(weight));
    }
    c10::List<std::optional<Tensor>> known;
    for (int k = 1; k < n + 2; ++k) {
      known.push_back(if_defined(arguments[k]));
    }
    c10::List<bool> needed;
    for (int i = 0; i < n; ++i) needed.push_back(halved >= 0 || task_should_compute_output(static_cast<size_t>(i)));
    const std::vector<Tensor> found =
        called("torchcalc_nodes::differentiable_backward",
               {std::string(formula->name), g, std::move(known), c10::List<double>(at::ArrayRef<double>(numbers)), needed})
            .toTensorVector();
    if (halved >= 0) return {at::cat(found, halved).to(dtypes[0])};
    variable_list grads(static_cast<size_t>(n));
    size_t next = 0;
    for (int i = 0; i < n; ++i) {
      if (!needed.get(static_cast<size_t>(i))) continue;
      grads[static_cast<size_t>(i)] = at::sum_to(found[next++], at::IntArrayRef(sizes[i])).to(dtypes[i]);
    }
    return grads;
  }
};

// What the formula's inputs must be; the dtype of the result.
bool takes(const Formula& formula, TensorList inputs, at::ScalarType& dtype) {
  if (static_cast<int>(inputs.size()) != formula.inputs) return false;
  dtype = inputs[0].scalar_type();
  for (const Tensor& x : inputs) {
    if (!is_plain(x) || x.scalar_type() != dtype || x.device() != inputs[0].device()) return false;
  }
  return inputs[0].is_cpu() || torchcalc::Gpu::instance().is_ready();
}

auto node_of(const Formula& formula, TensorList inputs, at::ArrayRef<double> numbers) {
  auto node = make_node<Backward>();
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  node->formula = &formula;
  node->numbers.assign(numbers.begin(), numbers.end());
  uint32_t used = 0;
  for (int i = 0; i < formula.inputs; ++i) {
    node->sizes.emplace_back(inputs[i].sizes().begin(), inputs[i].sizes().end());
    node->dtypes.push_back(inputs[i].scalar_type());
    if (inputs[i].requires_grad()) used |= formula.product[i].uses;
  }
  for (int i = 0; i < formula.inputs; ++i) {
    if (used >> (1 + i) & 1) {
      node->saved[i] = SavedVariable(inputs[i], false);
      node->has[i] = true;
    }
  }
  node->has_y = used >> (1 + formula.inputs) & 1;
  return node;
}

bool has_derivatives(const Formula& formula, TensorList inputs) {
  for (int i = 0; i < formula.inputs; ++i) {
    if (inputs[i].requires_grad() && formula.product[i].of_float == nullptr) return false;
  }
  return true;
}

std::optional<Tensor> elementwise(int64_t place, TensorList inputs, at::ArrayRef<double> numbers) {
  const Formula& formula = table->formulas[place];
  at::ScalarType dtype;
  if (!takes(formula, inputs, dtype)) return std::nullopt;
  const bool recorded = torch::autograd::compute_requires_grad(inputs);
  if (recorded && !has_derivatives(formula, inputs)) return std::nullopt;
  Tensor out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = inputs[0].is_cuda() ? launched(formula, torchcalc::value, inputs, nullptr, numbers)
                              : compute(formula.value, inputs, dtype, numbers.data())[0];
  }
  if (!out.defined()) return std::nullopt;
  if (recorded) {
    auto node = node_of(formula, inputs, numbers);
    torch::autograd::set_history(out, node);
    if (node->has_y) node->saved_y = SavedVariable(out, true);
  }
  return out;
}

// The value written over the input, as torch's operations in place are: of what backward reads the input is kept as a copy, and
// of the result torch checks that nobody changes it. Raises where torch does, before anything is changed.
std::optional<Tensor> in_place(int64_t place, const Tensor& x, at::ArrayRef<double> numbers) {
  const Formula& formula = table->formulas[place];
  at::ScalarType dtype;
  if (!takes(formula, x, dtype) || !x.is_non_overlapping_and_dense()) return std::nullopt;
  const bool recorded = torch::autograd::compute_requires_grad(x);
  if (recorded && !has_derivatives(formula, x)) return std::nullopt;
  torch::autograd::check_inplace(x, recorded);
  // Heavy kernels compute the element in the middle of an odd number twice.
  const bool twice = formula.value.heavy && dtype == at::kFloat && (x.numel() % 2 != 0 || x.numel() > torchcalc::heavy_grain);
  const bool copied = (recorded && (formula.product[0].uses & 2)) || (twice && !x.is_cuda());
  const Tensor kept = copied ? x.clone() : x;
  auto node = recorded ? node_of(formula, kept, numbers) : decltype(node_of(formula, kept, numbers)){};
  torch::autograd::increment_version(x);  // refuses a tensor of inference mode
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (!x.is_cuda()) {
      compute(formula.value, kept, dtype, numbers.data(), ~0u, {x});
    } else if (!launched(formula, torchcalc::value, kept, nullptr, numbers, x).defined()) {
      return std::nullopt;
    }
  }
  if (recorded) {
    node->set_next_edges(torch::autograd::collect_next_edges(x));  // the copy's gradient is x's
    torch::autograd::rebase_history(x, node);
    if (node->has_y) node->saved_y = SavedVariable(x, true, x.is_view());
  }
  return x;
}

// A formula of the two halves of one tensor, on CPU: its gradient is written as one, where the halves' own would be copied
// together.
std::optional<Tensor> of_halves(int64_t place, const Tensor& x, int64_t dim, at::ArrayRef<double> numbers) {
  const Formula& formula = table->formulas[place];
  if (!x.is_cpu() || !is_plain(x) || formula.inputs != 2 || formula.joint.of_float == nullptr) return std::nullopt;
  if (dim < 0 || dim >= x.dim() || x.size(dim) % 2 != 0) return std::nullopt;
  Tensor out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (const Turns turns(x, dim); turns.serve) {
      std::vector<int64_t> size = x.sizes().vec();
      size[dim] /= 2;
      out = at::detail::empty_cpu(size, x.scalar_type());
      turns.compute(formula.value, {turns.half(x, 0), turns.half(x, 1)}, {turns.own(out)}, numbers.data());
    } else {
      out = compute(formula.value, {half_of(x, dim, 0), half_of(x, dim, 1)}, x.scalar_type(), numbers.data())[0];
    }
  }
  if (torch::autograd::compute_requires_grad(x)) {
    auto node = make_node<Backward>();
    node->set_next_edges(torch::autograd::collect_next_edges(x));
    node->formula = &formula;
    node->numbers.assign(numbers.begin(), numbers.end());
    node->halved = dim;
    node->dtypes.push_back(x.scalar_type());
    node->saved[0] = SavedVariable(x, false);
    node->has[0] = true;
    torch::autograd::set_history(out, node);
  }
  return out;
}

// On CPU: the reduced loss, and the number that its mean is divided by.
double total_of(
    const Formula& formula, TensorList inputs, const std::optional<Tensor>& weight, at::ArrayRef<double> numbers,
    Reduction reduction, bool by_weight, at::ScalarType dtype, Tensor& out) {
  const auto all = aligned(inputs, weight);
  Operand in[max_inputs + 1], w;
  for (int i = 0; i < formula.inputs; ++i) in[i] = operand_like(all[i], all[0]);
  if (weight) w = operand_like(all.back(), all[0]);
  const int64_t n = all[0].numel();
  double total = table->total(formula.value, n, in, formula.inputs, weight ? &w : nullptr, numbers.data());
  double divisor = 1;
  if (reduction == mean) {
    const Tensor once = weight ? weight->contiguous() : Tensor();  // the weights as they were given, each once
    divisor = weight && by_weight ? table->sum(once.numel(), flat(once)) : static_cast<double>(n);
    total = total / divisor;
  }
  out = at::detail::empty_cpu({}, dtype);
  if (dtype == at::kFloat) {
    *out.mutable_data_ptr<float>() = static_cast<float>(total);
  } else {
    out.fill_(total);
  }
  return divisor;
}

std::optional<Tensor> reduced(
    int64_t place, TensorList inputs, const std::optional<Tensor>& weight, at::ArrayRef<double> numbers, int64_t how,
    bool by_weight) {
  const Formula& formula = table->formulas[place];
  const auto reduction = static_cast<Reduction>(how);
  if (reduction == none && !weight) return elementwise(place, inputs, numbers);
  at::ScalarType dtype;
  if (!takes(formula, inputs, dtype)) return std::nullopt;
  const bool recorded = torch::autograd::compute_requires_grad(inputs);
  if (recorded && !has_derivatives(formula, inputs)) return std::nullopt;
  if (weight && (!is_plain(*weight) || weight->scalar_type() != dtype || reduction == none ||
                 (at::GradMode::is_enabled() && weight->requires_grad()))) {
    return std::nullopt;
  }
  Tensor out;
  double divisor = 1;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (inputs[0].is_cuda()) {
      if (weight) return std::nullopt;
      if (reduction == mean) divisor = static_cast<double>(inputs[0].numel());
      out = launched_total(formula, inputs, 1 / divisor, numbers);
      if (!out.defined()) return std::nullopt;
    } else {
      divisor = total_of(formula, inputs, weight, numbers, reduction, by_weight, dtype, out);
    }
  }
  if (recorded) {
    auto node = node_of(formula, inputs, numbers);
    node->has_y = false;
    node->reduction = reduction;
    node->divisor = divisor;
    if (weight) {
      node->has_weight = true;
      node->saved_weight = SavedVariable(*weight, false);
    }
    torch::autograd::set_history(out, node);
  }
  return out;
}

}  // namespace
