// The functions of formulas, as arithmetic without branches, so that the loops around them vectorise for every instruction
// set. libm's are called one number at a time; and its vector versions are not everywhere, and wrong by up to 4 units in the
// last place, where these stay near 1.
//
// T is float or double, Fma whether a·b + c is rounded once. NaN and the infinities come out as the mathematics has them.
// Polynomials are near-minimax fits on the intervals named, made with mpmath's chebyfit; "relative" is their own error.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "isa.h"
#include "number.h"

namespace torchcalc {
namespace math {

template <class T>
struct Format;
template <>
struct Format<float> {
  using Int = int32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float round_to_int = 0x1.8p23f;  // adding it leaves an integer in the low bits
  static constexpr float log2e = 0x1.715476p+0f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float exp_lowest = -104.0f, exp_highest = 89.0f;
  static constexpr float least_normal = 0x1p-126f, exp_least_normal = -87.0f;
};
template <>
struct Format<double> {
  using Int = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double round_to_int = 0x1.8p52;
  static constexpr double log2e = 0x1.71547652b82fep+0, ln2_high = 0x1.62e42fefa0000p-1, ln2_low = 0x1.cf79abc9e3b3ap-40;
  static constexpr double exp_lowest = -746.0, exp_highest = 710.0;
  static constexpr double least_normal = 0x1p-1022, exp_least_normal = -708.0;
};

template <class T>
inline constexpr T infinity = std::numeric_limits<T>::infinity();
template <class T>
inline constexpr T not_a_number = std::numeric_limits<T>::quiet_NaN();

TC_INLINE float magnitude(float x) { return __builtin_fabsf(x); }
TC_INLINE double magnitude(double x) { return __builtin_fabs(x); }
TC_INLINE float with_sign(float x, float of) { return __builtin_copysignf(x, of); }
TC_INLINE double with_sign(double x, double of) { return __builtin_copysign(x, of); }

// c[0] + c[1]·x + c[2]·x² + ...
// By recursion: a loop within the loop over elements would not be vectorised.
template <bool Fma, int First = 0, class T, int N>
TC_INLINE T polynomial(T x, const T (&c)[N]) {
  if constexpr (First == N - 1) {
    return c[First];
  } else {
    return fma<Fma>(polynomial<Fma, First + 1>(x, c), x, c[First]);
  }
}

// The same, even and odd powers apart: two chains of half the length, for long polynomials.
template <bool Fma, int First, class T, int N>
TC_INLINE T every_other(T square, const T (&c)[N]) {
  if constexpr (First + 2 >= N) {
    return c[First];
  } else {
    return fma<Fma>(every_other<Fma, First + 2>(square, c), square, c[First]);
  }
}
template <bool Fma, class T, int N>
TC_INLINE T in_two_chains(T x, const T (&c)[N]) {
  const T square = x * x;
  return fma<Fma>(every_other<Fma, 1>(square, c), x, every_other<Fma, 0>(square, c));
}

template <class T>
TC_INLINE T power_of_2(typename Format<T>::Int n) {
  using Bits = std::make_unsigned_t<typename Format<T>::Int>;  // which may overflow: what is made of it is not used then
  return bit_cast<T>(static_cast<Bits>((static_cast<Bits>(n) + Bits(Format<T>::bias)) << Format<T>::mantissa));
}

// x = n·ln 2 + r, |r| <= ln(2)/2.
template <bool Fma, class T>
TC_INLINE typename Format<T>::Int reduce(T x, T& r) {
  using F = Format<T>;
  const T shifted = fma<Fma>(x, F::log2e, F::round_to_int);
  const T n = shifted - F::round_to_int;
  r = fma<Fma>(n, -F::ln2_low, fma<Fma>(n, -F::ln2_high, x));
  using Bits = std::make_unsigned_t<typename F::Int>;
  return static_cast<typename F::Int>(bit_cast<Bits>(shifted) - bit_cast<Bits>(F::round_to_int));
}

// (eʳ − 1 − r)/r² for |r| <= ln(2)/2.
template <bool Fma>
TC_INLINE float exp_rest(float r) {  // relative to eʳ: 8e-9
  constexpr float c[] = {0.5f, 0.1666657338f, 0.04166655011f, 0.008363773874f, 0.001392692661f};
  return polynomial<Fma>(r, c);
}
template <bool Fma>
TC_INLINE double exp_rest(double r) {  // 2e-19
  constexpr double c[] = {
      0x1.0p-1,               0x1.5555555555557p-3,   0x1.5555555555556p-5,   0x1.111111110ff87p-7,
      0x1.6c16c16c16212p-10,  0x1.a01a01aca0134p-13,  0x1.a01a01a741b3cp-16,  0x1.71ddffef9e7b1p-19,
      0x1.27e4da1a3bf04p-22,  0x1.af52906239de4p-26,  0x1.1f75aba0b1e2ep-29};
  return polynomial<Fma>(r, c);
}

template <bool Fma, class T>
TC_INLINE T exp(T x) {
  using F = Format<T>;
  T r;
  const auto n = reduce<Fma>(x, r);
  const T e = fma<Fma>(r * r, exp_rest<Fma>(r), r) + T(1);
  const auto half = n >> 1;  // in two factors: 2ⁿ itself may overflow, or be subnormal
  T result = e * power_of_2<T>(half) * power_of_2<T>(n - half);
  // At the end, beside the chain of operations and not before it. A NaN stays.
  result = x > F::exp_highest ? infinity<T> : result;
  return x < F::exp_lowest ? T(0) : result;
}

// The same for x <= 0, with 0 for what is below the least normal number: a third less to do.
template <bool Fma, class T>
TC_INLINE T exp_of_negative(T x) {
  T r;
  const auto n = reduce<Fma>(x, r);
  const T e = fma<Fma>(r * r, exp_rest<Fma>(r), r) + T(1);
  return x < Format<T>::exp_least_normal ? T(0) : e * power_of_2<T>(n);
}

template <bool Fma, class T>
TC_INLINE T expm1(T x) {
  using F = Format<T>;
  const T low = std::is_same_v<T, float> ? T(-20) : T(-40);  // −1 from there on
  T r;
  const auto n = reduce<Fma>(x, r);
  const T p = fma<Fma>(r * r, exp_rest<Fma>(r), r);
  const T s = power_of_2<T>(n - 1);  // 2·(s·p + (s − ½)) = 2ⁿ·eʳ − 1
  T result = T(2) * fma<Fma>(s, p, s - T(0.5));
  result = x > F::exp_highest ? infinity<T> : result;
  result = x < low ? T(-1) : result;
  return magnitude(x) < T(1e-18) ? x : result;
}

// (2·artanh(s) − 2s)/(s·z), z = s²; s = f/(2 + f), 1 + f in [√½, √2].
template <bool Fma>
TC_INLINE float log_rest(float z) {
  constexpr float c[] = {0.6666668618f, 0.39988319f, 0.2960069107f};
  return polynomial<Fma>(z, c);
}
template <bool Fma>
TC_INLINE double log_rest(double z) {
  constexpr double c[] = {
      0x1.5555555555558p-1, 0x1.99999999949d0p-2, 0x1.2492492eefe17p-2, 0x1.c71c61a40ddfbp-3,
      0x1.74630f3e18fa7p-3, 0x1.39f2bba043e06p-3, 0x1.2be6c99b32a48p-3};
  return polynomial<Fma>(z, c);
}

// log(x) + c for x > 0, where c is small: what rounding has cut off from x, divided by x.
template <bool Fma, class T>
TC_INLINE T log_of_normal(T x, T n, T c) {
  using F = Format<T>;
  using Int = typename F::Int;
  const Int root_half = bit_cast<Int>(T(0x1.6a09e667f3bcdp-1));
  const Int bits = bit_cast<Int>(x) - root_half;
  const Int exponent = bits >> F::mantissa;
  const T f = bit_cast<T>(static_cast<Int>((bits & ((Int(1) << F::mantissa) - 1)) + root_half)) - T(1);
  // The exponent as a number, by adding it to the bits of a large one: converting int64 is not vectorised on AVX2.
  n = bit_cast<T>(static_cast<Int>(exponent + bit_cast<Int>(F::round_to_int))) - F::round_to_int - n;
  const T s = f / (T(2) + f);
  const T z = s * s;
  const T half_square = T(0.5) * f * f;
  const T rest = s * fma<Fma>(log_rest<Fma>(z), z, half_square);  // log(1 + f) = f − f²/2 + s·(f²/2 + z·R(z))
  const T low = fma<Fma>(n, F::ln2_low, c);
  return fma<Fma>(n, F::ln2_high, f - (half_square - (rest + low)));
}

// What the formula above makes of x <= 0, of infinity and of NaN.
template <class T>
TC_INLINE T log_of_special(T x, T log) {
  log = x == infinity<T> ? x : log;
  log = x == T(0) ? -infinity<T> : log;
  return (x < T(0)) | (x != x) ? not_a_number<T> : log;
}

template <bool Fma, class T>
TC_INLINE T log(T x) {
  using F = Format<T>;
  const bool tiny = x < F::least_normal;
  const T by = tiny ? power_of_2<T>(F::mantissa + 1) : T(1), n = tiny ? T(F::mantissa + 1) : T(0);
  return log_of_special(x, log_of_normal<Fma>(x * by, n, T(0)));
}

template <bool Fma, class T>
TC_INLINE T log1p(T x) {
  const T u = T(1) + x;  // never subnormal
  const T of_x = u - T(1);
  const T cut = (T(1) - (u - of_x)) + (x - of_x);  // 1 + x = u + cut: Knuth
  const T log = log_of_special(u, log_of_normal<Fma>(u, T(0), cut / u));
  return magnitude(x) < T(1e-18) ? x : log;  // −0 too
}

template <bool Fma, class T>
TC_INLINE T sigmoid(T x) {
  return T(1) / (T(1) + exp<Fma>(-x));
}

// tanh(x)/x − 1 over z = x², for |x| <= 0.625.
template <bool Fma>
TC_INLINE float tanh_rest(float z) {
  constexpr float c[] = {-0.3333332894f, 0.1333276974f, -0.05385090958f, 0.020997179f, -0.006096714166f};
  return polynomial<Fma>(z, c);
}
template <bool Fma>
TC_INLINE double tanh_rest(double z) {
  constexpr double c[] = {
      -0x1.5555555555555p-2,  0x1.111111111110dp-3,   -0x1.ba1ba1ba1aff0p-5,  0x1.664f488279254p-6,
      -0x1.226e354ddfe9ap-7,  0x1.d6d3cc561e69ap-9,   -0x1.7da2fd76a3cf1p-10, 0x1.355204d5878bep-11,
      -0x1.f4fccb8116f0ap-13, 0x1.92d3563b405ccp-14,  -0x1.370efd62e9535p-15, 0x1.99b26df70cccdp-17,
      -0x1.47559de55bc91p-19};
  return polynomial<Fma>(z, c);
}

template <bool Fma, class T>
TC_INLINE T tanh(T x) {
  const T a = magnitude(x), z = x * x;
  const T small = fma<Fma>(x * z, tanh_rest<Fma>(z), x);
  const T large = T(1) - T(2) / (T(1) + exp<Fma>(T(2) * a));  // of |x|
  const T result = with_sign(a < T(0.625) ? small : large, x);  // the sum above makes 0 of −0
  return x != x ? x : result;
}

// (1 + 2a)·exp(a²)·erfc(a) of t = (a − k)/(a + k), a >= 0: Shepherd, Laframboise 1981, doi:10.1090/S0025-5718-1981-0595058-X.
template <class T>
struct Erfc;
template <>
struct Erfc<float> {  // relative: 1e-8
  static constexpr float k = 2, largest = 10.2f;
  static constexpr float c[] = {
      1.276978391f,    -0.0927639157f, -0.1660313243f, 0.1640535936f,    -0.05420541611f,  -0.008047373481f,
      0.00863850709f,  0.00128016806f, -0.001250953712f, -0.000370280981f, 2.299568454e-5f};
  static constexpr float erf[] = {  // erf(x)/x of x², |x| <= 1
      1.128379166f, -0.3761262667f, 0.1128359472f, -0.02685421201f, 0.005189087423f, -0.0008016864287f, 7.875875063e-5f};
};
template <>
struct Erfc<double> {  // relative: 2e-18
  static constexpr double k = 3.75, largest = 27.5;
  static constexpr double c[] = {
      0x1.3ccda0b5d5dc2p+0,   -0x1.1f367683f89a7p-3,  0x1.d5f29481596c2p-9,   0x1.510169d096820p-4,
      -0x1.bda9309a27bdap-4,  0x1.7a14188a99c7cp-4,   -0x1.e0d0fa6e28960p-5,  0x1.d0b0037da7358p-6,
      -0x1.3f603c2bbee97p-7,  0x1.cc3a0e50fcd7fp-10,  0x1.33fb1d1502b40p-12,  -0x1.303fa4af46391p-12,
      0x1.b14551a4cafb2p-15,  0x1.778caaee21353p-16,  -0x1.80143d25934a5p-17, -0x1.05b171a5364f7p-20,
      0x1.d752841b89653p-20,  -0x1.ce179013f6883p-25, -0x1.1a8b11af503efp-22, 0x1.39c750a393018p-26,
      0x1.5f6cf4be694c6p-25,  0x1.a54d5bc370666p-33,  -0x1.5b6445fecfd7cp-28, -0x1.10b7474af9eb2p-30};
  static constexpr double erf[] = {
      0x1.20dd750429b6dp+0,   -0x1.812746b0379e6p-2,  0x1.ce2f21a042b30p-4,   -0x1.b82ce31284e00p-6,
      0x1.565bcd0dbaa38p-8,   -0x1.c02db3dac435fp-11, 0x1.f9a321d5b8e1ep-14,  -0x1.f4d1e3183f7aep-17,
      0x1.b9df224ca4b97p-20,  -0x1.5f1ecb6f0764cp-23, 0x1.f7b4bf3b13964p-27,  -0x1.389d4f2641625p-30,
      0x1.05ffd737fb32ep-34};
};

// a·a − s, exactly, for the s that a·a was rounded to.
template <bool Fma>
TC_INLINE float rounded_off(float a, float s) {
  if constexpr (Fma) return __builtin_fmaf(a, a, -s);
  return static_cast<float>(static_cast<double>(a) * a - s);
}
template <bool Fma>
TC_INLINE double rounded_off(double a, double s) {
  if constexpr (Fma) return __builtin_fma(a, a, -s);
  const double split = 134217729.0 * a, high = split - (split - a), low = a - high;  // Dekker
  return ((high * high - s) + 2.0 * high * low) + low * low;
}

// erfc(a) for a >= 0 or NaN. The exponential is that of −a·a itself: a formula that needs it too shares it.
template <bool Fma, class T>
TC_INLINE T erfc_of_positive(T a) {
  using E = Erfc<T>;
  const T s = a * a;
  const T e = exp<Fma>(-s);
  const T up = a + E::k, by = fma<Fma>(T(2), a, T(1));
  const T inverse = T(1) / (up * by);  // both quotients by one division
  const T q = in_two_chains<Fma>((a - E::k) * (by * inverse), E::c) * (up * inverse);
  const T result = fma<Fma>(-e * rounded_off<Fma>(a, s), q, e * q);  // e⁻ˢ⁻ᵈ = e⁻ˢ·(1 − d)
  return a > E::largest ? T(0) : result;
}

template <bool Fma, class T>
TC_INLINE T erfc(T x) {
  const T tail = erfc_of_positive<Fma>(magnitude(x));
  const T result = x < T(0) ? T(2) - tail : tail;
  if constexpr (std::is_same_v<T, double>) {  // next to 0 the long polynomial is off by 5 units, and this by 1
    const T near = fma<Fma>(-x, polynomial<Fma>(static_cast<T>(x * x), Erfc<T>::erf), T(1));
    return magnitude(x) < T(0.5) ? near : result;
  }
  return result;
}

template <bool Fma, class T>
TC_INLINE T erf(T x) {
  const T a = magnitude(x);
  const T small = x * polynomial<Fma>(static_cast<T>(x * x), Erfc<T>::erf);
  const T large = with_sign(T(1) - erfc_of_positive<Fma>(a), x);
  return a < T(1) ? small : large;
}

template <bool Fma, class T>
TC_INLINE T abs(T x) {
  return magnitude(x);
}
template <bool Fma, class T>
TC_INLINE T neg(T x) {
  return -x;
}
template <bool Fma, class T>
TC_INLINE T sqrt(T x) {
  return square_root(x);
}
template <bool Fma, class T>
TC_INLINE T rsqrt(T x) {
  return T(1) / square_root(x);
}
template <bool Fma, class T>
TC_INLINE T sgn(T x) {  // of NaN it is 0, as torch's
  return x > T(0) ? T(1) : (x < T(0) ? T(-1) : T(0));
}

// One number at a time.
template <bool Fma, class T>
TC_INLINE T floor(T x) {
  return std::floor(x);
}
template <bool Fma, class T>
TC_INLINE T sin(T x) {
  return std::sin(x);
}
template <bool Fma, class T>
TC_INLINE T cos(T x) {
  return std::cos(x);
}
template <bool Fma, class T>
TC_INLINE T pow(T x, T y) {
  return std::pow(x, y);
}

}  // namespace math
}  // namespace torchcalc
