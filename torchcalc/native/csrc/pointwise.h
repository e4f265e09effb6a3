// Pointwise functions: kernels made from formulas (torchcalc/formula/cpp.py), and how they run over arrays.
//
// A kernel computes one number from several, for contiguous arrays of float or double: half types and other strides are
// staged through blocks that stay in the first cache. So each formula is compiled for two types alone, and for every
// instruction set.
#pragma once

#include <cstdint>

#include "isa.h"

namespace torchcalc {

template <class T>
using BlockKernel = void (*)(int64_t n, const T* const* in, T* out, const double* parameters);

inline constexpr int max_inputs = 6;   // of a formula
inline constexpr int block = 512;      // elements that are staged at a time

struct Kernel {
  BlockKernel<float> of_float;
  BlockKernel<double> of_double;
  uint32_t uses;  // which of its arguments it reads, a bit for each
  bool heavy;     // more than a few operations: worth a second thread earlier
};

// y = value(inputs). The gradient of input i is product[i] of (g, inputs..., y), where g is that of y.
struct Formula {
  const char* name;
  const char* hash;  // of what was recorded
  int inputs;
  Kernel value;
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
  // out[i] = kernel(in[0][i]·scale, in[1][i], ...), over all threads, or in the calling thread.
  void (*apply)(const Kernel&, int64_t n, const Operand* in, int count, double scale, const Operand& out, const double*, bool serial);
  // Σ weight[i]·kernel(in[0][i], ...), the same for any number of threads; and Σ weight[i].
  double (*total)(const Kernel&, int64_t n, const Operand* in, int count, const Operand* weight, const double*);
  double (*sum)(int64_t n, const Operand& of);
  const RowKernels* rows;  // rows.h
};

template <class K, class T>
void block_baseline(int64_t n, const T* const* in, T* out, const double* parameters) {
  K::template run<T, baseline_fma>(n, in, out, parameters);
}
#if TC_X86
template <class K, class T>
TC_TARGET_AVX2 void block_avx2(int64_t n, const T* const* in, T* out, const double* parameters) {
  K::template run<T, true>(n, in, out, parameters);
}
template <class K, class T>
TC_TARGET_AVX512 void block_avx512(int64_t n, const T* const* in, T* out, const double* parameters) {
  K::template run<T, true>(n, in, out, parameters);
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
Kernel kernel_of(uint32_t uses, bool heavy) {
  return {block_variant<K, float>(), block_variant<K, double>(), uses, heavy};
}

// Called by generated files before main: their formulas join the table.
struct Registered {
  explicit Registered(const Formula& formula);
};

}  // namespace torchcalc
