// ‖g‖² over all gradients in one read, and whether every element is finite.
//
// Squares of float32, bfloat16 and float16 numbers are exact in double and cannot overflow, so the sum is finite exactly if
// all elements are. Partial sums belong to fixed blocks of elements and fixed lanes in them and are added in order: the
// result is the same bits for any number of threads and any instruction set.
#include <cmath>

#include "isa.h"
#include "number.h"
#include "optim.h"

namespace torchcalc {
namespace {

struct NormItem {
  const char* grad;
  double* partial;  // one per block
  int64_t numel;
};
struct NormHyper {};

constexpr int64_t block = 8192;
constexpr int lanes = 32;
static_assert(block % unit == 0 && block % lanes == 0);

template <class G>
struct NormKernel {
  using Item = NormItem;
  using Hyper = NormHyper;

  // `begin` is a multiple of `block`; `end` is one, or the tensor's end.
  template <bool Fma>
  static TC_INLINE void run(const Item& item, const Hyper&, int64_t begin, int64_t end) {
    const G* const g = reinterpret_cast<const G*>(item.grad);
    for (; begin < end; begin += block) {
      double sums[lanes] = {};
      const int64_t stop = end - begin < block ? end : begin + block;
      int64_t i = begin;
      for (; i + lanes <= stop; i += lanes) {
        for (int l = 0; l < lanes; ++l) {
          const double x = static_cast<double>(load(g[i + l]));
          sums[l] += x * x;
        }
      }
      for (int l = 0; i < stop; ++i, ++l) {
        const double x = static_cast<double>(load(g[i]));
        sums[l] += x * x;
      }
      for (int half = lanes / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
      }
      item.partial[begin / block] = sums[0];
    }
  }
};

using Kernel = void (*)(const NormItem&, const NormHyper&, int64_t, int64_t);

// Only float64 gradients need this: their squares overflow from 1e154 on.
bool all_finite(const Dense& g) {
  const double* const x = reinterpret_cast<const double*>(g.data);
  for (int64_t i = 0; i < g.numel; ++i) {
    if (!std::isfinite(x[i])) return false;
  }
  return true;
}

std::tuple<bool, double, bool> grad_norm(TensorList grads) {
  const std::tuple<bool, double, bool> refused(false, 0.0, false);
  const int64_t n = grads.size();
  std::vector<Dense> dense(static_cast<size_t>(n));
  std::vector<int64_t> block_ends;  // of each gradient, in blocks from the first gradient's start
  block_ends.reserve(dense.size());
  int64_t blocks = 0;
  for (int64_t i = 0; i < n; ++i) {
    Dense& g = dense[static_cast<size_t>(i)];
    if (!describe(grads[i], Access::read, g)) return refused;
    blocks += (g.numel + block - 1) / block;
    block_ends.push_back(blocks);
  }
  std::vector<double> partial(static_cast<size_t>(blocks));
  std::vector<NormItem> items;
  std::vector<Kernel> kernels;
  items.reserve(dense.size());
  kernels.reserve(dense.size());
  for (size_t i = 0; i < dense.size(); ++i) {
    items.push_back({dense[i].data, partial.data() + (i == 0 ? 0 : block_ends[i - 1]), dense[i].numel});
    switch (dense[i].dtype) {
      case Dtype::float32:
        kernels.push_back(variant<NormKernel<float>>());
        break;
      case Dtype::float64:
        kernels.push_back(variant<NormKernel<double>>());
        break;
      case Dtype::bfloat16:
        kernels.push_back(variant<NormKernel<BFloat16>>());
        break;
      case Dtype::float16:
        kernels.push_back(variant<NormKernel<Float16>>());
        break;
    }
  }
  Partition partition(n, block);
  for (const Dense& g : dense) partition.append(g.numel);
  partition.for_each_slice(40 * 1024, [&](int64_t i, int64_t begin, int64_t end) {
    kernels[static_cast<size_t>(i)](items[static_cast<size_t>(i)], NormHyper{}, begin, end);
  });

  double sum = 0;
  for (double x : partial) sum += x;
  bool finite = std::isfinite(sum);
  if (!finite) {
    finite = true;
    for (size_t i = 0; i < dense.size() && finite; ++i) {
      if (dense[i].dtype == Dtype::float64) {
        finite = all_finite(dense[i]);
      } else {
        const int64_t first = i == 0 ? 0 : block_ends[i - 1];
        for (int64_t b = first; b < block_ends[i]; ++b) finite = finite && std::isfinite(partial[static_cast<size_t>(b)]);
      }
    }
  }
  return {true, sum, finite};
}

}  // namespace
}  // namespace torchcalc

STABLE_TORCH_LIBRARY_FRAGMENT(torchcalc, m) {
  m.def("grad_norm(Tensor[] grads) -> (bool supported, float squared, bool finite)");
}

STABLE_TORCH_LIBRARY_IMPL(torchcalc, CompositeExplicitAutograd, m) {
  m.impl("grad_norm", TC_BOX(torchcalc::grad_norm));
}
