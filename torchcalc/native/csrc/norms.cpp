#include "norms.h"

#include <algorithm>
#include <memory>

#include "parallel.h"
#include "rows.h"
#include "widened.h"

namespace torchcalc {
namespace {

constexpr int64_t chunk = 1024;   // elements of a row that are looked at together: they stay in the first cache
constexpr int width = 32;         // running sums in a loop, so that it vectorises
constexpr int64_t together = 32;  // rows whose part of a weight's gradient is summed in the dtype that is computed in
constexpr int64_t most = 64;      // blocks of rows, each with its sums in double
constexpr int64_t fewest = 8;     // rows of a block, and blocks, as far as there are rows
constexpr int64_t serial = 32 * 1024;  // elements for which no second thread pays

// What widened has returned.
template <class Stored, class T>
TC_INLINE const T* widened_before(const Stored* from, const T* buffer) {
  if constexpr (std::is_same_v<Stored, T>) {
    return from;
  } else {
    return buffer;
  }
}

// f(i, k) for every i < n, where k counts running sums.
template <class F>
TC_INLINE void in_lanes(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    for (int k = 0; k < width; ++k) f(i + k, k);
  }
  for (; i < n; ++i) f(i, static_cast<int>(i % width));
}

template <class T>
TC_INLINE double total(T* lane) {
  for (int half = width / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
  }
  return static_cast<double>(lane[0]);
}

template <class T>
TC_INLINE double sum_of(const T* a, int64_t n) {
  T lane[width] = {};
  in_lanes(n, [&](int64_t i, int k) TC_INLINE_LAMBDA { lane[k] += a[i]; });
  return total(lane);
}

// Σ a·b
template <bool Fma, class T>
TC_INLINE double product(const T* a, const T* b, int64_t n) {
  T lane[width] = {};
  in_lanes(n, [&](int64_t i, int k) TC_INLINE_LAMBDA { lane[k] = fma<Fma>(a[i], b[i], lane[k]); });
  return total(lane);
}

// Calls f(at, n) on pieces of a row of n numbers.
template <class F>
TC_INLINE void by_chunks(int64_t n, const F& f) {
  for (int64_t at = 0; at < n; at += chunk) f(at, std::min(chunk, n - at));
}

template <class Stored, bool Centred>
struct Forward {
  using T = computed_t<Stored>;
  struct Item {
    const Norm* rows;
    char* y;
    char* sum;
  };
  struct Hyper {};

  template <bool Fma>
  static TC_INLINE void run(const Item& item, const Hyper&, int64_t begin, int64_t end) {
    const Norm& job = *item.rows;
    const double count = static_cast<double>(job.n);
    T buffer[chunk], other[chunk];
    for (int64_t row = begin; row < end; ++row) {
      const Stored* x = reinterpret_cast<const Stored*>(job.x) + row * job.of_x;
      if (job.residual) {
        const Stored* const residual = reinterpret_cast<const Stored*>(job.residual) + row * job.of_residual;
        Stored* const sum = reinterpret_cast<Stored*>(item.sum) + row * job.n;
        by_chunks(job.n, [&](int64_t at, int64_t n) TC_INLINE_LAMBDA {
          const T *const a = widened(x + at, n, buffer), *const b = widened(residual + at, n, other);
          TC_INDEPENDENT
          for (int64_t i = 0; i < n; ++i) store(sum[at + i], a[i] + b[i]);
        });
        x = sum;
      }
      T m = 0;
      double squares = 0;
      if constexpr (Centred) {
        double sum = 0, off = 0;
        by_chunks(job.n, [&](int64_t at, int64_t n) TC_INLINE_LAMBDA { sum += sum_of(widened(x + at, n, buffer), n); });
        const T about = static_cast<T>(sum / count);
        by_chunks(job.n, [&](int64_t at, int64_t n) TC_INLINE_LAMBDA {
          const T* const v = widened(x + at, n, buffer);
          T lane[width] = {}, square[width] = {};
          in_lanes(n, [&](int64_t i, int k) TC_INLINE_LAMBDA {
            const T d = v[i] - about;
            lane[k] += d;
            square[k] = fma<Fma>(d, d, square[k]);
          });
          off += total(lane);
          squares += total(square);
        });
        // The sum was rounded; what is left of it corrects the mean, and the squares about it.
        off /= count;
        m = static_cast<T>(static_cast<double>(about) + off);
        squares = squares / count - off * off;
        static_cast<T*>(job.mean)[row] = m;
      } else {
        by_chunks(job.n, [&](int64_t at, int64_t n) TC_INLINE_LAMBDA {
          const T* const v = widened(x + at, n, buffer);
          squares += product<Fma>(v, v, n);
        });
        squares /= count;
      }
      const T r = static_cast<T>(1 / square_root(squares + job.eps));
      static_cast<T*>(job.rstd)[row] = r;
      write(job, x, m, r, reinterpret_cast<Stored*>(item.y) + row * job.n);
    }
  }

