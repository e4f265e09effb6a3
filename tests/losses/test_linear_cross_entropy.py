import itertools
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

import torchcalc.nn
from tests import stock
from tests.functions import classes, normal, table
from tests.losses.test_cross_entropy import extras
from torchcalc.functional import cross_entropy, linear, linear_cross_entropy

F = torch.nn.functional
BUDGETS = (1, 1200, 1 << 26)  # bytes: one sample at a time, a few, all


@table("linear_cross_entropy")
def test_linear_cross_entropy(row, check):
    check(row)


def gradients(f, leaves, double=False, **options):
    leaves = [
        None if a is None else (a.double() if double else a).detach().requires_grad_(a.requires_grad) for a in leaves
    ]
    x, w, b = leaves
    loss = f(x, w, linear_bias=b, **options)
    g = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape).to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, [a for a in leaves if a is not None and a.requires_grad], g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("memory", BUDGETS)
@pytest.mark.parametrize("recompute", [False, True])
def test_chunks_are_the_whole(recompute, memory, reduction, dtype):
    """For every set of arguments that need a gradient: what is frozen is not computed."""
    target = classes(23, high=11)
    target[::5] = -100
    class_weight = torch.linspace(0.2, 1, 11, dtype=dtype)
    for smoothing, weighted, frozen in itertools.product(
        (0.0, 0.1), (False, True), ((), (0,), (1,), (0, 2), "no bias")
    ):
        leaves = [normal(23, 6).to(dtype), normal(11, 6, seed=1).to(dtype), normal(11, seed=2).to(dtype)]
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(frozen == "no bias" or i not in frozen)
        if frozen == "no bias":
            leaves[2] = None
        options = dict(target=target, reduction=reduction, label_smoothing=smoothing)
        way = dict(memory=memory, recompute=recompute)
        c = class_weight if weighted else None
        mine = gradients(linear_cross_entropy, leaves, weight=c, **way, **options)
        right = gradients(
            stock.linear_cross_entropy, leaves, double=True, weight=c.double() if weighted else c, **options
        )
        eps = torch.finfo(dtype).eps
        for a, b in zip(mine, right, strict=True):
            assert a.dtype == dtype
            assert_close(a.double(), b, rtol=40 * eps, atol=120 * eps)


