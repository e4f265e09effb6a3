import torch
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

from tests.functions import table
from torchcalc.functional import relu


@table("relu")
def test_relu(row, check):
    check(row)


def test_in_place():
    for make in (lambda: torch.tensor([-1.0, 0.0, 2.0]), lambda: torch.tensor([[-1.0, 0.0], [2.0, 3.0]])[:, 0]):
        results = []
        for f in (relu, torch.nn.functional.relu):
            leaf = make().requires_grad_()
            x = leaf * 2
            y = f(x, inplace=True)
            assert y is x
            z = (y * torch.arange(1.0, 1 + y.numel())).sum()
            results.append((y.detach(), torch.autograd.grad(z, leaf)))
        assert_close(*results)
    x = torch.tensor([-1.0, 2.0])
    assert relu(x, True) is x
    assert x.tolist() == [0.0, 2.0]


def test_in_place_under_transforms():
    x = torch.tensor([[-1.0, 2.0], [3.0, -4.0]])
    f = lambda x: relu(x.clone(), inplace=True).square().sum()  # noqa: E731
    assert_close(grad(f)(x), 2 * x.relu())
    assert_close(vmap(grad(f))(x), 2 * x.relu())
    assert_close(torch.compile(grad(f), backend="aot_eager", fullgraph=True)(x), 2 * x.relu())
    assert_close(jvp(f, (x,), (x,))[1], 2 * x.relu().square().sum())


def test_the_second_derivative_is_zero_and_not_missing():
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    (g,) = torch.autograd.grad(relu(x).sum(), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(g.sum(), x)[0], torch.zeros(3))
