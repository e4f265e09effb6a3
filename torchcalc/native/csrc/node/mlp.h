// Two linear layers with an activation or a gate between them, in torch's graph: layers/mlp.py has the equations. The products are
// torch's.
#pragma once

#include <array>

#include "linear.h"
#include "pointwise.h"

namespace {

// The arguments in their order; biases, and up where there is no gate, may be undefined.
enum Argument : size_t { in, gate, gate_bias, up, up_bias, down, down_bias, arguments };

// a, and b where there is a gate.
variable_list hidden_of(const Tensor& rows, const Tensor* given) {
  variable_list hidden{at::linear(rows, given[gate], if_defined(given[gate_bias]))};
  if (given[up].defined()) hidden.push_back(at::linear(rows, given[up], if_defined(given[up_bias])));
  return hidden;
}

// h; undefined where no kernel takes them.
Tensor value_of(const Formula& formula, const variable_list& hidden) {
  return hidden[0].is_cuda() ? launched(formula, torchcalc::value, hidden, nullptr, {})
                             : compute(formula.value, hidden, hidden[0].scalar_type(), nullptr)[0];
}

// The gradients of what is hidden, and h; likewise.
variable_list whole_of(const Formula& formula, const Tensor& g, const variable_list& hidden, uint32_t wanted) {
  if (g.is_cuda()) return launched_whole(formula, g, hidden);
  variable_list given{g};
  given.insert(given.end(), hidden.begin(), hidden.end());
  given.emplace_back();
  const Results results = compute(formula.whole, given, g.scalar_type(), nullptr, wanted);
  return {results.begin(), results.end()};
}

struct MLPBackward : public KernelNode {
  const Formula* formula = nullptr;
  std::array<SavedVariable, arguments> saved;
  std::array<bool, arguments> has{};
  SavedVariable saved_hidden[2];
  bool recompute = false;

  std::string name() const override { return "MLPFunctionBackward"; }

  std::vector<SavedVariable*> kept() override {
    std::vector<SavedVariable*> all;
    for (size_t i = 0; i < arguments; ++i) {
      if (has[i]) all.push_back(&saved[i]);
    }
    for (int i = 0; i < formula->inputs && !recompute; ++i) all.push_back(&saved_hidden[i]);
    return all;
  }

  variable_list apply(variable_list&& incoming) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& g = incoming[0];
    if (!g.defined()) return variable_list(arguments);
    const auto self = self_of(static_cast<Node*>(this));
    Tensor given[arguments];
    bool plain = is_plain(g);
    for (size_t i = 0; i < arguments; ++i) {
      if (has[i]) plain = is_plain(given[i] = saved[i].unpack(self)) && plain;
    }
    variable_list hidden;
    for (int i = 0; i < formula->inputs && !recompute; ++i) {
      hidden.push_back(saved_hidden[i].unpack(self));
      plain = plain && is_plain(hidden.back());
    }
    if (plain && g.scalar_type() == given[in].scalar_type() && !at::GradMode::is_enabled()) {
      variable_list grads = compute_all(g, given, std::move(hidden));
      if (!grads.empty()) return grads;
    }
    c10::List<bool> needed;
    for (size_t i = 0; i < arguments; ++i) needed.push_back(has[i] && task_should_compute_output(i));
    return by_operations(
        "torchcalc_nodes::mlp_backward",
        {std::string(formula->name), g, given[in], given[gate], if_defined(given[gate_bias]), if_defined(given[up]),
         if_defined(given[up_bias]), given[down], if_defined(given[down_bias])},
        needed);
  }

