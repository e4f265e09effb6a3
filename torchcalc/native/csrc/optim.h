// What SGD, Adam and AdamW share: which tensors belong together, whether a kernel may run on them, and the walk over all.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "isa.h"
#include "number.h"
#include "parallel.h"
#include "philox.h"
#include "step.h"
#include "tensor.h"

namespace torchcalc {

enum Status : int64_t { unsupported = 0, done = 1 };  // unsupported leaves everything untouched

// One parameter's share of a step.
struct Item {
  char* param;
  const char* grad;
  char* slot[max_slots];
  int64_t numel;
  int64_t index;  // its place in the list: the stream of random numbers for stochastic rounding
  Dtype dtype;
  Dtype slot_dtype;
  Scalar step;
  double step_size;         // Adam: lr/(1 − β₁ᵗ)
  double root_correction;   // Adam: √(1 − β₂ᵗ)
  double first;             // SGD: 1 if the momentum buffer holds nothing yet
  int slots;                // of a recorded rule
  const double* uniforms;   // of a recorded rule: its numbers that are the same for all elements
};

// Parameters with their optimizer state: slot after slot in `state`, e.g. all exp_avg, then all exp_avg_sq.
class Group {
 public:
  Group(TensorList params, TensorList state, TensorList steps)
      : params_(std::move(params)), state_(std::move(state)), steps_(std::move(steps)) {}

  // Fills one item per parameter, or returns false where a kernel must not run: it looks at every tensor anew, because
  // `p.data = ...`, `resize_` and `set_` change them under our handles.
  bool items(const TensorList& grads, int slots, std::vector<Item>& out);

  // The places of those that have no kernel, whatever becomes of the others.
  std::vector<int64_t> refused(const TensorList& grads);

  int64_t size() const { return params_.size(); }
  int slots() const { return size() == 0 ? -1 : static_cast<int>(state_.size() / size()); }
  bool has_steps() const { return steps_.size() > 0; }

  std::mutex mutex;  // steps on the same group follow one another

 private:
  using Interval = std::pair<uintptr_t, uintptr_t>;
  bool fits(const TensorList& grads, int slots) const;  // so many of each
  bool describe_item(const TensorList& grads, int slots, int64_t i, Item& out) const;
  bool disjoint(const std::vector<Item>& items, int slots);

  TensorList params_, state_, steps_;
  std::vector<const char*> seen_;   // where the tensors lay when `written_` was last found to be disjoint
  std::vector<Interval> written_;   // sorted
};

// What every step takes besides its formula's numbers.
struct StepOptions {
  double grad_coef;
  std::optional<Tensor> grad_scale;
  std::optional<int64_t> seed;  // given: round stochastically

  // Fills `out`; `done` when there is a step to do. 1/grad_scale is rounded as torch.amp.GradScaler.unscale_ rounds it.
  Status prepare(bool maximize, StepHyper& out) const;
};

template <class P>
inline constexpr bool is_half = std::is_same_v<P, BFloat16> || std::is_same_v<P, Float16>;

// Random bits for the unit of elements that starts at `begin`: two neighbours share a word for bfloat16, which cuts off 16
// bits, and have one each for float16, which cuts off up to 31.
template <class Half>
struct Draws {
  static constexpr bool shared = std::is_same_v<Half, BFloat16>;
  static constexpr int pairs = unit / 2;
  static_assert(pairs == 4 * philox_lanes);
  PhiloxBlock first, second;

  TC_INLINE Draws(uint64_t seed, int64_t stream, int64_t begin) {
    const uint64_t number = static_cast<uint64_t>(begin / unit) * (shared ? philox_lanes : 2 * philox_lanes);
    philox(seed, static_cast<uint64_t>(stream), number, first);
    if constexpr (!shared) philox(seed, static_cast<uint64_t>(stream), number + philox_lanes, second);
  }
  TC_INLINE Random first_of(int64_t pair) const {
    const uint32_t word = first.word[pair];
    return {shared ? word & 0xFFFFu : word};
  }
  TC_INLINE Random second_of(int64_t pair) const {
    return {shared ? first.word[pair] >> 16 : second.word[pair]};
  }
};

// One kernel's walk over elements [begin, end) of a parameter, its gradient and its slots, in place:
// update(p, g, s) computes with the numbers p and g and the array of numbers s.
template <class P, class S, int Slots, bool Stochastic>
struct Walk {
  using T = computed_t<P>;
  static constexpr bool in_pairs = is_half<P> && (Slots == 0 || std::is_same_v<P, S>);

  P* p;
  const P* g;
  S* s[Slots + 1];

  TC_INLINE explicit Walk(const Item& item)
      : p(reinterpret_cast<P*>(item.param)), g(reinterpret_cast<const P*>(item.grad)) {
    for (int k = 0; k < Slots; ++k) s[k] = reinterpret_cast<S*>(item.slot[k]);
  }

