#include "optim.h"

#include <algorithm>
#include <unordered_map>

namespace torchcalc {

bool Group::fits(const TensorList& grads, int slots) const {
  const int64_t n = size();
  return grads.size() == n && state_.size() == slots * n && (!has_steps() || steps_.size() == n);
}

bool Group::describe_item(const TensorList& grads, int slots, int64_t i, Item& out) const {
  Dense param, other;
  if (!describe(params_[i], Access::write, param)) return false;
  if (!describe(grads[i], Access::read, other) || other.dtype != param.dtype || !other.same_layout(param)) return false;
  out.param = param.data;
  out.grad = other.data;
  out.numel = param.numel;
  out.index = i;
  out.dtype = out.slot_dtype = param.dtype;
  for (int s = 0; s < slots; ++s) {
    if (!describe(state_[s * size() + i], Access::write, other) || !other.same_layout(param)) return false;
    if (s > 0 && other.dtype != out.slot_dtype) return false;
    out.slot[s] = other.data;
    out.slot_dtype = other.dtype;
  }
  if (has_steps() && !describe(steps_[i], Access::write, out.step)) return false;
  return with_types(out.dtype, out.slot_dtype, [](auto, auto) {});
}

// No element that is written may be read or written through another tensor. Parameters and state rarely move, so they are
// sorted only when they did; gradients, which are new at every step, are looked up among them.
bool Group::disjoint(const std::vector<Item>& items, int slots) {
  const auto width = [](Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; };
  const auto interval = [](const char* data, int64_t bytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
    return Interval(begin, begin + static_cast<uintptr_t>(bytes));
  };
  const auto touches_written = [&](const Interval& x) {
    auto after = std::upper_bound(
        written_.begin(), written_.end(), x.first, [](uintptr_t a, const Interval& b) { return a < b.second; });
    return after != written_.end() && after->first < x.second;
  };

  std::vector<const char*> lies;
  lies.reserve(items.size() * static_cast<size_t>(slots + 3));
  for (const Item& item : items) {
    lies.push_back(item.param);
    lies.push_back(item.param + item.numel * width(item.dtype));
    lies.insert(lies.end(), item.slot, item.slot + slots);
    lies.push_back(static_cast<const char*>(item.step.data));
  }
  if (lies != seen_) {
    seen_.clear();
    written_.clear();
    for (const Item& item : items) {
      if (item.numel == 0) continue;
      written_.push_back(interval(item.param, item.numel * width(item.dtype)));
      for (int s = 0; s < slots; ++s) written_.push_back(interval(item.slot[s], item.numel * width(item.slot_dtype)));
    }
    std::sort(written_.begin(), written_.end());
    for (size_t i = 1; i < written_.size(); ++i) {
      if (written_[i].first < written_[i - 1].second) return false;
    }
    for (const Item& item : items) {
      if (item.step.data && touches_written(interval(static_cast<const char*>(item.step.data), item.step.is_double ? 8 : 4)))
        return false;
    }
    seen_ = std::move(lies);
  }
  for (const Item& item : items) {
    if (item.numel > 0 && touches_written(interval(item.grad, item.numel * width(item.dtype)))) return false;
  }
  return true;
}

bool Group::items(const TensorList& grads, int slots, std::vector<Item>& out) {
  if (!fits(grads, slots)) return false;
  out.resize(static_cast<size_t>(size()));
  for (int64_t i = 0; i < size(); ++i) {
    if (!describe_item(grads, slots, i, out[static_cast<size_t>(i)])) return false;
  }
  return disjoint(out, slots);
}

std::vector<int64_t> Group::refused(const TensorList& grads) {
  const int slots = this->slots();
  const bool comparable = slots <= max_slots && fits(grads, slots);
  std::vector<int64_t> places;
  Item item;
  for (int64_t i = 0; i < size(); ++i) {
    if (!comparable || !describe_item(grads, slots, i, item)) places.push_back(i);
  }
  return places;
}

Status StepOptions::prepare(bool maximize, StepHyper& out) const {
  Scalar scalar;
  out.factor = maximize ? -grad_coef : grad_coef;
  out.seed = static_cast<uint64_t>(seed.value_or(0));
  if (grad_scale) {
    if (!describe(grad_scale->get(), Access::read, scalar)) return unsupported;
    out.factor *= static_cast<double>(static_cast<float>(1.0 / scalar.get()));
  }
  return done;
}

namespace {
struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<Group>> groups;
  int64_t last = 0;
};
// Never destroyed: at exit the tensors in it must not outlive torch.
Registry& registry() {
  static Registry* const the = new Registry;
  return *the;
}
}  // namespace

int64_t bind(TensorList params, TensorList state, TensorList steps) {
  auto group = std::make_shared<Group>(std::move(params), std::move(state), std::move(steps));
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  r.groups.emplace(++r.last, std::move(group));
  return r.last;
}

std::shared_ptr<Group> bound(int64_t handle) {
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  const auto found = r.groups.find(handle);
  return found == r.groups.end() ? nullptr : found->second;
}

static std::vector<int64_t> refused(int64_t handle, TensorList grads) {
  const std::shared_ptr<Group> group = bound(handle);
  if (!group) return {};
  const std::lock_guard<std::mutex> lock(group->mutex);
  return group->refused(grads);
}

static bool unbind(int64_t handle) {
  std::shared_ptr<Group> group;  // dies after the lock is released: its tensors may belong to Python objects
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  const auto found = r.groups.find(handle);
  if (found == r.groups.end()) return false;
  group = std::move(found->second);
  r.groups.erase(found);
  return true;
}

}  // namespace torchcalc

STABLE_TORCH_LIBRARY_FRAGMENT(torchcalc, m) {
  // Marked as written to, which they will be: torch then refuses lazily negated tensors instead of binding copies of them.
  m.def("bind(Tensor(a!)[] params, Tensor(b!)[] state, Tensor(c!)[] steps) -> int");
  m.def("refused(int handle, Tensor[] grads) -> int[]");
  m.def("unbind(int handle) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(torchcalc, CompositeExplicitAutograd, m) {
  m.impl("bind", TC_BOX(torchcalc::bind));
  m.impl("refused", TC_BOX(torchcalc::refused));
  m.impl("unbind", TC_BOX(torchcalc::unbind));
}
