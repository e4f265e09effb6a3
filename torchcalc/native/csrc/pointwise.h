// Pointwise functions: kernels made from formulas (torchcalc/formula/cpp.py), and how they run over arrays.
//
// A kernel computes one number or several from several, for contiguous arrays of float or double: half types and other
// strides are staged through blocks that stay in the first cache. So each formula is compiled for two types alone, and for
// every instruction set. What costs less than moving it is compiled for bfloat16 too, widened and rounded in registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "isa.h"
#include "number.h"

namespace torchcalc {

template <class T>
using BlockKernel = void (*)(int64_t n, const T* const* in, T* const* out, const double* parameters);
using PairKernel = void (*)(int64_t words, const char* const* in, char* const* out, const double* parameters);

inline constexpr int max_inputs = 6;   // of a formula
inline constexpr int block = 512;      // elements that are staged at a time
inline constexpr int64_t heavy_grain = 8 * 1024;  // elements of a heavy kernel that are one thread's work

struct Kernel {
  BlockKernel<float> of_float;
  BlockKernel<double> of_double;
  PairKernel of_bfloat16;  // of words of two numbers; null where staging costs little beside the rest
  uint32_t uses;           // which of its arguments it reads, a bit for each
  int outputs;
  bool heavy;  // more than a few operations: worth a second thread earlier
};

// y = value(inputs). The gradient of input i is product[i] of (g, inputs..., y), where g is that of y; joint gives those of all
// inputs that have one, in order, where these are several; whole gives those of all inputs and then y, and does not read y.
struct Formula {
  const char* name;
  const char* hash;  // of what was recorded
  int inputs;
  Kernel value;
  Kernel joint;
  Kernel whole;  // without functions where nobody asked for it
  Kernel product[max_inputs];  // without functions where there is no derivative
};

enum class Number : int32_t { float32, float64, bfloat16, float16 };

struct Operand {
  char* data = nullptr;  // null: an argument that the kernel does not use
  int64_t stride = 0;    // in bytes; 0: one number for all
  Number number = Number::float32;
};

struct RowKernels;

// What the library of autograd nodes calls, which is built apart: see node/node.cpp.
struct Table {
  const Formula* formulas;
  int64_t count;
  // out[0][i], ... = kernel(in[0][i]·scale, in[1][i], ...), over all threads, or in the calling thread. An output without
  // data is not written.
  void (*apply)(const Kernel&, int64_t n, const Operand* in, int count, double scale, const Operand* out, const double*, bool serial);
  // Σ weight[i]·kernel(in[0][i], ...), the same for any number of threads; and Σ weight[i].
  double (*total)(const Kernel&, int64_t n, const Operand* in, int count, const Operand* weight, const double*);
  double (*sum)(int64_t n, const Operand& of);
  const RowKernels* rows;  // rows.h
};

// K is generated: element<T, Fma>(parameters)(arguments..., y) computes one element of every output, where the arguments
// that it reads have the numbers K::arguments.
template <class K, class T, bool Fma, size_t... I, size_t... O>
TC_INLINE void run_loop(
    int64_t n, const T* const* in, T* const* out, const double* parameters, std::index_sequence<I...>,
    std::index_sequence<O...>) {
  const auto element = K::template element<T, Fma>(parameters);
  const T* const a[sizeof...(I) + 1] = {in[K::arguments[I]]...};
  T* const o[] = {out[O]...};
  if constexpr (K::heavy && sizeof(T) == 4) {
    // Two elements in an iteration, of both halves, whose chains of operations run side by side; an odd one in the middle is
    // computed twice, so that the result may not be written over an argument. In double precision the processor's own reach
    // suffices.
    const int64_t half = (n + 1) / 2;
    const T* const b[sizeof...(I) + 1] = {a[I] + (n - half)...};
    T* const q[] = {o[O] + (n - half)...};
    TC_INDEPENDENT
    for (int64_t i = 0; i < half; ++i) {
      T y[sizeof...(O)], z[sizeof...(O)];
      element(a[I][i]..., y);
      element(b[I][i]..., z);
      ((o[O][i] = y[O], q[O][i] = z[O]), ...);
    }
  } else {
    TC_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      T y[sizeof...(O)];
      element(a[I][i]..., y);
      ((o[O][i] = y[O]), ...);
    }
  }
}

