"""state_dict, loading, pickling, copying: whatever way an optimizer is carried on, it continues to the last bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchcalc.testing.optimizers.compare import Mismatch, leaves, parting, tree_difference
from torchcalc.testing.optimizers.subject import OptimizerSubject
from torchcalc.testing.optimizers.tensors import Grads, Play, gradients, restored, snapshot
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding

Carried = tuple[torch.optim.Optimizer, list[nn.Parameter]]


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def half_way(subject: OptimizerSubject, **way: Any) -> tuple[Any, Any, Grads, Grads]:
    """An optimizer after 4 steps, in which a gradient was missing now and then, and the gradients of 4 more."""
    params = subject.parameters(torch.float32)  # not float64: torch's loading casts scalars of the state to it
    grads = gradients(params, 8)
    if len(params) > 1:
        grads[1][1] = grads[5][0] = None
    optimizer = subject.make(params, **way)
    subject.play(optimizer, params, grads[:4])
    return optimizer, params, grads[:4], grads[4:]


def bitwise(expected: Play, found: Play) -> Mismatch | None:
    return parting(expected, found, factor=1e-30)


def carry_on(
    subject: OptimizerSubject, check: str, what: str, carry: Callable[[Any, Any], Carried], **way: Any
) -> Finding | None:
    """The error that a carried optimizer does not continue as the original, or shares anything with it."""
    optimizer, params, _, grads = half_way(subject, **way)
    other, theirs = carry(optimizer, params)
    kept = tree_difference(optimizer.state_dict()["state"], other.state_dict()["state"])
    before = snapshot(other)
    expected = subject.play(optimizer, params, grads)
    shared = tree_difference(before, snapshot(other))
    if shared:
        text = f"stepping the original changes the {what}: {shared}"
        return Finding(check, "error", "shared", text, "state shared with the original")
    m = bitwise(expected, subject.play(other, theirs, grads))
    if m is None:
        return None
    cause = kept and f"state differs: {kept}"
    if "is missing" in kept:
        cause = f"state lost: {kept.partition(' is')[0]}"
    elif not kept:
        cause = "state kept outside of state_dict" if check == "state_dict" else "something is not carried over"
    off = f"off by {abs(m.expected - m.found):.2g}"
    return Finding(check, "error", off, f"the {what} continues otherwise: {m}", cause)


def load(subject: OptimizerSubject, state_dict: Any, params: list[nn.Parameter], **way: Any) -> Carried:
    """A new optimizer, of another lr, which has loaded the state dict."""
    new = copies(params)
    other = subject.make(new, **way, **({"lr": 7 * subject.lr} if subject.has_lr else {}))
    other.load_state_dict(state_dict)
    return other, new


@check("optimizer", "state_dict")
def state_dict(subject: OptimizerSubject) -> Finding | None:
    """A new optimizer that loads the state dict continues to the last bit."""
    for name, way in subject.each_way():
        finding = carry_on(
            subject,
            "state_dict",
            f"optimizer that loaded its state dict{name}",
            lambda o, ps, w=way: load(subject, copy.deepcopy(o.state_dict()), ps, **w),  # type: ignore[misc]
            **way,
        )
        if finding is not None:
            return finding
        optimizer, params, *_ = half_way(subject, **way)
        saved = copy.deepcopy(optimizer.state_dict())
        text = tree_difference(saved, load(subject, copy.deepcopy(saved), params, **way)[0].state_dict())
        if text:
            return Finding("state_dict", "error", "round trip", f"saved, loaded, saved{name}: {text}", "round trip")
    return None


@check("optimizer", "state in a file")
def state_file(subject: OptimizerSubject) -> Finding | None:
    """The state dict survives torch.save and torch.load(weights_only=True)."""
    optimizer, *_ = half_way(subject)
    saved = optimizer.state_dict()
    try:
        loaded = restored(saved)
    except pickle.UnpicklingError as reason:
        text = f"the state dict holds more than tensors and plain values: {str(reason).splitlines()[0]}"
        return Finding("state in a file", "note", "weights_only", text, "not loadable with weights_only=True")
    text = tree_difference(saved, loaded)
    return (
        Finding("state in a file", "error", "changed", f"through a file: {text}", "changed by a file") if text else None
    )


@check("optimizer", "fresh state_dict")
def state_dict_fresh(subject: OptimizerSubject) -> Finding | None:
    """An optimizer that never stepped can be saved and loaded."""
    params = subject.parameters(torch.float32)
    grads = gradients(params, 3)
    other, theirs = load(subject, subject.make(copies(params)).state_dict(), params)
    m = bitwise(subject.trial(params, grads), subject.play(other, theirs, grads))
    if m is None:
        return None
    text = f"loaded before the first step: {m}"
    return Finding("fresh state_dict", "error", f"off by {abs(m.expected - m.found):.2g}", text, "fresh state dict")


@check("optimizer", "state aliasing")
def state_aliasing(subject: OptimizerSubject) -> Finding | None:
    """Loading copies: steps leave the loaded state dict alone, and two optimizers that load one do not meet."""
    optimizer, params, _, grads = half_way(subject)
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    first, theirs = load(subject, saved, params)
    text = tree_difference(before, saved)
    if text:
        return Finding("state aliasing", "error", "changed", f"loading changes the dict: {text}", "changed by loading")
    subject.play(first, theirs, grads)
    text = tree_difference(before, saved)
    if text:
        text = f"after load_state_dict steps change the loaded state dict, and whoever else loaded it: {text}"
        return Finding("state aliasing", "note", "aliased", text, "state aliased after load")
    return None


@check("optimizer", "loading keeps foreach")
def load_keeps_ways(subject: OptimizerSubject) -> Finding:
    """foreach and fused stay as the constructor was told: they say how this process computes, not what was learnt."""
    ways = [way for way in ("foreach", "fused") if way in subject.accepts]
    if not ways:
        raise Skip("it has neither foreach nor fused")
    lost = []
    for way in ways:
        off = dict.fromkeys(ways, False)
        params = subject.parameters()
        saved = subject.make(copies(params), **off).state_dict()
        try:
            other = subject.make(params, **{**off, way: True})
        except (RuntimeError, ValueError):
            continue
        other.load_state_dict(saved)
        if other.param_groups[0].get(way) is not True:
            lost.append(way)
    if lost:
        text = f"{' and '.join(f'{way}=True' for way in lost)} of the constructor is overwritten by load_state_dict"
        return Finding(
            "loading keeps foreach", "note", ", ".join(lost), text, "constructor's foreach/fused lost by loading"
        )
    return Finding("loading keeps foreach", figure=", ".join(ways))


@check("optimizer", "loading keeps dtypes")
def load_keeps_dtype(subject: OptimizerSubject) -> Finding | None:
    """float32 state is kept in float32 when it is loaded beside bfloat16 parameters."""
    optimizer, params, *_ = half_way(subject)
    saved = optimizer.state_dict()
    wide = {k: x for k, x in leaves(saved["state"]).items() if isinstance(x, Tensor) and x.dtype == torch.float32}
    wide = {k: x for k, x in wide.items() if x.dim()}
    if not wide:
        raise Skip("it has no state of the parameter's shape")
    other = subject.make([nn.Parameter(p.detach().bfloat16()) for p in params])
    other.load_state_dict(copy.deepcopy(saved))
    loaded = leaves(other.state_dict()["state"])
    narrow = [k for k in wide if isinstance(loaded.get(k), Tensor) and loaded[k].dtype != torch.float32]
    if narrow:
        dtype = loaded[narrow[0]].dtype
        text = f"state{narrow[0]} was float32, is {dtype} beside bfloat16 parameters ({len(narrow)} such)"
        return Finding("loading keeps dtypes", "note", str(dtype), text, "state rounded by loading")
    return None


@check("optimizer", "loading mismatch")
def load_mismatch(subject: OptimizerSubject) -> Finding | None:
    """A state dict of other groups is refused, and nothing has changed."""
    optimizer, *_ = half_way(subject)
    good = optimizer.state_dict()
    group = good["param_groups"][0]
    bad = {
        "no groups": {**good, "param_groups": []},
        "one group more": {**good, "param_groups": [group, group]},
        "one parameter less": {**good, "param_groups": [{**group, "params": group["params"][:-1]}]},
    }
    before = snapshot(optimizer)
    for what, state_dict in bad.items():
        try:
            optimizer.load_state_dict(copy.deepcopy(state_dict))
        except (ValueError, KeyError):
            text = tree_difference(before, snapshot(optimizer))
            if text:
                text = f"a state dict with {what} is refused, but has changed the optimizer: {text}"
                return Finding("loading mismatch", "error", what, text, "changed before it raised")
            continue
        text = f"a state dict with {what} is loaded without a word"
        return Finding("loading mismatch", "error", what, text, "mismatch accepted")
    return None


@check("optimizer", "pickle")
def pickling(subject: OptimizerSubject) -> Finding | None:
    """pickle carries it: the copy continues to the last bit."""

    def carry(optimizer: Any, params: Any) -> Carried:
        other, theirs = pickle.loads(pickle.dumps((optimizer, params)))
        return subject.prepared(other), theirs

    try:
        return carry_on(subject, "pickle", "unpickled optimizer", carry)
    except (pickle.PicklingError, AttributeError) as reason:
        if any(word in str(reason) for word in ("local", "lambda", "attribute lookup", "not the same object")):
            raise Skip(f"its class cannot be imported by name: {reason}") from reason
        raise


@check("optimizer", "deepcopy")
def deepcopying(subject: OptimizerSubject) -> Finding | None:
    """deepcopy carries it: the copy continues to the last bit, and shares nothing."""

    def carry(optimizer: Any, params: Any) -> Carried:
        other, theirs = copy.deepcopy((optimizer, params))
        return subject.prepared(other), theirs

    return carry_on(subject, "deepcopy", "deep copy", carry)


@check("optimizer", "state dtype")
def state_dtype(subject: OptimizerSubject) -> Finding:
    """State of the parameter's shape is at least as precise as the parameter, and on its device."""
    seen: dict[str, str] = {}
    for dtype in (d for d in subject.dtypes if d != torch.float16):
        for name, way in subject.each_way():
            params = subject.parameters(dtype)
            optimizer = subject.make(params, **way)
            subject.play(optimizer, params, gradients(params, 2))
            for p in params:
                for key, x in leaves(optimizer.state.get(p, {})).items():
                    if not isinstance(x, Tensor) or x.shape != p.shape or not x.is_floating_point() or not p.dim():
                        continue
                    seen[str(dtype)] = str(x.dtype).removeprefix("torch.")
                    if torch.finfo(x.dtype).eps > torch.finfo(dtype).eps or x.device != p.device:
                        text = f"state{key} is {x.dtype} on {x.device}{name}, its parameter {dtype} on {p.device}"
                        return Finding("state dtype", "error", str(x.dtype), text, "state in a coarser dtype")
    if not seen:
        raise Skip("it keeps no state of the parameter's shape")
    return Finding("state dtype", figure=", ".join(f"{k.removeprefix('torch.')}: {v}" for k, v in seen.items()))
