// What kernels of every optimizer take.
#pragma once

#include <cstdint>

namespace torchcalc {

inline constexpr int max_slots = 3;  // tensors of state for each parameter

struct StepHyper {
  double factor;  // of the gradient: ± grad_coef/grad_scale
  uint64_t seed;
};

}  // namespace torchcalc