template <class K, class T, bool Fma>
TC_INLINE void run(int64_t n, const T* const* in, T* const* out, const double* parameters) {
  run_loop<K, T, Fma>(n, in, out, parameters, typename K::Inputs(), std::make_index_sequence<K::outputs>());
}

TC_INLINE uint32_t word_at(const char* from) {
  uint32_t word;
  std::memcpy(&word, from, 4);
  return word;
}

template <class K, class Half, bool Fma, size_t... I, size_t... O>
TC_INLINE void run_words(
    int64_t n, const char* const* in, char* const* out, const double* parameters, std::index_sequence<I...>,
    std::index_sequence<O...>) {
  const auto element = K::template element<float, Fma>(parameters);
  const char* const a[sizeof...(I) + 1] = {in[K::arguments[I]]...};
  char* const o[] = {out[O]...};
  const Nearest nearest;
  TC_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    float y[sizeof...(O)], z[sizeof...(O)];
    const uint32_t words[sizeof...(I) + 1] = {word_at(a[I] + 4 * i)...};
    element(widen<Half>(first_upper(words[I]))..., y);
    element(widen<Half>(second_upper(words[I]))..., z);
    // What enters is half numbers and parameters: a NaN needs no care.
    const uint32_t results[] = {
        join(nearest.template narrow<Half, Nan::narrow>(y[O]), nearest.template narrow<Half, Nan::narrow>(z[O]))...};
    (std::memcpy(o[O] + 4 * i, &results[O], 4), ...);
  }
}

template <class K, bool Fma>
TC_INLINE void run_pairs(int64_t n, const char* const* in, char* const* out, const double* parameters) {
  run_words<K, BFloat16, Fma>(n, in, out, parameters, typename K::Inputs(), std::make_index_sequence<K::outputs>());
}

template <class K, class T>
void block_baseline(int64_t n, const T* const* in, T* const* out, const double* parameters) {
  run<K, T, baseline_fma>(n, in, out, parameters);
}
#if TC_X86
template <class K, class T>
TC_TARGET_AVX2 void block_avx2(int64_t n, const T* const* in, T* const* out, const double* parameters) {
  run<K, T, true>(n, in, out, parameters);
}
template <class K>
TC_TARGET_AVX2 void pairs_avx2(int64_t n, const char* const* in, char* const* out, const double* parameters) {
  run_pairs<K, true>(n, in, out, parameters);
}
template <class K, class T>
TC_TARGET_AVX512 void block_avx512(int64_t n, const T* const* in, T* const* out, const double* parameters) {
  run<K, T, true>(n, in, out, parameters);
}
template <class K>
TC_TARGET_AVX512 void pairs_avx512(int64_t n, const char* const* in, char* const* out, const double* parameters) {
  run_pairs<K, true>(n, in, out, parameters);
}
#endif

template <class K, class T>
BlockKernel<T> block_variant() {
#if TC_X86
  if (isa() == Isa::avx512) return block_avx512<K, T>;
  if (isa() == Isa::avx2) return block_avx2<K, T>;
#endif
  return block_baseline<K, T>;
}

template <class K>
PairKernel pairs_variant() {
#if TC_X86
  if constexpr (!K::heavy) {
    if (isa() == Isa::avx512) return pairs_avx512<K>;
    if (isa() == Isa::avx2) return pairs_avx2<K>;
  }
#endif
  return nullptr;
}

template <class K>
constexpr uint32_t uses() {
  uint32_t found = 0;
  for (const int i : K::arguments) found |= i < 0 ? 0u : 1u << i;
  return found;
}

template <class K>
Kernel kernel_of() {
  return {block_variant<K, float>(), block_variant<K, double>(), pairs_variant<K>(), uses<K>(), K::outputs, K::heavy};
}

// Called by generated files before main: their formulas join the table.
struct Registered {
  explicit Registered(const Formula& formula);
};

}  // namespace torchcalc
