#include "parallel.h"

#include <pthread.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>

namespace torchcalc {

static std::atomic<bool> serial{false};

void run_serially() { serial.store(true, std::memory_order_relaxed); }

// OpenMP's threads do not survive a fork, and its runtime waits for them for ever.
[[maybe_unused]] static const int fork_handler = pthread_atfork(nullptr, nullptr, run_serially);

void parallel_for(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (n <= grain || serial.load(std::memory_order_relaxed)) {
    if (n > 0) body(0, n, context);
  } else {
    torch_parallel_for(0, n, grain, body, context);
  }
}

size_t Partition::tensor_at(int64_t position) const {
  return static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), position) - ends_.begin());
}

}  // namespace torchcalc
