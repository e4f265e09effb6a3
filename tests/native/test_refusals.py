"""Tensors that a kernel must not run on: it says so, and touches nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.native.common import ADAM, SGD, AdamState, adam_, clones, same, sgd_
from torchcalc.native.optim import DONE, UNSUPPORTED


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


def freed(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(0)
    return t


def truncated(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - 1)
    return t


# What replaces the tensor of the second of two parameters, by the list it is in.
REFUSED: dict[str, dict[str, Any]] = {
    "strided parameter": dict(params=strided),
    "strided gradient": dict(grads=strided),
    "strided state": dict(exp_avgs=strided),
    "expanded gradient": dict(grads=lambda t: t.new_ones(()).expand_as(t)),
    "gradient of another layout": dict(grads=lambda t: t.t().contiguous().t()),
    "state of another layout": dict(exp_avg_sqs=lambda t: t.t().contiguous().t()),
    "gradient of another shape": dict(grads=lambda t: t.reshape(-1)),
    "state of another size": dict(exp_avgs=lambda t: t[:-1].contiguous()),
    "gradient of another dtype": dict(grads=Tensor.double),
    "state of another dtype": dict(exp_avgs=Tensor.double, exp_avg_sqs=Tensor.double),
    "half state of a full parameter": dict(exp_avgs=Tensor.bfloat16, exp_avg_sqs=Tensor.bfloat16),
    "state of another half dtype": dict(
        params=Tensor.bfloat16,
        grads=Tensor.bfloat16,
        exp_avgs=Tensor.half,
        exp_avg_sqs=Tensor.half,
    ),
    "state in two dtypes": dict(exp_avgs=Tensor.bfloat16),
    "integers": dict(params=Tensor.int, grads=Tensor.int, exp_avgs=Tensor.int, exp_avg_sqs=Tensor.int),
    "complex": dict(
        params=lambda t: t.to(torch.complex64), grads=lambda t: t.to(torch.complex64),
        exp_avgs=lambda t: t.to(torch.complex64), exp_avg_sqs=lambda t: t.to(torch.complex64),
    ),
    "sparse gradient": dict(grads=Tensor.to_sparse),
    "compressed gradient": dict(grads=Tensor.to_sparse_csr),
    "another device": dict(params=lambda t: t.to("meta")),
    "gradient on another device": dict(grads=lambda t: t.to("meta")),
    "freed storage": dict(params=freed),
    "storage too small": dict(exp_avgs=truncated),
    "integer step": dict(steps=Tensor.int),
    "step of two elements": dict(steps=lambda t: torch.stack([t, t])),
    "half step": dict(steps=Tensor.bfloat16),
    "step on another device": dict(steps=lambda t: t.to("meta")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("way", ["bound", "unbound"])
@pytest.mark.parametrize("replace", REFUSED.values(), ids=REFUSED.keys())
def test_refuses_and_touches_nothing(replace: dict[str, Any], way: str) -> None:
    state = AdamState([(3, 4), (5, 6)], torch.float32)
    grads = state.grads()
    lists = dict(vars(state), grads=grads)
    for name, change in replace.items():
        lists[name][1] = change(lists[name][1])
    whole = [t for t in [*state.all(), *grads] if t.device.type == "cpu" and t.layout == torch.strided]
    whole = [t for t in whole if t.untyped_storage().nbytes() >= t.numel() * t.element_size()]
    before = clones(whole)
    if way == "bound":
        assert state.bound().adam_(grads, **ADAM) == UNSUPPORTED
    else:
        assert state.step(grads, **ADAM) == UNSUPPORTED
    for t, old in zip(whole, before, strict=True):
        assert torch.equal(t, old)


def test_refuses_overlaps() -> None:
    base = torch.randn(64)

    def status(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> int:
        kept = base.clone()
        result = sgd_(params, grads, buffers, **{**SGD, "momentum": 0.9})
        assert result == DONE or torch.equal(base, kept)
        return result

    new = torch.randn
    assert status([base[:20], base[20:40]], [new(20), new(20)], [new(20), new(20)]) == DONE  # neighbours
    assert status([base[:20], base[19:39]], [new(20), new(20)], [new(20), new(20)]) == UNSUPPORTED
    assert status([base[:20], base[:20]], [new(20), new(20)], [new(20), new(20)]) == UNSUPPORTED
    assert status([base[:20]], [new(20)], [base[:20]]) == UNSUPPORTED  # the state is the parameter
    assert status([base[:20]], [base[:20]], [new(20)]) == UNSUPPORTED  # the gradient is the parameter
    assert status([base[:20]], [base[19:39]], [new(20)]) == UNSUPPORTED
    assert status([new(20)], [base[:20]], [base[10:30]]) == UNSUPPORTED  # the gradient is another one's state
    shared = new(20)
    assert status([base[:20], base[20:40]], [shared, shared], [new(20), new(20)]) == DONE  # gradients are only read


def test_refuses_lists_of_different_lengths() -> None:
    state = AdamState([(3,), (4,)], torch.float32)
    grads = state.grads()
    before = clones(state.all())
    assert state.step(grads[:1]) == UNSUPPORTED
    assert adam_(state.params, grads, state.exp_avgs[:1], state.exp_avg_sqs, [], state.steps, **ADAM) == UNSUPPORTED
    assert adam_(state.params, grads, state.exp_avgs, state.exp_avg_sqs, [], state.steps[:1], **ADAM) == UNSUPPORTED
    assert adam_(state.params, grads, state.exp_avgs, state.exp_avg_sqs, [], [], **ADAM) == UNSUPPORTED
    assert adam_(state.params, grads, state.exp_avgs, state.exp_avg_sqs, state.exp_avgs[:1], state.steps, **ADAM) == 0
    assert sgd_(state.params, grads, [], **{**SGD, "momentum": 0.9}) == UNSUPPORTED
    assert sgd_(state.params, grads, state.exp_avgs, **SGD) == UNSUPPORTED
    for first in ([2], [-1]):
        assert sgd_(state.params, grads, state.exp_avgs, first=first, **{**SGD, "momentum": 0.9}) == UNSUPPORTED
    assert same(state.all(), before)
    assert adam_([], [], [], [], [], [], **ADAM) == DONE
    assert sgd_([], [], [], **SGD) == DONE
