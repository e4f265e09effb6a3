import pytest
import torch

from torchcalc.convergence import SURFACES

each = pytest.mark.parametrize("surface", SURFACES.values(), ids=SURFACES)


@each
def test_minima(surface):
    """There the function is 0, its gradient too, and its Hessian is positive."""
    for minimum in surface.minima:
        p = torch.tensor(minimum, dtype=torch.float64)
        assert surface(p) == pytest.approx(0, abs=1e-24)
        assert torch.func.grad(surface)(p).norm() < 1e-10
        assert torch.linalg.eigvalsh(torch.func.hessian(surface)(p)).min() > 0


@each
def test_bounds_hold_start_and_minima(surface):
    x0, x1, y0, y1 = surface.bounds
    for x, y in (surface.start, *surface.minima):
        assert x0 < x < x1
        assert y0 < y < y1


@each
def test_vectorised(surface):
    p = torch.randn(3, 4, 2, dtype=torch.float64)
    assert surface(p).shape == (3, 4)
    torch.testing.assert_close(surface(p)[1, 2], surface(p[1, 2]))
    assert (surface(p) >= 0).all()


def test_known_values():
    """Textbook values: f(0, 0) of each."""
    values = {name: float(surface(torch.zeros(2))) for name, surface in SURFACES.items()}
    assert values == pytest.approx({"bowl": 0, "rosenbrock": 1, "beale": 14.203125, "himmelblau": 170})


def test_wrong_shape():
    with pytest.raises(ValueError, match="last dimension must be 2"):
        SURFACES["bowl"](torch.zeros(3))