  variable_list compute_all(const Tensor& g, const Tensor* given, variable_list hidden) {
    const AsItIs guard;
    const auto needs = [&](Argument i) { return has[i] && task_should_compute_output(i); };
    const bool first = needs(in) || needs(gate) || needs(gate_bias), second = needs(in) || needs(up) || needs(up_bias);
    const Tensor rows = as_rows(given[in]), of_y = as_rows(g);
    variable_list grads(arguments);
    if (needs(down_bias)) grads[down_bias] = of_y.sum(0);
    if (!first && !second && !needs(down)) return grads;
    if (hidden.empty()) hidden = hidden_of(rows, given);
    Tensor h, of_a, of_b;
    if (first || second) {
      const bool gated = hidden.size() == 2;
      const uint32_t wanted = first | (gated && second) << 1 | needs(down) << hidden.size();
      variable_list found = whole_of(*formula, at::mm(of_y, given[down]), hidden, wanted);
      if (found.empty()) return {};
      of_a = std::move(found[0]);
      if (gated) of_b = std::move(found[1]);
      h = std::move(found[hidden.size()]);
    } else {
      h = value_of(*formula, hidden);
      if (!h.defined()) return {};
    }
    hidden.clear();
    if (needs(down)) grads[down] = at::mm(of_y.t(), h);
    h.reset();
    if (needs(gate)) grads[gate] = at::mm(of_a.t(), rows);
    if (needs(up)) grads[up] = at::mm(of_b.t(), rows);
    if (needs(gate_bias)) grads[gate_bias] = of_a.sum(0);
    if (needs(up_bias)) grads[up_bias] = of_b.sum(0);
    if (needs(in)) {
      Tensor of_x = at::mm(of_a, given[gate]);
      if (of_b.defined()) of_x.addmm_(of_b, given[up]);
      grads[in] = of_x.view(given[in].sizes());
    }
    return grads;
  }
};

bool fits(const Tensor* given, int inputs) {
  const Tensor& x = given[in];
  for (const size_t i : {in, gate, down}) {
    if (!given[i].defined()) return false;
  }
  if (x.dim() == 0 || given[gate].dim() != 2 || given[down].dim() != 2 || (inputs == 2) != given[up].defined()) return false;
  const int64_t hidden = given[gate].size(0);
  if (given[gate].size(1) != x.size(-1) || given[down].size(1) != hidden) return false;
  if (given[up].defined() ? given[up].sizes() != given[gate].sizes() : given[up_bias].defined()) return false;
  for (const auto& [i, size] : {std::pair{gate_bias, hidden}, {up_bias, hidden}, {down_bias, given[down].size(0)}}) {
    if (given[i].defined() && (given[i].dim() != 1 || given[i].size(0) != size)) return false;
  }
  for (size_t i = 0; i < arguments; ++i) {
    if (given[i].defined() && (given[i].scalar_type() != x.scalar_type() || given[i].device() != x.device() || given[i].numel() == 0)) {
      return false;
    }
  }
  return true;
}

std::optional<Tensor> mlp(int64_t place, const Tensor* given, bool recompute) {
  const Formula& formula = table->formulas[place];
  if (formula.whole.of_float == nullptr || !fits(given, formula.inputs)) return std::nullopt;
  if (given[in].is_cuda() && !torchcalc::Gpu::instance().is_ready()) return std::nullopt;
  variable_list hidden;
  Tensor y;
  {
    const AsItIs guard;
    const Tensor rows = as_rows(given[in]);
    hidden = hidden_of(rows, given);
    const Tensor h = value_of(formula, hidden);
    if (!h.defined()) return std::nullopt;
    y = at::linear(h, given[down], if_defined(given[down_bias])).view(with_last(given[in], given[down].size(0)));
  }
  bool recorded = false;
  for (size_t i = 0; i < arguments; ++i) recorded |= given[i].defined() && given[i].requires_grad();
  if (recorded && at::GradMode::is_enabled()) {
    auto node = make_node<MLPBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(
        given[in], given[gate], given[gate_bias], given[up], given[up_bias], given[down], given[down_bias]));
    node->formula = &formula;
    node->recompute = recompute;
    for (size_t i = 0; i < arguments; ++i) {
      node->has[i] = given[i].defined();
      if (node->has[i]) node->saved[i] = SavedVariable(given[i], false);
    }
    for (size_t i = 0; i < hidden.size() && !recompute; ++i) node->saved_hidden[i] = SavedVariable(hidden[i], false);
    torch::autograd::set_history(y, node);
  }
  return y;
}

}  // namespace
