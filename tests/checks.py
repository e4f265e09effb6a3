"""The generic checks of a function: each takes a row of tests/functions.py and compares it with stock torch."""

from __future__ import annotations

import copy
import gc
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from torchcalc.testing import assert_function

if TYPE_CHECKING:
    from tests.functions import Inputs, Row

Call = Callable[..., Tensor]


def close(ours: Any, stock: Any) -> None:
    """Equal but for the rounding of a different order of operations in float64."""
    assert_close(ours, stock, rtol=1e-11, atol=1e-13, equal_nan=True)


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def fresh(inputs: Inputs, needed: tuple[int, ...]) -> list[Any]:
    """Copies, of which the needed ones are leaves that require a gradient."""
    return [
        x.detach().clone().requires_grad_(i in needed) if isinstance(x, Tensor) else x for i, x in enumerate(inputs)
    ]


def like_output(y: Tensor, scale: float = 1.0) -> Tensor:
    """An incoming gradient of numbers that every dtype holds exactly; of no randomness, which vmap would refuse."""
    places = torch.linspace(-1.3, 4.1, y.numel(), dtype=torch.float64, device=y.device)
    numbers = scale * places.reshape(y.shape).cos()
    return numbers.to(torch.bfloat16).to(y.dtype)


def gradients(f: Call, inputs: Inputs, needed: tuple[int, ...], scale: float = 1.0) -> tuple[Tensor, ...]:
    """(value, gradient of each needed input)."""
    leaves = fresh(inputs, needed)
    y = f(*leaves)
    assert y.requires_grad
    return y.detach(), *torch.autograd.grad(y, [leaves[i] for i in needed], like_output(y, scale))


def subsets(indices: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(indices, n) for n in range(1, len(indices) + 1))


def scalar(f: Call, inputs: Inputs, over: tuple[int, ...]) -> tuple[Call, tuple[Tensor, ...]]:
    """f as a scalar function of the inputs that are differentiated, and these; nonlinear in the output."""

    def call(*xs: Tensor) -> Tensor:
        arguments = list(inputs)
        for i, x in zip(over, xs, strict=True):
            arguments[i] = x
        y = f(*arguments)
        return (y.sin() * like_output(y)).sum()

    return call, tuple(inputs[i] for i in over)


def all_inputs(row: Row) -> list[Inputs]:
    return [make() for make in (lambda: row.inputs(), *row.edges)]


def values(row: Row) -> None:
    for inputs in all_inputs(row):
        with torch.no_grad():
            y = row.ours(*inputs)
        close(y, row.stock(*inputs))
        assert not y.requires_grad
        with torch.inference_mode():
            close(row.ours(*inputs), row.stock(*inputs))


def first_derivatives(row: Row) -> None:
    for inputs in all_inputs(row):
        present = tuple(i for i in row.grads if inputs[i] is not None)
        for needed in subsets(present):
            close(gradients(row.ours, inputs, needed), gradients(row.stock, inputs, needed))


def second_derivatives(row: Row) -> None:
    for inputs in all_inputs(row):
        if any(is_float(x) and (x.is_complex() or not x.numel()) for x in inputs):
            continue  # torch's hessian has neither; gradgradcheck does complex inputs
        over = tuple(i for i in row.grads if inputs[i] is not None)
        results = []
        for f in (row.ours, row.stock):
            call, xs = scalar(f, inputs, over)
            hessians = torch.autograd.functional.hessian(call, xs)
            results.append(hessians)
        close(*results)


def numerical_derivatives(row: Row) -> None:
    """Also where torch has no derivative, or no second one."""
    over = (*row.grads, *row.ours_only)
    tuples = [row.inputs(), *(i for i in all_inputs(row)[1:] if any(is_float(x) and x.is_complex() for x in i))]
    for inputs in tuples:
        leaves = fresh(inputs, over)
        forward = dict(check_forward_ad=True, check_batched_forward_grad=True)
        assert gradcheck(row.ours, leaves, check_batched_grad=True, **forward)
        assert gradgradcheck(row.ours, leaves, check_fwd_over_rev=True, check_batched_grad=True)


def batched(row: Row) -> None:
    """vmap over all inputs, and over the first alone; of values, of gradients, and of tangents."""
    inputs = row.inputs()
    others = [torch.stack([x, x.flip(0) if x.dim() else x, x]) if isinstance(x, Tensor) else None for x in inputs]
    dims = tuple(None if x is None else 0 for x in inputs)
    for in_dims, arguments in ((dims, others), ((0, *[None] * (len(dims) - 1)), [others[0], *inputs[1:]])):
        close(vmap(row.ours, in_dims)(*arguments), vmap(row.stock, in_dims)(*arguments))
        results = []
        for f in (row.ours, row.stock):
            call = lambda *xs, f=f: (lambda y: (y * like_output(y)).sum())(f(*xs))  # noqa: E731
            derivative = vmap(grad(call, row.grads), in_dims)(*arguments)
            tangent = vmap(lambda *xs, call=call: jvp(lambda x: call(x, *xs[1:]), xs[:1], (xs[0].cos(),)), in_dims)(
                *arguments
            )
            results.append((derivative, tangent))
        close(*results)


