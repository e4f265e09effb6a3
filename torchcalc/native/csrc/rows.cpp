#include "rows.h"

#include <atomic>
#include <limits>

#include "math.h"
#include "parallel.h"
#include "widened.h"

namespace torchcalc {
namespace {

using math::infinity;

constexpr int64_t chunk = 1024;  // elements of a row that are looked at together: they stay in the first cache
constexpr int64_t shortest = 40; // up to here a row is too short for itself
constexpr int64_t lanes = 128;   // samples side by side that are
constexpr int width = 16;        // running numbers in a loop, so that it vectorises

// q = weight·(a·t + b) of each class, besides what a target of class y has more: 0, one number, or a row of numbers.
enum class Smooth { none, same, row };

template <class T>
struct Job {
  const CrossEntropy* rows;
  Smooth smooth;
  T a, b;
  double total;  // Σ q, where it is the same for every sample
  const T* weight;
  double* losses;
  std::atomic<bool>* refused;
  const T* share;
  T scale;
  char* grad;

  Job(const CrossEntropy& r)
      : rows(&r),
        smooth(r.probabilities || (r.weight && r.smoothing != 0) ? Smooth::row : r.smoothing != 0 ? Smooth::same : Smooth::none),
        a(static_cast<T>(1 - r.smoothing)),
        b(static_cast<T>(r.smoothing / static_cast<double>(r.classes))),
        total(smooth == Smooth::none ? 0 : r.smoothing),
        weight(static_cast<const T*>(r.weight)),
        losses(nullptr),
        refused(nullptr),
        share(nullptr),
        scale(1),
        grad(nullptr) {
    if (smooth != Smooth::row || r.probabilities) return;
    total = 0;
    for (int64_t c = 0; c < r.classes; ++c) total += static_cast<double>(weight[c] * b);
  }

  // The slope of z_loss·lse² where that of lse is p.
  T z_slope(T m, T log_s) const { return rows->z_loss == 0 ? T(0) : static_cast<T>(2 * rows->z_loss) * (m + log_s); }

  T hard(int64_t y) const { return weight ? a * weight[y] : a; }
};

template <class T>
TC_INLINE T select_times(T q, T x) {  // where 0·∞ = 0
  return q == T(0) ? T(0) : q * x;
}

// Of floats compilers vectorise no maximum, since that of NaN and of zeros depends on the order; of integers they do. A
// number's bits, all but the sign turned round where it is negative, are an integer that is ordered as the numbers are; a
// positive NaN is above them.
template <class Int>
TC_INLINE Int turned(Int bits) {
  return bits ^ ((bits >> (8 * sizeof(Int) - 1)) & std::numeric_limits<Int>::max());
}

template <class T>
TC_INLINE T largest(const T* x, int64_t n) {
  using Int = typename math::Format<T>::Int;
  Int most = turned(bit_cast<Int>(-infinity<T>));
  for (int64_t i = 0; i < n; ++i) {
    const Int here = turned(bit_cast<Int>(x[i]));
    most = here > most ? here : most;
  }
  return bit_cast<T>(turned(most));
}

template <class T>
TC_INLINE double sum_of(const T* x, int64_t n) {
  T lane[width] = {};
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    for (int k = 0; k < width; ++k) lane[k] += x[i + k];
  }
  for (; i < n; ++i) lane[i % width] += x[i];
  double sum = 0;
  for (int k = 0; k < width; ++k) sum += static_cast<double>(lane[k]);
  return sum;
}

// q of the classes [begin, begin + n) of one row; t is what is given there, or null.
template <class T>
TC_INLINE void fill_q(const Job<T>& job, const T* t, int64_t begin, int64_t n, T* q) {
  const T a = job.a, b = job.b;
  if (!t) {
    for (int64_t i = 0; i < n; ++i) q[i] = job.weight[begin + i] * b;
  } else if (job.weight) {
    for (int64_t i = 0; i < n; ++i) q[i] = job.weight[begin + i] * (a * t[i] + b);
  } else {
    for (int64_t i = 0; i < n; ++i) q[i] = a * t[i] + b;
  }
}

// The class of a sample: -1 where it is ignored or there are none, -2 where it is not a class.
template <class T>
TC_INLINE int64_t class_of(const Job<T>& job, int64_t sample) {
  const CrossEntropy& r = *job.rows;
  if (!r.target) return -1;
  const int64_t y = r.target[sample];
  return y == r.ignored ? -1 : y >= 0 && y < r.classes ? y : -2;
}

// ℓ from the sums about the largest logit: (1) of losses/cross_entropy.py.
template <class T>
TC_INLINE void finish(
    const Job<T>& job, int64_t sample, int64_t y, T m, T log_s, double q, double qx, T at_class) {
  T* const statistics = static_cast<T*>(job.rows->statistics);
  const int64_t samples = job.rows->samples();
  statistics[sample] = m;
  statistics[samples + sample] = log_s;
  if (job.rows->probabilities) statistics[2 * samples + sample] = static_cast<T>(q);
  double loss = 0;
  if (y >= 0 || job.rows->probabilities) {
    const double log = static_cast<double>(log_s);
    if (job.smooth != Smooth::none) loss += log * q - qx;
    if (y >= 0 && job.hard(y) != T(0)) {
      loss += static_cast<double>(job.hard(y)) * (log - (static_cast<double>(at_class) - static_cast<double>(m)));
    }
    if (job.rows->z_loss != 0) {
      const double lse = static_cast<double>(m) + log;
      loss += job.rows->z_loss * lse * lse;
    }
  }
  job.losses[sample] = loss;
}

// Samples [begin, end), each a row side by side. The largest logit so far moves from chunk to chunk, and the sums with it.
template <class Stored>
struct Rowwise {
  using T = computed_t<Stored>;

