// Kernels made from the recording of an optimizer's rule (torchcalc/formula/rule.py): what a generated file needs.
//
// A generated struct R has
//
//     static constexpr int64_t hash;                         // of the recording: how a step finds it
//     static constexpr int slots, parameters, uniforms;
//     template <class T>                                     // numbers that are the same for all elements of a tensor
//     static void uniform(const double* parameters, double* uniforms);
//     template <bool Fma, class T>                           // one loop over [begin, end)
//     static TC_INLINE void run(const RuleSlice<T>& x, int64_t begin, int64_t end);
//
// and is compiled for float and double alone: half numbers are converted in blocks, outside of it. Nothing of torch is included
// here: its headers would take longer to compile than the loops.
#pragma once

#include <cmath>

#include "isa.h"
#include "number.h"
#include "step.h"

namespace torchcalc {

template <class T>
struct RuleSlice {
  T* p;
  const T* g;
  T* s[max_slots];
  const double* u;
  T factor;  // of the gradient
};

struct Rule {
  template <class T>
  using Loop = void (*)(const RuleSlice<T>&, const StepHyper&, int64_t begin, int64_t end);

  int slots, parameters, uniforms;
  void (*uniform_float)(const double*, double*);
  void (*uniform_double)(const double*, double*);
  Loop<float> (*loop_float)();
  Loop<double> (*loop_double)();
};

void add_rule(int64_t hash, const Rule& rule);

template <class R, class T>
struct RuleKernel {
  using Item = RuleSlice<T>;
  using Hyper = StepHyper;

  template <bool Fma>
  static TC_INLINE void run(const Item& x, const Hyper&, int64_t begin, int64_t end) {
    R::template run<Fma, T>(x, begin, end);
  }
};

// A static object of this type makes the rule known when the library is loaded.
template <class R>
struct AddRule {
  AddRule() {
    add_rule(
        R::hash, {R::slots, R::parameters, R::uniforms, R::template uniform<float>, R::template uniform<double>,
                  variant<RuleKernel<R, float>>, variant<RuleKernel<R, double>>});
  }
};

namespace math {

template <bool Fma, class T>
TC_INLINE T sqrt(T x) {
  return square_root(x);
}

template <bool Fma, class T>
TC_INLINE T abs(T x) {
  return x < 0 ? -x : x + 0;  // of −0 too
}

template <bool Fma, class T>
TC_INLINE T sgn(T x) {
  return T(x > 0) - T(x < 0);
}

}  // namespace math
}  // namespace torchcalc
