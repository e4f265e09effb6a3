"""The engine of formulas: kernels against the formula on tensors, and what a node in torch's graph owes."""

import copy
import gc
import importlib.util
import multiprocessing
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import torchcalc.functional as F
from torchcalc import native
from torchcalc.formula import loss, pointwise, where
from torchcalc.formula.pointwise import FORMULAS, Formula
from torchcalc.native import pointwise as kernels

pytestmark = pytest.mark.skipif(native.nodes() is None, reason=f"no nodes: {native.why_no_nodes()}")

inf, nan = torch.inf, torch.nan
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture
def formulas():
    """Formulas that a test defines are gone after it."""
    kept = dict(FORMULAS)
    yield
    FORMULAS.clear()
    FORMULAS.update(kept)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    x = normal(6, 10, 4, dtype=dtype)
    return {
        "contiguous": x,
        "transposed": x.transpose(0, 2),
        "strided": normal(6, 20, 4, dtype=dtype)[:, ::2],
        "offset": normal(241, dtype=dtype)[1:].view(6, 10, 4),
        "expanded": x[:1].expand(6, 10, 4),
        "one number": normal(dtype=dtype).expand(5, 3),
        "0-d": normal(dtype=dtype),
        "empty": x[:0],
        "channels_last": normal(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=torch.channels_last),
        "long": normal(70_001, dtype=dtype),
    }


def made_by_a_node(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ == "CppFunction"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", layouts(torch.float32))
def test_kernels_are_the_formula(layout, dtype):
    """Value and gradient within two roundings of the formula on tensors in float64, in torch's layout."""
    x = layouts(dtype)[layout]
    for name in ("gelu", "sigmoid", "tanh", "relu", "square"):
        f, stock = getattr(F, name), getattr(torch.nn.functional, name, None) or getattr(torch, name)
        leaf, wide = x.detach().requires_grad_(), x.double().requires_grad_()
        y, truth = f(leaf), stock(wide)
        assert made_by_a_node(y), name
        for g in (normal(*x.shape, dtype=dtype, seed=1), normal(dtype=dtype, seed=2).expand(x.shape)):
            (mine,) = torch.autograd.grad(y, leaf, g, retain_graph=True)
            (true,) = torch.autograd.grad(truth, wide, g.double(), retain_graph=True)
            tolerance = 4 * torch.finfo(dtype).eps
            assert_close(y.double(), truth, rtol=tolerance, atol=tolerance)
            assert_close(mine.double(), true, rtol=tolerance, atol=4 * tolerance)
            assert mine.dtype == dtype
        assert y.stride() == stock(leaf).stride()


@pytest.mark.parametrize("n", [2**16, 2**16 - 1, 7, 1])
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "abs", "square"])
def test_every_bfloat16_number(name, n):
    """What is widened and rounded in registers is what torch computes, NaN and infinities too."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)[-n:]
    f, stock = getattr(F, name), getattr(torch.nn.functional, name, None) or getattr(torch, name)
    results = []
    for function in (f, stock):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, x.flip(0))))
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


T = torch.nn.functional
#: Of several inputs: ours, torch's, and which arguments get a gradient.
SEVERAL = {
    "swiglu": (F.swiglu, lambda a, b: T.silu(a) * b, (0, 1)),
    "geglu": (F.geglu, lambda a, b: T.gelu(a) * b, (0, 1)),
    "mse none": (partial(F.mse_loss, reduction="none"), partial(T.mse_loss, reduction="none"), (0, 1)),
    "mse weighted": (lambda x, t, w: F.mse_loss(x, t, weight=w), lambda x, t, w: T.mse_loss(x, t, weight=w), (0, 1)),
    "gaussian": (F.gaussian_nll_loss, T.gaussian_nll_loss, (0, 1, 2)),
    "gaussian, no target": (F.gaussian_nll_loss, T.gaussian_nll_loss, (0, 2)),
    "bce": (
        lambda x, t, p: F.binary_cross_entropy_with_logits(x, t, pos_weight=p, reduction="sum"),
        lambda x, t, p: T.binary_cross_entropy_with_logits(x, t, pos_weight=p, reduction="sum"),
        (0, 1),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SEVERAL)
def test_gradients_of_several_inputs_at_once(name, dtype):
    """They are those of each input alone, to the bit, and torch's of float64 within roundings."""
    f, stock, places = SEVERAL[name]
    n = 2 if name in ("swiglu", "geglu", "mse none") else 3
    for layout in layouts(dtype):
        x = layouts(dtype)[layout]
        given = [x, *(normal_like(x, seed) for seed in range(1, n))]
        given[2:] = [x.abs() + 0.5 for x in given[2:]]
        leaves = [x.detach().requires_grad_(i in places) for i, x in enumerate(given)]
        wide = [x.detach().double().requires_grad_(i in places) for i, x in enumerate(given)]
        y, truth = f(*leaves), stock(*wide)
        assert made_by_a_node(y)
        g = normal(*y.shape, dtype=dtype, seed=9)
        together = torch.autograd.grad(y, [leaves[i] for i in places], g, retain_graph=True)
        true = torch.autograd.grad(truth, [wide[i] for i in places], g.double(), allow_unused=True)
        eps = torch.finfo(dtype).eps
        for i, grad, expected in zip(places, together, true, strict=True):
            (alone,) = torch.autograd.grad(y, leaves[i], g, retain_graph=True)
            assert torch.equal(grad, alone) and grad.stride() == alone.stride()
            assert_close(grad.double(), expected, rtol=8 * eps, atol=32 * eps)


