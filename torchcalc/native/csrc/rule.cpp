// The step of any rule: looks up the kernel that was made from its recording, and runs it over all tensors at once.
//
// Elements of half type are computed in float, block by block in the processor's first cache, and rounded once.
#include "rule.h"

#include <unordered_map>

#include "optim.h"

namespace torchcalc {
namespace {

std::unordered_map<int64_t, Rule>& rules() {
  static std::unordered_map<int64_t, Rule> the;  // filled while the library is loaded, and never written to again
  return the;
}

struct RuleHyper : StepHyper {
  Rule::Loop<float> loop_float;
  Rule::Loop<double> loop_double;
};

// Half numbers in memory, and their block of floats. Where everything is half, a block holds first the even places and then
// the odd ones: two neighbours come and go as one word, without a shuffle, and a rule does not care for the order.
struct Conversion {
  void* half;
  float* wide;
  int64_t index;  // of the tensor, for random bits
};

enum class Order { as_stored, even_odd };

inline constexpr int64_t block = 4 * unit;

template <class Half, Order O>
struct Widen {
  using Item = Conversion;
  using Hyper = StepHyper;
  template <bool Fma>
  static TC_INLINE void run(const Item& x, const Hyper&, int64_t begin, int64_t end) {
    const Half* const half = static_cast<const Half*>(x.half) + begin;
    float* const wide = x.wide;
    const int64_t n = end - begin;
    if constexpr (O == Order::as_stored) {
      TC_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) wide[i] = load(half[i]);
    } else {
      const int64_t whole = n / 2, odd = n - whole;  // where the odd places begin
      TC_INDEPENDENT
      for (int64_t i = 0; i < whole; ++i) {
        uint32_t word;
        std::memcpy(&word, half + 2 * i, 4);
        wide[i] = widen<Half>(first_upper(word));
        wide[odd + i] = widen<Half>(second_upper(word));
      }
      if (odd > whole) wide[whole] = load(half[n - 1]);
    }
  }
};

struct ToNearest {
  TC_INLINE ToNearest(const StepHyper&, int64_t, int64_t) {}
  TC_INLINE Nearest first_of(int64_t) const { return {}; }
  TC_INLINE Nearest second_of(int64_t) const { return {}; }
};

template <class Half>
struct AtRandom : Draws<Half> {
  TC_INLINE AtRandom(const StepHyper& h, int64_t index, int64_t begin) : Draws<Half>(h.seed, index, begin) {}
};

template <class Half, Order O, Nan N, class Rounding>
struct Narrow {
  using Item = Conversion;
  using Hyper = StepHyper;

  static TC_INLINE uint32_t join_pair(float a, float b, const Rounding& rounding, int64_t pair) {
    return join(
        rounding.first_of(pair).template narrow<Half, N>(a), rounding.second_of(pair).template narrow<Half, N>(b));
  }

