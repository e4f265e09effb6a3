// Kernels on a GPU: Triton has compiled them, Python has told their handles, and they are launched here by the driver itself.
// A launch from Python costs 20 µs and more with what is around it, as much as all of torch's call.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace torchcalc {

// Which kernel of a formula: its value, its sum over all elements in one program or in several, the gradient of an input
// (product + i), that of a reduced loss (loss_product + i), and all gradients with the value.
enum Kind : int { value = 0, loss = 1, partial = 2, whole = 3, product = 8, loss_product = 16 };

// What the driver launches.
struct Handle {
  void* function = nullptr;  // CUfunction
  unsigned threads = 0, shared = 0;
};

// The arguments of a kernel, in its order.
class Arguments {
 public:
  template <class T>
  void add(T x) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    TORCH_CHECK(count_ < most, "torchcalc: a kernel has more arguments than ", most);
    std::memcpy(&values_[count_], &x, sizeof(T));
    addresses_[count_] = &values_[count_];
    ++count_;
  }

  void** addresses() { return addresses_; }

 private:
  static constexpr size_t most = 64;
  uint64_t values_[most];
  void* addresses_[most];
  size_t count_ = 0;
};

// A kernel of a formula.
struct Launch : Handle {
  int64_t block = 0;           // elements of a program
  std::vector<double> given;   // the formula's parameters that `numbers` were made from
  std::vector<double> numbers; // what its elements use, computed from them
};

// The driver's stream; a stream tells it from torch 2.11 on.
template <class Stream>
inline constexpr bool tells_handle = requires(const Stream& stream) { stream.native_handle(); };

template <class Stream>
void* handle_of(const Stream& stream) {
  if constexpr (tells_handle<Stream>) {
    return stream.native_handle();
  } else {
    return nullptr;
  }
}

class Gpu {
 public:
  // All kernels of the process; never destroyed.
  static Gpu& instance() {
    static Gpu* const the = new Gpu;
    return *the;
  }

  static uint64_t key(int64_t place, int kind, at::ScalarType type, int device) {
    return (static_cast<uint64_t>(place) << 24) | (static_cast<uint64_t>(kind) << 16) |
        (static_cast<uint64_t>(type) << 8) | static_cast<uint64_t>(device);
  }

  void enter(uint64_t key, Launch launch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    launches_[key].push_back(std::make_shared<const Launch>(std::move(launch)));
  }

  // The kernel with these parameters; null if Python has not told it.
  std::shared_ptr<const Launch> find(uint64_t key, at::ArrayRef<double> parameters) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = launches_.find(key);
    if (found == launches_.end()) return nullptr;
    for (const auto& launch : found->second) {
      if (parameters.equals(launch->given)) return launch;
    }
    return nullptr;
  }

  // Whether tensors of this device can be launched on now: it is the current one.
  static bool is_current(const at::Tensor& x) {
    const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
    return guard.getDevice().index() == x.device().index();
  }

  static bool is_aligned(const at::Tensor& x) { return (reinterpret_cast<uintptr_t>(x.const_data_ptr()) & 15) == 0; }

  // kernel(pointers..., n, [scale,] numbers...) on the current stream. `as_double`: the type of the numbers.
  void run(
      const Launch& kernel, int64_t programs, at::ArrayRef<void*> pointers, int64_t n, const double* scale,
      bool as_double) const {
    Arguments arguments;
    for (void* p : pointers) arguments.add(p);
    arguments.add(n);
    if (scale) arguments.add(*scale);
    for (const double x : kernel.numbers) as_double ? arguments.add(x) : arguments.add(static_cast<float>(x));
    launch(kernel, programs, arguments);
  }

  // On the current stream of the current device.
  void launch(const Handle& kernel, int64_t programs, Arguments& arguments) const {
    for (int i = 0; i < 2; ++i) arguments.add(static_cast<void*>(nullptr));  // Triton's scratch memory: these need none
    const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
    const c10::Stream stream = guard.getStream(guard.getDevice());
    const auto attempt = [&] {
      return launch_kernel_(
          kernel.function, static_cast<unsigned>(programs), 1, 1, kernel.threads, 1, 1, kernel.shared,
          handle_of(stream), arguments.addresses(), nullptr);
    };
    int status = attempt();
    // A thread of autograd's has no context before its first call of the CUDA runtime; and one whose memory comes from
    // torch's cache may have made none yet.
    if (status == no_context && make_context_current(guard.getDevice().index())) status = attempt();
    TORCH_CHECK(
        status == 0, "torchcalc: the launch of a kernel failed with the CUDA driver's error " + std::to_string(status));
  }

  // Whether the driver is there, and the current stream is known; else Python launches.
  bool is_ready() const { return tells_handle<c10::Stream> && launch_kernel_ != nullptr; }

 private:
  Gpu() {
    if (void* driver = dlopen("libcuda.so.1", RTLD_NOW)) {
      launch_kernel_ = reinterpret_cast<decltype(launch_kernel_)>(dlsym(driver, "cuLaunchKernel"));
      retain_context_ = reinterpret_cast<decltype(retain_context_)>(dlsym(driver, "cuDevicePrimaryCtxRetain"));
      set_context_ = reinterpret_cast<decltype(set_context_)>(dlsym(driver, "cuCtxSetCurrent"));
    }
  }

  static constexpr int no_context = 201;  // CUDA_ERROR_INVALID_CONTEXT

  // The device's primary context, the one that torch uses, for the calling thread. It is retained for good, once a thread.
  bool make_context_current(int device) const {
    void* context = nullptr;
    return retain_context_ && set_context_ && retain_context_(&context, device) == 0 && set_context_(context) == 0;
  }

  int (*retain_context_)(void**, int) = nullptr;
  int (*set_context_)(void*) = nullptr;
  int (*launch_kernel_)(
      void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**) = nullptr;
  std::mutex mutex_;
  std::unordered_map<uint64_t, std::vector<std::shared_ptr<const Launch>>> launches_;
};

}  // namespace torchcalc