def normal_like(x: Tensor, seed: int) -> Tensor:
    """Other numbers, as they lie."""
    other = normal(*x.shape, dtype=x.dtype, seed=seed)
    return torch.empty_like(x).copy_(other) if x.numel() else x


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_of_any_layout(dtype, reduction):
    for x in layouts(dtype).values():
        t = normal(*x.shape, dtype=dtype, seed=3)
        for target in (t, t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t):
            leaves = [x.detach().requires_grad_(), target.clone().requires_grad_()]
            wide = [a.detach().double().requires_grad_() for a in leaves]
            mine, true = (
                F.mse_loss(*leaves, reduction=reduction),
                torch.nn.functional.mse_loss(*wide, reduction=reduction),
            )
            g = torch.full_like(mine, 0.5)
            got, expected = torch.autograd.grad(mine, leaves, g), torch.autograd.grad(true, wide, g.double())
            tolerance = 4 * torch.finfo(dtype).eps
            for a, b in zip((mine, *got), (true, *expected), strict=True):
                assert_close(a.double(), b.to(dtype).double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def test_a_sum_does_not_depend_on_threads():
    x, t = normal(300_001), normal(300_001, seed=1)
    before = torch.get_num_threads()
    results = set()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.add(F.mse_loss(x, t).item())
    finally:
        torch.set_num_threads(before)
    assert len(results) == 1
    exact = torch.nn.functional.mse_loss(x.double(), t.double()).item()
    assert abs(results.pop() - exact) <= abs(torch.nn.functional.mse_loss(x, t).item() - exact) + 2**-24 * exact


def test_second_derivatives_come_back_to_the_formula():
    x = normal(5, dtype=torch.float64).requires_grad_()
    t = normal(5, dtype=torch.float64, seed=1)
    for f in (F.gelu, F.tanh, lambda x: F.mse_loss(x, t), lambda x: F.huber_loss(x, 2 * t)):
        assert torch.autograd.gradgradcheck(f, x, check_fwd_over_rev=True, check_batched_grad=True)
    (first,) = torch.autograd.grad(F.relu(x).sum(), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(first.sum(), x)[0], torch.zeros_like(x))  # zero, and not unused


def test_batches_of_gradients():
    x = normal(4, dtype=torch.float64).requires_grad_()
    y = F.gelu(x)
    assert made_by_a_node(y)
    one_by_one = torch.stack([torch.autograd.grad(y, x, e, retain_graph=True)[0] for e in torch.eye(4).double()])
    eye = torch.eye(4, dtype=torch.float64)
    assert_close(torch.autograd.grad(y, x, eye, is_grads_batched=True, retain_graph=True)[0], one_by_one)
    assert_close(torch.func.vmap(lambda e: torch.autograd.grad(y, x, e, retain_graph=True)[0])(eye), one_by_one)


class TestANode:
    """What torch's own nodes do."""

    def test_a_second_backward_is_refused_without_retain_graph(self):
        x = normal(3).requires_grad_()
        y = F.gelu(x).sum()
        y.backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.backward()

    def test_a_saved_tensor_that_was_written_to_is_refused(self):
        x = normal(3).requires_grad_()
        y = F.sigmoid(x)
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_hooks_pack_what_it_saves(self):
        packed = []
        x = normal(3).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t * 1, lambda t: t):
            y = F.gelu(x)
        y.sum().backward()
        assert len(packed) == 1 and torch.equal(packed[0], x)

    def test_it_saves_only_what_backward_needs(self):
        kept = []
        x, t = normal(3).requires_grad_(), normal(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda s: kept.append(s) or s, lambda s: s):
            F.binary_cross_entropy_with_logits(x, t.sigmoid().requires_grad_(), reduction="sum")
        assert len(kept) == 2
        alive = weakref.ref(x)
        y = F.sigmoid(x * 1)
        del x
        gc.collect()
        assert alive() is not None  # the graph's leaf
        assert y.grad_fn is not None

    def test_without_a_graph(self):
        x = normal(3).requires_grad_()
        with torch.no_grad():
            assert F.gelu(x).grad_fn is None
        with torch.inference_mode():
            assert F.gelu(normal(3)).is_inference()
        assert not F.gelu(normal(3)).requires_grad

    def test_its_name(self):
        x = normal(3).requires_grad_()
        assert F.gelu(x).grad_fn.name() == "GELUBackward"
        assert F.mse_loss(x, x.detach()).grad_fn.name() == "MSELossBackward"
        assert "grad_fn=<GELUBackward>" in repr(F.gelu(x))

    def test_hooks_of_gradients(self):
        x = normal(3).requires_grad_()
        y = F.gelu(x)
        y.register_hook(lambda g: 2 * g)
        y.sum().backward()
        assert_close(x.grad, 2 * torch.autograd.grad(torch.nn.functional.gelu(x).sum(), x)[0])

    @pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
    @pytest.mark.filterwarnings("ignore:Error detected in GELUBackward:UserWarning")
    def test_anomaly_mode(self):
        x = normal(3).requires_grad_()
        with torch.autograd.detect_anomaly(check_nan=True), pytest.raises(RuntimeError, match="GELUBackward"):
            F.gelu(x).backward(torch.full((3,), nan))

    def test_it_goes_with_the_result(self):
        x = normal(3).requires_grad_()
        y = F.gelu(x)
        alive = weakref.ref(y)
        del y
        assert alive() is None


