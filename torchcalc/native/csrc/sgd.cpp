// SGD with momentum.                                         Sutskever et al. 2013; the form of torch.optim.SGD
//
//     g ← ± c·g/scale + λ·p                                                                                (1)
//     b ← μ·b + (1 − τ)·g, at the first step b ← g                                                         (2)
//     g ← g + μ·b for Nesterov, else g ← b                                                                 (3)
//     p ← p − lr·g                                                                                         (4)
//
// Rounded as torch.optim.SGD's loop of tensor operations rounds (see adam.cpp).
#include "optim.h"

namespace torchcalc {
namespace {

struct SgdHyper : StepHyper {
  double lr, momentum, dampening, weight_decay;
  double nesterov;  // 0 or 1: GCC 12 vectorises a select on a number that does not change, not on a bool
};

template <class P, class S, bool Momentum, bool Stochastic>
struct SgdKernel {
  using Item = torchcalc::Item;
  using Hyper = SgdHyper;
  using T = computed_t<P>;

  struct Numbers {
    T factor, weight_decay, momentum, gain, negative_lr, nesterov, first;
  };

  template <bool Fma>
  static TC_INLINE void run(const Item& item, const Hyper& h, int64_t begin, int64_t end) {
    const Numbers c{
        number<T>(h.factor), number<T>(h.weight_decay), number<T>(h.momentum), number<T>(1 - h.dampening),
        number<T>(-h.lr), number<T>(h.nesterov), number<T>(item.first)};
    constexpr int slots = Momentum ? 1 : 0;
    Walk<P, S, slots, Stochastic>(item).run(
        begin, end, item, h, [c](T& p, T g, T (&s)[slots + 1]) TC_INLINE_LAMBDA {
          g = g * c.factor;
          g = c.weight_decay != 0 ? fma<Fma>(p, c.weight_decay, g) : g;                       // (1)
          if constexpr (Momentum) {
            T& b = s[0];
            b = c.first != 0 ? g : fma<Fma>(g, c.gain, b * c.momentum);                       // (2)
            g = c.nesterov != 0 ? fma<Fma>(b, c.momentum, g) : b;                             // (3)
          }
          p = fma<Fma>(g, c.negative_lr, p);                                                  // (4)
        });
  }
};

using Kernel = void (*)(const Item&, const SgdHyper&, int64_t, int64_t);

template <bool Stochastic>
bool choose(const Item& item, bool momentum, Kernel& kernel) {
  return with_types(item.dtype, item.slot_dtype, [&](auto p, auto s) {
    using P = decltype(p);
    using S = decltype(s);
    constexpr bool draws = Stochastic && is_half<P>;
    kernel = momentum ? variant<SgdKernel<P, S, true, draws>>() : variant<SgdKernel<P, P, false, draws>>();
  });
}

struct SgdNumbers {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

Status step(
    Group& group, const TensorList& grads, const std::vector<int64_t>& first, const SgdNumbers& a,
    const StepOptions& options) {
  const std::lock_guard<std::mutex> lock(group.mutex);
  if (group.size() == 0) return done;
  const int slots = group.slots();
  if (slots != (a.momentum != 0 ? 1 : 0)) return unsupported;

  std::vector<Item> items;
  if (!group.items(grads, slots, items)) return unsupported;
  for (Item& item : items) item.first = 0;
  for (int64_t i : first) {
    if (slots == 0 || i < 0 || i >= group.size()) return unsupported;
    items[static_cast<size_t>(i)].first = 1;
  }
  std::vector<Kernel> kernels(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    const bool found = options.seed ? choose<true>(items[i], slots == 1, kernels[i])
                                    : choose<false>(items[i], slots == 1, kernels[i]);
    if (!found) return unsupported;
  }
  SgdHyper hyper;
  const Status status = options.prepare(a.maximize, hyper);
  if (status != done) return status;
  hyper.lr = a.lr;
  hyper.momentum = a.momentum;
  hyper.dampening = a.dampening;
  hyper.weight_decay = a.weight_decay;
  hyper.nesterov = a.nesterov;
  run_all(items, kernels, hyper, 32 * 1024);
  return done;
}

int64_t sgd_bound_(
    int64_t handle, TensorList grads, std::vector<int64_t> first, double lr, double momentum, double dampening,
    double weight_decay, bool nesterov, bool maximize, double grad_coef, std::optional<Tensor> grad_scale,
    std::optional<int64_t> seed) {
  const std::shared_ptr<Group> group = bound(handle);
  if (!group) return unsupported;
  return step(
      *group, grads, first, {lr, momentum, dampening, weight_decay, nesterov, maximize},
      {grad_coef, grad_scale, seed});
}

}  // namespace
}  // namespace torchcalc

STABLE_TORCH_LIBRARY_FRAGMENT(torchcalc, m) {
  m.def(
      "sgd_bound_(int handle, Tensor[] grads, int[] first, float lr, float momentum, float dampening, float weight_decay, "
      "bool nesterov, bool maximize, float grad_coef, Tensor? grad_scale, int? seed) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(torchcalc, CompositeExplicitAutograd, m) {
  m.impl("sgd_bound_", TC_BOX(torchcalc::sgd_bound_));
}
