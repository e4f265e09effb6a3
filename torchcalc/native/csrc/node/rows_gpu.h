// Cross-entropy on a GPU: (rows, classes) and a class for each row, by the kernels of row_kernels.py, which Python has told.
#pragma once

#include <ATen/ops/empty.h>

#include <map>
#include <tuple>

#include "gpu.h"
#include "rows.h"

namespace {

// What there are kernels of, in row_kernels.py's words: type, device, block, even, whole, weighted,
// smoothed, by_row.
using RowKind = std::tuple<at::ScalarType, int, int64_t, bool, bool, bool, bool, bool>;

struct RowKernels {
  torchcalc::Handle forward, sum, backward;
};

class AllRowKernels {
 public:
  static AllRowKernels& instance() {
    static AllRowKernels* const the = new AllRowKernels;
    return *the;
  }

  void enter(const RowKind& kind, const RowKernels& kernels) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kernels_[kind] = kernels;
  }

  std::optional<RowKernels> find(const RowKind& kind) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = kernels_.find(kind);
    return found == kernels_.end() ? std::nullopt : std::optional<RowKernels>(found->second);
  }

 private:
  std::mutex mutex_;
  std::map<RowKind, RowKernels> kernels_;
};

constexpr int64_t longest_block = 4096;  // as in row_kernels.py

// Logits as the kernels are told of them.
struct GpuRows {
  Tensor x;
  int64_t rows, classes, stride, block = 16;
  bool even, whole;

  explicit GpuRows(const Tensor& logits) : x(logits), rows(x.size(0)), classes(x.size(1)), stride(x.stride(0)) {
    while (block < classes && block < longest_block) block *= 2;
    even = stride % 16 == 0 && torchcalc::Gpu::is_aligned(x);
    whole = classes % 16 == 0;
  }

  std::optional<RowKernels> kernels(bool weighted, const Ways& ways) const {
    if (!torchcalc::Gpu::instance().is_ready() || !torchcalc::Gpu::is_current(x)) return std::nullopt;
    const int device = x.device().index();
    return AllRowKernels::instance().find(
        {x.scalar_type(), device, block, even, whole, weighted, ways.smoothing != 0, ways.by_row()});
  }

  // Sizes that are known to be multiples of 16 are given in sixteens.
  void add_forward(torchcalc::Arguments& arguments, const Ways& ways) const {
    for (const int64_t n : {rows, classes / (whole ? 16 : 1), stride / (even ? 16 : 1)}) arguments.add(n);
    add_ways(arguments, ways);
  }

  void add_backward(torchcalc::Arguments& arguments, const Ways& ways) const {
    const int64_t unit = even && whole ? 16 : 1;
    for (const int64_t n : {rows, classes / (whole ? 16 : 1), stride / unit, classes / unit}) arguments.add(n);
    add_ways(arguments, ways);
  }

 private:
  void add_ways(torchcalc::Arguments& arguments, const Ways& ways) const {
    arguments.add(ways.ignored);
    for (const double p : {1 - ways.smoothing, ways.smoothing / static_cast<double>(classes), ways.z_loss}) {
      x.scalar_type() == at::kDouble ? arguments.add(p) : arguments.add(static_cast<float>(p));
    }
  }
};

bool gpu_takes(const Tensor& x, const Tensor& target, const Tensor& weight, const Ways& ways) {
  if (x.dim() != 2 || x.numel() == 0 || x.stride(1) != 1 || !(ways.smoothing >= 0 && ways.smoothing <= 1)) return false;
  if (ways.reduction < none || ways.reduction > wide) return false;
  if (!is_array(target) || target.scalar_type() != at::kLong || target.device() != x.device() || target.dim() != 1 ||
      target.size(0) != x.size(0) || !target.is_contiguous()) {
    return false;
  }
  return !weight.defined() ||
      (weight.dim() == 1 && weight.size(0) == x.size(1) && weight.scalar_type() == x.scalar_type() &&
       weight.device() == x.device() && weight.stride(0) == 1 && !weight.requires_grad());
}