def test_tensors_of_others_take_the_formula():
    class Mine(Tensor):
        pass

    x = normal(3).as_subclass(Mine)
    assert type(F.gelu(x)) is Mine
    assert F.gelu(normal(3).to("meta")).is_meta
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        F.mse_loss(normal(3), torch.zeros(3))
    assert torch.ops.aten.mse_loss.default in seen
    z = torch.complex(normal(3), normal(3, seed=1))
    assert_close(F.sigmoid(z), torch.sigmoid(z))
    assert F.sigmoid(torch.tensor([0, 1])).dtype == torch.float32


@pytest.mark.usefixtures("formulas")
class TestDefining:
    def test_a_formula_of_ones_own_has_no_kernel_and_is_right(self):
        cube = pointwise("TestCube", lambda x, *, a: a * x * x * x, lambda x, a: 3 * a * x * x)
        x = normal(4, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: cube(x, 2.0), x, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(lambda x: cube(x, 2.0), x)

    def test_a_loss_of_ones_own(self):
        quartic = loss("TestQuartic", lambda x, t: (x - t) ** 4, lambda x, t: 4 * (x - t) ** 3, None)
        x, t = normal(4, dtype=torch.float64).requires_grad_(), normal(4, dtype=torch.float64, seed=1)
        for reduction, expected in (
            ("none", (x - t) ** 4),
            ("mean", ((x - t) ** 4).mean()),
            ("sum", ((x - t) ** 4).sum()),
        ):
            assert_close(quartic(x, t, None, reduction, False), expected)
        assert torch.autograd.gradcheck(lambda x: quartic(x, t, None, "mean", False), x)
        w = normal(4, dtype=torch.float64, seed=2).abs()
        assert_close(quartic(x, t, w, "mean", True), (w * (x - t) ** 4).sum() / w.sum())

    def test_a_slope_of_comparisons_has_a_second_derivative_of_zero(self):
        ramp = pointwise("TestRamp", lambda x: where(x > 1, 2 * x, x + 1), lambda x: where(x > 1, 2, 1))
        x = torch.tensor([0.0, 3.0], requires_grad=True)
        (first,) = torch.autograd.grad(ramp(x).sum(), x, create_graph=True)
        assert first.tolist() == [1, 2]
        assert torch.autograd.grad(first.sum(), x)[0].tolist() == [0, 0]

    def test_mistakes_are_told(self):
        with pytest.raises(TypeError, match="give one for each"):
            pointwise("TestA", lambda x, t: x * t, lambda x, t: t)
        with pytest.raises(TypeError, match=r"\['z'\]; known are"):
            pointwise("TestB", lambda x: x, lambda z: z)
        pointwise("TestC", lambda x: x, lambda g: g)
        with pytest.raises(ValueError, match="a formula TestC already"):
            pointwise("TestC", lambda x: x, lambda g: g)
        branching = pointwise("TestD", lambda x: x if x > 0 else -x, lambda x: x.sgn())
        with pytest.raises(TypeError, match="asked whether"):
            branching(normal(3))  # the kernel is looked for by what is recorded

    def test_what_runs_once_more_defines_anew(self, monkeypatch):
        """As where a module is imported by its path, or a cell of a notebook runs again."""
        x = torch.tensor([2.0], requires_grad=True)
        for factor in (2, 3):
            times = pointwise("TestAgain", lambda x: factor * x, lambda: factor)  # noqa: B023
            assert times(x).item() == 2 * factor
            assert torch.autograd.grad(times(x), x)[0].item() == factor
        monkeypatch.setitem(FORMULAS, "Tanh", FORMULAS["Tanh"])
        spec = importlib.util.find_spec("torchcalc.activations.tanh")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert torch.equal(module.tanh(x), x.tanh())

    def test_a_kernel_of_another_formula_is_not_used(self):
        gelu = FORMULAS["GELU"]
        edited = Formula("GELU", lambda x: x * x, (lambda x: 2 * x,), ("x",), ())
        nodes = native.nodes()
        assert nodes.find("GELU", gelu.hash) >= 0
        assert nodes.find("GELU", edited.hash) == -1


def test_every_formula_of_the_library_has_its_kernels():
    missing = [
        f.name for f in FORMULAS.values() if f.value.__module__.startswith("torchcalc.") and kernels.index(f) < 0
    ]
    assert not missing, f"{missing}: run python -m torchcalc build"


def _in_a_child(queue):
    x = normal(100_000).requires_grad_()
    F.mse_loss(F.gelu(x), torch.zeros(100_000)).backward()
    queue.put(x.grad.sum().item())


def test_in_a_forked_child():
    _ = F.gelu(normal(100_000))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    assert isinstance(queue.get(timeout=60), float)
    child.join(60)
    assert child.exitcode == 0


def test_a_module_is_copied_and_pickled():
    module = copy.deepcopy(torch.nn.Sequential(torch.nn.Linear(2, 2), __import__("torchcalc").nn.GELU()))
    assert module(normal(1, 2)).shape == (1, 2)
