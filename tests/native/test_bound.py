"""Parameters that the library holds from step to step: what may change under it, and when it lets go."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.native.common import ADAM, SGD, AdamState, adam_, same, sgd_
from torchcalc.native.optim import DONE, UNSUPPORTED, Bound


def test_bound_equals_unbound() -> None:
    unbound = AdamState([(33,), (4, 5), ()], torch.float32, amsgrad=True)
    held = copy.deepcopy(unbound)
    bound = held.bound()
    for _ in range(3):
        grads = unbound.grads()
        assert unbound.step(grads) == DONE
        assert bound.adam_(grads, **ADAM) == DONE
        assert same(unbound.all(), held.all())


def test_new_data_is_seen() -> None:
    state = AdamState([(6, 5), (7,)], torch.float32)
    bound = state.bound()
    assert bound.adam_(state.grads(), **ADAM) == DONE
    # as module.to(), load_state_dict(assign) and FSDP do
    state.params[0].data = torch.randn(6, 5)
    state.exp_avgs[0].set_(torch.randn(6, 5))
    twin = copy.deepcopy(state)
    grads = state.grads()
    assert bound.adam_(grads, **ADAM) == twin.step(grads) == DONE
    assert same(state.all(), twin.all())
    for tensors in (state.params, grads, state.exp_avgs, state.exp_avg_sqs):
        tensors[0].data = tensors[0].data.t().contiguous().t()
        assert bound.adam_(grads, **ADAM) == (DONE if tensors is state.exp_avg_sqs else UNSUPPORTED)
    state.params[1].data = state.params[1].data.double()
    assert bound.adam_(grads, **ADAM) == UNSUPPORTED
    grads[1] = grads[1].double()
    assert bound.adam_(grads, **ADAM) == UNSUPPORTED
    for tensors in (state.exp_avgs, state.exp_avg_sqs):
        tensors[1].data = tensors[1].data.double()
    assert bound.adam_(grads, **ADAM) == DONE


def test_tensors_that_come_to_overlap_are_refused() -> None:
    params = [torch.randn(8), torch.randn(8)]
    bound = Bound(params, [])
    grads = [torch.randn(8), torch.randn(8)]
    assert bound.sgd_(grads, **SGD) == DONE
    params[1].data = params[0].data[:8]
    kept = params[0].clone()
    for _ in range(2):
        assert bound.sgd_(grads, **SGD) == UNSUPPORTED
    assert bound.sgd_([params[0], params[0]], **SGD) == UNSUPPORTED
    params[1].data = torch.randn(8)
    assert bound.sgd_([params[0], grads[1]], **SGD) == UNSUPPORTED
    assert torch.equal(params[0], kept)
    assert bound.sgd_(grads, **SGD) == DONE


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_hold_the_copies(copier: Callable[[Bound], Bound]) -> None:
    state = AdamState([(9,), (2, 3)], torch.float32)
    bound = state.bound()
    other = copier(bound)
    grads = state.grads()
    assert other.adam_(grads, **ADAM) == DONE
    assert not torch.equal(other.params[0], state.params[0])
    assert bound.adam_(grads, **ADAM) == DONE
    assert same([*other.params, *other.state, *other.steps], [*bound.params, *bound.state, *bound.steps])


def test_letting_go_frees_the_tensors() -> None:
    p = torch.randn(4)
    gone = weakref.ref(p)
    bound = Bound([p], [])
    del p
    assert gone() is not None
    del bound
    gc.collect()
    assert gone() is None


def test_unknown_handles_are_unsupported() -> None:
    step = torch.ops.torchcalc.sgd_bound_.default
    handle = torch.ops.torchcalc.bind.default([torch.randn(3)], [], [])
    numbers = ([], 0.1, 0.0, 0.0, 0.0, False, False, 1.0, None, None)
    assert step(handle, [torch.randn(3)], *numbers) == DONE
    assert torch.ops.torchcalc.unbind.default(handle)
    assert not torch.ops.torchcalc.unbind.default(handle)
    for unknown in (handle, -1, 0, 2**62):
        assert step(unknown, [torch.randn(3)], *numbers) == UNSUPPORTED


def sgd_bound(w: Tensor, g: Tensor) -> int:
    return Bound([w], []).sgd_([g], **SGD)


def sgd_unbound(w: Tensor, g: Tensor) -> int:
    return sgd_([w], [g], [], **SGD)


def adam_bound(w: Tensor, g: Tensor) -> int:
    return Bound([w], [torch.zeros(3), torch.zeros(3)], [torch.tensor(0.0)]).adam_([g], **ADAM)


def adam_unbound(w: Tensor, g: Tensor) -> int:
    return adam_([w], [g], [torch.zeros(3)], [torch.zeros(3)], [], [torch.tensor(0.0)], **ADAM)


@pytest.mark.parametrize("step", [sgd_bound, sgd_unbound, adam_bound, adam_unbound])
def test_autograd_notices_the_new_weights(step: Callable[[Tensor, Tensor], int]) -> None:
    w = torch.randn(3, requires_grad=True)
    loss = (w * w).sum()
    version = w._version
    assert step(w, torch.randn(3)) == DONE  # with grad mode on
    assert w._version > version
    assert w.requires_grad and w.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_threads_of_the_program_step_side_by_side() -> None:
    start = [AdamState([(40_000,), (17,)], torch.float32) for _ in range(4)]
    threaded = copy.deepcopy(start)
    grads = [s.grads() for s in start]

    def train(state: AdamState, g: list[Tensor]) -> None:
        bound = state.bound()
        for _ in range(20):
            assert bound.adam_(g, **ADAM) == DONE

    workers = [threading.Thread(target=train, args=pair) for pair in zip(threaded, grads, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for state, g, other in zip(start, grads, threaded, strict=True):
        train(state, g)
        assert same(state.all(), other.all())


def test_steps_on_one_group_follow_one_another() -> None:
    state = AdamState([(30_000,)], torch.float32)
    serial = copy.deepcopy(state)
    bound, (g,) = state.bound(), state.grads()
    workers = [threading.Thread(target=lambda: [bound.adam_([g], **ADAM) for _ in range(25)]) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for _ in range(100):
        args = (serial.params, [g], serial.exp_avgs, serial.exp_avg_sqs, [], serial.steps)
        assert adam_(*args, **ADAM) == DONE
    assert same(state.all(), serial.all())
