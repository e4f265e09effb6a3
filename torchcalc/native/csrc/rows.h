// Cross-entropy of rows of logits: one pass over them forward, one backward, and between the two what losses/cross_entropy.py
// calls the log-sum-exp, in two numbers for each row: the softmax itself is never stored.
//
// The logits are (outer, classes, inner), as they lie: the classes of a sample side by side, or the samples of a class, as
// those of (N, C, *) are by default.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "norms.h"
#include "pointwise.h"

namespace torchcalc {

struct CrossEntropy {
  const char* logits = nullptr;
  Number number = Number::float32;
  int64_t outer = 0, classes = 0, inner = 0;
  int64_t of_outer = 0, of_class = 0, of_inner = 0;  // strides, in elements

  const int64_t* target = nullptr;    // the class of each sample, or
  const char* probabilities = nullptr;  // as the logits, which lie alike
  const void* weight = nullptr;         // of each class, float or double as the logits are computed with; null: 1
  double smoothing = 0;
  double z_loss = 0;  // times (log Σ e^x)² of each sample is added to its loss
  int64_t ignored = -100;

  void* statistics = nullptr;  // for each sample its largest logit m, and log Σ e^(x − m), computed as above; then Σ q

  int64_t samples() const { return outer * inner; }
  int64_t at(int64_t sample) const { return sample / inner * of_outer + sample % inner * of_inner; }
};

// Of this file, of norms.h and dropout.h.
struct RowKernels {
  // Writes the statistics, and each sample's loss. False, and nothing of use written, where a target is not a class.
  bool (*cross_entropy)(const CrossEntropy&, double* losses);
  // grad = ∂ℓ/∂logits·r, where r is share[sample], or scale for every sample if share is null. grad lies as the logits.
  void (*cross_entropy_backward)(const CrossEntropy&, const void* share, double scale, char* grad);
  void (*norm)(const Norm&, char* y, char* sum);
  void (*norm_backward)(const Norm&, const NormGradient&);
  void (*dropout)(Number, int64_t n, const char* x, const uint8_t* keep, double p, char* y);
};

extern const RowKernels row_kernels;

}  // namespace torchcalc
