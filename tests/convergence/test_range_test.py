"""suggest on curves whose steepest point is known, beside Lightning's finder; range_test leaves no trace."""

import copy
import math
import random
import re

import pytest
import torch
from lightning.pytorch.tuner.lr_finder import _LRFinder
from torch import Tensor, nn

from torchcalc import optim as ours
from torchcalc.convergence import range_test, stability_limit, suggest

# Suggestions on curves of s = log₁₀ lr that are steepest at lr = 10⁻².


def explosion(s: Tensor, at: float, power: float = 2.0) -> Tensor:
    return torch.where(s > at, 10 ** (power * (s - at)) - 1, 0.0)


CURVES = {
    "sigmoid": lambda s: 2.3 - 1.5 * torch.sigmoid(6 * (s + 2)),
    "gentle": lambda s: 2.3 - 1.5 * torch.sigmoid(4 * (s + 2)) + explosion(s, -0.5),
    "sharp": lambda s: 2.3 - 1.5 * torch.sigmoid(12 * (s + 2)) + explosion(s, -1),
    "atan": lambda s: 2.0 - torch.atan(8 * (s + 2)) / 1.6 + explosion(s, -0.5),
    "gradient flow": lambda s: 0.2 + torch.exp(-(10 ** (s + 2))) + explosion(s, -1),
    "not finite": lambda s: torch.where(s > -0.8, math.inf, 2.3 - 1.5 * torch.sigmoid(6 * (s + 2))),
}
LRS = 1e-8 * 10 ** (8 * torch.arange(1, 101, dtype=torch.float64) / 100)  # those that Lightning tries by default


