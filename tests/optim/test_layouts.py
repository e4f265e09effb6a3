"""Memory layouts: a weight, its gradient and its state may each have their own, and none may touch what lies beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.optim.cases import CASES, Case, build, each_path, leaves, options_of, parameters, same, snapshot

SHAPE = (4, 6, 3, 5)


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


def strided(x: Tensor) -> Tensor:
    """Every other element of a buffer whose rest is 7."""
    buffer = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0, dtype=x.dtype, device=x.device)
    view = buffer[..., ::2]
    view.copy_(x)
    return view


def column(x: Tensor) -> Tensor:
    """A slice of a larger tensor whose rest is 7."""
    buffer = torch.full((x.shape[0], x.shape[1] + 2, *x.shape[2:]), 7.0, dtype=x.dtype, device=x.device)
    view = buffer[:, 1:-1]
    view.copy_(x)
    return view


LAYOUTS = (contiguous, channels_last, transposed, strided, column)


def with_neighbours(x: Tensor) -> Tensor:
    """All of the storage, without the elements of x."""
    seen = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).clone()
    torch.as_strided(seen, x.shape, x.stride(), x.storage_offset()).zero_()
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
@each_path()
def test_layouts_change_nothing(
    case: Case, config: dict[str, Any], options: dict[str, Any], device: str, layout: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(SHAPE, generator=generator).to(device)
    grads = [torch.randn(SHAPE, generator=generator).to(device) for _ in range(3)]

    def trained(layout: Any, grad_layout: Any) -> Any:
        p = layout(start.clone()).requires_grad_()
        optimizer = build(case.cls, [p], config, **options)
        beside = with_neighbours(p.detach())
        for g in grads:
            p.grad = grad_layout(g)
            beside_g = with_neighbours(p.grad)
            optimizer.step()
            same(with_neighbours(p.grad), beside_g)
        same(with_neighbours(p.detach()), beside)
        return p.detach().contiguous(), {k: v.contiguous() for k, v in optimizer.state[p].items()}

    expected = trained(contiguous, contiguous)
    for grad_layout in LAYOUTS:
        close(trained(layout, grad_layout), expected, config)


def close(a: Any, b: Any, config: dict[str, Any]) -> None:
    """Equal but for the order in which a vector loop and its remainder round: 2 ulp of float32, of the largest number.

    With centered, v − m² has lost some digits before its root is divided by.
    """
    known = dict(leaves(b))
    for path, x in leaves(a):
        y = known.pop(path)
        if isinstance(x, Tensor) and x.numel():
            atol = 2**-22 * max(0.5, y.abs().max().item()) * (8 if config.get("centered") else 1)
            torch.testing.assert_close(x, y, rtol=2**-22, atol=atol)
        else:
            same(x, y)
    assert not known


@pytest.mark.parametrize("options_index", range(4))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_model_turned_channels_last_in_mid_training(case: Case, options_index: int) -> None:
    """Weight and gradient are then channels_last, and the state is not."""
    config = case.configs[1]
    ways = [options for options in options_of(case, config) if "capturable" not in options]
    if options_index >= len(ways):
        return
    options = ways[options_index]

    def trained(turn: bool) -> Any:
        params = parameters(shapes=(SHAPE, SHAPE))
        optimizer = build(case.cls, params, config, **options)
        for step in range(6):
            if turn and step == 2:
                for p in params:
                    p.data = p.data.to(memory_format=torch.channels_last)
            for i, p in enumerate(params):
                generator = torch.Generator().manual_seed(10 * step + i)
                p.grad = torch.randn(SHAPE, generator=generator).to(
                    memory_format=torch.channels_last if turn and step >= 2 else torch.contiguous_format
                )
            optimizer.step()
        return [p.detach().contiguous() for p in params], [
            {k: v.contiguous() for k, v in optimizer.state[p].items()} for p in params
        ]

    close(trained(True), trained(False), config)


@each_path()
def test_expanded_gradients(case: Case, config: dict[str, Any], options: dict[str, Any], device: str) -> None:
    """As the gradient of a sum is: one number, shown everywhere."""
    ends = []
    for expand in (True, False):
        params = parameters(device=device)
        optimizer = build(case.cls, params, config, **options)
        for _ in range(3):
            for p in params:
                g = torch.tensor(0.5, device=device).expand(p.shape)
                p.grad = g if expand else g.contiguous()
            optimizer.step()
        ends.append(snapshot(optimizer))
    close(*ends, config)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_weights_that_share_a_storage(case: Case) -> None:
    """A flat buffer whose slices are the weights."""
    flat = torch.arange(12.0)
    params = [flat[:5].requires_grad_(), flat[5:5].requires_grad_(), flat[7:].requires_grad_()]
    alone = [p.detach().clone().requires_grad_() for p in params]
    for ps in (params, alone):
        optimizer = build(case.cls, ps, case.configs[0])
        for _ in range(2):
            for p in ps:
                p.grad = torch.ones_like(p)
            optimizer.step()
    same([p.detach() for p in params], [p.detach() for p in alone])
    assert flat[5:7].tolist() == [5.0, 6.0]
