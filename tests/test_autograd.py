"""The engine: each claim of torchcalc/autograd.py, on Functions small enough to check by eye."""

import gc
import subprocess
import sys
import threading
import timeit
import weakref
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from torchcalc.autograd import Function

compile = partial(torch.compile, fullgraph=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def reset():
    torch._dynamo.reset()


class Scale(Function):
    """k·x^n·w, with arguments that are not tensors, optional ones, defaults."""

    @staticmethod
    def forward(x, k, n=2, w=None, name="w"):
        return k * x**n if w is None else k * x**n * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.k, ctx.n, w, _ = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        u = 1 if w is None else w
        return g * ctx.k * ctx.n * x ** (ctx.n - 1) * u, None, None, None if w is None else g * ctx.k * x**ctx.n, None

    @staticmethod
    def jvp(ctx, dx, dk, dn, dw, dname):
        assert dk is dn is dname is None
        x, w = ctx.saved_tensors
        t = ctx.k * ctx.n * x ** (ctx.n - 1) * dx
        return t if w is None else t * w + ctx.k * x**ctx.n * dw


class Round(Function):
    """A straight-through estimator: the derivative is not that of forward, so a dropped backward shows."""

    @staticmethod
    def forward(x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def jvp(ctx, t):
        return t.clone()


class Stats(Function):
    """(x², max |x|, argmax): a differentiable output, a metric that is not, and integers."""

    @staticmethod
    def forward(x):
        return x * x, x.abs().amax(), x.argmax()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, g, *_):
        (x,) = ctx.saved_tensors
        return 2 * x * g

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return 2 * x * t, None, None


def vector(requires_grad=False, n=3):
    x = torch.linspace(0.5, 2.0, n, dtype=torch.float64)
    return x.requires_grad_() if requires_grad else x


def test_one_definition_passes_every_numerical_check():
    x, w = vector(True), vector(True)
    for f in (
        lambda x, w: Scale.apply(x, 3.0, 3, w),
        lambda x, w: Scale.apply(x, 3.0) + w,
        lambda x, w: Stats.apply(x)[0] * w,
    ):
        assert gradcheck(f, (x, w), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
        assert gradgradcheck(f, (x, w), check_fwd_over_rev=True, check_batched_grad=True)


def test_every_transform_of_one_definition():
    f, stock = (lambda x: Scale.apply(x, 2.0, 3).sum()), (lambda x: (2 * x**3).sum())
    x = vector()
    for transform in (
        grad,
        jacrev,
        jacfwd,
        hessian,
        lambda f: grad(lambda x: hessian(f)(x).sum()),
        lambda f: vmap(grad(f)),
    ):
        z = x.expand(2, 3) if "vmap" in str(transform(f).__qualname__) else x
        assert_close(transform(f)(z), transform(stock)(z))
        assert_close(compile(transform(f))(z), transform(stock)(z))
    assert_close(jvp(f, (x,), (x,)), jvp(stock, (x,), (x,)))
    assert_close(torch.autograd.functional.hessian(f, x), torch.diag(12 * x))
    assert_close(checkpoint(f, x, use_reentrant=False), stock(x))


@pytest.mark.parametrize("args", [(2.0,), (2.0, 3), (2.0, 3, None), (2.0, 3, None, "v")])
def test_arguments_left_out_take_their_defaults(args):
    n = args[1] if len(args) > 1 else 2
    for f in (Scale.apply, compile(Scale.apply)):
        x = vector(True)
        f(x, *args).sum().backward()
        assert_close(x.grad, 2 * n * x.detach() ** (n - 1))
    assert_close(grad(lambda x: Scale.apply(x, *args).sum())(vector()), 2 * n * vector() ** (n - 1))


def test_the_same_tensor_twice():
    x = vector(True)
    (g,) = torch.autograd.grad(Scale.apply(x, 1.0, 2, x).sum(), x)
    assert_close(g, 3 * x.detach() ** 2)
    assert_close(grad(lambda x: Scale.apply(x, 1.0, 2, x).sum())(x.detach()), 3 * x.detach() ** 2)
    assert_close(jvp(lambda x: Scale.apply(x, 1.0, 2, x), (vector(),), (vector(),))[1], 3 * vector() ** 3)


def test_eager_calls_run_each_method_once_and_nothing_else():
    calls = []

    class Counted(Scale):
        @staticmethod
        def forward(*args):
            calls.append("forward")
            return Scale.forward(*args)

        @staticmethod
        def backward(ctx, g):
            calls.append("backward")
            return Scale.backward(ctx, g)

        @staticmethod
        def jvp(ctx, *tangents):
            raise AssertionError

    Counted.apply(vector(True), 2.0, 2, None, "w").sum().backward()
    assert calls == ["forward", "backward"]


STRAIGHT = {
    "backward": lambda f, x: torch.autograd.grad(f(z := x.clone().requires_grad_()), z)[0],
    "compiled backward": lambda f, x: torch.autograd.grad(compile(f)(z := x.clone().requires_grad_()), z)[0],
    "grad": lambda f, x: grad(f)(x),
    "compiled grad": lambda f, x: compile(grad(f))(x),
    "compiled vmap of grad": lambda f, x: compile(vmap(grad(f)))(x),
    "jacrev": lambda f, x: jacrev(f)(x),
    "compiled jacrev": lambda f, x: compile(jacrev(f))(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "compiled jacfwd": lambda f, x: compile(jacfwd(f))(x),
}


@pytest.mark.parametrize("how", STRAIGHT)
def test_a_custom_derivative_is_kept(how):
    x = torch.tensor([[0.4, 1.3, -2.6], [3.7, -0.2, 5.1]])
    assert_close(STRAIGHT[how](lambda z: (Round.apply(z) * torch.arange(3.0)).sum(), x), torch.arange(3.0).expand(2, 3))


def test_non_differentiable_outputs_do_not_leak():
    x = vector(True)
    square, peak, index = Stats.apply(x)
    assert square.requires_grad
    assert not peak.requires_grad
    assert (peak.item(), index.item()) == (2.0, 2)

    def f(x):
        square, peak, index = Stats.apply(x)
        return square.sum() + 100 * peak + index, (peak, index)

    for g in (grad(f, has_aux=True), compile(grad(f, has_aux=True))):
        derivative, (peak, index) = g(vector())
        assert_close(derivative, 2 * vector())
        assert (peak.item(), index.item()) == (2.0, 2)
    rows = torch.stack([vector(), -3 * vector()])
    derivative, (peak, index) = vmap(grad(f, has_aux=True))(rows)
    assert_close(derivative, 2 * rows)
    assert (peak.tolist(), index.tolist()) == ([2.0, 6.0], [2, 0])
    assert_close(grad(lambda x: vmap(f)(x)[0].sum())(rows), 2 * rows)
    assert_close(
        jvp(lambda x: Stats.apply(x)[:2], (vector(),), (vector(),))[1], (2 * vector() ** 2, torch.zeros(()).double())
    )


def test_a_single_non_differentiable_output_does_not_leak():
    class Peak(Function):
        @staticmethod
        def forward(x):
            return x.abs().amax()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.mark_non_differentiable(output)

        @staticmethod
        def backward(ctx, g):
            raise AssertionError("called for an output that is not differentiable")

    assert not Peak.apply(vector(True)).requires_grad
    rows = vector().expand(2, 3)
    for f in (lambda x: Peak.apply(x), lambda x: vmap(Peak.apply)(x).sum()):
        assert_close(grad(lambda x, f=f: f(x) + x.sum())(rows), torch.ones_like(rows))


class Product(Function):
    seen: tuple[object, ...] = ()

    @staticmethod
    def forward(x, w):
        return x @ w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        Product.seen = (torch.is_autocast_enabled("cpu"), g.dtype)
        return g @ w.mT, x.mT @ g


POLICIES = {  # policy: dtype of the result from float32, autocast in backward
    "inherit": (torch.bfloat16, True),
    "off": (torch.float32, False),
    "lower_precision": (torch.bfloat16, False),
    "float32": (torch.float32, False),
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("form", ["eager", "compiled", "functional"])
@pytest.mark.parametrize("policy", POLICIES)
def test_autocast(policy, form, inside):
    dtype, on = POLICIES[policy]
    f = type("Product", (Product,), {"autocast": policy}).apply
    x, w = torch.rand(2, 3), torch.rand(3, 2)
    call = compile(lambda *a: f(*a)) if form == "compiled" else f
    if form == "functional":
        with torch.autocast("cpu", torch.bfloat16):
            y = f(x, w)
            grads = grad(lambda x, w: f(x, w).float().sum(), (0, 1))(x, w)
    else:
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = call(*leaves)
            if inside:
                grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        if not inside:
            grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert y.dtype == dtype
    assert Product.seen == (on, dtype)
    assert [g.dtype for g in grads] == [torch.float32] * 2
    assert_close(grads, (torch.ones(2, 2) @ w.mT, x.mT @ torch.ones(2, 2)), rtol=0.02, atol=0.02)


def test_autocast_leaves_float64_alone_and_does_not_reach_a_backward_of_a_forward_without_it():
    for policy in POLICIES:
        f = type("Product", (Product,), {"autocast": policy}).apply
        x, w = vector(True).expand(2, 3), torch.rand(3, 2).double()
        if policy != "inherit":  # as torch's matmul, which takes float64 as it is
            with torch.autocast("cpu", torch.bfloat16):
                assert f(x, w).dtype == torch.float64
        y = f(x.float(), w.float())
        with torch.autocast("cpu", torch.bfloat16):
            y.sum().backward()
        assert Product.seen == (False, torch.float32)


def test_mark_dirty():
    class Triple(Function):
        @staticmethod
        def forward(x):
            return x.mul_(3)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.mark_dirty(*inputs)

        @staticmethod
        def backward(ctx, g):
            return 3 * g

        @staticmethod
        def jvp(ctx, t):
            return t.mul_(3)

    p = vector(True)
    x = p.clone()
    y = Triple.apply(x)
    assert y is x
    assert_close(x.detach(), 3 * vector())
    assert_close(torch.autograd.grad(x.sum(), p)[0], torch.full((3,), 3.0).double())
    assert_close(grad(lambda x: Triple.apply(x.clone()).sum())(vector()), torch.full((3,), 3.0).double())
    assert_close(jvp(lambda x: Triple.apply(x.clone()), (vector(),), (vector(),))[1], 3 * vector())
    with pytest.raises(RuntimeError, match="in-place operation"):
        Triple.apply(p)
    with pytest.raises(RuntimeError, match="dirty"):  # refused by torch, and not silently wrong
        vmap(lambda x: Triple.apply(x.clone()))(vector().expand(2, 3))


def test_gradients_that_do_not_come_in_may_be_none():
    class Pair(Function):
        @staticmethod
        def forward(x):
            return 2 * x, 3 * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, a, b):
            Pair.seen = (a is None, b is None)
            return sum(k * g for k, g in ((2, a), (3, b)) if g is not None)

    x = vector(True)
    assert_close(torch.autograd.grad(Pair.apply(x)[1].sum(), x)[0], torch.full((3,), 3.0).double())
    assert Pair.seen == (True, False)
    assert_close(vmap(grad(lambda x: Pair.apply(x)[0].sum()))(vector().expand(2, 3)), torch.full((2, 3), 2.0).double())
    assert Pair.seen == (False, True)


def test_a_vmap_rule_of_its_own():
    class Total(Function):
        @staticmethod
        def forward(x, scale, *, needs_input_grad):
            return scale * x.sum(-1), x.amax(-1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            x, ctx.scale = inputs
            ctx.save_for_backward(x)
            ctx.mark_non_differentiable(output[1])

        @staticmethod
        def backward(ctx, g, _):
            (x,) = ctx.saved_tensors
            return ctx.scale * g.unsqueeze(-1).expand_as(x), None

        @staticmethod
        def vmap(info, in_dims, x, scale):
            Total.rule = (info.batch_size, in_dims)
            Round.apply(x)  # another Function must not confuse this one's outputs
            return Total.apply(x.movedim(in_dims[0], 0), scale), (0, 0)

    rows = vector(n=6).reshape(3, 2)
    total, peak = vmap(lambda x: Total.apply(x, 2.0), in_dims=1)(rows)
    assert Total.rule == (2, (1, None))
    assert_close((total, peak), (2 * rows.sum(0), rows.amax(0)))
    assert_close(vmap(grad(lambda x: sum(Total.apply(x, 2.0))))(rows), torch.full((3, 2), 2.0).double())
    assert_close(
        grad(lambda x: sum(vmap(lambda x: Total.apply(x, 2.0))(x)).sum())(rows), torch.full((3, 2), 2.0).double()
    )


def test_functions_inside_functions_and_subclasses_of_subclasses():
    class Quartic(Function):
        @staticmethod
        def forward(x):
            return Scale.apply(x, 1.0, 4)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * Scale.apply(x, 4.0, 3)

        @staticmethod
        def jvp(ctx, t):
            (x,) = ctx.saved_tensors
            return t * Scale.apply(x, 4.0, 3)

    class Negative(Quartic):
        @staticmethod
        def forward(x):
            return -Quartic.apply(x)

        @staticmethod
        def backward(ctx, g):
            return -Quartic.backward(ctx, g)

        jvp = backward

    for cls, sign in ((Quartic, 1), (Negative, -1), (type("Again", (Negative,), {}), -1)):
        f = lambda x, cls=cls: cls.apply(x).sum()  # noqa: E731
        x = vector(True)
        assert gradcheck(cls.apply, x, check_forward_ad=True)
        assert gradgradcheck(cls.apply, x, check_fwd_over_rev=True)
        for second in (hessian(f), compile(hessian(f)), partial(torch.autograd.functional.hessian, f)):
            assert_close(second(vector()), torch.diag(sign * 12 * vector() ** 2))


def test_functions_reached_through_the_same_code_are_compiled_each_for_itself():
    """Dynamo guards closures by their code; were it one for all, the second Function would get the first's graph."""

    class Minus(Round):
        @staticmethod
        def backward(ctx, g):
            return -g

        jvp = backward

    def through(cls):
        return lambda x: cls.apply(x).sum()

    for transform in (lambda f: f, grad, jacrev, jacfwd, lambda f: vmap(grad(f))):
        torch._dynamo.reset()
        for cls in (Round, Minus, Stats):
            f = through(cls) if cls is not Stats else (lambda x: Stats.apply(x)[0].sum())
            x = torch.stack([vector(), -vector()]).requires_grad_()
            expected, result = transform(f)(x), compile(transform(f))(x)
            assert_close(result, expected)
            if expected.requires_grad:
                assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (result, expected)))


def test_forward_may_return_its_input():
    class Double(Round):
        @staticmethod
        def forward(x):
            return x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    x = vector(True)
    for f in (Double.apply, compile(Double.apply)):
        assert_close(torch.autograd.grad(f(x).sum(), x)[0], torch.full((3,), 2.0).double())
    assert_close(vmap(grad(lambda x: Double.apply(x).sum()))(vector().expand(2, 3)), torch.full((2, 3), 2.0).double())


def test_threads():
    errors = []

    def work(k):
        try:
            for _ in range(20):
                x = k * vector()
                assert_close(vmap(grad(lambda x: Stats.apply(x)[0].sum()))(x.expand(2, 3)), 2 * x.expand(2, 3))
                leaf = x.clone().requires_grad_()
                assert_close(torch.autograd.grad(Scale.apply(leaf, float(k)).sum(), leaf)[0], 2 * k * x)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


LIVES = {
    "eager": lambda x, w: Scale.apply(x, 2.0, 3, w),
    "double backward": lambda x, w: torch.autograd.grad(Scale.apply(x, 2.0, 3, w).sum(), x, create_graph=True)[0],
    "grad": lambda x, w: grad(lambda z: Scale.apply(z, 2.0, 3, w).sum())(x),
    "vmap": lambda x, w: vmap(lambda z: Scale.apply(z, 2.0, 3, w))(x.expand(2, 3)),
    "jvp": lambda x, w: jvp(lambda z: Scale.apply(z, 2.0, 3, w), (x,), (x,))[1],
    "outputs": lambda x, w: Stats.apply(x * w)[0],
}


@pytest.mark.parametrize("form", LIVES)
def test_nothing_leaks(form):
    def references():
        x, w = vector(True), vector(True)
        y = LIVES[form](x, w)
        return [weakref.ref(t) for t in (x, w, y)]

    enabled = gc.isenabled()
    gc.disable()
    try:
        assert [r() for r in references()] == [None] * 3
    finally:
        if enabled:
            gc.enable()


def test_a_saved_tensor_that_changed_is_refused():
    x = vector(True)
    saved = x * 1
    y = Scale.apply(saved, 2.0)
    saved.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_importing_the_engine_does_not_import_dynamo():
    code = "import sys, torchcalc.functional, torchcalc.nn; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_function_compiled_first_in_a_process():
    """Registration with Dynamo happens while it traces the first call."""
    code = """
import torch, torchcalc.functional as F
x = torch.tensor([1.0, -2.0], requires_grad=True)
torch.compile(lambda x: F.square(F.relu(x)), fullgraph=True, backend="aot_eager")(x).sum().backward()
assert x.grad.tolist() == [2.0, 0.0], x.grad
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_modules_of_functions_compose_with_functional_call():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(vector())

        def forward(self, x):
            return Scale.apply(x, 2.0, 2, self.w)

    layer = Layer()
    g = grad(lambda p: functional_call(layer, p, (vector(),)).sum())({"w": layer.w.detach()})
    assert_close(g["w"], 2 * vector() ** 2)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), dict(x=1, k=2.0)),
        ((), dict(k=2.0, x=1)),
        ((1,), dict(k=2.0, w=1)),
        ((1, 2.0), dict(name="v")),
        ((1, 2.0, 3), dict(w=1, name="v")),
    ],
    ids=str,
)
def test_arguments_by_name(args, kwargs):
    def run(f):
        leaf = vector(True)
        given = [leaf if a == 1 else a for a in args], {k: leaf if a == 1 else a for k, a in kwargs.items()}
        return torch.autograd.grad(f(*given[0], **given[1]).sum(), leaf)

    assert_close(run(Scale.apply), run(Scale.forward))
    assert_close(run(compile(lambda *args, **kwargs: Scale.apply(*args, **kwargs))), run(Scale.forward))


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((1, 2.0), dict(k=3.0), "two values for argument 'k'; leave one out"),
        ((1,), dict(k=3.0, z=1), "no argument 'z'; its forward takes x, k, n, w, name"),
        ((1,), dict(n=3), "Scale.apply lacks k; pass"),
        ((), dict(w=3), "Scale.apply lacks x, k; pass"),
    ],
)
def test_arguments_by_name_that_do_not_fit(args, kwargs, text):
    with pytest.raises(TypeError, match=text):
        Scale.apply(*args, **kwargs)


def test_arguments_by_name_after_those_by_position_only():
    class Times(Function):
        @staticmethod
        def forward(x, k, /, n=2, m=3):
            return x * k * n * m

        @staticmethod
        def backward(ctx, g):
            return g, None, None, None

    x = vector()
    assert_close(Times.apply(x, 2.0, m=5), 20 * x)
    with pytest.raises(TypeError, match="lacks arguments that are given by position"):
        Times.apply(x, m=5)
    with pytest.raises(TypeError, match="no argument 'k'"):
        Times.apply(x, k=5)


def test_the_check_of_saved_tensors_is_linear_in_the_arguments():
    class Many(Function):
        @staticmethod
        def forward(*xs):
            return xs[0].clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*reversed(inputs))

        @staticmethod
        def backward(ctx, g):
            return (g, *(None for _ in ctx.saved_tensors[1:]))

    def seconds(n):
        xs = [torch.zeros(()) for _ in range(n)]
        return min(timeit.repeat(lambda: Many.apply(*xs), number=1, repeat=5))

    assert seconds(4000) < 25 * seconds(500)  # 64 times if quadratic