def noisy(curve, noise: float, seed: int, lrs: Tensor = LRS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return curve(lrs.log10()) * (1 + noise * torch.randn(len(lrs), generator=generator, dtype=torch.float64))


def lightnings(lrs: Tensor, losses: Tensor) -> float:
    finder = _LRFinder("exponential", float(lrs[0]), float(lrs[-1]), len(lrs))
    finder.results = {"lr": lrs.tolist(), "loss": losses.tolist()}
    return finder.suggestion()


def test_lightning_suggests_seven_billionths():
    """np.gradient by lr, not by its logarithm, divides the noise by tiny differences: 0.1 % of it suffices."""
    found = [lightnings(LRS, noisy(CURVES["sigmoid"], 0.001, seed)) for seed in range(200)]
    assert torch.tensor(found).mode().values.item() == pytest.approx(7.6e-8, rel=0.01)
    assert max(found) < 1e-6
    clean = lightnings(LRS, CURVES["sigmoid"](LRS.log10()))
    assert clean == pytest.approx(7e-3, rel=0.2)  # it is the noise


@pytest.mark.parametrize("noise", [0, 0.001, 0.01, 0.05])
@pytest.mark.parametrize("name", CURVES)
def test_suggestion_within_a_factor_of_three(name, noise):
    for seed in range(200 if noise else 1):
        found = suggest(LRS, noisy(CURVES[name], noise, seed))
        assert 1e-2 / 3 < found.suggestion < 1e-2 * 3, seed
        assert found.interval[0] <= found.suggestion <= found.interval[1] <= found.largest_stable


@pytest.mark.slow
@pytest.mark.parametrize(("n", "allowed"), [(50, 0.02), (100, 0), (300, 0)])
@pytest.mark.parametrize("name", CURVES)
def test_suggestion_for_other_resolutions(name, n, allowed):
    """Six rates to a decade are few for 5 % of noise."""
    lrs = torch.logspace(-7, 1, n, dtype=torch.float64)
    found = [suggest(lrs, noisy(CURVES[name], 0.05, seed, lrs)).suggestion for seed in range(200)]
    assert sum(not 1e-2 / 3 < lr < 1e-2 * 3 for lr in found) <= allowed * 200


@pytest.mark.parametrize("seed", range(20))
def test_largest_stable_is_where_it_explodes(seed):
    for name, at in (("sharp", 0.1), ("gentle", 10**-0.5), ("not finite", 10**-0.8)):
        found = suggest(LRS, noisy(CURVES[name], 0.01, seed))
        assert at / 4 < found.largest_stable <= at


def test_interval_is_where_the_fall_is_half_as_steep():
    """Of a logistic curve of steepness 6 that is s = −2 ± ln(3 + √8)/6."""
    lrs = torch.logspace(-5, 1, 601, dtype=torch.float64)
    half = math.log(3 + math.sqrt(8)) / 6
    found = suggest(lrs, CURVES["sigmoid"](lrs.log10()))
    assert math.log10(found.interval[0]) == pytest.approx(-2 - half, abs=0.05)
    assert math.log10(found.interval[1]) == pytest.approx(-2 + half, abs=0.05)


@pytest.mark.parametrize("losses", [torch.full((100,), 2.0), torch.linspace(1, 3, 100), torch.full((100,), math.nan)])
def test_nothing_falls(losses):
    found = suggest(LRS, losses)
    assert math.isnan(found.suggestion) and math.isnan(found.largest_stable)
    assert "no rate from 1.2e-08 to 1 lowers the loss" in str(found)
    found.figure()


def test_pure_noise_is_seldom_taken_for_a_fall():
    flat = [suggest(LRS, noisy(lambda s: torch.full_like(s, 2.3), 0.01, seed)).suggestion for seed in range(100)]
    assert sum(map(math.isnan, flat)) >= 95


def test_figure():
    figure = suggest(LRS, noisy(CURVES["gentle"], 0.01, 0)).figure()
    (ax,) = figure.axes
    assert ax.get_xscale() == "log"
    assert [t.get_text().split(" ")[0] for t in ax.get_legend().get_texts()] == [
        "loss", "smoothed", "falls", "suggestion", "stable",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lrs", "losses", "message"),
    [
        (LRS, LRS[:-1], "lengths 100 and 99"),
        (LRS[:4], LRS[:4], "lengths 4 and 4; both must be the same, at least 5"),
        (LRS.flip(0), LRS, "rise"),
        (-LRS.flip(0), LRS, "positive"),
    ],
)
def test_suggest_refuses(lrs, losses, message):
    with pytest.raises(ValueError, match=message):
        suggest(lrs, losses)


# Everything is put back.


class Net(nn.Module):
    """With dropout, batch norm, a frozen parameter, and a buffer that is replaced, not written to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.first.bias.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + len(x)
        return self.last(nn.functional.dropout(self.norm(self.first(x)).tanh(), 0.3, self.training))


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3), foreach=False),
    "ours SGD": lambda p: ours.SGD(p, lr=0.1, momentum=0.9),
    "ours AdamW": lambda p: ours.AdamW(p, lr=1e-3, max_norm=1.0, skip_nonfinite=True),
    "ours NAdam": lambda p: ours.NAdam(p, lr=1e-3),
    "ours Lion": lambda p: ours.Lion(p, lr=1e-3),
}


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 32, 4, generator=generator)
    return [(b, b[:, :3].argmax(1)) for b in x]


def train(model, optimizer, steps: int) -> None:
    for i in range(steps):
        x, y = batches()[i % 3]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def made(name: str, steps: int):
    torch.manual_seed(0)
    model = Net()
    groups = [{"params": [model.first.weight, *model.norm.parameters()]}, {"params": [*model.last.parameters()]}]
    optimizer = OPTIMIZERS[name](groups)
    if name != "tensor lr":
        optimizer.param_groups[1]["lr"] *= 0.1
    train(model, optimizer, steps)
    return model, optimizer


def snapshot(model, optimizer):
    """All that is to come back, by value."""
    own = {
        k: v for k, v in vars(optimizer).items() if isinstance(v, (int, float, bool, str, tuple, Tensor)) or v is None
    }
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "grads": [p.grad for p in model.parameters()],
            "modes": [m.training for m in model.modules()],
            "optimizer": optimizer.state_dict(),
            "own": own,
            "names": sorted(vars(optimizer)),
            "rng": torch.get_rng_state(),
        }
    )


def same(a, b) -> bool:
    """Equal to the bit, types and dtypes included."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def failing(error: BaseException, at: int):
    """Cross-entropy that raises in call number ``at``."""
    calls = iter(range(10**6))

    def loss(output, target):
        if next(calls) == at:
            raise error
        return nn.functional.cross_entropy(output, target)

    return loss


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_to_the_bit(name, steps):
    model, optimizer = made(name, steps)
    before = snapshot(model, optimizer)
    grads, objects = [p.grad for p in model.parameters()], [id(t) for t in (*model.parameters(), *model.buffers())]
    states = {p: dict(state) for p, state in optimizer.state.items()}
    found = range_test(model, nn.functional.cross_entropy, batches(), optimizer, low=1e-5, high=10, steps=40)
    assert found.losses.isfinite().sum() >= 5
    assert same(snapshot(model, optimizer), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))  # the same objects
    assert objects == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert optimizer.state.keys() == states.keys()
    assert all(optimizer.state[p][k] is v for p, s in states.items() for k, v in s.items() if isinstance(v, Tensor))


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_been(name, steps):
    ends = []
    for tested in (False, True):
        model, optimizer = made(name, steps)
        if tested:
            range_test(model, nn.functional.cross_entropy, batches(), optimizer, steps=20)
        train(model, optimizer, 5)
        ends.append(snapshot(model, optimizer))
    assert same(*ends)