// The loss; and what backward needs, in one tensor: (3, rows) statistics, then losses and shares, which it does not need, then
// 1/N.
std::optional<Tensor> gpu_cross_entropy(
    const Tensor& x, const Tensor& target, const Tensor& weight, const Ways& ways, Tensor& kept) {
  if (!gpu_takes(x, target, weight, ways)) return std::nullopt;
  const GpuRows rows(x);
  const auto kernels = rows.kernels(weight.defined(), ways);
  if (!kernels) return std::nullopt;
  const at::ScalarType wide_type = computed(x.scalar_type());
  const int64_t n = rows.rows;
  kept = at::empty({5 * n + 1}, x.options().dtype(wide_type));
  char* const base = static_cast<char*>(kept.mutable_data_ptr());
  const auto part = [&](int64_t k) { return static_cast<void*>(base + k * n * static_cast<int64_t>(kept.element_size())); };
  torchcalc::Gpu& gpu = torchcalc::Gpu::instance();

  torchcalc::Arguments forward;
  forward.add(x.const_data_ptr());
  forward.add(target.const_data_ptr());
  if (weight.defined()) forward.add(weight.const_data_ptr());
  for (const int64_t k : {3, 4, 0}) forward.add(part(k));  // losses, shares, statistics
  rows.add_forward(forward, ways);
  gpu.launch(kernels->forward, n, forward);

  if (ways.by_row()) {
    kept.narrow(0, 5 * n, 1).fill_(1);
    return kept.narrow(0, 3 * n, n).to(ways.reduction == wide ? wide_type : x.scalar_type(), false, /*copy=*/true);
  }
  Tensor loss = at::empty({}, x.options());
  torchcalc::Arguments sum;
  for (const int64_t k : {3, 4}) sum.add(part(k));
  sum.add(loss.mutable_data_ptr());
  sum.add(part(5));
  sum.add(n);
  sum.add(static_cast<int32_t>(ways.reduction == mean));
  gpu.launch(kernels->sum, 1, sum);
  return loss;
}

// The gradient; undefined where there is no kernel for it.
Tensor gpu_cross_entropy_gradient(
    const Tensor& incoming, const Tensor& x, const Tensor& target, const Tensor& weight, const Ways& ways, const Tensor& kept) {
  const GpuRows rows(x);
  const auto kernels = rows.kernels(weight.defined(), ways);
  if (!kernels) return {};
  const Tensor g = incoming.to(kept.scalar_type()).contiguous();
  Tensor grad = at::empty({rows.rows, rows.classes}, x.options());
  const char* const base = static_cast<const char*>(kept.const_data_ptr());
  torchcalc::Arguments backward;
  backward.add(x.const_data_ptr());
  backward.add(grad.mutable_data_ptr());
  backward.add(target.const_data_ptr());
  if (weight.defined()) backward.add(weight.const_data_ptr());
  backward.add(base);
  backward.add(base + 5 * rows.rows * static_cast<int64_t>(kept.element_size()));
  backward.add(g.const_data_ptr());
  rows.add_backward(backward, ways);
  const int64_t blocks = (rows.classes + rows.block - 1) / rows.block;
  torchcalc::Gpu::instance().launch(kernels->backward, rows.rows * blocks, backward);
  return grad;
}

// enter_rows(dtype, device, block, even, whole, weighted, smoothed, by_row, forward, sum, backward): handles are (function, threads,
// shared).
PyObject* py_enter_rows(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject* dtype;
  int device, even, whole, weighted, smoothed, by_row;
  long long block, functions[3];
  RowKernels kernels;
  torchcalc::Handle* const handles[] = {&kernels.forward, &kernels.sum, &kernels.backward};
  if (!PyArg_ParseTuple(
          args, "OiLppppp(LII)(LII)(LII)", &dtype, &device, &block, &even, &whole, &weighted, &smoothed, &by_row, &functions[0],
          &handles[0]->threads, &handles[0]->shared, &functions[1], &handles[1]->threads, &handles[1]->shared, &functions[2],
          &handles[2]->threads, &handles[2]->shared)) {
    return nullptr;
  }
  for (int i = 0; i < 3; ++i) handles[i]->function = reinterpret_cast<void*>(functions[i]);
  const at::ScalarType type = reinterpret_cast<THPDtype*>(dtype)->scalar_type;
  AllRowKernels::instance().enter({type, device, block, even != 0, whole != 0, weighted != 0, smoothed != 0, by_row != 0}, kernels);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

}  // namespace
