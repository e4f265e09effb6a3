import itertools

import pytest
import torch
from torch.func import grad, hessian, vmap
from torch.testing import assert_close

import torchcalc.nn
from tests import stock
from tests.functions import classes, normal, probabilities, table
from torchcalc.functional import cross_entropy

F = torch.nn.functional


@table("cross_entropy")
def test_cross_entropy(row, check):
    check(row)


def test_the_gradient_is_p_minus_y():
    x = normal(5, 3).requires_grad_()
    y = classes(5, high=3)
    (g,) = torch.autograd.grad(cross_entropy(x, y, reduction="sum"), x)
    p = x.detach().exp() / x.detach().exp().sum(1, keepdim=True)
    assert_close(g, p - torch.eye(3, dtype=torch.float64)[y])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_all_targets_ignored(smoothing, weight, ignore_index):
    """The mean is 0 with a gradient of 0, where torch's is NaN; sum and none are torch's zeros."""
    x = normal(4, 3).requires_grad_()
    y = torch.full((4,), ignore_index)
    arguments = dict(weight=weight, ignore_index=ignore_index, label_smoothing=smoothing)
    assert F.cross_entropy(x, y, **arguments).isnan()
    for f in (cross_entropy, torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)):
        loss = f(x, y, **arguments)
        assert loss.item() == 0
        assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))
    (g,) = torch.autograd.grad(cross_entropy(x, y, **arguments), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(g.sum(), x)[0], torch.zeros_like(x))
    f = lambda x: cross_entropy(x, y, **arguments)  # noqa: E731
    assert torch.equal(vmap(grad(f))(x.detach().expand(2, 4, 3)), torch.zeros(2, 4, 3))
    assert not hessian(f)(x.detach()).any()
    assert_close(cross_entropy(x, y, reduction="sum", **arguments), F.cross_entropy(x, y, reduction="sum", **arguments))


def test_all_targets_of_one_sample_ignored_under_vmap():
    """per-sample losses of a padded batch: one is empty, the others are not."""
    x, y = normal(2, 4, 3), torch.stack([torch.full((4,), -100), classes(4, high=3)])
    assert_close(vmap(cross_entropy)(x, y), torch.stack([torch.zeros(()).double(), F.cross_entropy(x[1], y[1])]))


def test_the_mean_of_nothing_is_torchs_nan():
    for target in (classes(0, high=3), probabilities(0, 3)):
        assert cross_entropy(normal(0, 3), target).isnan()
        assert F.cross_entropy(normal(0, 3), target).isnan()


def test_weights_that_sum_to_zero_are_not_finite_as_in_torch():
    x, y, w = normal(4, 3).requires_grad_(), torch.tensor([0, 0, 0, -100]), torch.tensor([0.0, 1.0, 2.0]).double()
    for smoothing in (0.0, 0.1):
        ours, stock = (f(x, y, w, label_smoothing=smoothing) for f in (cross_entropy, F.cross_entropy))
        assert not ours.isfinite()
        assert not stock.isfinite()
        assert torch.autograd.grad(ours, x)[0][:3].isnan().all()


def test_unbatched_input_with_a_target_of_one_element():
    """torch computes this value and then fails in backward; the gradient is that of a batch of one."""
    x, y = normal(4), classes(1, high=4)
    for reduction in ("none", "mean", "sum"):
        leaf = x.clone().requires_grad_()
        loss = cross_entropy(leaf, y, reduction=reduction)
        assert_close(loss, F.cross_entropy(x, y, reduction=reduction))
        batch = x[None].clone().requires_grad_()
        expected = torch.autograd.grad(F.cross_entropy(batch, y), batch)[0][0]
        assert_close(torch.autograd.grad(loss.sum(), leaf)[0], expected)


