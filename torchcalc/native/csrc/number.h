// How a number is stored and how it is computed with: float32, bfloat16 and float16 compute in float, float64 in double.
// All conversions are branch-free integer and float arithmetic, so the loops around them vectorise for every
// instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "isa.h"

namespace torchcalc {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class Stored>
struct Computed {
  using type = float;
};
template <>
struct Computed<double> {
  using type = double;
};
template <class Stored>
using computed_t = typename Computed<Stored>::type;

template <class To, class From>
TC_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// A hyperparameter, as it is computed with. NaN is the ordinary one (see Nan below).
template <class T>
TC_INLINE T number(double x) {
  return x == x ? static_cast<T>(x) : std::numeric_limits<T>::quiet_NaN();
}

TC_INLINE float load(float x) { return x; }
TC_INLINE double load(double x) { return x; }
TC_INLINE void store(float& to, float x) { to = x; }
TC_INLINE void store(double& to, double x) { to = x; }

// A half number as the upper 16 bits of a word, to float.
template <class Half>
TC_INLINE float widen(uint32_t upper);

template <>
TC_INLINE float widen<BFloat16>(uint32_t upper) {
  return bit_cast<float>(upper);
}

// float16 has a 5-bit exponent with bias 15: widen by shifting, then rescale by 2⁻¹¹²; a subnormal is read as the
// mantissa of 0.5 + m·2⁻²⁴ instead, so that no float subnormal appears (flush-to-zero mode would lose it).
template <>
TC_INLINE float widen<Float16>(uint32_t upper) {
  const uint32_t sign = upper & 0x80000000u;
  const uint32_t twice = upper + upper;  // exponent and mantissa, at the top of the word
  const float normal = bit_cast<float>((twice >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const float subnormal = bit_cast<float>((twice >> 17) | (126u << 23)) - 0.5f;
  return bit_cast<float>(sign | (twice < (1u << 27) ? bit_cast<uint32_t>(subnormal) : bit_cast<uint32_t>(normal)));
}

// What NaNs a number to be narrowed can be. Adding below the cut must not carry a NaN's payload of all ones into the sign;
// it cannot if the NaN came from bfloat16 numbers or from an invalid operation, whose lower 16 bits are zero. The test for
// the others costs a fifth of a bfloat16 Adam step.
enum class Nan { any, narrow };

// How a float becomes 16 bits: to the nearest, ties to even, as torch rounds; NaN stays NaN.
struct Nearest {
  template <class Half, Nan N = Nan::any>
  TC_INLINE uint32_t narrow(float x) const {
    if constexpr (std::is_same_v<Half, BFloat16>) {
      return above<N>(x, 0x7FFFu + ((bit_cast<uint32_t>(x) >> 16) & 1u));
    } else {
      return float16(x);
    }
  }

  template <Nan N>
  static TC_INLINE uint32_t above(float x, uint32_t added) {
    const uint32_t kept = (bit_cast<uint32_t>(x) + added) >> 16;
    if constexpr (N == Nan::narrow) return kept;
    return x != x ? 0x7FC0u : kept;
  }

  static TC_INLINE uint32_t float16(float x);
};

// The addition of a power of two 2¹³ ulps above x makes the float adder round at float16's last bit.
TC_INLINE uint32_t Nearest::float16(float x) {
  const uint32_t w = bit_cast<uint32_t>(x);
  const uint32_t twice = w + w;
  const float magnitude = bit_cast<float>(w & 0x7FFFFFFFu);
  const float base = (magnitude * 0x1p+112f) * 0x1p-110f;  // overflows to inf where float16 does
  uint32_t bias = twice & 0xFF000000u;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  const uint32_t sum = bit_cast<uint32_t>(bit_cast<float>((bias >> 1) + 0x07800000u) + base);
  const uint32_t finite = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  return ((w & 0x80000000u) >> 16) | (twice > 0xFF000000u ? 0x7E00u : finite);
}

// Or stochastically: up with a probability equal to the part that is cut off, so that the expected value is x. What is above
// the largest finite value, infinite or NaN is stored as to the nearest: a finite weight does not become infinite by chance.
struct Random {
  uint32_t bits;  // uniform: 16 for bfloat16, 32 for float16

  template <class Half, Nan N = Nan::any>
  TC_INLINE uint32_t narrow(float x) const {
    if constexpr (std::is_same_v<Half, BFloat16>) {
      const uint32_t w = bit_cast<uint32_t>(x);
      const uint32_t half = 0x7FFFu + ((w >> 16) & 1u);
      return Nearest::above<N>(x, (w & 0x7FFFFFFFu) > 0x7F7F0000u ? half : bits);
    } else {
      return float16(x);
    }
  }

  TC_INLINE uint32_t float16(float x) const;
};

TC_INLINE uint32_t Random::float16(float x) const {
  const uint32_t w = bit_cast<uint32_t>(x);
  const uint32_t magnitude = w & 0x7FFFFFFFu;
  // normal: cut the 13 lowest of 23 mantissa bits, then rebias the exponent from 127 to 15
  const uint32_t normal = ((magnitude + (bits & 0x1FFFu)) >> 13) - (112u << 10);
  // subnormal: a multiple of 2⁻²⁴, the 24-bit significand shifted right until its last bit is worth that much
  const uint32_t exponent = magnitude >> 23;
  uint32_t significand = (magnitude & 0x7FFFFFu) | (exponent == 0 ? 0u : 0x800000u);
  const uint32_t shift = 126u - exponent;  // 14 for the largest subnormal binade
  const uint32_t beyond = shift > 31u ? shift - 31u : 0u;
  significand >>= beyond > 31u ? 31u : beyond;
  const uint32_t within = (shift > 31u ? 31u : shift) & 31u;
  const uint32_t subnormal = (significand + (bits & ((1u << within) - 1u))) >> within;
  const uint32_t drawn = ((w & 0x80000000u) >> 16) | (magnitude < (113u << 23) ? subnormal : normal);
  return magnitude > 0x477FE000u ? Nearest::float16(x) : drawn;  // 65504
}

template <class Half>
TC_INLINE float load(Half x) {
  return widen<Half>(static_cast<uint32_t>(x.bits) << 16);
}
template <class Half>
TC_INLINE void store(Half& to, float x) {
  to.bits = static_cast<uint16_t>(Nearest{}.template narrow<Half>(x));
}

// Two neighbours in memory as one word: half the shuffles that widening each would take.
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
TC_INLINE uint32_t first_upper(uint32_t pair) { return pair << 16; }
TC_INLINE uint32_t second_upper(uint32_t pair) { return pair & 0xFFFF0000u; }
TC_INLINE uint32_t join(uint32_t first, uint32_t second) { return first | (second << 16); }
#else
TC_INLINE uint32_t first_upper(uint32_t pair) { return pair & 0xFFFF0000u; }
TC_INLINE uint32_t second_upper(uint32_t pair) { return pair << 16; }
TC_INLINE uint32_t join(uint32_t first, uint32_t second) { return second | (first << 16); }
#endif

}  // namespace torchcalc