  template <bool Fma>
  static TC_INLINE void forward(const Job<T>& job, int64_t begin, int64_t end) {
    const CrossEntropy& r = *job.rows;
    const Stored* const logits = reinterpret_cast<const Stored*>(r.logits);
    const Stored* const given = reinterpret_cast<const Stored*>(r.probabilities);
    T buffer[chunk], power[chunk], read[chunk], row[chunk];
    for (int64_t sample = begin; sample < end; ++sample) {
      const int64_t y = class_of(job, sample), offset = r.at(sample);
      if (y == -2) return job.refused->store(true);
      T m = -infinity<T>, from = 0;  // what the sums are about: m, if that is a number
      double s = 0, q = 0, qx = 0;  // qx = Σ q·(x − m), of the classes so far
      for (int64_t at = 0, n; at < r.classes; at += n) {
        n = r.classes - at < chunk ? r.classes - at : chunk;
        const T* const x = widened(logits + offset + at, n, buffer);
        const T top = largest(x, n);
        if (!(top <= m)) {
          const double moved = static_cast<double>(from) - static_cast<double>(top);
          s = s == 0 ? 0 : s * math::exp_of_negative<Fma>(moved);
          qx += select_times(q, moved);
          m = top;
        }
        from = m == -infinity<T> ? T(0) : m;
        TC_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) power[i] = math::exp_of_negative<Fma>(x[i] - from);
        s += sum_of(power, n);
        if (job.smooth == Smooth::none) continue;
        if (job.smooth == Smooth::same) {
          for (int64_t i = 0; i < n; ++i) power[i] = job.b * (x[i] - from);
          q += static_cast<double>(job.b) * static_cast<double>(n);
        } else {
          fill_q(job, given ? widened(given + offset + at, n, read) : nullptr, at, n, row);
          for (int64_t i = 0; i < n; ++i) power[i] = select_times(row[i], x[i] - from);
          q += sum_of(row, n);
        }
        qx += sum_of(power, n);
      }
      const T at_class = y >= 0 ? static_cast<T>(load(logits[offset + y])) : T(0);
      finish(job, sample, y, m, static_cast<T>(math::log<Fma>(s)), q, qx, at_class);
    }
  }

