"""CPU kernels behind torchcalc's own functions: optional, and never a different answer.

`available()` says whether the kernel library is loaded (it is loaded on first use), `why_not()` says why it is not and what
to do about it. Neither raises. `TORCHCALC_NATIVE=0` in the environment switches the kernels off.

For optimizers (`torchcalc.native.optim`, thin wrappers around `torch.ops.torchcalc.*`)::

    bound = Bound(params, state, steps)              # once, while the tensors are the same objects; state = slot after slot:
                                                     #   exp_avgs + exp_avg_sqs (+ max_exp_avg_sqs), or momentum_buffers, or []
    bound.adam_(grads, lr=..., ...) -> Status        # each step: UNSUPPORTED (nothing was touched), DONE, or SKIPPED (found_inf)
    bound.sgd_(grads, lr=..., ...) -> Status
    adam_(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, ...) -> Status       # the same, without binding
    sgd_(params, grads, momentum_buffers, ...) -> Status
    grad_norm(grads) -> GradNorm | None              # None: unsupported. Sum of squares in float64, finite or not

The schemas::

    bind(Tensor[] params, Tensor[] state, Tensor[] steps) -> int          # a handle; unbind(int handle) -> bool
    adam_bound_(int handle, Tensor[] grads, float lr, float beta1, float beta2, float eps, float weight_decay,
                bool decoupled, bool maximize, float grad_coef, Tensor? grad_scale, Tensor? found_inf, int? seed) -> int
    sgd_bound_(int handle, Tensor[] grads, int[] first, float lr, float momentum, float dampening, float weight_decay,
               bool nesterov, bool maximize, float grad_coef, Tensor? grad_scale, Tensor? found_inf, int? seed) -> int
    adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,
          Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, <as adam_bound_ from lr on>) -> int
    sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, int[] first, <as sgd_bound_ from lr on>) -> int
    grad_norm(Tensor[] grads) -> (bool, float, bool)                      # supported, sum of squares, all finite
"""

from torchcalc.native.load import available, library, why_not

__all__ = ["available", "library", "why_not"]
