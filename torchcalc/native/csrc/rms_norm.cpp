#include "rms_norm.h"

#include <algorithm>
#include <memory>

#include "parallel.h"
#include "rows.h"

namespace torchcalc {
namespace {

constexpr int64_t chunk = 1024;   // elements of a row that are looked at together: they stay in the first cache
constexpr int width = 32;         // running sums in a loop, so that it vectorises
constexpr int64_t together = 32;  // rows of a gradient of the weight that are summed in the dtype that is computed in
constexpr int64_t most = 64;      // blocks of rows, each with its sum in double
constexpr int64_t fewest = 8;     // rows of a block, so that the sums are not larger than what is summed
constexpr int64_t serial = 32 * 1024;  // elements for which no second thread pays

template <class Stored, class T>
TC_INLINE const T* widened(const Stored* from, int64_t n, T* buffer) {
  if constexpr (std::is_same_v<Stored, T>) {
    return from;
  } else {
    TC_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) buffer[i] = load(from[i]);
    return buffer;
  }
}

// Σ a·b
template <bool Fma, class T>
TC_INLINE double product(const T* a, const T* b, int64_t n) {
  T lane[width] = {};
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    for (int k = 0; k < width; ++k) lane[k] = fma<Fma>(a[i + k], b[i + k], lane[k]);
  }
  for (; i < n; ++i) lane[i % width] = fma<Fma>(a[i], b[i], lane[i % width]);
  double sum = 0;
  for (int k = 0; k < width; ++k) sum += static_cast<double>(lane[k]);
  return sum;
}

template <class Stored>
struct Forward {
  using T = computed_t<Stored>;
  struct Item {
    const RmsNorm* rows;
    char* y;
    char* sum;
  };
  struct Hyper {};

  template <bool Fma>
  static TC_INLINE void run(const Item& item, const Hyper&, int64_t begin, int64_t end) {
    const RmsNorm& job = *item.rows;
    const T* const weight = static_cast<const T*>(job.weight);
    T buffer[chunk], other[chunk];
    for (int64_t row = begin; row < end; ++row) {
      const Stored* x = reinterpret_cast<const Stored*>(job.x) + row * job.of_x;
      Stored* const y = reinterpret_cast<Stored*>(item.y) + row * job.n;
      double squares = 0;
      if (job.residual) {
        const Stored* const residual = reinterpret_cast<const Stored*>(job.residual) + row * job.of_residual;
        Stored* const sum = reinterpret_cast<Stored*>(item.sum) + row * job.n;
        for (int64_t at = 0, n; at < job.n; at += n) {
          n = std::min(chunk, job.n - at);
          const T *const a = widened(x + at, n, buffer), *const b = widened(residual + at, n, other);
          TC_INDEPENDENT
          for (int64_t i = 0; i < n; ++i) store(sum[at + i], a[i] + b[i]);
          const T* const v = widened(sum + at, n, buffer);
          squares += product<Fma>(v, v, n);
        }
        x = sum;
      } else {
        for (int64_t at = 0, n; at < job.n; at += n) {
          n = std::min(chunk, job.n - at);
          const T* const v = widened(x + at, n, buffer);
          squares += product<Fma>(v, v, n);
        }
      }
      const T r = static_cast<T>(1 / square_root(squares / static_cast<double>(job.n) + job.eps));
      static_cast<T*>(job.rstd)[row] = r;
      if (weight) {
        TC_INDEPENDENT
        for (int64_t i = 0; i < job.n; ++i) store(y[i], load(x[i]) * r * weight[i]);
      } else {
        TC_INDEPENDENT
        for (int64_t i = 0; i < job.n; ++i) store(y[i], load(x[i]) * r);
      }
    }
  }
};

template <class Stored>
struct Backward {
  using T = computed_t<Stored>;
  struct Item {
    const RmsNorm* rows;
    const RmsNormGradient* gradient;
    int64_t of_block;  // rows
    double* partial;   // for each block n sums, or null
  };
  struct Hyper {};