  // (3) of losses/cross_entropy.py: p·Σq − q, times r.
  template <bool Fma>
  static TC_INLINE void backward(const Job<T>& job, int64_t begin, int64_t end) {
    const CrossEntropy& r = *job.rows;
    const Stored* const logits = reinterpret_cast<const Stored*>(r.logits);
    const Stored* const given = reinterpret_cast<const Stored*>(r.probabilities);
    Stored* const grads = reinterpret_cast<Stored*>(job.grad);
    const T* const statistics = static_cast<const T*>(r.statistics);
    const int64_t samples = r.samples();
    T buffer[chunk], read[chunk], row[chunk], result[chunk];
    for (int64_t sample = begin; sample < end; ++sample) {
      const int64_t y = class_of(job, sample), offset = r.at(sample);
      if (y < 0 && !given) {
        for (int64_t i = 0; i < r.classes; ++i) grads[offset + i] = Stored{};
        continue;
      }
      const T m = statistics[sample], log_s = statistics[samples + sample];
      const T share = job.share ? job.share[sample] : job.scale;
      const T hard = y >= 0 ? job.hard(y) : T(0);
      const T all = share * (hard + (given ? statistics[2 * samples + sample] : static_cast<T>(job.total)) + job.z_slope(m, log_s));
      for (int64_t at = 0, n; at < r.classes; at += n) {
        n = r.classes - at < chunk ? r.classes - at : chunk;
        const T* const x = widened(logits + offset + at, n, buffer);
        T* out = result;
        if constexpr (std::is_same_v<Stored, T>) out = grads + offset + at;
        const T same = job.smooth == Smooth::same ? share * job.b : T(0);
        TC_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) out[i] = all * math::exp_of_negative<Fma>((x[i] - m) - log_s) - same;
        if (job.smooth == Smooth::row) {
          fill_q(job, given ? widened(given + offset + at, n, read) : nullptr, at, n, row);
          TC_INDEPENDENT
          for (int64_t i = 0; i < n; ++i) out[i] -= select_times(row[i], share);
        }
        if (y >= at && y < at + n) out[y - at] -= share * hard;
        if constexpr (!std::is_same_v<Stored, T>) narrowed(result, n, grads + offset + at);
      }
    }
  }
};

// Class by class, for many samples at a time: where the samples lie side by side and their classes apart, and where rows
// are short. Every number of a row is one of a lane.
template <class Stored>
struct Lanewise {
  using T = computed_t<Stored>;