def test_masked_classes():
    """Logits of -inf: the class has no part in value or gradient."""
    x = normal(4, 5)
    masked = x.clone()
    masked[:, 1] = -torch.inf
    y = torch.tensor([0, 2, 3, 4])
    without = [0, 2, 3, 4]
    for reduction in ("mean", "sum"):
        leaf, short = masked.clone().requires_grad_(), x[:, without].clone().requires_grad_()
        loss, expected = (
            cross_entropy(leaf, y, reduction=reduction),
            F.cross_entropy(short, torch.arange(4), reduction=reduction),
        )
        assert_close(loss, expected)
        g, e = torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(expected, short)[0]
        assert_close(g[:, without], e)
        assert not g[:, 1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_large_offset_lose_no_digits(dtype):
    """log softmax, not lse - x, which at an offset of 1e6 has only two digits left in float32."""
    x = torch.tensor([[1.0, 2.5, -0.25]], dtype=dtype)
    for offset in (0.0, 1e4, -1e4, 2.0**20):
        leaf = (x + offset).requires_grad_()
        loss = cross_entropy(leaf, torch.tensor([1]))
        assert_close(loss, F.cross_entropy(x, torch.tensor([1])))
        assert_close(torch.autograd.grad(loss, leaf)[0], x.softmax(1) - torch.tensor([[0.0, 1.0, 0.0]], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    """torch rounds log softmax of each sample; our error is the last rounding alone."""
    x, y = (3 * normal(512, 50)).to(dtype), classes(512, high=50)
    truth = F.cross_entropy(x.double(), y)
    ours, stock = (f(x, y) for f in (cross_entropy, F.cross_entropy))
    assert ours.dtype == stock.dtype == dtype
    assert ours == truth.to(dtype)
    truth = F.cross_entropy(x.double(), y, reduction="none")
    errors = [(f(x, y, reduction="none").double() - truth).abs().max() for f in (cross_entropy, F.cross_entropy)]
    assert errors[0] <= errors[1]
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    incoming = torch.tensor(0.7, dtype=dtype)
    (g,) = torch.autograd.grad(cross_entropy(leaf, y, reduction="sum"), leaf, incoming)
    (true,) = torch.autograd.grad(F.cross_entropy(exact, y, reduction="sum"), exact, incoming.double())
    assert (g == true.to(dtype)).float().mean() > 0.99  # float32 rounds to the other side once in thousands


def saved(f, *arguments, **options):
    """Bytes that backward keeps, inputs apart."""
    sizes = {}

    def pack(tensor):
        if all(tensor.data_ptr() != a.data_ptr() for a in arguments):
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = f(*arguments, **options)
    assert y.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}])
def test_backward_keeps_nothing_of_the_size_of_the_logits(dtype, options):
    x, y = normal(64, 100).to(dtype).requires_grad_(), classes(64, high=100)
    assert saved(F.cross_entropy, x, y, **options) >= x.nbytes
    assert saved(cross_entropy, x, y, **options) == 0
    t = probabilities(64, 100).to(dtype)
    assert saved(F.cross_entropy, x, t, **options) >= x.nbytes
    assert saved(cross_entropy, x, t, **options) == 0


def test_uint8_targets():
    x, y = normal(4, 3), classes(4, high=3)
    assert_close(cross_entropy(x, y.to(torch.uint8)), F.cross_entropy(x, y.to(torch.uint8)))
    g = vmap(grad(cross_entropy))(x[None], y.to(torch.uint8)[None])
    assert_close(g[0], grad(F.cross_entropy)(x, y))


IGNORED = {"plain": {}, "smoothing": {"label_smoothing": 0.1}, "weight": {"weight": torch.tensor([1.0, 2.0, 0.5])}}


@pytest.mark.parametrize("options", IGNORED.values(), ids=IGNORED)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_an_ignored_sample_contributes_nothing_whatever_its_logits(bad, reduction, options):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    x[1] = bad
    y = torch.tensor([0, -100, 2, 1])
    for gradient in (
        lambda x: torch.autograd.grad(cross_entropy(x, y, reduction=reduction, **options).sum(), x)[0],
        torch.func.grad(lambda x: cross_entropy(x, y, reduction=reduction, **options).sum()),
    ):
        g = gradient(x.clone().requires_grad_())
        assert g[1].tolist() == [0, 0, 0] and g.isfinite().all() and g[0].abs().sum() > 0


def test_an_impossible_class_that_is_not_asked_for_costs_nothing():
    x = torch.tensor([[-torch.inf, 0.0, 1.0]])
    expected = cross_entropy(x[:, 1:], torch.tensor([[0.5, 0.5]]))
    assert torch.equal(cross_entropy(x, torch.tensor([[0.0, 0.5, 0.5]])), expected)
    w = torch.tensor([0.0, 1.0, 1.0])
    smoothed = cross_entropy(x, torch.tensor([1]), w, label_smoothing=0.3)
    z = x[0, 1:].log_softmax(0)
    assert torch.allclose(smoothed, -(0.8 * z[0] + 0.1 * z[1]))  # over the weight of class 1, which is 1
    assert cross_entropy(x, torch.tensor([[0.1, 0.4, 0.5]])) == torch.inf


