"""forward(..., *, needs_input_grad) is told which inputs need a derivative, wherever it is called."""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from torchcalc.autograd import Function

compile = partial(torch.compile, fullgraph=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def reset():
    torch._dynamo.reset()


class Told(Function):
    """x·w, noting what it is told."""

    seen: tuple[bool, ...] | None = None

    @staticmethod
    def forward(x, n, w=None, *, needs_input_grad):
        Told.seen = needs_input_grad
        return n * x if w is None else n * x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.n, w = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return (ctx.n * g, None, None) if w is None else (ctx.n * g * w, None, ctx.n * g * x)

    @staticmethod
    def jvp(ctx, dx, _, dw):
        x, w = ctx.saved_tensors
        return ctx.n * dx if w is None else ctx.n * (dx * w + x * dw)


def vector(requires_grad=False, n=3):
    x = torch.linspace(0.5, 2.0, n, dtype=torch.float64)
    return x.requires_grad_() if requires_grad else x


def told(f, *args):
    Told.seen = None
    f(*args)
    return Told.seen


def test_forward_is_told_in_eager_mode():
    x, p = vector(), vector(True)
    assert told(Told.apply, p, 2) == (True, False, False)
    assert told(Told.apply, x, 2, p) == (False, False, True)
    assert told(Told.apply, x, 2, x) == (False, False, False)
    with torch.no_grad():
        assert told(Told.apply, p, 2, p) == (False, False, False)
    with torch.inference_mode():
        assert told(Told.apply, p, 2, p) == (False, False, False)
    assert told(lambda: checkpoint(Told.apply, p, 2, x, use_reentrant=False).sum().backward()) == (True, False, False)


def test_forward_is_told_under_torch_func():
    x, p, rows = vector(), vector(True), vector().expand(2, 3)
    first = lambda w: lambda z: Told.apply(z, 2, w).sum()  # noqa: E731
    second = lambda x: lambda z: Told.apply(x, 2, z).sum()  # noqa: E731
    for transform in (grad, jacrev, jacfwd, hessian, lambda f: grad(lambda z: grad(f)(z).sum())):
        assert told(transform(first(x)), x) == (True, False, False)
        assert told(transform(second(x)), x) == (False, False, True)
    assert told(grad(lambda w: grad(first(w))(x).sum()), x) == (True, False, True)
    assert told(vmap(first(x)), rows) == (False, False, False)
    assert told(vmap(first(p)), rows) == (False, False, True)
    assert told(vmap(grad(first(x))), rows) == (True, False, False)
    assert told(grad(lambda z: vmap(first(x))(z).sum()), rows) == (True, False, False)
    assert told(lambda: jvp(lambda z: vmap(first(x))(z), (rows,), (rows,))) == (True, False, False)
    assert told(vmap(lambda z: jvp(first(x), (z,), (z,))), rows) == (True, False, False)
    with torch.no_grad():
        assert told(vmap(first(p)), rows) == (False, False, False)
        assert told(grad(first(x)), x) == (True, False, False)
        assert told(lambda: jvp(first(p), (x,), (x,))) == (True, False, False)


def test_forward_is_told_under_forward_ad():
    x = vector()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert told(Told.apply, dual, 2, x) == (True, False, False)
        assert told(Told.apply, x, 2, dual) == (False, False, True)
        assert told(Told.apply, x, 2, x) == (False, False, False)
        assert told(vmap(lambda z: Told.apply(z, 2, x)), dual.expand(2, 3))[0]


def test_forward_is_told_under_compile():
    x, p = vector(), vector(True)
    f = compile(lambda x, w: Told.apply(x, 2, w))
    assert told(f, p, x) == (True, False, False)
    assert told(f, x, p) == (False, False, True)
    with torch.no_grad():
        assert told(f, p, x) == (False, False, False)
    assert told(compile(grad(lambda z: Told.apply(z, 2, x).sum())), x) == (True, False, False)
