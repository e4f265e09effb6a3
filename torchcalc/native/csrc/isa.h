// One source, several instruction sets.
//
// A kernel is a plain loop in a struct:
//
//     struct Axpy {
//       using Item = ...;                                    // one tensor's pointers and scalars
//       using Hyper = ...;                                   // what all tensors share
//       template <bool Fma>
//       static TC_INLINE void run(const Item&, const Hyper&, int64_t begin, int64_t end);
//     };
//
// and `variant<Axpy>()` is the function pointer to the copy of it that was compiled for the best instruction set of this
// machine. We do not use target_clones: it needs ifunc (no macOS, no musl), Clang learnt its arch= late, and a loop could
// not know which clone it is in; here it does (Fma), so that `fma` below is never an out-of-line call to libm.
#pragma once

#include <cstdint>

#define TC_INLINE inline __attribute__((always_inline))
#define TC_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__clang__)
#define TC_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define TC_INDEPENDENT _Pragma("GCC ivdep")  // no iteration reads what another one writes
#else
#define TC_INDEPENDENT
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define TC_X86 1
#define TC_TARGET_AVX2 __attribute__((target("avx2,fma")))
#if defined(__clang__)
#define TC_TARGET_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define TC_TARGET_AVX512 \
  __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif
#else
#define TC_X86 0
#endif

namespace torchcalc {

enum class Isa { baseline, avx2, avx512 };

Isa isa();               // chosen once; TORCHCALC_NATIVE_ISA=baseline|avx2 lowers it
const char* isa_name();  // "avx512", "avx2", "baseline", or "neon" on 64-bit ARM

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
inline constexpr bool baseline_fma = true;
#else
inline constexpr bool baseline_fma = false;
#endif

// a·b + c, rounded once where the instruction set can. torch's vectorised CPU loops do the same, which is why a step equals
// theirs bit for bit; nothing else is contracted (-ffp-contract=off).
template <bool Fma>
TC_INLINE float fma(float a, float b, float c) {
  if constexpr (Fma) return __builtin_fmaf(a, b, c);
  return a * b + c;
}

template <bool Fma>
TC_INLINE double fma(double a, double b, double c) {
  if constexpr (Fma) return __builtin_fma(a, b, c);
  return a * b + c;
}

TC_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
TC_INLINE double square_root(double x) { return __builtin_sqrt(x); }

template <class K>
using Variant = void (*)(const typename K::Item&, const typename K::Hyper&, int64_t begin, int64_t end);

template <class K>
void run_baseline(const typename K::Item& item, const typename K::Hyper& h, int64_t begin, int64_t end) {
  K::template run<baseline_fma>(item, h, begin, end);
}

#if TC_X86
template <class K>
TC_TARGET_AVX2 void run_avx2(const typename K::Item& item, const typename K::Hyper& h, int64_t begin, int64_t end) {
  K::template run<true>(item, h, begin, end);
}

template <class K>
TC_TARGET_AVX512 void run_avx512(const typename K::Item& item, const typename K::Hyper& h, int64_t begin, int64_t end) {
  K::template run<true>(item, h, begin, end);
}
#endif

template <class K>
Variant<K> variant() {
#if TC_X86
  if (isa() == Isa::avx512) return run_avx512<K>;
  if (isa() == Isa::avx2) return run_avx2<K>;
#endif
  return run_baseline<K>;
}

}  // namespace torchcalc