@pytest.mark.parametrize("error", [RuntimeError("out"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("at", [1, 3, 12])  # while the starts are measured, before and between steps
@pytest.mark.parametrize("name", ["Adam", "ours AdamW"])
def test_restored_when_it_raises(name, error, at):
    for steps in (0, 2):
        model, optimizer = made(name, steps)
        before = snapshot(model, optimizer)
        with pytest.raises(type(error)):
            range_test(model, failing(error, at), batches(), optimizer)
        assert same(snapshot(model, optimizer), before)


def test_restored_after_a_loss_that_is_not_finite():
    model, optimizer = made("Adam", 1)
    before, calls = snapshot(model, optimizer), iter(range(1000))

    def loss(output, target):
        return nn.functional.cross_entropy(output, target) * (math.nan if next(calls) > 20 else 1)

    found = range_test(model, loss, batches(), optimizer, low=1e-5)
    assert found.losses.isnan().any() and found.losses[:5].isfinite().all()
    assert same(snapshot(model, optimizer), before)


class Own(torch.optim.Optimizer):
    """With state in all places where it may be."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "seen": [0]})
        self.buffers, self.log, self.steps = {}, [], torch.zeros(())
        self.noise = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        self.log.append(float(self.steps))
        for group in self.param_groups:
            group["seen"][0] += 1
            for p in group["params"]:
                if p.grad is not None:
                    self.buffers.setdefault(p, torch.zeros_like(p)).add_(p.grad)
                    state = self.state[p]
                    state.setdefault("nested", {"sums": [torch.zeros_like(p)]})["sums"][0] += p.grad
                    p -= group["lr"] * (self.buffers[p] + torch.randn(p.shape, generator=self.noise))


@pytest.mark.parametrize("steps", [0, 2])
def test_state_anywhere_in_an_optimizer_is_restored(steps):
    torch.manual_seed(0)
    model = Net()
    optimizer = Own(model.parameters())
    train(model, optimizer, steps)
    keep = ("buffers", "log", "steps", "state", "param_groups")
    objects = {name: id(getattr(optimizer, name)) for name in keep}
    before = copy.deepcopy([list(optimizer.buffers.values()), optimizer.log, optimizer.steps, optimizer.state_dict()])
    noise = optimizer.noise.get_state()
    range_test(model, nn.functional.cross_entropy, batches(), optimizer, steps=10)
    after = [list(optimizer.buffers.values()), optimizer.log, optimizer.steps, optimizer.state_dict()]
    assert same(after, before) and torch.equal(optimizer.noise.get_state(), noise)
    assert objects == {name: id(getattr(optimizer, name)) for name in keep}


def test_a_dataloader_draws_its_order_without_a_trace():
    model = nn.Linear(4, 3)
    x = torch.randn(64, 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :3].argmax(1)), 16, shuffle=True)
    before, python = torch.get_rng_state(), random.getstate()
    loss = lambda output, target: random.random() * nn.functional.cross_entropy(output, target)  # noqa: E731
    range_test(model, loss, loader, torch.optim.SGD(model.parameters()), steps=10)
    assert torch.equal(before, torch.get_rng_state()) and python == random.getstate()


def test_inference_mode():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters())
    with torch.inference_mode():
        data = [(x.clone(), y.clone()) for x, y in batches()]
        found = range_test(model, nn.functional.cross_entropy, data, optimizer)
    assert found.suggestion == range_test(model, nn.functional.cross_entropy, batches(), optimizer).suggestion


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_a_constant_added_to_the_loss_changes_nothing(seed, dropout):
    """Such as one that makes it 0 at the start."""
    torch.manual_seed(seed)
    x = torch.randn(512, 8, dtype=torch.float64)
    y = (x @ torch.randn(8, 3).double() + 0.5 * torch.randn(512, 3)).argmax(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 3)).double()
    data, start = list(zip(x.split(32), y.split(32), strict=True)), nn.functional.cross_entropy(model(x), y).item()
    found = [
        range_test(
            model,
            lambda output, target, shift=shift: nn.functional.cross_entropy(output, target) - shift,
            data,
            torch.optim.SGD(model.parameters()),
        ).suggestion
        for shift in (0.0, start, 100.0)
    ]
    assert found[0] == found[1] == found[2] and 0.01 < found[0] < 10


def test_restored_when_the_optimizer_needs_a_closure():
    model, _ = made("SGD", 0)
    optimizer = ours.GradientDescent(model.parameters(), backtrack=True)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="needs a closure"):
        range_test(model, nn.functional.cross_entropy, batches(), optimizer)
    assert same(snapshot(model, optimizer), before)


# The rates tried.


class Recorder(torch.optim.SGD):
    rates: list[list[float]]  # of the class: what an optimizer has is put back

    def step(self, closure=None):
        self.rates.append([float(group["lr"]) for group in self.param_groups])
        return super().step(closure)


def test_ratios_between_groups_are_kept():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    rates = (0.5, 0.05, 0.0)
    optimizer = Recorder([{"params": m.parameters(), "lr": lr} for m, lr in zip(model, rates, strict=True)])
    Recorder.rates = []
    range_test(model, nn.functional.cross_entropy, batches(), optimizer, low=1e-6, high=1e-2, steps=9)
    tried = torch.tensor(optimizer.rates, dtype=torch.float64)
    torch.testing.assert_close(tried[:, 0], torch.logspace(-6, -2, 9, dtype=torch.float64))
    torch.testing.assert_close(tried[:, 1], 0.1 * tried[:, 0])
    assert (tried[:, 2] == 0).all()
    assert [group["lr"] for group in optimizer.param_groups] == list(rates)


def test_ratios_at_the_start_of_a_warm_up():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    optimizer = Recorder([{"params": m.parameters(), "lr": lr} for m, lr in zip(model, (0.1, 0.001), strict=True)])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: epoch / 10)
    Recorder.rates = []
    range_test(model, nn.functional.cross_entropy, batches(), optimizer, low=1e-6, high=1e-2, steps=9)
    tried = torch.tensor(optimizer.rates, dtype=torch.float64)
    torch.testing.assert_close(tried[:, 1], 0.01 * tried[:, 0])


def test_losses_are_those_of_the_steps_and_batches():
    """Against a plain loop: the loss after step i is that of batch i + 1, measured from that batch's own start."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    data = [(x.double(), y) for x, y in batches()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    found = range_test(model, nn.functional.cross_entropy, data, optimizer, low=1e-4, high=1.0, steps=10)
    copied = copy.deepcopy(model)
    starts = [nn.functional.cross_entropy(copied(x), y).item() for x, y in data]
    expected = []
    for i, lr in enumerate(found.lrs.tolist()):
        x, y = data[i % 3]
        gradient = torch.autograd.grad(nn.functional.cross_entropy(copied(x), y), list(copied.parameters()))
        with torch.no_grad():
            for p, g in zip(copied.parameters(), gradient, strict=True):
                p -= lr * g
            x, y = data[(i + 1) % 3]
            expected.append(nn.functional.cross_entropy(copied(x), y).item() - starts[(i + 1) % 3] + sum(starts) / 3)
    torch.testing.assert_close(found.losses, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_largest_stable_is_near_the_stability_limit(momentum, seed):
    """On least squares; the loss rises some steps after the rate has passed the limit. Momentum rings long before."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 5, generator=generator, dtype=torch.float64)
    y = x.sum(1, keepdim=True) + torch.randn(256, 1, generator=generator, dtype=torch.float64)
    torch.manual_seed(seed)
    model = nn.Linear(5, 1).double()
    design = torch.cat([x, torch.ones(256, 1)], 1)
    sharpness = torch.linalg.eigvalsh(2 * design.T @ design / 256)[-1].item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    limit = stability_limit(optimizer, sharpness)
    found = range_test(model, nn.functional.mse_loss, (x, y), optimizer, low=1e-4, steps=200)
    assert limit / 3 < found.largest_stable < 3 * limit
    assert found.suggestion < limit


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_restored_on_cuda():
    torch.manual_seed(0)
    model = Net().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), capturable=True)
    before, rng = snapshot(model, optimizer), torch.cuda.get_rng_state()
    found = range_test(model, nn.functional.cross_entropy, batches(), optimizer, low=1e-5)
    assert found.losses[0].isfinite()
    assert same(snapshot(model, optimizer), before) and torch.equal(torch.cuda.get_rng_state(), rng)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(low=0.0), "low=0.0, high=10.0"),
        (dict(low=1.0, high=0.1), "low=1.0, high=0.1"),
        (dict(high=math.inf), "finite"),
        (dict(steps=4), "steps: 4; it must be an int, at least 5"),
        (dict(steps=10.0), "steps: 10.0; it must be an int"),
    ],
)
def test_refuses_options(options, message):
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=message):
        range_test(model, nn.functional.cross_entropy, batches(), torch.optim.SGD(model.parameters()), **options)


def test_refuses_what_cannot_be_tested():
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    with pytest.raises(ValueError, match="holds none of the model's trainable parameters"):
        range_test(model, nn.functional.cross_entropy, batches(), torch.optim.SGD(other.parameters()))
    sgd = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match="LBFGS needs a closure"):
        range_test(model, nn.functional.cross_entropy, batches(), torch.optim.LBFGS(model.parameters()))
    cross_entropy = nn.functional.cross_entropy
    for optimizer in (None, torch.optim.SGD):
        with pytest.raises(TypeError, match=r"optimizer: .*; it must be a torch.optim.Optimizer"):
            range_test(model, cross_entropy, batches(), optimizer)
    with pytest.raises(TypeError, match="batches: a NoneType"):
        range_test(model, cross_entropy, None, sgd)
    with pytest.raises(ValueError, match=r"loss returned shape \(32,\)"):
        range_test(model, lambda output, target: cross_entropy(output, target, reduction="none"), batches(), sgd)
    with pytest.raises(ValueError, match="loss: its value has no graph"):
        range_test(model, lambda output, target: cross_entropy(output, target).detach(), batches(), sgd)
    with pytest.raises(ValueError, match="batches: it is empty"):
        range_test(model, nn.functional.cross_entropy, [], sgd)
    with pytest.raises(ValueError, match="loss: it is nan before the first step"):
        range_test(model, lambda output, target: output.sum() * math.nan, batches(), sgd)


@pytest.mark.parametrize(
    ("high", "says"), [(2.0, r"beyond \S+ it rises\)$"), (-0.5, r"at none that was tried it rises\)$")]
)
def test_the_words_claim_no_rise_that_was_not_seen(high, says):
    lrs = torch.logspace(-5, high, 120)
    losses = 2 - 1.5 * torch.sigmoid(6 * (lrs.log10() + 2)) + (lrs > 1) * lrs
    assert re.search(says, str(suggest(lrs, losses)))


def test_a_loss_that_falls_without_bound():
    """Nothing rises there: the loss is -1e37, and then it is not finite."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(8, 3)
    loss = lambda output, target: -output.square().mean()  # noqa: E731
    found = range_test(model, loss, (x, x), torch.optim.SGD(model.parameters()), high=1e4, steps=200)
    last = found.losses[found.losses.isfinite()][-1]
    assert last < -1e20 and found.losses.isnan().any() and found.beyond == "is not finite"
    assert found.largest_stable == found.lrs[found.losses.isfinite()][-1]
    assert str(found).endswith(f"it is not finite, after {float(last):.3g})") and "rises" not in str(found)
    lrs = torch.logspace(-4, 0, 50)
    falling = -(torch.linspace(0, 1, 50) ** 2)
    for broken, says in ((math.inf, "rises"), (math.nan, "is not finite"), (-math.inf, "is not finite")):
        found = suggest(lrs, torch.where(lrs > 0.5, broken, falling))
        assert found.beyond == says and f"it {says}" in str(found)
    assert suggest(lrs, falling).beyond == ""


def test_stable_as_long_as_the_dots_fall():
    """A wall: smoothed, the rise seems to begin before the last dot that is lower than all others."""
    lrs = torch.logspace(-4, 1, 100, dtype=torch.float64)
    losses = 2 - torch.sigmoid(3 * (lrs.log10() + 1.5))
    losses[lrs > 3] = 5 * lrs[lrs > 3]
    found = suggest(lrs, losses)
    assert found.largest_stable == lrs[losses.argmin()] and found.beyond == "rises"
    assert f"beyond {found.largest_stable:.2g} it rises" in str(found)
