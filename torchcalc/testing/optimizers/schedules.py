"""What changes lr between steps, lr as a tensor, and maximize."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchcalc.testing.optimizers.compare import difference, failed, parting
from torchcalc.testing.optimizers.subject import OptimizerSubject
from torchcalc.testing.optimizers.tensors import Grads, clone, gradients
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding


def scheduled(subject: OptimizerSubject, grads: Grads, lrs: list[float], **override: Any) -> list[list[Tensor]]:
    """A run in which the groups' lr is written before each step."""
    params = subject.parameters()
    optimizer = subject.make(params, **override)
    seen = [clone(params)]
    for step, lr in zip(grads, lrs, strict=True):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        seen += subject.play(optimizer, params, [step])[1:]
    return seen


def is_initial_step(subject: OptimizerSubject) -> bool:
    """Whether lr is only where a step size per element starts, as in Rprop: its state holds it."""
    params = subject.parameters()[:1]
    optimizer = subject.make(params)
    subject.step(optimizer, params, gradients(params, 1)[0])
    return any(
        isinstance(x, Tensor) and x.shape == params[0].shape and difference(x, torch.full_like(x, subject.lr)) == 0
        for x in optimizer.state[params[0]].values()
    )


@check("optimizer", "schedulers")
def schedulers(subject: OptimizerSubject) -> Finding:
    """The lr that a scheduler writes into the groups counts from the next step on."""
    lr = subject.lr
    factors = [1.0, 0.5, 0.0, 2.0, 2.0, 3.0]
    for name, way in subject.each_way():
        params = subject.parameters()
        grads = gradients(params, len(factors))
        optimizer = subject.make(params, **way)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: factors[min(t, 5)])
        found = [clone(params)]
        for step in grads:
            found += subject.play(optimizer, params, [step])[1:]
            schedule.step()
        m = parting(scheduled(subject, grads, [lr * f for f in factors], **way), found)
        if m is not None:
            return failed("schedulers", f"a LambdaLR against lr written into the groups by hand{name}", m)
        constant = scheduled(subject, grads, [lr] * len(factors), **way)
        if parting(constant, found) is None:
            if is_initial_step(subject):
                return Finding("schedulers", figure="lr only starts each element's own step size")
            text = f"changing the groups' lr after the constructor changes nothing{name}: schedulers have no effect"
            return Finding("schedulers", "error", "no effect", text, "lr read once, by the constructor")
        still = all(difference(a, b) == 0 for a, b in zip(found[2], found[3], strict=True))
        late = all(difference(a, b) == 0 for a, b in zip(found[3], found[4], strict=True))
        if late and not still:
            text = f"with lr=0 in step 3 only, it is step 4 that stands still{name}"
            return Finding("schedulers", "note", "one step late", text, "a new lr counts one step late")
        restored = subject.make(subject.parameters(), **way)
        torch.optim.lr_scheduler.LambdaLR(restored, lambda t: 1.0)
        if restored.param_groups[0].get("initial_lr") is None:
            return Finding("schedulers", "error", "initial_lr", f"group keys are not kept{name}", "group keys dropped")
    return Finding("schedulers", figure="LambdaLR, lr=0 among them")


@check("optimizer", "changed lr")
def changed_lr(subject: OptimizerSubject) -> Finding | None:
    """Where steps are in proportion to lr, a new lr scales the steps from then on, and what is remembered stays."""
    lr = subject.lr
    if subject.needs_closure:
        raise Skip("it needs a closure")
    params = subject.parameters()
    grads = gradients(params, 8)
    plain = {"weight_decay": 0.0} if subject.has("weight_decay") else {}

    def run(*lrs: float) -> list[list[Tensor]]:
        return scheduled(subject, grads, list(lrs), **plain)

    def scaled(factors: list[float]) -> list[list[Tensor]]:
        play = [base[0]]
        for t, factor in enumerate(factors):
            play.append([p + factor * (b - a) for p, a, b in zip(play[-1], base[t], base[t + 1], strict=True)])
        return play

    base = run(*[lr] * 8)
    if parting(scaled([2.0] * 8), run(*[2 * lr] * 8), factor=8) is not None:
        raise Skip("its steps are not in proportion to lr")
    factors = [1.0] * 4 + [3.0] * 4
    m = parting(scaled(factors), run(*[lr * f for f in factors]), factor=8)
    if m is None:
        return None
    text = f"lr three times as large from step 5 on, against steps three times as long: {m}"
    return Finding("changed lr", "note", f"step {m.step}", text, "a new lr changes what is remembered")


