// What the library says about itself.
#include <string>

#include "isa.h"
#include "parallel.h"
#include "tensor.h"

#ifndef TORCHCALC_SOURCE_HASH
#error "compile with torchcalc/native/build.py, which defines TORCHCALC_SOURCE_HASH"
#endif

// load.py looks for this in the file before it loads it.
extern "C" __attribute__((used, visibility("default"))) const char torchcalc_source_hash[] =
    "torchcalc-source-hash:" TORCHCALC_SOURCE_HASH;

namespace torchcalc {

static std::string instruction_set() { return isa_name(); }

static bool serial_from_now_on() {
  run_serially();
  return true;
}

}  // namespace torchcalc

STABLE_TORCH_LIBRARY_FRAGMENT(torchcalc, m) {
  m.def("instruction_set() -> str");
  m.def("run_serially() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(torchcalc, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TC_BOX(torchcalc::instruction_set));
  m.impl("run_serially", TC_BOX(torchcalc::serial_from_now_on));
}
