// Adam and AdamW.                        Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101
//
//     g ← ± c·g/scale (+ λ·p for Adam)                                                                     (1)
//     p ← p·(1 − lr·λ)  for AdamW                                                                          (2)
//     m ← m + (1 − β₁)(g − m)                                                                              (3)
//     v ← β₂·v + (1 − β₂)·g²;  amsgrad: v̂ ← max(v̂, v), used in (5) instead of v                           (4)
//     p ← p − [lr/(1 − β₁ᵗ)]·m / (√v/√(1 − β₂ᵗ) + ε)                                                       (5)
//
// One pass: 28 bytes per float32 element are all that must move. Every operation rounds where torch.optim's loop of tensor
// operations rounds (lerp_ and addcmul_ are fused multiply-adds there as well), so that float32 and float64 are equal to it
// bit for bit; bfloat16 and float16 compute in float and round once, as torch's fused kernel does.
#include <cmath>

#include "optim.h"

namespace torchcalc {
namespace {

struct AdamHyper : StepHyper {
  double beta1, beta2, eps;
  double decay;         // (2): 1 − lr·λ, or 1
  double l2;            // (1): λ, or 0
};

// `plain` takes the gradient as it is, without L2, and β₁ > ½: multiplying by 1 and adding 0 would give the same numbers.
// It is there for the half types, where it saves a sixth of the time; float32 waits for root and division anyway.
enum class Form { plain, general, amsgrad };

template <class P, class S, Form F, bool Stochastic>
struct AdamKernel {
  using Item = torchcalc::Item;
  using Hyper = AdamHyper;
  using T = computed_t<P>;

  struct Numbers {
    T factor, decay, l2, weight, beta2, rest2, root_correction, eps, negative_step;
    T lerp_from_g;  // 0 or 1: GCC 12 vectorises a select on a number that does not change, not on a bool
  };

  template <bool Fma>
  static TC_INLINE void run(const Item& item, const Hyper& h, int64_t begin, int64_t end) {
    const T weight = number<T>(1 - h.beta1);
    const bool lerp_from_g = weight >= T(0.5);
    // (5) multiplied through by √(1 − β₂ᵗ) saves a division of three; its last float bit is far below a half type's.
    const double through = is_half<P> ? item.root_correction : 1;
    const Numbers c{
        number<T>(h.factor), number<T>(h.decay), number<T>(h.l2), lerp_from_g ? weight - 1 : weight,
        number<T>(h.beta2), number<T>(1 - h.beta2), number<T>(item.root_correction), number<T>(h.eps * through),
        number<T>(-item.step_size * through), number<T>(lerp_from_g)};
    constexpr int slots = F == Form::amsgrad ? 3 : 2;
    Walk<P, S, slots, Stochastic>(item).run(
        begin, end, item, h, [c](T& p, T g, T (&s)[slots + 1]) TC_INLINE_LAMBDA {
          if constexpr (F != Form::plain) {
            g = g * c.factor;
            g = c.l2 != 0 ? fma<Fma>(p, c.l2, g) : g;                                         // (1)
          }
          p = p * c.decay;                                                                    // (2)
          T& m = s[0];
          const T start = F != Form::plain && c.lerp_from_g != 0 ? g : m;
          m = fma<Fma>(c.weight, g - m, start);                                               // (3), from the nearer end
          T& v = s[1];
          v = fma<Fma>(c.rest2 * g, g, v * c.beta2);                                          // (4)
          if constexpr (F == Form::amsgrad) s[2] = v > s[2] || v != v ? v : s[2];             // (4), NaN wins
          T root = square_root(s[slots - 1]);
          if constexpr (!is_half<P>) root = root / c.root_correction;
          p = p + c.negative_step * m / (root + c.eps);                                       // (5)
        });
  }
};

using Kernel = void (*)(const Item&, const AdamHyper&, int64_t, int64_t);

bool choose(const Item& item, Form form, bool stochastic, Kernel& kernel) {
  return with_types(item.dtype, item.slot_dtype, [&](auto p, auto s) {
    using P = decltype(p);
    using S = decltype(s);
    constexpr bool half = is_half<P>;
    if (half && stochastic) {
      kernel = form == Form::amsgrad ? variant<AdamKernel<P, S, Form::amsgrad, half>>()
                                     : variant<AdamKernel<P, S, Form::general, half>>();
    } else if (half && form == Form::plain) {
      kernel = variant<AdamKernel<P, S, half ? Form::plain : Form::general, false>>();
    } else {
      kernel = form == Form::amsgrad ? variant<AdamKernel<P, S, Form::amsgrad, false>>()
                                     : variant<AdamKernel<P, S, Form::general, false>>();
    }
  });
}

struct AdamNumbers {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled, maximize;
};

Status step(Group& group, const TensorList& grads, const AdamNumbers& a, const StepOptions& options) {
  const std::lock_guard<std::mutex> lock(group.mutex);
  if (group.size() == 0) return done;
  const int slots = group.slots();
  if ((slots != 2 && slots != 3) || !group.has_steps()) return unsupported;

  AdamHyper hyper;
  const Status status = options.prepare(a.maximize, hyper);
  if (status != done) return status;
  hyper.beta1 = a.beta1;
  hyper.beta2 = a.beta2;
  hyper.eps = a.eps;
  hyper.decay = a.decoupled && a.weight_decay != 0 ? 1 - a.lr * a.weight_decay : 1;
  hyper.l2 = a.decoupled ? 0 : a.weight_decay;
  const bool plain = hyper.factor == 1 && hyper.l2 == 0 && static_cast<float>(1 - a.beta1) < 0.5f;
  const Form form = slots == 3 ? Form::amsgrad : plain ? Form::plain : Form::general;

  std::vector<Item> items;
  if (!group.items(grads, slots, items)) return unsupported;
  std::vector<Kernel> kernels(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    if (!choose(items[i], form, options.seed.has_value(), kernels[i])) return unsupported;
  }

  // From here on things change.
  double correction1 = 1, root_correction = 1, last = NAN;
  for (Item& item : items) {
    item.step.set(item.step.get() + 1);
    const double t = item.step.get();
    if (t != last) {
      correction1 = 1 - std::pow(a.beta1, t);
      root_correction = std::pow(1 - std::pow(a.beta2, t), 0.5);  // Python's ** 0.5, which torch uses, is pow
      last = t;
    }
    item.step_size = a.lr / correction1;
    item.root_correction = root_correction;
  }
  run_all(items, kernels, hyper, 24 * 1024);
  return done;
}

int64_t adam_bound_(
    int64_t handle, TensorList grads, double lr, double beta1, double beta2, double eps, double weight_decay,
    bool decoupled, bool maximize, double grad_coef, std::optional<Tensor> grad_scale, std::optional<int64_t> seed) {
  const std::shared_ptr<Group> group = bound(handle);
  if (!group) return unsupported;
  return step(*group, grads, {lr, beta1, beta2, eps, weight_decay, decoupled, maximize}, {grad_coef, grad_scale, seed});
}

}  // namespace
}  // namespace torchcalc

STABLE_TORCH_LIBRARY_FRAGMENT(torchcalc, m) {
  m.def(
      "adam_bound_(int handle, Tensor[] grads, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "bool decoupled, bool maximize, float grad_coef, Tensor? grad_scale, int? seed) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(torchcalc, CompositeExplicitAutograd, m) {
  m.impl("adam_bound_", TC_BOX(torchcalc::adam_bound_));
}
