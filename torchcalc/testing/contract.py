"""Checks of the contract: what the same function must do with other layouts, shapes, subsets of inputs and calls."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchcalc.testing.diagnosis import compare
from torchcalc.testing.numeric import need_derivatives, slack
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import CLEAR, Subject, pull, said, same

Grads = Sequence[Tensor | None]


def agree(
    subject: Subject,
    what: str,
    grads: Grads,
    expected: Grads,
    names: tuple[str, str],
    cause: str = "",
    values: bool = False,
) -> Finding | None:
    """The first gradient (or value) that differs from what it should be; ``cause`` where no pattern fits."""
    for k, (g, e) in enumerate(zip(grads, expected, strict=True)):
        label = f"output {k}" if values else f"gradient of {subject.label(subject.wrt[k])}"
        if e is None:
            if g is not None and g.nan_to_num(1).any():
                return Finding("", "error", "None", f"{label} {what}: a tensor, where it was None", cause)
            continue
        found = compare(f"{label} {what}", g, e, slack(subject, e), names=names)
        if found is not None:
            return replace(found, cause=f"{cause}: {found.cause}" if cause and found.cause else cause or found.cause)
    return None


@check("function", "reference")
def reference(subject: Subject) -> Finding | None:
    """Values and gradients equal those of the reference."""
    if subject.reference is None:
        raise Skip("no reference given")
    inputs = subject.floats()
    outputs, grads = subject.gradients(inputs)
    truths, expected = subject.gradients(inputs, fn=subject.reference)
    names = ("function", "reference")
    return agree(subject, "against the reference", outputs, truths, names, values=True) or agree(
        subject, "against the reference", grads, expected, names
    )


@check("function", "subsets")
def subsets(subject: Subject) -> Finding | None:
    """Whichever inputs require grad, each gets the gradient that it gets when all do."""
    if len(subject.wrt) < 2:
        raise Skip("one differentiable input")
    inputs = subject.floats()
    values, full = subject.gradients(inputs)
    by_input = dict(zip(subject.wrt, full, strict=True))
    sizes = range(1, len(subject.wrt)) if len(subject.wrt) <= 4 else (1, len(subject.wrt) - 1)
    for needed in itertools.chain.from_iterable(itertools.combinations(subject.wrt, n) for n in sizes):
        frozen = ", ".join(subject.label(i) for i in subject.wrt if i not in needed)
        cause = f"wrong when {frozen} is frozen"
        try:
            outputs, grads = subject.gradients(inputs, needed)
        except Exception as error:  # whatever it is: with all inputs it worked
            text = f"{type(error).__name__}: {error}"
            return Finding("", "error", "raised", text, f"raises when {frozen} is frozen")
        part = replace(subject, wrt=needed)
        names = ("with some", "with all")
        found = agree(part, f"when {frozen} is frozen", grads, [by_input[i] for i in needed], names, cause) or agree(
            part, f"when {frozen} is frozen", outputs, values, names, cause, values=True
        )
        if found is not None:
            return found
    return None


@check("function", "outputs apart")
def outputs_apart(subject: Subject) -> Finding | None:
    """Backward from one output alone works, whichever it is, and those of all outputs add up to that from all together."""
    need_derivatives(subject)
    inputs = subject.floats()
    leaves = subject.leaves(inputs, subject.wrt)
    outputs = subject.call(*leaves)
    if len(outputs) < 2:
        raise Skip("one output")
    xs = [leaves[i] for i in subject.wrt]
    incoming = subject.incoming(outputs)
    together = pull(outputs, xs, incoming)
    total = [torch.zeros_like(x) for x in xs]
    for k, (y, v) in enumerate(zip(outputs, incoming, strict=True)):
        try:
            parts = pull([y], xs, [v])
        except Exception as error:  # with all outputs it worked
            return Finding(
                "",
                "error",
                "raised",
                f"backward from output {k}: {said(error)}",
                f"raises when only output {k} is used",
            )
        total = [t if g is None else t + g for t, g in zip(total, parts, strict=True)]
    expected = [torch.zeros_like(x) if g is None else g for g, x in zip(together, xs, strict=True)]
    cause = "wrong when one output alone is used"
    return agree(subject, "summed over outputs", total, expected, ("one by one", "together"), cause)


@check("function", "no_grad")
def no_grad(subject: Subject) -> Finding | None:
    """Under torch.no_grad and torch.inference_mode the values are the same; under no_grad they do not require grad."""
    inputs = subject.floats()
    values, _ = subject.gradients(inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            leaves = subject.leaves(inputs, subject.wrt)
            outputs = subject.call(*leaves)
            new = [y for y in outputs if not y._is_view() and not any(y is x for x in leaves)]
            if mode is torch.no_grad and any(y.requires_grad for y in new):
                text = f"the output requires grad under torch.{mode.__name__}()"
                return Finding("", "error", "", text, "ignores no_grad")
            what, names = f"under {mode.__name__}", (mode.__name__, "with grad")
            found = agree(subject, what, outputs, values, names, "value differs under no_grad", True)
        if found is not None:
            return found
    return None


@check("function", "same tensor twice")
def same_tensor_twice(subject: Subject) -> Finding | None:
    """f(x, x) and f(x) + f(x): the gradient of one tensor in several places is the sum of those of its copies."""
    need_derivatives(subject)
    inputs = subject.floats()
    i = subject.wrt[0]
    twins = [k for k in subject.wrt if inputs[k].shape == inputs[i].shape]
    shared = [inputs[i] if k in twins else x for k, x in enumerate(inputs)]
    try:
        _, separate = subject.gradients(shared, twins)
    except CLEAR as error:
        raise Skip(f"the first input is outside the domain of the others: {error}") from error
    leaf = inputs[i].clone().requires_grad_()
    arguments = [leaf if k in twins else x for k, x in enumerate(shared)]
    once = subject.call(*arguments)
    again = subject.call(*arguments)
    total = pull((*once, *again), [leaf], [*subject.incoming(once), *subject.incoming(again)])
    expected = sum((g for g in separate if g is not None), torch.zeros_like(leaf)) * 2
    part = replace(subject, wrt=(i,))
    cause = "wrong when a tensor is used twice"
    return agree(part, "used twice", total, [expected.detach()], ("used twice", "sum over copies"), cause)


@check("function", "determinism")
def determinism(subject: Subject) -> Finding | None:
    """The same inputs give the same values and gradients, to the last bit (a random function: from the same seed)."""
    inputs = subject.floats()
    if subject.drifts:
        text = "two calls with the same inputs and from the same seed differed: the result depends on the calls before"
        return Finding("", "error", "", text, "not deterministic: state is kept between calls")
    (y1, g1), (y2, g2) = subject.gradients(inputs), subject.gradients(inputs)
    for a, b in zip((*y1, *g1), (*y2, *g2), strict=True):
        if (a is None) != (b is None) or (a is not None and b is not None and not same(a, b)):
            return Finding("", "error", "", "two calls with the same inputs differ", "not deterministic")
    return Finding("", figure="random, from a seed" if subject.random else "")
