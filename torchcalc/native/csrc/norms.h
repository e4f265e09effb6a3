// rms_norm and layer_norm: one pass over memory forward and one backward, a row at a time, which stays in the cache between
// the sums over it and the products with them. The equations are those of layers/rms_norm.py and layers/layer_norm.py.
#pragma once

#include <cstdint>

#include "pointwise.h"

namespace torchcalc {

// Numbers of a row lie side by side; of_x is from one row to the next, in elements.
struct Norm {
  const char* x = nullptr;
  int64_t of_x = 0;
  const char* residual = nullptr;  // what is added to x first, or null
  int64_t of_residual = 0;
  const void* weight = nullptr;  // n numbers, float or double as the rows are computed with; null: 1
  const void* bias = nullptr;    // likewise; null: 0
  void* mean = nullptr;          // of each row, computed as above; null: rms_norm
  void* rstd = nullptr;          // 1/rms of each row, less its mean if that is there
  Number number = Number::float32;
  int64_t rows = 0, n = 0;
  double eps = 0;
};

// What comes back: the gradient of y, and that of x + residual by other ways, or null.
struct NormGradient {
  const char* g = nullptr;
  int64_t of_g = 0;
  const char* added = nullptr;
  int64_t of_added = 0;
  char* grad = nullptr;         // of x, or null; dense
  void* grad_weight = nullptr;  // as weight, or null; the same bits for any number of threads
  void* grad_bias = nullptr;    // likewise
};

// Writes the rows of y, of x + residual where that is given, dense, and the statistics.
void norm(const Norm&, char* y, char* sum);
void norm_backward(const Norm&, const NormGradient&);

}  // namespace torchcalc