  static TC_INLINE void write(const Norm& job, const Stored* x, T m, T r, Stored* y) {
    const T *const weight = static_cast<const T*>(job.weight), *const bias = static_cast<const T*>(job.bias);
    const auto normed = [&](int64_t i) TC_INLINE_LAMBDA { return Centred ? (load(x[i]) - m) * r : load(x[i]) * r; };
    if (weight && bias) {
      TC_INDEPENDENT
      for (int64_t i = 0; i < job.n; ++i) store(y[i], normed(i) * weight[i] + bias[i]);
    } else if (weight) {
      TC_INDEPENDENT
      for (int64_t i = 0; i < job.n; ++i) store(y[i], normed(i) * weight[i]);
    } else if (bias) {
      TC_INDEPENDENT
      for (int64_t i = 0; i < job.n; ++i) store(y[i], normed(i) + bias[i]);
    } else {
      TC_INDEPENDENT
      for (int64_t i = 0; i < job.n; ++i) store(y[i], normed(i));
    }
  }
};

template <class Stored, bool Centred>
struct Backward {
  using T = computed_t<Stored>;
  struct Item {
    const Norm* rows;
    const NormGradient* gradient;
    int64_t of_block;  // rows
    double* weight;    // for each block n sums, or null
    double* bias;
  };
  struct Hyper {};

  // Blocks [begin, end): blocks, and not what a thread gets of them, decide what is added to what.
  template <bool Fma>
  static TC_INLINE void run(const Item& item, const Hyper&, int64_t begin, int64_t end) {
    const Norm& job = *item.rows;
    const int64_t n = job.n;
    const std::unique_ptr<T[]> weight(sums_of(item.weight, n)), bias(sums_of(item.bias, n));
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * item.of_block, last = std::min(first + item.of_block, job.rows);
      for (int64_t from = first; from < last; from += together) {
        const int64_t to = std::min(from + together, last);
        if (weight) std::fill_n(weight.get(), n, T(0));
        if (bias) std::fill_n(bias.get(), n, T(0));
        for (int64_t row = from; row < to; ++row) each<Fma>(item, row, weight.get(), bias.get());
        if (weight) flush(weight.get(), n, from == first, item.weight + block * n);
        if (bias) flush(bias.get(), n, from == first, item.bias + block * n);
      }
    }
  }

  static T* sums_of(const double* to, int64_t n) { return to ? new T[static_cast<size_t>(n)] : nullptr; }

  static TC_INLINE void flush(const T* sums, int64_t n, bool first, double* to) {
    if (first) {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<double>(sums[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] += static_cast<double>(sums[i]);
    }
  }

  template <bool Fma>
  static TC_INLINE void each(const Item& item, int64_t row, T* grad_weight, T* grad_bias) {
    const Norm& job = *item.rows;
    const NormGradient& back = *item.gradient;
    const T* const weight = static_cast<const T*>(job.weight);
    const Stored* const x = reinterpret_cast<const Stored*>(job.x) + row * job.of_x;
    const Stored* const g = reinterpret_cast<const Stored*>(back.g) + row * back.of_g;
    const Stored* const added = back.added ? reinterpret_cast<const Stored*>(back.added) + row * back.of_added : nullptr;
    Stored* const grad = back.grad ? reinterpret_cast<Stored*>(back.grad) + row * job.n : nullptr;
    T xs[chunk], gs[chunk], hs[chunk], more[chunk], result[chunk];
    const T r = static_cast<const T*>(job.rstd)[row], m = Centred ? static_cast<const T*>(job.mean)[row] : T(0);

    // Reads a piece of the row: x, less its mean, to xs, h = g·w to hs; adds up h and h·x, and returns g.
    double sum = 0, slope = 0;
    const auto read = [&](int64_t at, int64_t n) TC_INLINE_LAMBDA {
      const T *const v = widened(x + at, n, xs), *const u = widened(g + at, n, gs);
      T sums[width] = {}, slopes[width] = {};
      const auto each = [&](auto has_weight) TC_INLINE_LAMBDA {
        in_lanes(n, [&](int64_t i, int k) TC_INLINE_LAMBDA {
          const T h = has_weight ? u[i] * weight[at + i] : u[i], d = Centred ? v[i] - m : v[i];
          hs[i] = h;
          xs[i] = d;
          if constexpr (Centred) sums[k] += h;
          slopes[k] = fma<Fma>(h, d, slopes[k]);
        });
      };
      weight ? each(std::true_type()) : each(std::false_type());
      if constexpr (Centred) sum += total(sums);
      slope += total(slopes);
      return u;
    };
    by_chunks(job.n, [&](int64_t at, int64_t n) TC_INLINE_LAMBDA { read(at, n); });
    const T mean = static_cast<T>(sum / static_cast<double>(job.n));         // of h
    const T along = static_cast<T>(slope / static_cast<double>(job.n)) * r;  // of h·x̂
    by_chunks(job.n, [&](int64_t at, int64_t n) TC_INLINE_LAMBDA {
      const T* const u = job.n <= chunk ? widened_before(g + at, gs) : read(at, n);
      if (grad_weight) {
        T* const to = grad_weight + at;
        TC_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) to[i] = fma<Fma>(u[i], xs[i] * r, to[i]);  // (4), (6) of layer_norm.py
      }
      if (grad_bias) {
        T* const to = grad_bias + at;
        TC_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) to[i] += u[i];
      }
      if (!grad) return;
      T* out = result;
      if constexpr (std::is_same_v<Stored, T>) out = grad + at;
      TC_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) out[i] = r * ((Centred ? hs[i] - mean : hs[i]) - xs[i] * r * along);  // (3), (5)
      if (added) {
        const T* const a = widened(added + at, n, more);
        TC_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) out[i] += a[i];
      }
      if constexpr (!std::is_same_v<Stored, T>) {
        TC_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) store(grad[at + i], result[i]);
      }
    });
  }
};

