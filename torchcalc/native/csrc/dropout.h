// y = x·keep/(1 − p): dropout, forward and backward.
#pragma once

#include <cstdint>

#include "pointwise.h"

namespace torchcalc {

// keep has a byte for each of n numbers, 0 or 1.
void dropout(Number number, int64_t n, const char* x, const uint8_t* keep, double p, char* y);

}  // namespace torchcalc
