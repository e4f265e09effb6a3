import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import torchcalc.functional as ours
from tests.functions import table


@table("linear")
def test_linear(row, check):
    check(row)


def nested(layout, grad):
    parts = [torch.linspace(-1, 1, 4 * n).reshape(n, 4) for n in (2, 3)]
    return torch.nested.nested_tensor(parts, layout=layout, requires_grad=grad)


def sparse(convert, grad):
    return convert(torch.linspace(-1, 1, 12).reshape(3, 4).relu()).requires_grad_(grad)


INPUTS = {
    "nested": lambda grad: nested(torch.strided, grad),
    "jagged": lambda grad: nested(torch.jagged, grad),
    "coo": lambda grad: sparse(torch.Tensor.to_sparse, grad),
    "csr": lambda grad: sparse(torch.Tensor.to_sparse_csr, grad),
}


@pytest.mark.filterwarnings("ignore:.*in (beta|prototype)")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", INPUTS)
def test_nested_and_sparse_input(kind, grad, bias):
    results = []
    for linear in (F.linear, ours.linear):
        x = INPUTS[kind](grad)
        w = torch.linspace(-1, 2, 8).reshape(2, 4).requires_grad_()
        b = torch.ones(2, requires_grad=True) if bias else None
        y = linear(x, w, b)
        parts = y.unbind() if y.is_nested else [y]
        sum(part.square().sum() for part in parts).backward()
        results.append([y, w.grad, *([b.grad] if bias else []), *([x.grad] if grad else [])])
    for theirs, mine in zip(*results, strict=True):
        assert mine.layout == theirs.layout
        assert_close(*(t.unbind() if t.is_nested else t for t in (mine, theirs)))