  template <bool Fma>
  static TC_INLINE void run(const Item& x, const Hyper& h, int64_t begin, int64_t end) {
    const int64_t n = end - begin, even = O == Order::even_odd ? n - n / 2 : 0;
    for (int64_t from = 0; from < n; from += unit) {
      const Rounding rounding(h, x.index, begin + from);
      Half* const half = static_cast<Half*>(x.half) + begin + from;
      const int64_t m = n - from < unit ? n - from : unit;
      const float* const first = O == Order::even_odd ? x.wide + from / 2 : x.wide + from;
      const float* const second = O == Order::even_odd ? x.wide + even + from / 2 : x.wide + from + 1;
      constexpr int64_t stride = O == Order::even_odd ? 1 : 2;
      TC_INDEPENDENT
      for (int64_t i = 0; i < m / 2; ++i) {
        const uint32_t word = join_pair(first[stride * i], second[stride * i], rounding, i);
        std::memcpy(half + 2 * i, &word, 4);
      }
      if (m % 2 != 0)
        half[m - 1].bits = static_cast<uint16_t>(rounding.first_of(m / 2).template narrow<Half, N>(first[stride * (m / 2)]));
    }
  }
};

using Kernel = void (*)(const Item&, const RuleHyper&, int64_t, int64_t);

template <class T>
void whole(const Item& item, const RuleHyper& h, int64_t begin, int64_t end) {
  RuleSlice<T> x{
      reinterpret_cast<T*>(item.param), reinterpret_cast<const T*>(item.grad), {}, item.uniforms, number<T>(h.factor)};
  for (int k = 0; k < item.slots; ++k) x.s[k] = reinterpret_cast<T*>(item.slot[k]);
  if constexpr (std::is_same_v<T, float>) {
    h.loop_float(x, h, begin, end);
  } else {
    h.loop_double(x, h, begin, end);
  }
}

template <class P, class S, bool Stochastic>
void in_blocks(const Item& item, const RuleHyper& h, int64_t begin, int64_t end) {
  constexpr bool wide_slots = std::is_same_v<S, float>;
  constexpr Order order = wide_slots ? Order::as_stored : Order::even_odd;
  constexpr Nan nan = wide_slots ? Nan::any : Nan::narrow;
  static const auto widen = variant<Widen<P, order>>();
  static const auto narrow = variant<Narrow<P, order, nan, ToNearest>>();
  static const auto narrow_parameter = Stochastic ? variant<Narrow<P, order, nan, AtRandom<P>>>() : narrow;

  alignas(64) float p[block], g[block], s[max_slots][block];
  RuleSlice<float> x{p, g, {}, item.uniforms, number<float>(h.factor)};
  for (; begin < end; begin += block) {
    const int64_t stop = end - begin < block ? end : begin + block;
    widen({item.param, p, 0}, h, begin, stop);
    widen({const_cast<char*>(item.grad), g, 0}, h, begin, stop);
    for (int k = 0; k < item.slots; ++k) {
      x.s[k] = wide_slots ? reinterpret_cast<float*>(item.slot[k]) + begin : s[k];
      if (!wide_slots) widen({item.slot[k], s[k], 0}, h, begin, stop);
    }
    h.loop_float(x, h, 0, stop - begin);
    narrow_parameter({item.param, p, item.index}, h, begin, stop);
    for (int k = 0; k < item.slots && !wide_slots; ++k) narrow({item.slot[k], s[k], 0}, h, begin, stop);
  }
}

bool choose(const Item& item, bool stochastic, Kernel& kernel) {
  return with_types(item.dtype, item.slot_dtype, [&](auto p, auto s) {
    using P = decltype(p);
    using S = decltype(s);
    if constexpr (is_half<P>) {
      kernel = stochastic ? in_blocks<P, S, true> : in_blocks<P, S, false>;
    } else {
      kernel = whole<P>;
    }
  });
}

// A tensor's parameters are its step count, if we count; its scalars; and the numbers that all tensors share.
struct RuleNumbers {
  bool counts;
  std::vector<double> scalars, shared;
};

Status step(
    Group& group, const TensorList& grads, const Rule& rule, const RuleNumbers& numbers, bool maximize,
    const StepOptions& options) {
  const std::lock_guard<std::mutex> lock(group.mutex);
  if (group.size() == 0) return done;
  const size_t count = static_cast<size_t>(group.size()), own = numbers.scalars.size() / count;
  const size_t parameters = numbers.counts + own + numbers.shared.size();
  if (group.slots() != rule.slots || rule.slots > max_slots || own * count != numbers.scalars.size() ||
      parameters != static_cast<size_t>(rule.parameters) || (numbers.counts && !group.has_steps()))
    return unsupported;

  RuleHyper hyper;
  const Status status = options.prepare(maximize, hyper);
  if (status != done) return status;
  hyper.loop_float = rule.loop_float();
  hyper.loop_double = rule.loop_double();

  std::vector<Item> items;
  if (!group.items(grads, rule.slots, items)) return unsupported;
  std::vector<Kernel> kernels(count);
  for (size_t i = 0; i < count; ++i) {
    if (!choose(items[i], options.seed.has_value(), kernels[i])) return unsupported;
  }

  // From here on things change.
  std::vector<double> uniforms(count * static_cast<size_t>(rule.uniforms) + 1), a(parameters), last;
  Dtype last_dtype = Dtype::float32;
  for (size_t i = 0; i < count; ++i) {
    Item& item = items[i];
    auto next = a.begin();
    if (numbers.counts) {
      item.step.set(item.step.get() + 1);
      *next++ = item.step.get();
    }
    for (size_t k = 0; k < own; ++k) *next++ = numbers.scalars[i * own + k];
    for (double x : numbers.shared) *next++ = x;
    double* const u = uniforms.data() + i * static_cast<size_t>(rule.uniforms);
    if (i > 0 && a == last && item.dtype == last_dtype) {
      item.uniforms = items[i - 1].uniforms;
    } else {
      (item.dtype == Dtype::float64 ? rule.uniform_double : rule.uniform_float)(a.data(), u);
      item.uniforms = u;
      last = a;
      last_dtype = item.dtype;
    }
    item.slots = rule.slots;
  }
  run_all(items, kernels, hyper, 24 * 1024);
  return done;
}

int64_t rule_bound_(
    int64_t handle, TensorList grads, int64_t hash, bool counts, std::vector<double> scalars, std::vector<double> shared,
    bool maximize, double grad_coef, std::optional<Tensor> grad_scale, std::optional<int64_t> seed) {
  const std::shared_ptr<Group> group = bound(handle);
  const auto found = rules().find(hash);
  if (!group || found == rules().end()) return unsupported;
  return step(
      *group, grads, found->second, {counts, std::move(scalars), std::move(shared)}, maximize,
      {grad_coef, grad_scale, seed});
}

bool has_rule(int64_t hash) { return rules().count(hash) != 0; }

}  // namespace

void add_rule(int64_t hash, const Rule& rule) { rules().emplace(hash, rule); }

}  // namespace torchcalc

STABLE_TORCH_LIBRARY_FRAGMENT(torchcalc, m) {
  m.def(
      "rule_bound_(int handle, Tensor[] grads, int hash, bool counts, float[] scalars, float[] shared, bool maximize, "
      "float grad_coef, Tensor? grad_scale, int? seed) -> int");
  m.def("has_rule(int hash) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(torchcalc, CompositeExplicitAutograd, m) {
  m.impl("rule_bound_", TC_BOX(torchcalc::rule_bound_));
  m.impl("has_rule", TC_BOX(torchcalc::has_rule));
}