  template <bool Fma>
  static TC_INLINE void forward(const Job<T>& job, int64_t begin, int64_t end) {
    const CrossEntropy& r = *job.rows;
    T buffer[lanes], row[lanes], m[lanes], from[lanes], s[lanes], q[lanes], qx[lanes], log_s[lanes];
    double sums[3][lanes];
    for (int64_t sample = begin, n; sample < end; sample += n) {
      n = piece(r, sample, end);
      const Stored* const x = reinterpret_cast<const Stored*>(r.logits) + r.at(sample);
      const Stored* const t = r.probabilities ? reinterpret_cast<const Stored*>(r.probabilities) + r.at(sample) : nullptr;
      for (int64_t i = 0; i < n; ++i) {
        m[i] = -infinity<T>;
        s[i] = q[i] = qx[i] = T(0);
        sums[0][i] = sums[1][i] = sums[2][i] = 0;
      }
      for (int64_t c = 0; c < r.classes; ++c) {
        const T* const each = widened(x + c * r.of_class, n, buffer, r.of_inner);
        TC_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) m[i] = each[i] > m[i] ? each[i] : m[i];
      }
      for (int64_t i = 0; i < n; ++i) from[i] = m[i] == -infinity<T> ? T(0) : m[i];
      for (int64_t c = 0; c < r.classes; ++c) {
        const T* const each = widened(x + c * r.of_class, n, buffer, r.of_inner);
        TC_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) s[i] += math::exp_of_negative<Fma>(each[i] - from[i]);
        if (job.smooth != Smooth::none) {
          fill(job, t ? t + c * r.of_class : nullptr, c, n, row);
          TC_INDEPENDENT
          for (int64_t i = 0; i < n; ++i) {
            q[i] += row[i];
            qx[i] += select_times(row[i], each[i] - from[i]);
          }
        }
        if (c % 32 == 31 || c == r.classes - 1) {  // long sums in double
          for (int64_t i = 0; i < n; ++i) {
            sums[0][i] += static_cast<double>(s[i]);
            sums[1][i] += static_cast<double>(q[i]);
            sums[2][i] += static_cast<double>(qx[i]);
            s[i] = q[i] = qx[i] = T(0);
          }
        }
      }
      for (int64_t i = 0; i < n; ++i) s[i] = static_cast<T>(sums[0][i]);
      TC_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) log_s[i] = math::log<Fma>(s[i]);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t y = class_of(job, sample + i);
        if (y == -2) return job.refused->store(true);
        const T at_class = y >= 0 ? static_cast<T>(load(x[y * r.of_class + i * r.of_inner])) : T(0);
        finish(job, sample + i, y, m[i], log_s[i], sums[1][i], sums[2][i], at_class);
      }
    }
  }

  template <bool Fma>
  static TC_INLINE void backward(const Job<T>& job, int64_t begin, int64_t end) {
    const CrossEntropy& r = *job.rows;
    const T* const statistics = static_cast<const T*>(r.statistics);
    const int64_t samples = r.samples();
    T buffer[lanes], row[lanes], share[lanes], hard[lanes], all[lanes], result[lanes];
    T target[lanes];  // as numbers of the same width as all others; −1: the sample is ignored
    for (int64_t sample = begin, n; sample < end; sample += n) {
      n = piece(r, sample, end);
      const Stored* const x = reinterpret_cast<const Stored*>(r.logits) + r.at(sample);
      const Stored* const t = r.probabilities ? reinterpret_cast<const Stored*>(r.probabilities) + r.at(sample) : nullptr;
      Stored* const grads = reinterpret_cast<Stored*>(job.grad) + r.at(sample);
      const T *const m = statistics + sample, *const log_s = m + samples;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t y = class_of(job, sample + i);
        share[i] = job.share ? job.share[sample + i] : job.scale;
        hard[i] = y >= 0 ? job.hard(y) : T(0);
        all[i] = share[i] * (hard[i] + (t ? m[2 * samples + i] : static_cast<T>(job.total)) + job.z_slope(m[i], log_s[i]));
        hard[i] *= share[i];
        target[i] = t ? static_cast<T>(r.classes) : static_cast<T>(y);
      }
      const bool direct = std::is_same_v<Stored, T> && r.of_inner == 1;
      for (int64_t c = 0; c < r.classes; ++c) {
        const T* const each = widened(x + c * r.of_class, n, buffer, r.of_inner);
        T* const out = direct ? reinterpret_cast<T*>(grads + c * r.of_class) : result;
        const T here = static_cast<T>(c);
        TC_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) {
          const T slope = all[i] * math::exp_of_negative<Fma>((each[i] - m[i]) - log_s[i]);
          const T less = target[i] == here ? hard[i] : T(0);
          out[i] = target[i] < T(0) ? T(0) : slope - less;  // also where an ignored sample's logits are infinite or NaN
        }
        if (job.smooth != Smooth::none) {
          fill(job, t ? t + c * r.of_class : nullptr, c, n, row);
          TC_INDEPENDENT
          for (int64_t i = 0; i < n; ++i) {
            const T less = select_times(row[i], share[i]);
            out[i] = target[i] < T(0) ? T(0) : out[i] - less;
          }
        }
        if (!direct) narrowed(result, n, grads + c * r.of_class, r.of_inner);
      }
    }
  }

  // q of class c, for n samples.
  static TC_INLINE void fill(const Job<T>& job, const Stored* t, int64_t c, int64_t n, T* q) {
    const T w = job.weight ? job.weight[c] : T(1);
    if (!t) {
      for (int64_t i = 0; i < n; ++i) q[i] = w * job.b;
      return;
    }
    const T* const given = widened(t, n, q, job.rows->of_inner);
    for (int64_t i = 0; i < n; ++i) q[i] = w * (job.a * given[i] + job.b);
  }

  static TC_INLINE int64_t piece(const CrossEntropy& r, int64_t sample, int64_t end) {
    const int64_t left = r.inner - sample % r.inner;  // samples of other outer positions lie elsewhere
    const int64_t n = end - sample < lanes ? end - sample : lanes;
    return n < left ? n : left;
  }
};

