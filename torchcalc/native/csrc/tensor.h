// Tensors as kernels see them, over torch's stable ABI alone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace torchcalc {

using torch::stable::Tensor;

// An argument `Tensor[]`. torch hands over one new reference per element; we hold the bare handles, because wrapping each in
// a torch::stable::Tensor (a shared_ptr) costs more than all checks on it.
class TensorList {
 public:
  TensorList() = default;
  explicit TensorList(StableListHandle list);
  TensorList(TensorList&& other) noexcept : handles_(std::move(other.handles_)) { other.handles_.clear(); }
  TensorList& operator=(TensorList&& other) noexcept {
    handles_.swap(other.handles_);
    return *this;
  }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;
  ~TensorList();

  int64_t size() const { return static_cast<int64_t>(handles_.size()); }
  AtenTensorHandle operator[](int64_t i) const { return handles_[static_cast<size_t>(i)]; }
  void append(TensorList&& other);

 private:
  std::vector<AtenTensorHandle> handles_;
};

enum class Dtype : int8_t { float32, float64, bfloat16, float16 };

// A dense CPU tensor: its elements fill [data, data + numel) without gaps or overlaps, in the order that the strides give.
struct Dense {
  char* data;
  int64_t numel;
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;
  Dtype dtype;

  int64_t bytes() const;
  bool same_layout(const Dense& other) const;  // equal sizes and, wherever there is more than one element, strides
};

enum class Access { read, write };

// False, without a word on stderr, for all that is not plain: another device, sparse, another dtype, gaps, storage freed.
bool describe(AtenTensorHandle tensor, Access access, Dense& out);

// A one-element CPU tensor of float32 or float64 (torch's `step`, `grad_scale`).
struct Scalar {
  void* data = nullptr;
  bool is_double = false;

  double get() const { return is_double ? *static_cast<double*>(data) : static_cast<double>(*static_cast<float*>(data)); }
  void set(double x) const {
    if (is_double) {
      *static_cast<double*>(data) = x;
    } else {
      *static_cast<float*>(data) = static_cast<float>(x);
    }
  }
};

bool describe(AtenTensorHandle tensor, Access access, Scalar& out);

// Boxing: a C++ function as torch calls it, `TensorList` included.
template <class T>
struct Unbox {
  static T call(StableIValue value) { return torch::stable::detail::to<T>(value); }
};
template <>
struct Unbox<TensorList> {
  static TensorList call(StableIValue value) { return TensorList(torch::stable::detail::to<StableListHandle>(value)); }
};

template <class R>
void box_result(StableIValue* stack, R result) {
  stack[0] = torch::stable::detail::from(result);
}
template <class... R>
void box_result(StableIValue* stack, std::tuple<R...> results) {
  size_t i = 0;
  std::apply([&](auto... r) { ((stack[i++] = torch::stable::detail::from(r)), ...); }, results);
}

template <class F>
struct Boxed;
template <class R, class... A>
struct Boxed<R (*)(A...)> {
  template <R (*function)(A...), size_t... I>
  static void call(StableIValue* stack, std::index_sequence<I...>) {
    std::tuple<std::decay_t<A>...> arguments{Unbox<std::decay_t<A>>::call(stack[I])...};
    box_result(stack, function(std::move(std::get<I>(arguments))...));
  }
  template <R (*function)(A...)>
  static void boxed(StableIValue* stack, uint64_t, uint64_t) {
    call<function>(stack, std::index_sequence_for<A...>{});
  }
};

#define TC_BOX(function) (&torchcalc::Boxed<decltype(&(function))>::template boxed<&(function)>)

}  // namespace torchcalc