  // Blocks [begin, end): blocks, and not what a thread gets of them, decide what is added to what.
  template <bool Fma>
  static TC_INLINE void run(const Item& item, const Hyper&, int64_t begin, int64_t end) {
    const RmsNorm& job = *item.rows;
    const int64_t n = job.n;
    const std::unique_ptr<T[]> sums(item.partial ? new T[static_cast<size_t>(n)] : nullptr);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * item.of_block, last = std::min(first + item.of_block, job.rows);
      double* const partial = item.partial ? item.partial + block * n : nullptr;
      for (int64_t row = first; row < last; row += together) {
        const int64_t stop = std::min(row + together, last);
        if (sums) std::fill_n(sums.get(), n, T(0));
        for (int64_t r = row; r < stop; ++r) each<Fma>(item, r, sums.get());
        if (sums && row == first) {
          for (int64_t i = 0; i < n; ++i) partial[i] = static_cast<double>(sums[i]);
        } else if (sums) {
          for (int64_t i = 0; i < n; ++i) partial[i] += static_cast<double>(sums[i]);
        }
      }
    }
  }

  template <bool Fma>
  static TC_INLINE void each(const Item& item, int64_t row, T* sums) {
    const RmsNorm& job = *item.rows;
    const RmsNormGradient& back = *item.gradient;
    const T* const weight = static_cast<const T*>(job.weight);
    const Stored* const x = reinterpret_cast<const Stored*>(job.x) + row * job.of_x;
    const Stored* const g = reinterpret_cast<const Stored*>(back.g) + row * back.of_g;
    const Stored* const added = back.added ? reinterpret_cast<const Stored*>(back.added) + row * back.of_added : nullptr;
    Stored* const grad = back.grad ? reinterpret_cast<Stored*>(back.grad) + row * job.n : nullptr;
    T xs[chunk], gs[chunk], hs[chunk], more[chunk], result[chunk];
    const T r = static_cast<const T*>(job.rstd)[row];
    T mean = 0;  // of g·w·x̂
    if (grad) {
      double total = 0;
      for (int64_t at = 0, n; at < job.n; at += n) {
        n = std::min(chunk, job.n - at);
        const T* const v = widened(x + at, n, xs);
        const T* h = widened(g + at, n, gs);
        if (weight) {
          TC_INDEPENDENT
          for (int64_t i = 0; i < n; ++i) hs[i] = h[i] * weight[at + i];
          h = hs;
        }
        total += product<Fma>(h, v, n);
      }
      mean = static_cast<T>(total / static_cast<double>(job.n)) * r;
    }
    for (int64_t at = 0, n; at < job.n; at += n) {
      n = std::min(chunk, job.n - at);
      const T* const v = widened(x + at, n, xs);
      const T* h = widened(g + at, n, gs);
      if (sums) {
        T* const to = sums + at;
        TC_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) to[i] = fma<Fma>(h[i], v[i] * r, to[i]);  // (4)
      }
      if (!grad) continue;
      if (weight) {
        TC_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) hs[i] = h[i] * weight[at + i];
        h = hs;
      }
      T* out = result;
      if constexpr (std::is_same_v<Stored, T>) out = grad + at;
      TC_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) out[i] = r * (h[i] - v[i] * r * mean);  // (3)
      if (added) {
        const T* const a = widened(added + at, n, more);
        TC_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) out[i] += a[i];
      }
      if constexpr (!std::is_same_v<Stored, T>) {
        TC_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) store(grad[at + i], result[i]);
      }
    }
  }
};

// [begin, end) of the work of K, in as many threads as pay.
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
    double total[chunk];
    for (int64_t at = begin, m; at < end; at += m) {
      m = std::min(chunk, end - at);
      std::fill_n(total, m, 0.0);
      for (int64_t b = 0; b < c.blocks; ++b) {
        const double* const from = c.partial + b * c.n + at;
        TC_INDEPENDENT
        for (int64_t i = 0; i < m; ++i) total[i] += from[i];
      }
      for (int64_t i = 0; i < m; ++i) c.to[at + i] = static_cast<T>(total[i]);
    }
  };
  blocks * n <= serial ? columns(0, n, &context) : parallel_for(n, 1 + serial / blocks, columns, &context);
}

template <class Stored>
void forward(const RmsNorm& rows, char* y, char* sum) {
  over_threads<Forward<Stored>>({&rows, y, sum}, rows.rows, rows.n);
}

template <class Stored>
void backward(const RmsNorm& rows, const RmsNormGradient& gradient) {
  using T = computed_t<Stored>;
  const int64_t whole = std::max((rows.rows + most - 1) / most, std::min(fewest, rows.rows));
  const int64_t of_block = rows.rows * rows.n <= serial ? rows.rows : whole;
  const int64_t blocks = (rows.rows + of_block - 1) / of_block;
  const std::unique_ptr<double[]> partial(gradient.grad_weight ? new double[static_cast<size_t>(blocks * rows.n)] : nullptr);
  over_threads<Backward<Stored>>({&rows, &gradient, of_block, partial.get()}, blocks, of_block * rows.n);
  if (partial) add_blocks(partial.get(), blocks, rows.n, static_cast<T*>(gradient.grad_weight));
}

}  // namespace

void rms_norm(const RmsNorm& rows, char* y, char* sum) {
  switch (rows.number) {
    case Number::float32: return forward<float>(rows, y, sum);
    case Number::float64: return forward<double>(rows, y, sum);
    case Number::bfloat16: return forward<BFloat16>(rows, y, sum);
    case Number::float16: return forward<Float16>(rows, y, sum);
  }
}

void rms_norm_backward(const RmsNorm& rows, const RmsNormGradient& gradient) {
  switch (rows.number) {
    case Number::float32: return backward<float>(rows, gradient);
    case Number::float64: return backward<double>(rows, gradient);
    case Number::bfloat16: return backward<BFloat16>(rows, gradient);
    case Number::float16: return backward<Float16>(rows, gradient);
  }
}

}  // namespace torchcalc
