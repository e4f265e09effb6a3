// A stretch of numbers as the type that is computed in.
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "number.h"

namespace torchcalc {

// Numbers of a row or a class: as they lie, where that is side by side as T, or in a buffer.
template <class Stored, class T>
TC_INLINE const T* widened(const Stored* from, int64_t n, T* buffer, int64_t stride = 1) {
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(load(from[i * stride]));
    return buffer;
  }
  if constexpr (std::is_same_v<Stored, T>) {
    return from;
  } else {
    TC_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) buffer[i] = load(from[i]);
    return buffer;
  }
}

template <class Stored, class T>
TC_INLINE void narrowed(const T* from, int64_t n, Stored* to, int64_t stride = 1) {
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) store(to[i * stride], from[i]);
    return;
  }
  TC_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) store(to[i], from[i]);
}

}  // namespace torchcalc
