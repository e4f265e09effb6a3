"""Sparse gradients, where torch takes them: SGD and Adagrad."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.cases import CASES, Case, build, parameters, same
from torchcalc import optim as ours

CONFIGS = [
    (ours.SGD, torch.optim.SGD, dict(lr=0.1)),
    (ours.SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
    (ours.SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True, maximize=True)),
    (ours.SGD, torch.optim.SGD, dict(lr=torch.tensor(0.1), momentum=0.9, dampening=0.5)),
    (ours.Adagrad, torch.optim.Adagrad, dict(lr=0.1)),
    (ours.Adagrad, torch.optim.Adagrad, dict(lr=0.1, lr_decay=0.1, initial_accumulator_value=0.5, maximize=True)),
]


def sparse_gradient(p: Tensor, rows: list[int], seed: int) -> Tensor:
    """Uncoalesced where rows repeat."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((len(rows), *p.shape[1:]), generator=generator, dtype=p.dtype)
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, p.shape, check_invariants=True)


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cls", "twin", "config"), CONFIGS, ids=lambda x: getattr(x, "__name__", None) or str(x))
def test_equals_torch(cls: Any, twin: Any, config: dict[str, Any], dtype: torch.dtype, foreach: bool | None) -> None:
    """An embedding with repeated and with missing rows beside a dense weight."""

    def trained(c: Any, foreach: bool | None) -> Any:
        params = parameters(dtype, shapes=((6, 3), (4,)))
        optimizer = build(c, params, config, foreach=foreach)
        for step, rows in enumerate([[1, 4, 1], [0], [], [5, 5, 2, 1]]):
            params[0].grad = sparse_gradient(params[0], rows, step)
            params[1].grad = torch.full((4,), 0.5, dtype=dtype)
            before = params[0].grad.clone()
            optimizer.step()
            assert params[0].grad.is_coalesced() == before.is_coalesced()
            same(params[0].grad.to_dense(), before.to_dense())
        return params, [{k: x.to_dense() for k, x in optimizer.state[p].items()} for p in params]

    found = trained(cls, foreach)  # first: torch's warning about sparse invariants comes once, and not from ours
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")
        expected = trained(twin, False)
    if foreach is False and dtype != torch.bfloat16:  # halves are computed in float32, beside a sparse one too
        same(found, expected)
    else:
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=4 * eps, atol=4 * eps)


def test_rows_without_a_gradient_stay() -> None:
    p = nn.Parameter(torch.ones(4, 2))
    optimizer = ours.Adagrad([p], lr=0.1)
    p.grad = sparse_gradient(p, [2, 2], 0)
    optimizer.step()
    assert torch.equal(p[[0, 1, 3]], torch.ones(3, 2))
    assert not optimizer.state[p]["sum"][[0, 1, 3]].any()
    total = p.grad.to_dense()[2]
    same(optimizer.state[p]["sum"][2], total**2)  # the square of the sum, not the sum of squares


@pytest.mark.parametrize("case", [c for c in CASES if c.sparse], ids=lambda c: c.name)
def test_embedding_sparse_trains_as_the_dense_one(case: Case) -> None:
    """The whole way, from nn.Embedding(sparse=True)."""
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(7, 3, sparse=sparse)
        optimizer = build(case.cls, table.parameters(), dict(lr=0.1))
        for _ in range(3):
            optimizer.zero_grad()
            table(torch.tensor([0, 3, 3, 6])).pow(2).sum().backward()
            optimizer.step()
        ends.append(table.weight)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", [c for c in CASES if c.sparse and c.takes("fused")], ids=lambda c: c.name)
def test_a_scaled_sparse_gradient_is_unscaled(case: Case) -> None:
    ends = []
    for fused in (True, False):
        p = nn.Parameter(torch.ones(4, 2))
        optimizer = build(case.cls, [p], dict(lr=0.1), fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        p.grad = sparse_gradient(p, [1, 3, 1], 0) * 1024
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        ends.append(p)
    same(*ends)
