// One parallel region over the elements of all tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace torchcalc {

// Work is split between threads at multiples of this many elements from a tensor's start. No result depends on where.
inline constexpr int64_t unit = 128;

// Calls body(context, begin, end) on parts of [0, n) that hold at least `grain` each, in torch's thread pool. In a process
// that was forked from one where the library was loaded, the pool's threads do not exist: then in the calling thread.
void parallel_for(int64_t n, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context), void* context);

void run_serially();  // from now on, as after a fork

// Tensors laid end to end, each rounded up to whole pieces; at least one, so that many tiny tensors are work as well.
class Partition {
 public:
  explicit Partition(int64_t tensors, int64_t split = unit) : split_(split) {
    ends_.reserve(static_cast<size_t>(tensors));
    numels_.reserve(static_cast<size_t>(tensors));
  }

  void append(int64_t numel) {
    ends_.push_back(pieces() + (numel + split_ - 1) / split_ + (numel == 0));
    numels_.push_back(numel);
  }

  // f(tensor, begin, end): elements [begin, end) of that tensor, for every tensor, in parallel.
  template <class F>
  void for_each_slice(int64_t grain, const F& f) const {
    struct Context {
      const Partition* partition;
      const F* f;
    } context{this, &f};
    parallel_for(
        pieces(), (grain + split_ - 1) / split_,
        [](int64_t begin, int64_t end, void* opaque) {
          const Context& c = *static_cast<Context*>(opaque);
          c.partition->walk(begin, end, *c.f);
        },
        &context);
  }

 private:
  int64_t pieces() const { return ends_.empty() ? 0 : ends_.back(); }
  size_t tensor_at(int64_t position) const;

  template <class F>
  void walk(int64_t begin, int64_t end, const F& f) const {
    for (size_t i = tensor_at(begin); begin < end; ++i) {
      const int64_t start = i == 0 ? 0 : ends_[i - 1];
      const int64_t stop = end < ends_[i] ? end : ends_[i];
      const int64_t last = (stop - start) * split_;
      f(static_cast<int64_t>(i), (begin - start) * split_, last < numels_[i] ? last : numels_[i]);
      begin = stop;
    }
  }

  int64_t split_;
  std::vector<int64_t> ends_;    // in pieces of split_ elements
  std::vector<int64_t> numels_;
};

}  // namespace torchcalc
