// Autograd's nodes: what torch's stable ABI does not reach.
#include <torch/library.h>
#include <torch/version.h>

#include <string>

namespace {

std::string version() { return TORCH_VERSION; }

}  // namespace

TORCH_LIBRARY(torchcalc_nodes, m) { m.def("version() -> str", &version); }
