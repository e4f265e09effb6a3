"""CPU kernels behind torchcalc's own functions: optional, and never a different answer.

`available()` says whether the kernel library is loaded (it is loaded on first use), `why_not()` says why it is not and
what to do about it. Neither raises. `TORCHCALC_NATIVE=0` (or false, off, no) in the environment switches the kernels off,
and `TORCHCALC_NATIVE_ISA=avx2` or `baseline` chooses loops for a lesser processor. `nodes()` and `why_no_nodes()` tell the
same of autograd's nodes, a second library, which is bound to one version of torch and Python. `warn_once(tensors)` is for
the place where a kernel would have been used and is not there.

The library registers operators in `torch.ops.torchcalc`; they are called through wrappers (`torchcalc.native.optim`), which
tell autograd what was written. Optimizers::

    bind(Tensor(a!)[] params, Tensor(b!)[] state, Tensor(c!)[] steps) -> int
    refused(int handle, Tensor[] grads) -> int[]
    unbind(int handle) -> bool
    adam_bound_(int handle, Tensor[] grads, float lr, float beta1, float beta2, float eps, float weight_decay,
                bool decoupled, bool maximize, float grad_coef, Tensor? grad_scale, int? seed) -> int
    sgd_bound_(int handle, Tensor[] grads, int[] first, float lr, float momentum, float dampening, float weight_decay,
               bool nesterov, bool maximize, float grad_coef, Tensor? grad_scale, int? seed) -> int
    rule_bound_(int handle, Tensor[] grads, int hash, bool counts, float[] scalars, float[] shared, bool maximize,
                float grad_coef, Tensor? grad_scale, int? seed) -> int
    has_rule(int hash) -> bool
    grad_norm(Tensor[] grads) -> (bool supported, float squared, bool finite)

and about itself::

    instruction_set() -> str
    run_serially() -> bool

New kernels: a `csrc/*.cpp` that registers its operators (`norm.cpp` is the shortest example), built by
`python -m torchcalc build`; a wrapper here; the choice between kernel and reference inside the function that has the
reference; tests of the kernel against that reference in `tests/native`.
"""

from torchcalc.native.load import available, library, nodes, warn_once, why_no_nodes, why_not

__all__ = ["available", "library", "nodes", "warn_once", "why_no_nodes", "why_not"]
