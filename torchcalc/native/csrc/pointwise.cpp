#include "pointwise.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "number.h"
#include "parallel.h"
#include "rows.h"

namespace torchcalc {
namespace {

// Numbers in memory ↔ a block of T. Compiled for each instruction set, as the kernels are.
template <class T, class Stored>
TC_INLINE void read_as(const char* from, int64_t stride, int64_t n, T* to) {
  if (stride == 0) {
    const T x = static_cast<T>(load(*reinterpret_cast<const Stored*>(from)));
    for (int64_t i = 0; i < n; ++i) to[i] = x;
  } else if (stride == sizeof(Stored)) {
    const Stored* const a = reinterpret_cast<const Stored*>(from);
    TC_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(load(a[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(load(*reinterpret_cast<const Stored*>(from + i * stride)));
  }
}

template <class T>
TC_INLINE void read(const Operand& o, int64_t begin, int64_t n, T* to) {
  const char* const from = o.data + begin * o.stride;
  switch (o.number) {
    case Number::float32: return read_as<T, float>(from, o.stride, n, to);
    case Number::float64: return read_as<T, double>(from, o.stride, n, to);
    case Number::bfloat16: return read_as<T, BFloat16>(from, o.stride, n, to);
    case Number::float16: return read_as<T, Float16>(from, o.stride, n, to);
  }
}

template <class T, class Stored>
TC_INLINE void write_as(const T* from, int64_t n, char* to, int64_t stride) {
  using Computed = computed_t<Stored>;
  if (stride == sizeof(Stored)) {
    Stored* const a = reinterpret_cast<Stored*>(to);
    TC_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) store(a[i], static_cast<Computed>(from[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) store(*reinterpret_cast<Stored*>(to + i * stride), static_cast<Computed>(from[i]));
  }
}

template <class T>
TC_INLINE void write(const T* from, int64_t begin, int64_t n, const Operand& o) {
  char* const to = o.data + begin * o.stride;
  switch (o.number) {
    case Number::float32: return write_as<T, float>(from, n, to, o.stride);
    case Number::float64: return write_as<T, double>(from, n, to, o.stride);
    case Number::bfloat16: return write_as<T, BFloat16>(from, n, to, o.stride);
    case Number::float16: return write_as<T, Float16>(from, n, to, o.stride);
  }
}

template <class T>
inline constexpr Number own_number = sizeof(T) == 4 ? Number::float32 : Number::float64;

template <class T>
BlockKernel<T> function_of(const Kernel& kernel) {
  if constexpr (sizeof(T) == 4) {
    return kernel.of_float;
  } else {
    return kernel.of_double;
  }
}

// Half numbers as words of two: all first ones of a block, then all second ones. That halves the shuffles, and changes
// nothing where every array of a kernel is read so. An odd one is the last of its block.
template <class Half>
TC_INLINE void read_pairs_as(const char* from, int64_t n, float* to) {
  const int64_t pairs = n / 2;
  TC_INDEPENDENT
  for (int64_t i = 0; i < pairs; ++i) {
    uint32_t word;
    std::memcpy(&word, from + 4 * i, 4);
    to[i] = widen<Half>(first_upper(word));
    to[pairs + i] = widen<Half>(second_upper(word));
  }
  if (n % 2 != 0) to[n - 1] = load(reinterpret_cast<const Half*>(from)[n - 1]);
}

template <class Half>
TC_INLINE void write_pairs_as(const float* from, int64_t n, char* to) {
  const int64_t pairs = n / 2;
  const Nearest nearest;
  TC_INDEPENDENT
  for (int64_t i = 0; i < pairs; ++i) {
    // What enters is half numbers and parameters: a NaN needs no care.
    const uint32_t word = join(
        nearest.template narrow<Half, Nan::narrow>(from[i]), nearest.template narrow<Half, Nan::narrow>(from[pairs + i]));
    std::memcpy(to + 4 * i, &word, 4);
  }
  if (n % 2 != 0) store(reinterpret_cast<Half*>(to)[n - 1], from[n - 1]);
}

TC_INLINE void read_pairs(const Operand& o, int64_t begin, int64_t n, float* to) {
  if (o.stride == 0) return read(o, begin, n, to);
  const char* const from = o.data + begin * 2;
  o.number == Number::bfloat16 ? read_pairs_as<BFloat16>(from, n, to) : read_pairs_as<Float16>(from, n, to);
}

TC_INLINE void write_pairs(const float* from, int64_t begin, int64_t n, const Operand& o) {
  char* const to = o.data + begin * 2;
  o.number == Number::bfloat16 ? write_pairs_as<BFloat16>(from, n, to) : write_pairs_as<Float16>(from, n, to);
}

bool is_half_array(const Operand& o) {
  return o.stride == 2 && (o.number == Number::bfloat16 || o.number == Number::float16);
}

struct Job {
  const Kernel* kernel;
  const Operand* in;
  int count;
  double scale;  // of in[0]
  const Operand* out;  // of each output
  const Operand* weight;
  const double* parameters;
  bool pairs;  // every array is one of half numbers, side by side
  bool words;  // these are bfloat16, and no argument is one number for all
};

// The arguments of one block: where they lie if that is T already, else read into a buffer.
template <class T>
struct Stage {
  T buffer[max_inputs + 2][block];
  const T* in[max_inputs + 2];

  TC_INLINE void fill(const Job& job, int64_t begin, int64_t n, bool again) {
    for (int k = 0; k < job.count; ++k) {
      const Operand& o = job.in[k];
      if (o.data == nullptr) {
        in[k] = nullptr;
      } else if (o.number == own_number<T> && o.stride == sizeof(T) && !(k == 0 && job.scale != 1)) {
        in[k] = reinterpret_cast<const T*>(o.data) + begin;
      } else if (!(again && o.stride == 0)) {  // one number for all is there from the block before
        if constexpr (sizeof(T) == 4) {
          job.pairs ? read_pairs(o, begin, n, buffer[k]) : read(o, begin, n, buffer[k]);
        } else {
          read(o, begin, n, buffer[k]);
        }
        if (k == 0 && job.scale != 1) {
          const T scale = static_cast<T>(job.scale);
          for (int64_t i = 0; i < n; ++i) buffer[k][i] = buffer[k][i] * scale;
        }
        in[k] = buffer[k];
      }
    }
  }
};

// Elements of a heavy kernel that are computed at a time: the two halves that its loop reads must not lie a multiple of
// 4 KiB apart, or its loads are taken for those of what it has just stored.
constexpr int64_t stretch = 3 * block;

template <class T>
struct Elements {
  static TC_INLINE void run(const Job& job, int64_t begin, int64_t end) {
    const Kernel& kernel = *job.kernel;
    if constexpr (sizeof(T) == 4) {
      if (job.words && kernel.of_bfloat16) begin = run_words(job, begin, end);
    }
    Stage<T> stage;
    T result[max_inputs][block];
    const BlockKernel<T> function = function_of<T>(kernel);
    const auto is_direct = [](const Operand& o) { return o.number == own_number<T> && o.stride == sizeof(T); };
    bool staged = job.scale != 1;
    for (int k = 0; k < job.count; ++k) staged |= job.in[k].data != nullptr && !is_direct(job.in[k]);
    for (int k = 0; k < kernel.outputs; ++k) staged |= job.out[k].data == nullptr || !is_direct(job.out[k]);
    const int64_t step = staged ? block : kernel.heavy ? stretch : end - begin;
    for (int64_t at = begin, n; at < end; at += n) {
      n = end - at < step ? end - at : step;
      stage.fill(job, at, n, at != begin && n == block);
      T* out[max_inputs];
      for (int k = 0; k < kernel.outputs; ++k) {
        const Operand& o = job.out[k];
        out[k] = o.data != nullptr && is_direct(o) ? reinterpret_cast<T*>(o.data) + at : result[k];
      }
      function(n, stage.in, out, job.parameters);
      for (int k = 0; k < kernel.outputs; ++k) {
        if (out[k] != result[k] || job.out[k].data == nullptr) continue;
        if constexpr (sizeof(T) == 4) {
          job.pairs ? write_pairs(result[k], at, n, job.out[k]) : write(result[k], at, n, job.out[k]);
        } else {
          write(result[k], at, n, job.out[k]);
        }
      }
    }
  }

  // All words of two; where the rest begins.
  static TC_INLINE int64_t run_words(const Job& job, int64_t begin, int64_t end) {
    const char* in[max_inputs + 2] = {};
    char* out[max_inputs] = {};
    for (int k = 0; k < job.count; ++k) {
      if (job.in[k].data != nullptr) in[k] = job.in[k].data + 2 * begin;
    }
    for (int k = 0; k < job.kernel->outputs; ++k) out[k] = job.out[k].data + 2 * begin;
    const int64_t words = (end - begin) / 2;
    job.kernel->of_bfloat16(words, in, out, job.parameters);
    return begin + 2 * words;
  }
};

// Σ over [begin, end), in double: eight running sums within a block, so that it vectorises.
template <class T>
struct Sums {
  static TC_INLINE double of(const T* x, int64_t n) {
    double lane[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      for (int k = 0; k < 8; ++k) lane[k] += static_cast<double>(x[i + k]);
    }
    for (; i < n; ++i) lane[i % 8] += static_cast<double>(x[i]);
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  }

  static TC_INLINE double run(const Job& job, int64_t begin, int64_t end) {
    Stage<T> stage;
    T result[block], weight[block];
    const BlockKernel<T> function = job.kernel ? function_of<T>(*job.kernel) : nullptr;
    double sum = 0;
    for (int64_t at = begin, n; at < end; at += n) {
      n = end - at < block ? end - at : block;
      stage.fill(job, at, n, at != begin && n == block);
      T* const out[] = {result};
      if (function) function(n, stage.in, out, job.parameters);
      if (job.weight) {
        read(*job.weight, at, n, weight);
        for (int64_t i = 0; i < n; ++i) result[i] = result[i] * weight[i];
      }
      sum += of(function ? result : stage.in[0], n);
    }
    return sum;
  }
};

#define TC_FOR_EACH_ISA(Result, name, Loop)                                                                   \
  template <class T>                                                                                          \
  Result name##_baseline(const Job& job, int64_t begin, int64_t end) {                                        \
    return Loop<T>::run(job, begin, end);                                                                     \
  }                                                                                                           \
  TC_FOR_X86(                                                                                                 \
      template <class T> TC_TARGET_AVX2 Result name##_avx2(const Job& job, int64_t begin, int64_t end) {      \
        return Loop<T>::run(job, begin, end);                                                                 \
      } template <class T> TC_TARGET_AVX512 Result name##_avx512(const Job& job, int64_t begin, int64_t end) { \
        return Loop<T>::run(job, begin, end);                                                                 \
      })                                                                                                      \
  template <class T>                                                                                          \
  Result name(const Job& job, int64_t begin, int64_t end) {                                                   \
    TC_FOR_X86(if (isa() == Isa::avx512) return name##_avx512<T>(job, begin, end);                            \
               if (isa() == Isa::avx2) return name##_avx2<T>(job, begin, end);)                               \
    return name##_baseline<T>(job, begin, end);                                                               \
  }
#if TC_X86
#define TC_FOR_X86(...) __VA_ARGS__
#else
#define TC_FOR_X86(...)
#endif
TC_FOR_EACH_ISA(void, run_elements, Elements)
TC_FOR_EACH_ISA(double, run_sums, Sums)

// Half types compute in float; double where one argument is.
bool in_double(const Operand* in, int count) {
  for (int k = 0; k < count; ++k) {
    if (in[k].data != nullptr && in[k].stride != 0 && in[k].number == Number::float64) return true;
  }
  return false;
}

void apply(
    const Kernel& kernel, int64_t n, const Operand* in, int count, double scale, const Operand* out,
    const double* parameters, bool serial) {
  bool pairs = true, words = scale == 1, as_double = in_double(in, count);
  for (int k = 0; k < kernel.outputs; ++k) {
    const bool written = out[k].data != nullptr;
    pairs = pairs && (!written || is_half_array(out[k]));
    words = words && written && out[k].number == Number::bfloat16;
    as_double = as_double || (written && out[k].number == Number::float64);
  }
  for (int k = 0; k < count; ++k) {
    if (in[k].data == nullptr) continue;
    pairs = pairs && (in[k].stride == 0 || is_half_array(in[k]));
    words = words && in[k].stride != 0 && in[k].number == Number::bfloat16;
  }
  const Job job{&kernel, in, count, scale, out, nullptr, parameters, pairs, pairs && words};
  const auto body = as_double ? run_elements<double> : run_elements<float>;
  const int64_t grain = kernel.heavy ? heavy_grain : 32 * 1024;
  if (serial || n <= grain) return body(job, 0, n);
  struct Context {
    const Job& job;
    void (*body)(const Job&, int64_t, int64_t);
  } context{job, body};
  parallel_for(
      n, grain,
      [](int64_t begin, int64_t end, void* opaque) {
        const Context& c = *static_cast<Context*>(opaque);
        c.body(c.job, begin, end);
      },
      &context);
}

// Pieces of a fixed length, whose sums are added in order: no result depends on the number of threads.
double add_up(const Job& job, int64_t n, bool as_double) {
  constexpr int64_t piece = 8 * 1024;
  const auto body = as_double ? run_sums<double> : run_sums<float>;
  if (n <= piece) return body(job, 0, n);
  std::vector<double> sums(static_cast<size_t>((n + piece - 1) / piece));
  struct Context {
    const Job& job;
    double (*body)(const Job&, int64_t, int64_t);
    double* sums;
    int64_t n;
  } context{job, body, sums.data(), n};
  const bool heavy = job.kernel && job.kernel->heavy;
  parallel_for(
      static_cast<int64_t>(sums.size()), heavy ? 1 : 4,
      [](int64_t begin, int64_t end, void* opaque) {
        const Context& c = *static_cast<Context*>(opaque);
        for (int64_t k = begin; k < end; ++k) {
          const int64_t stop = (k + 1) * piece;
          c.sums[k] = c.body(c.job, k * piece, stop < c.n ? stop : c.n);
        }
      },
      &context);
  double sum = 0, lost = 0;  // Neumaier 1974, doi:10.1002/zamm.19740540106
  for (const double x : sums) {
    const double next = sum + x;
    lost += std::fabs(sum) >= std::fabs(x) ? (sum - next) + x : (x - next) + sum;
    sum = next;
  }
  return std::isfinite(sum) ? sum + lost : sum;
}

double total(
    const Kernel& kernel, int64_t n, const Operand* in, int count, const Operand* weight, const double* parameters) {
  const Job job{&kernel, in, count, 1, nullptr, weight, parameters, false, false};
  return add_up(job, n, in_double(in, count));
}

double sum(int64_t n, const Operand& of) {
  const Job job{nullptr, &of, 1, 1, nullptr, nullptr, nullptr, false, false};
  return add_up(job, n, of.number == Number::float64);
}

// Filled by the constructors of generated files, in the order in which they are linked.
std::vector<Formula>& formulas() {
  static std::vector<Formula> all;
  return all;
}

}  // namespace

Registered::Registered(const Formula& formula) { formulas().push_back(formula); }

}  // namespace torchcalc

extern "C" __attribute__((visibility("default"))) const torchcalc::Table* torchcalc_table() {
  using namespace torchcalc;
  static const Table table{formulas().data(), static_cast<int64_t>(formulas().size()), apply, total, sum, &row_kernels};
  return &table;
}