template <class Way>
struct Forward {
  using Item = Job<typename Way::T>;
  struct Hyper {};
  template <bool Fma>
  static TC_INLINE void run(const Item& job, const Hyper&, int64_t begin, int64_t end) {
    Way::template forward<Fma>(job, begin, end);
  }
};

template <class Way>
struct Backward {
  using Item = Job<typename Way::T>;
  struct Hyper {};
  template <bool Fma>
  static TC_INLINE void run(const Item& job, const Hyper&, int64_t begin, int64_t end) {
    Way::template backward<Fma>(job, begin, end);
  }
};

template <class K>
void over_threads(const typename K::Item& job) {
  struct Context {
    const typename K::Item& job;
    Variant<K> run;
  } context{job, variant<K>()};
  const int64_t samples = job.rows->samples();
  const int64_t grain = 1 + 8 * 1024 / job.rows->classes;
  if (samples <= grain) return context.run(job, {}, 0, samples);
  parallel_for(
      samples, grain,
      [](int64_t begin, int64_t end, void* opaque) {
        const Context& c = *static_cast<Context*>(opaque);
        c.run(c.job, {}, begin, end);
      },
      &context);
}

bool is_rowwise(const CrossEntropy& r) { return r.of_class == 1 && r.classes > shortest; }

template <class Stored>
bool forward(const CrossEntropy& rows, double* losses) {
  Job<computed_t<Stored>> job(rows);
  std::atomic<bool> refused{false};
  job.losses = losses;
  job.refused = &refused;
  is_rowwise(rows) ? over_threads<Forward<Rowwise<Stored>>>(job) : over_threads<Forward<Lanewise<Stored>>>(job);
  return !refused;
}

template <class Stored>
void backward(const CrossEntropy& rows, const void* share, double scale, char* grad) {
  Job<computed_t<Stored>> job(rows);
  job.share = static_cast<const computed_t<Stored>*>(share);
  job.scale = static_cast<computed_t<Stored>>(scale);
  job.grad = grad;
  is_rowwise(rows) ? over_threads<Backward<Rowwise<Stored>>>(job) : over_threads<Backward<Lanewise<Stored>>>(job);
}

bool cross_entropy(const CrossEntropy& rows, double* losses) {
  switch (rows.number) {
    case Number::float32: return forward<float>(rows, losses);
    case Number::float64: return forward<double>(rows, losses);
    case Number::bfloat16: return forward<BFloat16>(rows, losses);
    case Number::float16: return forward<Float16>(rows, losses);
  }
  return false;
}

void cross_entropy_backward(const CrossEntropy& rows, const void* share, double scale, char* grad) {
  switch (rows.number) {
    case Number::float32: return backward<float>(rows, share, scale, grad);
    case Number::float64: return backward<double>(rows, share, scale, grad);
    case Number::bfloat16: return backward<BFloat16>(rows, share, scale, grad);
    case Number::float16: return backward<Float16>(rows, share, scale, grad);
  }
}

}  // namespace

const RowKernels row_kernels{cross_entropy, cross_entropy_backward, norm, norm_backward, dropout};

}  // namespace torchcalc
