#include "dropout.h"

#include "parallel.h"
#include "widened.h"

namespace torchcalc {
namespace {

constexpr int64_t grain = 32 * 1024;

template <class Stored>
struct Kept {
  using T = computed_t<Stored>;
  struct Item {
    const char* x;
    const uint8_t* keep;
    char* y;
  };
  struct Hyper {
    T scale;
  };

  template <bool Fma>
  static TC_INLINE void run(const Item& item, const Hyper& hyper, int64_t begin, int64_t end) {
    const Stored* const x = reinterpret_cast<const Stored*>(item.x);
    Stored* const y = reinterpret_cast<Stored*>(item.y);
    // A product and no selection: a NaN that is dropped stays one, as in torch.
    TC_INDEPENDENT
    for (int64_t i = begin; i < end; ++i) store(y[i], load(x[i]) * (static_cast<T>(item.keep[i]) * hyper.scale));
  }
};

template <class Stored>
void run(int64_t n, const char* x, const uint8_t* keep, double p, char* y) {
  using K = Kept<Stored>;
  using T = computed_t<Stored>;
  struct Context {
    typename K::Item item;
    typename K::Hyper hyper;
    Variant<K> run;
  } context{{x, keep, y}, {T(1) / static_cast<T>(1 - p)}, variant<K>()};
  parallel_for(
      n, grain,
      [](int64_t begin, int64_t end, void* opaque) {
        const Context& c = *static_cast<Context*>(opaque);
        c.run(c.item, c.hyper, begin, end);
      },
      &context);
}

}  // namespace

void dropout(Number number, int64_t n, const char* x, const uint8_t* keep, double p, char* y) {
  switch (number) {
    case Number::float32: return run<float>(n, x, keep, p, y);
    case Number::float64: return run<double>(n, x, keep, p, y);
    case Number::bfloat16: return run<BFloat16>(n, x, keep, p, y);
    case Number::float16: return run<Float16>(n, x, keep, p, y);
  }
}

}  // namespace torchcalc