def functional_transforms(row: Row) -> None:
    inputs = row.inputs()
    n = tuple(range(len(row.grads)))
    results = []
    for f in (row.ours, row.stock):
        call, xs = scalar(f, inputs, row.grads)
        elements = lambda *xs, f=f: f(*xs, *inputs[len(xs) :])  # noqa: E731
        first = lambda x, call=call, xs=xs: call(x, *xs[1:])  # noqa: E731
        results.append(
            {
                "grad": grad(call, n)(*xs),
                "jacrev": jacrev(elements, n)(*xs),
                "jacfwd": jacfwd(elements, n)(*xs),
                "hessian": hessian(call, n)(*xs),
                "reverse over reverse": jacrev(jacrev(call, n), n)(*xs),
                "reverse over forward": jacrev(jacfwd(call, n), n)(*xs),
                "third": grad(lambda x, f=first: hessian(f)(x).sum())(xs[0]),
                "vjp of jvp": vjp(lambda x, f=first: jvp(f, (x,), (x.sin(),))[1], xs[0])[1](torch.ones_like(call(*xs))),
            }
        )
    close(*results)


def compiled(row: Row, backend: str = "aot_eager") -> None:
    """fullgraph, forward and backward, and the gradient taken inside."""
    torch._dynamo.reset()
    inputs = row.inputs()
    f = torch.compile(row.ours, backend=backend, fullgraph=True)
    close(gradients(f, inputs, row.grads), gradients(row.stock, inputs, row.grads))
    with torch.no_grad():
        close(f(*inputs), row.stock(*inputs))


def compiled_functional(row: Row) -> None:
    torch._dynamo.reset()
    results = []
    for f in (row.ours, row.stock):
        call, xs = scalar(f, row.inputs(), row.grads)
        g = grad(call, tuple(range(len(xs))))
        results.append(torch.compile(g, backend="aot_eager", fullgraph=True)(*xs) if f is row.ours else g(*xs))
    close(*results)


def compiled_by_inductor(row: Row) -> None:
    compiled(row, "inductor")


def autocast(row: Row) -> None:
    """dtypes of the value and of the gradients, with backward inside of autocast and outside."""
    for dtype, low, inside in itertools.product(
        (torch.float32, torch.bfloat16, torch.float64), (torch.bfloat16,), (True, False)
    ):
        results = []
        for f in (row.ours, row.stock):
            leaves = [x.to(dtype) if is_float(x) else x for x in row.inputs()]
            leaves = fresh(tuple(leaves), row.grads)
            try:
                with torch.autocast(leaves[0].device.type, low):
                    y = f(*leaves)
                    if inside:
                        grads = torch.autograd.grad(y, [leaves[i] for i in row.grads], like_output(y))
                if not inside:
                    grads = torch.autograd.grad(y, [leaves[i] for i in row.grads], like_output(y))
                results.append((y, *grads))
            except RuntimeError as error:
                results.append(type(error))
        ours, stock = results
        if isinstance(ours, tuple) and isinstance(stock, tuple):
            assert [t.dtype for t in ours] == [t.dtype for t in stock]
        assert_close(ours, stock, rtol=0.02, atol=0.02) if isinstance(stock, tuple) else close(*map(str, results))


def autocast_of_cuda(row: Row) -> None:
    """The dtype of the value under CUDA's autocast, whose list is another; on fake tensors, so no device is needed."""
    for dtype in (torch.float16, torch.float32, torch.float64):
        results = []
        for f in (row.ours, row.stock):
            inputs = [x.to(dtype) if is_float(x) else x for x in row.inputs()]
            with FakeTensorMode():
                fake = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in inputs]
                torch.set_autocast_enabled("cuda", True)  # torch.autocast("cuda") is refused where there is no device
                try:
                    results.append(f(*fake).dtype)
                except RuntimeError as error:
                    results.append(type(error))
                finally:
                    torch.set_autocast_enabled("cuda", False)
        assert results[0] == results[1], (dtype, results)


def layouts(row: Row) -> None:
    """Non-contiguous, offset and expanded inputs and incoming gradients; nothing is written to."""

    def strided(x: Any) -> Any:
        return torch.stack([x, x + 1], -1)[..., 0] if isinstance(x, Tensor) else x

    def transposed(x: Any) -> Any:
        return x.mT.contiguous().mT if isinstance(x, Tensor) and x.dim() > 1 else x

    def expanded(x: Any) -> Any:
        return x[:1].expand_as(x) if isinstance(x, Tensor) and x.dim() > 1 else x

    for inputs, layout in itertools.product(all_inputs(row), (strided, transposed, expanded)):
        over = tuple(i for i in row.grads if inputs[i] is not None)
        arguments = tuple(layout(x) for x in inputs)
        kept = copy.deepcopy(arguments)
        results = []
        for f in (row.ours, row.stock):
            xs = [x.detach().requires_grad_(i in over) if isinstance(x, Tensor) else x for i, x in enumerate(arguments)]
            y = f(*xs)
            incoming = layout(like_output(y))
            before = incoming.clone()
            results.append((y.detach(), torch.autograd.grad(y, [xs[i] for i in over], incoming)))
            assert torch.equal(incoming, before)
        close(*results)
        assert all(torch.equal(x, k) for x, k in zip(arguments, kept, strict=True) if isinstance(x, Tensor))