def extras():
    """Every set of what torch's cross_entropy does not take."""
    for z, c, weighted, n, reduction in itertools.product(
        (0.0, 0.1), (None, 2.0), (False, True), (None, 3.7), ("none", "sum", "mean")
    ):
        if n is None or reduction == "mean":
            yield dict(z_loss=z, softcap=c, normalizer=n, reduction=reduction), weighted


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (5, 100), (3, 7, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_torch_does_not_take(shape, dtype, probabilities):
    """Values, gradients, and in float64 gradients of gradients."""
    samples = (shape[0], *shape[2:])
    t = normal(*shape).softmax(1).to(dtype) if probabilities else classes(*samples, high=shape[1])
    if not probabilities:
        t.view(-1)[1] = -100
    eps = torch.finfo(dtype).eps
    for (options, weighted), smoothing, by_class in itertools.product(extras(), (0.0, 0.2), (False, True)):
        w = torch.linspace(0.2, 1, shape[1]).to(normal(1)).to(dtype) if by_class else None
        results = []
        for f, wide in ((cross_entropy, dtype), (stock.cross_entropy, torch.float64)):
            x = normal(*shape).to(dtype).to(wide).requires_grad_()
            u = normal(*samples, seed=2).abs().to(dtype).to(wide).requires_grad_() if weighted else None
            leaves = [x] if u is None else [x, u]
            target = t.to(wide) if probabilities else t
            cw = None if w is None else w.to(wide)
            loss = f(x, target, cw, label_smoothing=smoothing, token_weight=u, **options)
            g = torch.linspace(0.5, 1.5, loss.numel()).to(x).view(loss.shape)
            grads = torch.autograd.grad(loss, leaves, g, create_graph=dtype == torch.float64)
            second = torch.autograd.grad(grads[0].sin().sum(), x) if dtype == torch.float64 else ()
            results.append([a.detach().double() for a in (loss, *grads, *second)])
        assert_close(*results, rtol=30 * eps, atol=30 * eps)


def test_micro_batches_add_up_to_the_batch():
    x, t = normal(8, 5).requires_grad_(), classes(8, high=5)
    t[5:] = -100  # batches of unlike numbers of tokens
    whole = cross_entropy(x, t)
    parts = sum(cross_entropy(a, b, normalizer=(t != -100).sum()) for a, b in zip(x.split(4), t.split(4), strict=True))
    assert_close(parts, whole)
    assert_close(torch.autograd.grad(parts, x), torch.autograd.grad(whole, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(z_loss=-1.0), "z_loss=-1.0: the factor"),
        (dict(softcap=0.0), "cap=0.0: what the result stays below"),
        (dict(normalizer=0.0), "normalizer=0.0: one number > 0"),
        (dict(normalizer=2.0, reduction="sum"), "normalizer=2.0 is what a mean divides by, and reduction is 'sum'"),
        (dict(token_weight=torch.ones(3)), r"token_weight of shape \(3,\): one weight for each sample, \(2,\)"),
    ],
)
def test_what_is_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), **options)


def test_the_module_hands_everything_over():
    x, t, u = normal(4, 3), classes(4, high=3), normal(4).abs()
    module = torchcalc.nn.CrossEntropyLoss(reduction="mean", z_loss=0.1, softcap=2.0)
    loss = cross_entropy(x, t, z_loss=0.1, softcap=2.0, token_weight=u, normalizer=3.0)
    assert_close(module(x, t, token_weight=u, normalizer=3.0), loss)
    head = torchcalc.nn.LinearCrossEntropyLoss(3, 5, z_loss=0.1, softcap=2.0, dtype=torch.float64, device=x.device)
    found, metrics = head(x, t, token_weight=u, normalizer=3.0, metrics=True)
    logits = x @ head.linear.weight.t()
    assert_close(found, cross_entropy(logits, t, z_loss=0.1, softcap=2.0, token_weight=u, normalizer=3.0))
    assert torch.equal(metrics.prediction, logits.argmax(1))