@check("optimizer", "one cycle")
def one_cycle(subject: OptimizerSubject) -> Finding | None:
    """OneCycleLR, which also cycles momentum or β₁, has an effect by both."""
    if "momentum" not in subject.defaults and "betas" not in subject.defaults:
        raise Skip("it has neither momentum nor betas")
    if subject.defaults.get("nesterov") or ("momentum" in subject.defaults and not subject.defaults["momentum"]):
        raise Skip("its momentum is off")
    plays = []
    for cycle in (False, True):
        params = subject.parameters()
        optimizer = subject.make(params)
        try:
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=10 * subject.lr, total_steps=8, cycle_momentum=cycle
            )
        except ValueError as reason:
            raise Skip(f"OneCycleLR refuses it: {reason}") from reason
        play = []
        for step in gradients(params, 6):
            play += subject.play(optimizer, params, [step])[1:]
            schedule.step()
        plays.append(play)
    if parting(plays[0], plays[1]) is None:
        name = "momentum" if "momentum" in subject.defaults else "betas"
        params = subject.parameters()
        other = {"momentum": 0.5} if name == "momentum" else {"betas": (0.5, *subject.defaults["betas"][1:])}
        usual, moved = (subject.trial(params, gradients(params, 6), **options) for options in ({}, other))
        if parting(usual, moved) is None:
            return Finding(
                "one cycle", "note", "no effect", f"no value of {name} has an effect", f"{name} has no effect"
            )
        text = "momentum or betas written into the groups by OneCycleLR change nothing"
        return Finding("one cycle", "error", "no effect", text, "momentum read once, by the constructor")
    return None


@check("optimizer", "tensor lr")
def tensor_lr(subject: OptimizerSubject) -> Finding:
    """lr as a tensor: the same steps as the number, the tensor untouched, a new value in it counts, no sharing."""
    lr = subject.lr
    if subject.needs_closure:
        raise Skip("it needs a closure: a line search may choose its own")
    grads = gradients(subject.parameters(), 4)
    lrs = [lr, lr, lr / 4, lr * 2]
    way = subject.with_reference_way()
    given = torch.tensor(lr, dtype=torch.float64)
    try:
        subject.make(subject.parameters(), lr=given, **way)
    except Exception as reason:
        raise Skip(f"it takes no tensor for lr: {reason}") from reason
    found = scheduled(subject, grads, lrs, lr=given, **way)
    if not isinstance(subject.defaults["lr"], Tensor) and float(given) not in (lr, lrs[-1]):
        return Finding("tensor lr", "error", "lr written", f"lr={lr} became {float(given)} in the steps", "lr written")
    m = parting(scheduled(subject, grads, lrs, **way), found, factor=4)
    if m is not None:
        fixed = scheduled(subject, grads, [lr] * 4, **way)
        causes = [("lr read once, by the constructor", fixed)]
        if parting(scheduled(subject, grads, lrs, **way), found, factor=1e7) is None:
            off = abs(m.found - m.expected)
            return Finding("tensor lr", "note", f"{off:.1g}", f"single precision: {m}", "float32 lr")
        return failed("tensor lr", "lr as a tensor, changed in place", m, causes, found)
    params = subject.parameters()
    if len(params) > 1:
        shared = torch.tensor(lr, dtype=torch.float64)
        try:
            optimizer = subject.make([{"params": params[:1]}, {"params": params[1:]}], lr=shared, **way)
        except ValueError:
            return Finding("tensor lr")
        first, second = (group["lr"] for group in optimizer.param_groups)
        if isinstance(first, Tensor) and first is second:
            text = "one tensor is the lr of all groups: scheduling one in place changes the others"
            return Finding("tensor lr", "note", "shared", text, "tensor lr shared between groups")
    return Finding("tensor lr", figure="equal to the number")


@check("optimizer", "maximize")
def maximize(subject: OptimizerSubject) -> Finding:
    """maximize=True steps as with the negated gradient."""
    if not subject.has("maximize"):
        raise Skip("it has no option maximize")
    on = bool(subject.defaults.get("maximize"))
    params = subject.parameters()
    grads = gradients(params, 4)
    negated: Grads = [[-g for g in step if g is not None] for step in grads]
    options: list[dict[str, Any]] = [{}]
    if subject.has("weight_decay"):
        options.append({"weight_decay": 0.3})
    for name, way in subject.each_way():
        for option in options:
            expected = subject.trial(params, negated, maximize=on, **way, **option)
            found = subject.trial(params, grads, maximize=not on, **way, **option)
            m = parting(expected, found)
            if m is not None:
                what = f"maximize={not on}{name}{f', {option}' if option else ''} against negated gradients"
                decay = option.get("weight_decay", subject.defaults.get("weight_decay"))
                causes: list[Any] = [
                    ("maximize ignored", lambda w=way, o=option: subject.trial(params, grads, maximize=on, **w, **o))
                ]
                if decay:
                    causes.append(
                        (
                            "weight decay negated by maximize",
                            _grown(subject, params, negated, on, {**way, **option}, decay),
                        )
                    )
                return failed("maximize", what, m, causes, found)
    return Finding("maximize", figure=f"{len(options)} configurations")


def _grown(
    subject: OptimizerSubject, params: list[nn.Parameter], grads: Grads, on: bool, options: dict[str, Any], decay: Any
) -> list[list[Tensor]]:
    """A run in which coupled weight decay has the wrong sign: it is added to the gradient by hand."""
    mine = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = subject.make(mine, maximize=on, **{**options, "weight_decay": 0.0})
    seen = [clone(mine)]
    sign = -1 if not on else 1
    for step in grads:
        pushed: list[Tensor | None] = [
            g + sign * decay * p.detach() for g, p in zip(step, mine, strict=True) if g is not None
        ]
        seen += subject.play(optimizer, mine, [pushed])[1:]
    return seen