def special_values(row: Row) -> None:
    """NaN, infinities, kinks and huge numbers come out as torch's, in value and in gradient."""
    assert row.special is not None
    inputs = row.special()
    over = tuple(i for i in row.grads if inputs[i] is not None)
    close(gradients(row.ours, inputs, over), gradients(row.stock, inputs, over))
    leaves = fresh(inputs, (0,))
    y = row.ours(*leaves)
    infinite = torch.full_like(y, torch.inf)
    close(torch.autograd.grad(y, leaves[0], infinite), torch.autograd.grad(row.stock(*leaves), leaves[0], infinite))


def same_tensor_twice(row: Row) -> None:
    results = []
    for f in (row.ours, row.stock):
        leaves = fresh(row.inputs(), (0,))
        x = leaves[0]
        shared = [x if is_float(a) and a.shape == x.shape and i in row.grads else a for i, a in enumerate(leaves)]
        y = f(*shared)
        z = y.sum() + f(*shared).square().sum()
        results.append((z.detach(), torch.autograd.grad(z, x)))
    close(*results)


def checkpointed(row: Row) -> None:
    close(
        gradients(partial(checkpoint, row.ours, use_reentrant=False), row.inputs(), row.grads),
        gradients(row.stock, row.inputs(), row.grads),
    )


def exported(row: Row) -> None:
    class Module(torch.nn.Module):
        def forward(self, *inputs: Any) -> Tensor:
            return row.ours(*inputs)

    program = torch.export.export(Module(), row.inputs())
    close(program.module()(*row.inputs()), row.stock(*row.inputs()))


def half_precision(row: Row) -> None:
    """In 16 bits the error against float64, summed over many numbers, is at most torch's own.

    Both round once; but not always the same way, where the last digits of float32 differ. That is a coin toss for one
    of some thousand numbers: 5 % of the sum is more than it makes, and one rounding more in a formula is far above it.
    """
    for dtype in (torch.bfloat16, torch.float16):
        ours, stock = (0.0,) * (len(row.grads) + 1), (0.0,) * (len(row.grads) + 1)
        for k in range(40):
            scaled = tuple(x * (1 - k / 53) if is_float(x) else x for x in row.inputs())
            small = tuple(x.to(dtype) if is_float(x) else x for x in scaled)
            exact = tuple(x.double() if is_float(x) else x for x in small)
            truth = gradients(row.stock, exact, row.grads, 1 + k / 37)
            twin = row.half_stock or row.stock
            mine, theirs = (gradients(f, small, row.grads, 1 + k / 37) for f in (row.ours, twin))
            assert [t.dtype for t in mine] == [t.dtype for t in theirs]
            ours = tuple(
                e + (t.double() - true).abs().sum().item() for e, t, true in zip(ours, mine, truth, strict=True)
            )
            stock = tuple(
                e + (t.double() - true).abs().sum().item() for e, t, true in zip(stock, theirs, truth, strict=True)
            )
        assert all(mine <= 1.05 * theirs for mine, theirs in zip(ours, stock, strict=True)), (ours, stock)


def no_leak(row: Row) -> None:
    """Without the garbage collector, the graph and what it saved go with the last reference to the result."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        leaves = fresh(row.inputs(), row.grads)
        y = row.ours(*leaves)
        alive = weakref.ref(y), *(weakref.ref(x) for x in leaves if isinstance(x, Tensor))
        gradients = torch.autograd.grad(y, [leaves[i] for i in row.grads], like_output(y), create_graph=True)
        del y, leaves, gradients
        # On a GPU backward runs in a thread of its own, which lets go of its last node a moment after we go on.
        deadline = time.monotonic() + 2
        while any(r() is not None for r in alive) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert [r() for r in alive] == [None] * len(alive)
    finally:
        if enabled:
            gc.enable()


def reported(row: Row) -> None:
    """What users are given to check their own functions finds nothing wrong with ours."""
    assert_function(
        row.ours, *row.inputs(), reference=row.reference or row.stock, wrt=row.grads, name=row.name, progress=False
    )


ALL = (
    reported,
    values,
    first_derivatives,
    second_derivatives,
    numerical_derivatives,
    batched,
    functional_transforms,
    compiled,
    compiled_functional,
    compiled_by_inductor,
    autocast,
    autocast_of_cuda,
    layouts,
    special_values,
    same_tensor_twice,
    checkpointed,
    exported,
    half_precision,
    no_leak,
)


def applies(row: Row, check: Callable[[Row], None]) -> bool:
    if check is special_values:
        return row.special is not None
    if check is half_precision:
        return row.half
    if check is reported:
        return row.reported
    if check in (autocast, autocast_of_cuda):
        return row.autocast
    return row.inductor if check is compiled_by_inductor else True
