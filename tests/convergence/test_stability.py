"""Each limit against the optimizer itself: 1 % below it a quadratic is solved, 1 % above it diverges."""

import math

import pytest
import torch

from torchcalc import optim as ours
from torchcalc.calculus import curvature
from torchcalc.convergence import preconditioner, stability_limit

FROZEN = {
    "SGD": {}, "GradientDescent": {},
    "Adam": {"betas": (0.9, 1 - 1e-13)}, "AdamW": {"betas": (0.9, 1 - 1e-13)}, "NAdam": {"betas": (0.9, 1 - 1e-13)},
    "RMSprop": {"alpha": 1 - 1e-13}, "Adagrad": {"initial_accumulator_value": 4e12},
}  # fmt: skip

CASES = [
    ("SGD", {}),
    ("SGD", {"weight_decay": 3.0}),
    ("SGD", {"momentum": 0.5}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5}),
    ("SGD", {"momentum": 0.9, "dampening": 0.9, "weight_decay": 2.0}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"momentum": 0.5, "nesterov": True, "weight_decay": 2.0}),
    ("SGD", {"momentum": 0.9, "maximize": True}),
    ("SGD", {"momentum": 1.0, "nesterov": True}),
    ("Adam", {}),
    ("Adam", {"betas": (0.5, 1 - 1e-13)}),
    ("Adam", {"weight_decay": 5.0}),  # as part of the gradient
    ("NAdam", {"weight_decay": 5.0}),
    ("RMSprop", {"weight_decay": 5.0, "momentum": 0.5}),
    ("Adagrad", {"weight_decay": 5.0}),
    ("Adam", {"betas": (0.0, 1 - 1e-13), "amsgrad": True}),
    ("AdamW", {"weight_decay": 0.0}),
    ("AdamW", {"weight_decay": 0.5}),
    ("AdamW", {"weight_decay": 5.0, "betas": (0.5, 1 - 1e-13)}),
    ("NAdam", {}),
    ("NAdam", {"weight_decay": 0.7, "decoupled_weight_decay": True}),
    ("NAdam", {"betas": (0.5, 1 - 1e-13)}),
    ("NAdam", {"momentum_decay": 0.0}),  # its schedule stays at the start
    ("NAdam", {"momentum_decay": 0.0, "weight_decay": 0.7, "decoupled_weight_decay": True}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.8}),
    ("RMSprop", {"centered": True}),
    ("Adagrad", {}),
    ("Adagrad", {"lr_decay": 1e-13}),
    ("GradientDescent", {}),
]
CLASSES = [
    (cls, options)
    for name, options in CASES
    for cls in (getattr(torch.optim, name, None), getattr(ours, name))
    if cls is not None
]


def frozen(cls, options, groups):
    """An optimizer of float64 scalars whose preconditioner is 2 (2·10⁶ of Adagrad) and, in effect, does not change."""
    optimizer = cls(groups, **{**FROZEN[cls.__name__], **options})
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
        for p in group["params"]:
            state = optimizer.state[p]
            for key, value in state.items():
                if not isinstance(value, torch.Tensor):
                    continue
                if key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg"):
                    value.fill_(4.0)
                elif key in ("mu_product", "momentum_buffer", "exp_avg"):  # weight decay has been averaged already
                    value.zero_()
                elif key == "step" and cls.__name__ != "Adagrad":
                    value.fill_(1e15)  # bias corrections and schedules are over
    return optimizer


@pytest.mark.parametrize(
    ("cls", "options"), CLASSES, ids=[f"{c.__module__.split('.')[0]} {c.__name__} {o}" for c, o in CLASSES]
)
def test_limit_to_one_percent(cls, options):
    curvature, sign = 7.0, (-1.0 if options.get("maximize") else 1.0)
    probe = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    one = frozen(cls, options, [{"params": [probe], "lr": 1.0}])
    scale = preconditioner(one)[probe]
    assert float(scale) == pytest.approx(
        {"Adagrad": 2e6}.get(cls.__name__, 2.0 if one.state[probe].get("step") is not None else 1.0)
    )
    limit = stability_limit(one, curvature / float(scale))
    below, above = (torch.nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(2))
    optimizer = frozen(cls, options, [{"params": [below], "lr": 0.99 * limit}, {"params": [above], "lr": 1.01 * limit}])
    most = []
    for _ in range(500):
        for p in (below, above):
            p.grad = sign * curvature * p.detach()
        optimizer.step()
        most.append([abs(p.item()) for p in (below, above)])
        if most[-1][1] > 1e4:
            break
    assert max(b for b, _ in most[-5:]) < 0.7 * max(b for b, _ in most[:20])
    assert max(a for _, a in most[-5:]) > 1.5 * max(a for _, a in most[:5])


def test_closed_forms():
    """As the textbooks have them, for λ = 10."""
    w = torch.nn.Parameter(torch.zeros(2))

    def limit(cls, **options):
        return stability_limit(cls([w], lr=0.1, **options), 10.0)

    sgd, mu = torch.optim.SGD, 0.9
    assert limit(sgd) == pytest.approx(2 / 10)
    assert limit(sgd, momentum=mu) == pytest.approx(2 * (1 + mu) / 10)
    assert limit(sgd, momentum=mu, nesterov=True) == pytest.approx(2 * (1 + mu) / ((1 + 2 * mu) * 10))
    assert limit(torch.optim.Adam) == pytest.approx(2 * (1 + 0.9) / ((1 - 0.9) * 10))