// [0, count) of the work of K, in as many threads as pay.
template <class K>
void over_threads(const typename K::Item& item, int64_t count, int64_t of_each) {
  struct Context {
    const typename K::Item& item;
    Variant<K> run;
  } context{item, variant<K>()};
  const int64_t grain = 1 + serial / of_each;
  if (count <= grain) return context.run(item, {}, 0, count);
  parallel_for(
      count, grain,
      [](int64_t begin, int64_t end, void* opaque) {
        const Context& c = *static_cast<Context*>(opaque);
        c.run(c.item, {}, begin, end);
      },
      &context);
}

template <class T>
void add_blocks(const double* partial, int64_t blocks, int64_t n, T* to) {
  struct Context {
    const double* partial;
    int64_t blocks, n;
    T* to;
  } context{partial, blocks, n, to};
  const auto columns = [](int64_t begin, int64_t end, void* opaque) {
    const Context& c = *static_cast<Context*>(opaque);
    double sum[chunk];
    for (int64_t at = begin, m; at < end; at += m) {
      m = std::min(chunk, end - at);
      std::fill_n(sum, m, 0.0);
      for (int64_t b = 0; b < c.blocks; ++b) {
        const double* const from = c.partial + b * c.n + at;
        TC_INDEPENDENT
        for (int64_t i = 0; i < m; ++i) sum[i] += from[i];
      }
      for (int64_t i = 0; i < m; ++i) c.to[at + i] = static_cast<T>(sum[i]);
    }
  };
  // Another wait for all threads costs more than these additions, unless they are many.
  blocks * n <= 16 * serial ? columns(0, n, &context) : parallel_for(n, 1 + 16 * serial / blocks, columns, &context);
}

template <class Stored>
void forward(const Norm& rows, char* y, char* sum) {
  rows.mean ? over_threads<Forward<Stored, true>>({&rows, y, sum}, rows.rows, rows.n)
            : over_threads<Forward<Stored, false>>({&rows, y, sum}, rows.rows, rows.n);
}

template <class Stored>
void backward(const Norm& rows, const NormGradient& to) {
  using T = computed_t<Stored>;
  const int64_t n = rows.n;
  const int64_t whole = std::max((rows.rows + most - 1) / most, std::clamp<int64_t>(rows.rows / fewest, 1, fewest));
  const int64_t of_block = rows.rows * n <= serial ? rows.rows : whole;
  const int64_t blocks = (rows.rows + of_block - 1) / of_block;
  const auto partial = [&](const void* sums) { return sums ? new double[static_cast<size_t>(blocks * n)] : nullptr; };
  const std::unique_ptr<double[]> weight(partial(to.grad_weight)), bias(partial(to.grad_bias));
  const auto run = [&](auto kernel) {
    over_threads<decltype(kernel)>({&rows, &to, of_block, weight.get(), bias.get()}, blocks, of_block * n);
  };
  rows.mean ? run(Backward<Stored, true>()) : run(Backward<Stored, false>());
  if (weight) add_blocks(weight.get(), blocks, n, static_cast<T*>(to.grad_weight));
  if (bias) add_blocks(bias.get(), blocks, n, static_cast<T*>(to.grad_bias));
}

}  // namespace

void norm(const Norm& rows, char* y, char* sum) {
  switch (rows.number) {
    case Number::float32: return forward<float>(rows, y, sum);
    case Number::float64: return forward<double>(rows, y, sum);
    case Number::bfloat16: return forward<BFloat16>(rows, y, sum);
    case Number::float16: return forward<Float16>(rows, y, sum);
  }
}

void norm_backward(const Norm& rows, const NormGradient& to) {
  switch (rows.number) {
    case Number::float32: return backward<float>(rows, to);
    case Number::float64: return backward<double>(rows, to);
    case Number::bfloat16: return backward<BFloat16>(rows, to);
    case Number::float16: return backward<Float16>(rows, to);
  }
}

}  // namespace torchcalc