def test_bfloat16_gradients_of_the_weight_are_added_in_float32():
    """Of as many samples that a sum in bfloat16 would stand still."""
    x, w = torch.ones(4096, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(4096, dtype=torch.int64)
    (g,) = torch.autograd.grad(linear_cross_entropy(x, w, target, reduction="sum", memory=64), w)
    assert g.tolist() == [[-2048.0], [2048.0]]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_backward_twice_gives_the_same(reduction, recompute):
    x, w = normal(6, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    loss = linear_cross_entropy(x, w, classes(6, high=3), reduction=reduction, recompute=recompute).sum()
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (x, w))
    assert_close([3 * g for g in first], list(again))
    assert first[0].data_ptr() != again[0].data_ptr()


def test_no_grad_computes_no_gradients(monkeypatch):
    import torchcalc.losses.linear_cross_entropy as file

    shares = []
    losses_of = file.losses_of
    monkeypatch.setattr(file, "losses_of", lambda *args: shares.append(args[-1]) or losses_of(*args))
    x, w = normal(6, 4).requires_grad_(), normal(3, 4, seed=1)
    with torch.no_grad():
        linear_cross_entropy(x, w, classes(6, high=3))
    assert shares == [None]
    linear_cross_entropy(x, w, classes(6, high=3))
    assert shares[1] is not None


def test_autocast_gives_a_loss_of_float32():
    x, w = normal(6, 4).float().requires_grad_(), normal(3, 4, seed=1).float().requires_grad_()
    target = classes(6, high=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = linear_cross_entropy(x, w, target)
        whole = cross_entropy(linear(x, w), target)
    assert mine.dtype == torch.float32
    assert_close(mine, whole)
    assert_close(torch.autograd.grad(mine, (x, w)), torch.autograd.grad(whole, (x, w)), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bad", [3, -1])
def test_a_target_that_is_no_class(bad, recompute):
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        linear_cross_entropy(normal(2, 4), normal(3, 4), torch.tensor([0, bad]), recompute=recompute)


def test_what_does_not_fit_is_refused():
    x, w, t = normal(2, 4), normal(3, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"metrics=True with recompute=True"):
        linear_cross_entropy(x, w, t, metrics=True, recompute=True)
    for how in (
        dict(filter_eps=1e-3),
        dict(filter_eps=-1, recompute=True),
        dict(filter_eps=float("nan"), recompute=True),
    ):
        with pytest.raises(ValueError, match=r"filter_eps=.*only with recompute=True"):
            linear_cross_entropy(x, w, t, **how)
    with pytest.raises(ValueError, match=r"memory=0: bytes for logits, > 0"):
        linear_cross_entropy(x, w, t, memory=0)
    refused = {
        "input": (x[None], w, t, {}),
        "weight": (x, w[0], t, {}),
        "features": (x, w[:, :3], t, {}),
        "bias": (x, w, t, {"linear_bias": normal(4)}),
        "dimensions": (x[0], normal(3, 2, 4), torch.tensor([0, 1]), {}),
        "ignored": (x, w, normal(2, 3), {"ignore_index": 1}),
    }
    for x_, w_, t_, options in refused.values():
        with pytest.raises(RuntimeError) as mine:
            linear_cross_entropy(x_, w_, t_, **options)
        if stock.HAS_LINEAR_CROSS_ENTROPY:
            with pytest.raises(RuntimeError) as theirs:
                F.linear_cross_entropy(x_, w_, t_, **options)
            assert str(mine.value) == str(theirs.value)


def test_the_module_shares_its_weight_with_an_embedding():
    """The usual tied head: one parameter, whose gradients add up."""
    torch.manual_seed(0)
    embedding, head = torch.nn.Embedding(7, 4), torchcalc.nn.LinearCrossEntropyLoss(4, 7)
    head.linear.weight = embedding.weight
    tokens, target = classes(5, high=7), classes(5, high=7, seed=1)
    head(embedding(tokens), target).backward()
    mine = embedding.weight.grad.clone()
    embedding.weight.grad = None
    F.cross_entropy(F.linear(embedding(tokens), embedding.weight), target).backward()
    assert_close(mine, embedding.weight.grad)


def test_what_is_kept_to_compute_again():
    """No tensor of the classes' size but the weight; and second derivatives."""
    x, w = (normal(*s).requires_grad_() for s in ((6, 4), (300, 4)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(a) or a, lambda a: a):
        loss = linear_cross_entropy(x, w, classes(6, high=300), recompute=True)
    assert {a.numel() for a in kept if a.data_ptr() != w.data_ptr()} <= {6 * 4, 6, 1}
    del loss
    leaves = [a.detach().double().requires_grad_() for a in (x, w[:5])]
    f = lambda x, w: linear_cross_entropy(x, w, classes(6, high=5), recompute=True)  # noqa: E731
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eps", [2**-12, 2**-6, 0.3])
def test_classes_that_are_left_out(eps, dtype):
    """The error of the gradients is within its bound, and not 0."""
    samples, classes_, features = 12, 300, 8
    x = (2 * normal(samples, features)).to(dtype).requires_grad_()
    w = (2 * normal(classes_, features, seed=1)).to(dtype).requires_grad_()
    t = classes(samples, high=classes_)
    results = []
    for filter_eps in (eps, 0.0):
        how = dict(recompute=True, filter_eps=filter_eps, memory=64 * samples * x.element_size())
        loss = linear_cross_entropy(x, w, t, **how)
        results.append([g.double() for g in torch.autograd.grad(loss, (x, w))])
    (mine_x, mine_w), (all_x, all_w) = results
    left_out = (mine_w == 0).all(1)
    share, rounding = 1 / samples, torch.finfo(dtype).eps
    bound = eps * share * x.double().norm(dim=1).sum()
    assert 0.2 < left_out.double().mean() < 1
    assert ((mine_w - all_w).norm(dim=1)[left_out] <= bound).all()
    assert_close(mine_w[~left_out], all_w[~left_out], rtol=4 * rounding, atol=1e-5)
    error = (mine_x - all_x).norm(dim=1)
    assert (error <= eps * share * w.double().norm(dim=1)[left_out].sum() + 8 * rounding * all_x.norm(dim=1)).all()
    assert (mine_w - all_w).abs().max() > 0


MEMORY = """
import resource, torch
from torchcalc.functional import linear_cross_entropy
x, w = torch.randn(2048, 64, requires_grad=True), torch.randn(16384, 64, requires_grad=True)
t = torch.randint(16384, (2048,))
(linear_cross_entropy(x[:8], w, t[:8]) / 8).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(linear_cross_entropy(x, w, t, memory=1 << 22) / 8).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_the_logits_are_never_there(recompute):
    """They would be 128 MiB, and their gradient as much."""
    code = MEMORY.replace("memory=", f"recompute={recompute}, memory=")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 32 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", BUDGETS)
@pytest.mark.parametrize("recompute", [False, True])
def test_what_torch_does_not_take(recompute, memory, dtype):
    target = classes(23, high=11)
    target[::5] = -100
    eps = torch.finfo(dtype).eps
    for options, weighted in extras():
        results = []
        for wide in (dtype, torch.float64):
            x, w = (a.to(dtype).to(wide).requires_grad_() for a in (normal(23, 6), normal(11, 6, seed=1)))
            u = normal(23, seed=2).abs().to(dtype).to(wide) if weighted else None
            if wide is dtype:
                loss = linear_cross_entropy(x, w, target, memory=memory, token_weight=u, recompute=recompute, **options)
            else:
                loss = stock.cross_entropy(x @ w.t(), target, token_weight=u, **options)
            g = torch.linspace(0.5, 1.5, loss.numel()).to(x).view(loss.shape)
            second = ()
            if dtype == torch.float64:
                (first,) = torch.autograd.grad(loss, x, g, create_graph=True)
                second = torch.autograd.grad(first.sin().sum(), x, retain_graph=True)
            grads = torch.autograd.grad(loss, (x, w), g)
            results.append([a.detach().double() for a in (loss, *grads, *second)])
        assert_close(*results, rtol=40 * eps, atol=200 * eps)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("way", ["chunks", "logits"])
def test_metrics(way, cap):
    x, w, b = normal(9, 4).requires_grad_(), normal(6, 4, seed=1), normal(6, seed=2)
    target = classes(9, high=6)
    target[2] = -100
    options = dict(linear_bias=b, softcap=cap, z_loss=0.1, memory=2 * 8 * 6, metrics=True)
    u = normal(9).abs().requires_grad_(way == "logits")  # which no chunk takes
    loss, found = linear_cross_entropy(x, w, target, token_weight=u, **options)
    logits = (x @ w.t() + b).detach()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    p = logits.softmax(1)
    assert_close(loss.detach(), stock.cross_entropy(logits, target, token_weight=u.detach(), z_loss=0.1))
    assert_close(found.loss, stock.cross_entropy(logits, target, reduction="none", z_loss=0.1))
    assert_close(found.log_sum_exp, logits.logsumexp(1))
    assert_close(found.entropy, -(p * p.log()).sum(1))
    assert torch.equal(found.prediction, logits.argmax(1))
    assert_close(found.accuracy.item(), (logits.argmax(1) == target)[target != -100].float().mean().item())
    assert not any(a.requires_grad for a in found)
    loss.backward()
    assert x.grad is not None
