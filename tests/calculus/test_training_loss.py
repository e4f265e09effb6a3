"""A training loss is a function: the same value every time, and nothing else changes."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from torchcalc.calculus import curvature, gradient, training_loss


class Net(nn.Module):
    """Everything that makes a forward pass more than a function: dropout, batch norm, frozen and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight
        self.head.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.drop(self.norm(self.a(x)).tanh())))


def data(device: str, n: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 6, device=device), torch.randint(3, (n,), device=device)


def test_everything_is_left_as_it_was(device: str) -> None:
    model = Net().to(device)
    x, y = data(device)
    nn.functional.cross_entropy(model(x), y).backward()
    model.norm.eval()
    state = copy.deepcopy(model.state_dict())
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device == "cuda" else torch.zeros(0)
    f = training_loss(model, nn.functional.cross_entropy, [(x[:12], y[:12]), (x[12:], y[12:])])
    p = f.parameters
    first, again = f(p), f(p)
    curvature(f, p, max_products=3)
    model.norm.train()
    batch_norm_in_training = f(p)
    model.norm.eval()
    assert torch.equal(first, again) and not torch.equal(first, batch_norm_in_training)
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(cuda, torch.cuda.get_rng_state(device) if device == "cuda" else torch.zeros(0))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, q in model.named_parameters():
        assert (q.grad is None) == (name not in grads), name
        assert q.grad is None or torch.equal(q.grad, grads[name]), name
    assert [m.training for m in model.modules()] == modes


def test_parameters_are_trainable_copies_and_tied_ones_once() -> None:
    model = Net()
    f = training_loss(model, nn.functional.cross_entropy, data("cpu"))
    p = f.parameters
    assert set(p) == {"a.weight", "a.bias", "norm.weight", "norm.bias", "b.bias", "head.weight"}
    p["a.weight"].zero_()
    assert model.a.weight.any() and f.parameters["a.weight"].any()
    with torch.no_grad():
        model.a.bias.fill_(7)
    assert (f.parameters["a.bias"] == 7).all()  # as they are now
    model.eval()
    value = f(p)
    with torch.no_grad():
        model.a.weight.zero_()  # both of the tied weights
    model.a.bias.data = p["a.bias"]
    x, y = model, None  # the batch is held by f
    (part,) = f.parts
    x, y = part.args[1]
    torch.testing.assert_close(value, nn.functional.cross_entropy(model(x), y))


def test_batches_are_weighted_by_size() -> None:
    model = nn.Linear(6, 3)
    x, y = data("cpu")
    whole = training_loss(model, nn.functional.cross_entropy, (x, y))
    parts = training_loss(model, nn.functional.cross_entropy, ((a, b) for a, b in [(x[:3], y[:3]), (x[3:], y[3:])]))
    torch.testing.assert_close(whole(whole.parameters), parts(parts.parameters))
    torch.testing.assert_close(whole(whole.parameters), nn.functional.cross_entropy(model(x), y).detach())
    two = training_loss(model, nn.functional.cross_entropy, [(x[:10], y[:10]), (x[10:], y[10:])])
    assert len(two.parts) == 2 and len(whole.parts) == 1


def test_dropout_masks_differ_between_batches_and_between_seeds() -> None:
    model, x = nn.Sequential(nn.Linear(50, 50), nn.Dropout(0.5)), torch.ones(1, 50)
    seen = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append((output == 0).detach())
        return output.mean()

    f = training_loss(model, loss, [(x, x), (x, x)])
    f(f.parameters), f(f.parameters)
    torch.manual_seed(1)
    other = training_loss(model, loss, [(x, x)])
    other(other.parameters)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[4])


def test_several_inputs_and_other_devices(device: str) -> None:
    model = nn.Bilinear(2, 3, 1).to(device)
    x, z, y = torch.randn(5, 2), torch.randn(5, 3), torch.randn(5, 1)
    f = training_loss(model, nn.functional.mse_loss, ((x, z), y))  # moved to the model's device
    expected = nn.functional.mse_loss(model(x.to(device), z.to(device)), y.to(device)).detach()
    torch.testing.assert_close(f(f.parameters), expected)


def test_all_random_numbers_are_held(device: str) -> None:
    class Noisy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * random.random() * np.random.random() + torch.rand(())

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    loader = DataLoader(TensorDataset(*data("cpu")), 4, shuffle=True)
    f = training_loss(Noisy(6, 3).to(device), nn.functional.cross_entropy, loader)
    torch.set_rng_state(states[0])  # Noisy's weights
    g = training_loss(f._model, nn.functional.cross_entropy, loader)
    assert f(f.parameters) == f(f.parameters) and f(f.parameters) != g(f.parameters)  # by their seeds
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate() and (states[2] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_refused(reentrant: bool) -> None:
    """It computes a part again in backward, when the model has its own parameters back: a wrong gradient, silently."""

    class Checkpointed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x.requires_grad_(reentrant), use_reentrant=reentrant).tanh()

    f = training_loss(Checkpointed(6, 3), nn.functional.cross_entropy, data("cpu"))
    for call in (gradient(f), lambda p: curvature(f, p)):
        with pytest.raises(RuntimeError, match="switch gradient checkpointing off for the measurement"):
            call(f.parameters)
    with torch.no_grad():
        assert f(f.parameters).isfinite()


def test_one_batch_or_two() -> None:
    model, (x, y) = nn.Linear(6, 3), data("cpu")
    loss = lambda output, target: nn.functional.cross_entropy(output, target["y"])  # noqa: E731
    assert len(training_loss(model, loss, (x, {"y": y})).parts) == 1
    assert len(training_loss(nn.Bilinear(6, 6, 3), loss, ((x, x), {"y": y})).parts) == 1
    assert len(training_loss(model, nn.functional.cross_entropy, ((x, y), (x, y))).parts) == 2


def test_refusals() -> None:
    model, (x, y) = nn.Linear(6, 3), data("cpu")
    cross_entropy = nn.functional.cross_entropy
    with pytest.raises(ValueError, match="batches: it is empty"):
        training_loss(model, cross_entropy, [])
    with pytest.raises(TypeError, match="batches: a NoneType"):
        training_loss(model, cross_entropy, None)
    with pytest.raises(ValueError, match="batches: number 1 has no samples"):
        training_loss(model, cross_entropy, [(x, y), (x[:0], y[:0])])
    with pytest.raises(ValueError, match="must be a pair"):
        training_loss(model, cross_entropy, [x])
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        training_loss(nn.Linear(6, 3).requires_grad_(False), cross_entropy, (x, y))
    f = training_loss(model, lambda a, b: cross_entropy(a, b, reduction="none"), (x, y))
    with pytest.raises(ValueError, match=r"loss returned shape \(20,\)"):
        f(f.parameters)
    f = training_loss(model, cross_entropy, (x, y))
    with pytest.raises(ValueError, match=r"\['wieght'\] are no parameters of the model"):
        f({"wieght": x})