@pytest.mark.parametrize("seed", range(3))
def test_adam_with_a_frozen_preconditioner_in_many_dimensions(seed):
    """The sharpness is that of P^-½HP^-½: the chain from curvature by preconditioner to the limit."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    hessian, start = root @ root.T + 0.1 * torch.eye(6), torch.randn(6, generator=generator, dtype=torch.float64)

    def grown(factor):
        p = torch.nn.Parameter(start.clone())
        optimizer = frozen(ours.Adam, {}, [{"params": [p], "lr": 1.0}])
        optimizer.state[p]["exp_avg_sq"].copy_(torch.rand(6, generator=torch.Generator().manual_seed(seed)) * 9 + 0.1)
        metric = preconditioner(optimizer)[p]
        found = curvature(lambda x: x @ hessian @ x / 2, start, metric=metric, tolerance=1e-6)
        optimizer.param_groups[0]["lr"] = factor * stability_limit(optimizer, found.value)
        norms = []
        for _ in range(400):
            p.grad = hessian @ p.detach()
            optimizer.step()
            norms.append(float(p.detach().norm() / start.norm()))
        return norms

    assert grown(0.99)[-1] < 1 > max(grown(0.5)[-10:])
    assert max(grown(1.01)) > 1e3  # until the preconditioner grows with it: Adam's way of surviving


def test_preconditioner_before_a_step_and_of_frozen_parameters():
    a, b = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    found = preconditioner(torch.optim.Adam([a, b]))
    assert set(found) == {a}
    assert torch.equal(found[a], torch.ones(2, 3))


def test_nothing_is_too_large_or_everything_is():
    w = torch.nn.Parameter(torch.zeros(1))
    assert stability_limit(torch.optim.SGD([w]), 0.0) == math.inf
    assert stability_limit(torch.optim.SGD([w]), -1.0) == math.inf
    assert stability_limit(torch.optim.SGD([w], momentum=1.0), 1.0) == 0
    assert stability_limit(torch.optim.SGD([w], momentum=0.9, dampening=1.5), 1.0) == 0
    assert stability_limit(torch.optim.SGD([w], momentum=0.9, dampening=1.0), 1.0) == math.inf
    assert stability_limit(torch.optim.RMSprop([w], momentum=1.0), 1.0) == 0


def test_nadam_warms_up():
    """Over 10⁴ steps the largest step grows fourfold."""
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.NAdam([w])
    start = stability_limit(optimizer, 1.0)
    optimizer.state[w] = {"step": torch.tensor(1e5)}
    assert start == pytest.approx(3.8 / (1.9 - 0.81), rel=1e-3)
    assert stability_limit(optimizer, 1.0) == pytest.approx(3.8 / 0.28, rel=1e-3)


GROUPS = {  # options of two groups, by class
    "lr": ("SGD", {"lr": 1.0}, {"lr": 0.1}),
    "decay": ("SGD", {"weight_decay": 1.0}, {"weight_decay": 0.0}),
    "momentum": ("SGD", {"momentum": 0.9}, {"momentum": 0.3}),
    "all": ("SGD", {"lr": 0.2, "momentum": 0.9, "dampening": 0.5}, {"momentum": 0.3, "weight_decay": 3.0}),
    "decoupled": ("AdamW", {"weight_decay": 0.5}, {"weight_decay": 0.0, "lr": 0.3}),
    "coupled": ("Adam", {"weight_decay": 2.0}, {"weight_decay": 0.0}),
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("seed", range(3))
def test_of_several_groups_the_limit_is_a_bound(name, seed):
    """Below it nothing diverges, whichever group the sharp direction lies in."""
    cls, *options = GROUPS[name]
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    hessian = root @ root.T
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.float64)), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    groups = [{"params": [q], "lr": 1.0, **each} for q, each in zip(p, options, strict=True)]
    optimizer = frozen(getattr(torch.optim, cls), {}, groups)
    if cls != "SGD":
        for q, v in zip(p, (4.0, 9.0), strict=True):
            optimizer.state[q]["exp_avg_sq"].fill_(v)  # P = 2 and 3
    scale = torch.cat([preconditioner(optimizer)[q] for q in p]).rsqrt()
    sharpness = torch.linalg.eigvalsh(scale[:, None] * hessian * scale)[-1].item()
    limit = stability_limit(optimizer, sharpness)
    assert (
        limit
        == min(
            stability_limit(frozen(getattr(torch.optim, cls), {}, [{**group, "params": [q]}]), sharpness)
            for group, q in zip(groups, p, strict=True)
        )
        or cls == "Adam"
    )
    for group, each in zip(optimizer.param_groups, groups, strict=True):
        group["lr"] = 0.99 * limit * each["lr"]
    for _ in range(2000):
        for q, g in zip(p, (hessian @ torch.cat([q.detach() for q in p])).split(2), strict=True):
            q.grad = g
        optimizer.step()
    assert max(float(q.detach().norm()) for q in p) < 0.5


def test_unknown_optimizer_and_nan():
    w = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(TypeError, match="known for Lion; known are Adagrad, "):
        stability_limit(ours.Lion([w]), 1.0)
    with pytest.raises(TypeError, match="LBFGS"):
        preconditioner(torch.optim.LBFGS([w]))
    with pytest.raises(ValueError, match="sharpness: nan"):
        stability_limit(torch.optim.SGD([w]), math.nan)
    for sharpness, message in (
        (None, "sharpness: a NoneType"),
        (curvature(torch.sum, w), r"pass a number, such as cur"),
    ):
        with pytest.raises(TypeError, match=message):
            stability_limit(torch.optim.SGD([w]), sharpness)


def test_a_subclass_has_the_limit_of_its_class():
    class Mine(torch.optim.SGD):
        pass

    assert stability_limit(Mine([torch.nn.Parameter(torch.zeros(1))]), 4.0) == 0.5