  template <class Rounding, class Update>
  TC_INLINE void element(int64_t i, const Rounding& rounding, const Update& update) const {
    T pi = load(p[i]), si[Slots + 1];
    for (int k = 0; k < Slots; ++k) si[k] = load(s[k][i]);
    update(pi, load(g[i]), si);
    for (int k = 0; k < Slots; ++k) store(s[k][i], si[k]);
    if constexpr (is_half<P>) {
      p[i].bits = static_cast<uint16_t>(rounding.template narrow<P>(pi));
    } else {
      p[i] = pi;
    }
  }

  static TC_INLINE uint32_t get(const void* half_numbers, int64_t pair) {
    uint32_t word;
    std::memcpy(&word, static_cast<const char*>(half_numbers) + 4 * pair, 4);
    return word;
  }
  static TC_INLINE void put(void* half_numbers, int64_t pair, uint32_t word) {
    std::memcpy(static_cast<char*>(half_numbers) + 4 * pair, &word, 4);
  }

  template <class Rounding, class Update>
  TC_INLINE void pair(int64_t i, const Rounding& first, const Rounding& second, const Update& update) const {
    const uint32_t pw = get(p, i), gw = get(g, i);
    T pa = widen<P>(first_upper(pw)), pb = widen<P>(second_upper(pw));
    T sa[Slots + 1], sb[Slots + 1];
    for (int k = 0; k < Slots; ++k) {
      const uint32_t sw = get(s[k], i);
      sa[k] = widen<P>(first_upper(sw));
      sb[k] = widen<P>(second_upper(sw));
    }
    update(pa, widen<P>(first_upper(gw)), sa);
    update(pb, widen<P>(second_upper(gw)), sb);
    // All that enters is half numbers and hyperparameters.
    const auto nearest = [](float x) TC_INLINE_LAMBDA { return Nearest{}.template narrow<P, Nan::narrow>(x); };
    for (int k = 0; k < Slots; ++k) put(s[k], i, join(nearest(sa[k]), nearest(sb[k])));
    put(p, i, join(first.template narrow<P, Nan::narrow>(pa), second.template narrow<P, Nan::narrow>(pb)));
  }

  template <class Update>
  TC_INLINE void run(int64_t begin, int64_t end, const Item& item, const StepHyper& h, const Update& update) const {
    if constexpr (Stochastic) {
      for (; begin < end; begin += unit) {
        const Draws<P> draws(h.seed, item.index, begin);
        const int64_t n = end - begin < unit ? end - begin : unit;
        if constexpr (in_pairs) {
          TC_INDEPENDENT
          for (int64_t i = 0; i < n / 2; ++i) {
            pair(begin / 2 + i, draws.first_of(i), draws.second_of(i), update);
          }
          if (n % 2 != 0) element(begin + n - 1, draws.first_of(n / 2), update);
        } else {
          Random random[unit];
          for (int64_t i = 0; i < unit / 2; ++i) {
            random[2 * i] = draws.first_of(i);
            random[2 * i + 1] = draws.second_of(i);
          }
          TC_INDEPENDENT
          for (int64_t i = 0; i < n; ++i) element(begin + i, random[i], update);
        }
      }
    } else if constexpr (in_pairs) {
      TC_INDEPENDENT
      for (int64_t i = begin / 2; i < end / 2; ++i) pair(i, Nearest{}, Nearest{}, update);
      if (end % 2 != 0) element(end - 1, Nearest{}, update);
    } else {
      TC_INDEPENDENT
      for (int64_t i = begin; i < end; ++i) element(i, Nearest{}, update);
    }
  }
};

// Calls with(P{}, S{}) for the stored types of the parameter and of its state; false if there is no kernel for the pair.
template <class F>
bool with_types(Dtype param, Dtype slot, const F& with) {
  const bool mixed = slot == Dtype::float32;
  if (param == Dtype::float32 && mixed) return with(float{}, float{}), true;
  if (param == Dtype::float64 && slot == param) return with(double{}, double{}), true;
  if (param == Dtype::bfloat16 && slot == param) return with(BFloat16{}, BFloat16{}), true;
  if (param == Dtype::bfloat16 && mixed) return with(BFloat16{}, float{}), true;
  if (param == Dtype::float16 && slot == param) return with(Float16{}, Float16{}), true;
  if (param == Dtype::float16 && mixed) return with(Float16{}, float{}), true;
  return false;
}

// `grain`: so many elements are cheaper in one thread than waking another one is; measured.
template <class Hyper>
void run_all(
    const std::vector<Item>& items,
    const std::vector<void (*)(const Item&, const Hyper&, int64_t, int64_t)>& kernels,
    const Hyper& hyper,
    int64_t grain) {
  Partition partition(static_cast<int64_t>(items.size()));
  for (const Item& item : items) partition.append(item.numel);
  partition.for_each_slice(grain, [&](int64_t i, int64_t begin, int64_t end) {
    kernels[static_cast<size_t>(i)](items[static_cast<size_t>(i)], hyper, begin, end);
  });
}

// Groups that Python holds by number.
int64_t bind(TensorList params, TensorList state, TensorList steps);
std::shared_ptr<Group> bound(int64_t handle);  // null for a number that is not, or no longer, bound

}  // namespace torchcalc
