// Philox-4x32-10: random bits as a pure function of (seed, stream, counter).     Salmon et al. 2011, "Parallel random
// numbers: as easy as 1, 2, 3". No state, so any thread computes the bits of any element, and they are the same for any
// number of threads.
#pragma once

#include <cstdint>

#include "isa.h"

namespace torchcalc {

inline constexpr int philox_lanes = 16;  // counters computed side by side, one SIMD lane each

struct PhiloxBlock {
  uint32_t word[4 * philox_lanes];  // word[w * philox_lanes + l]: output word w of the counter first + l
};

// One round, and the next round's key.
TC_INLINE void philox_round(uint32_t& x0, uint32_t& x1, uint32_t& x2, uint32_t& x3, uint32_t& key0, uint32_t& key1) {
  const uint64_t a = static_cast<uint64_t>(x0) * 0xD2511F53u;
  const uint64_t b = static_cast<uint64_t>(x2) * 0xCD9E8D57u;
  x0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ key0;
  x1 = static_cast<uint32_t>(b);
  x2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ key1;
  x3 = static_cast<uint32_t>(a);
  key0 += 0x9E3779B9u;
  key1 += 0xBB67AE85u;
}

TC_INLINE void philox(uint64_t seed, uint64_t stream, uint64_t first, PhiloxBlock& out) {
  // Ten rounds written out, so that the loop over lanes is the innermost one and vectorises.
  for (int l = 0; l < philox_lanes; ++l) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    const uint64_t counter = first + static_cast<uint64_t>(l);
    uint32_t x0 = static_cast<uint32_t>(counter), x1 = static_cast<uint32_t>(counter >> 32);
    uint32_t x2 = static_cast<uint32_t>(stream), x3 = static_cast<uint32_t>(stream >> 32);
    philox_round(x0, x1, x2, x3, key0, key1);
    philox_round(x0, x1, x2, x3, key0, key1);
    philox_round(x0, x1, x2, x3, key0, key1);
    philox_round(x0, x1, x2, x3, key0, key1);
    philox_round(x0, x1, x2, x3, key0, key1);
    philox_round(x0, x1, x2, x3, key0, key1);
    philox_round(x0, x1, x2, x3, key0, key1);
    philox_round(x0, x1, x2, x3, key0, key1);
    philox_round(x0, x1, x2, x3, key0, key1);
    philox_round(x0, x1, x2, x3, key0, key1);
    out.word[l] = x0;
    out.word[philox_lanes + l] = x1;
    out.word[2 * philox_lanes + l] = x2;
    out.word[3 * philox_lanes + l] = x3;
  }
}

}  // namespace torchcalc
