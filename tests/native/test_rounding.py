"""Stochastic rounding: bit by bit against exact arithmetic, and on average."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.native.common import ADAM, SGD, AdamState, adam_, same, sgd_
from tests.native.reference import HALF, philox, random_bits, ulp
from torchcalc.native.optim import DONE


def test_philox_reference_has_the_published_answers() -> None:
    # Random123's known answers, whose counters and keys fit our (stream, counter) and seed.
    zero = philox(np.array([0]), 0, 0)[0]
    assert [f"{w:08x}" for w in zero] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = philox(np.array([2**64 - 1], np.uint64), 2**64 - 1, 2**64 - 1)[0]
    assert [f"{w:08x}" for w in ones] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    pi = philox(np.array([0x85A308D3243F6A88], np.uint64), 0x0370734413198A2E, 0x299F31D0A4093822)[0]
    assert [f"{w:08x}" for w in pi] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def expected_rounding(x: Tensor, dtype: torch.dtype, random: np.ndarray) -> Tensor:
    """x, in float32, rounded up in magnitude where the part cut off exceeds the random number, by exact arithmetic."""
    fraction_bits = 16 if dtype == torch.bfloat16 else 13
    info = torch.finfo(dtype)
    magnitude = x.double().abs()
    quantum = torch.maximum(ulp(x, dtype), torch.tensor(info.tiny * info.eps, dtype=torch.float64))
    below = torch.floor(magnitude / quantum)
    part = magnitude / quantum - below  # exact: powers of two
    width = torch.full_like(part, 2.0**fraction_bits)
    if dtype == torch.float16:  # below the normal numbers more bits are cut off
        exponent = torch.floor(torch.log2(magnitude.clamp_min(1e-45)))
        width = torch.where(magnitude < info.tiny, torch.exp2(-1 - exponent), width)
    drawn = torch.from_numpy(random.astype(np.float64)) % width
    up = part * width + drawn >= width
    return torch.copysign((below + up) * quantum, x.double()).to(dtype)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -5])
@pytest.mark.parametrize("scale", [1.0, 2.0**-16, 2.0**-22])
@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_bit_by_bit(dtype: torch.dtype, scale: float, seed: int) -> None:
    params = [(torch.randn(n) * scale).to(dtype) for n in (1000, 129)]
    grads = [torch.randn_like(p) * scale for p in params]
    # Half numbers and a quarter: exact in float64, and so once rounded in float32, as the kernel computes.
    results = [(p.double() - 0.25 * g.double()).float() for p, g in zip(params, grads, strict=True)]
    assert sgd_(params, grads, [], **{**SGD, "lr": 0.25}, seed=seed) == DONE
    for i, (p, x) in enumerate(zip(params, results, strict=True)):
        random = random_bits(len(p), i, seed % 2**64, dtype)
        assert torch.equal(p, expected_rounding(x, dtype, random))


def step_to(values: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """`values`, in float32, as stored by a kernel that rounds stochastically."""
    p = values.to(dtype)  # to the nearest; the step adds what is missing
    g = ((values - p.float()) * 4096).to(dtype)
    assert torch.equal(p.float() + g.float() / 4096, values)
    assert sgd_([p], [g], [], **{**SGD, "lr": -1 / 4096}, seed=seed) == DONE
    return p


@pytest.mark.parametrize("fraction", [1 / 32, 0.25, 0.5, 0.75, 31 / 32])
@pytest.mark.parametrize("low", [1.0, -1.0, 1.5 * 2.0**-10, 240.0, 2.0**-20])
@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_is_right_on_average(dtype: torch.dtype, low: float, fraction: float) -> None:
    n = 100_000
    below = torch.tensor(low, dtype=dtype)
    quantum = max(ulp(below, dtype).item(), torch.finfo(dtype).tiny * torch.finfo(dtype).eps)
    above = below + math.copysign(quantum, low)
    x = torch.full((n,), low + math.copysign(quantum, low) * fraction)
    stored = step_to(x, dtype, seed=3)
    ups = int((stored == above).sum())
    assert ups + int((stored == below).sum()) == n
    sigma = math.sqrt(n * fraction * (1 - fraction))
    assert abs(ups - n * fraction) < 5 * sigma
    # Neighbours are independent: so many runs of equal outcomes as a coin gives (Wald & Wolfowitz).
    runs = 1 + int((stored[1:] != stored[:-1]).sum())
    assert abs(runs - 2 * n * fraction * (1 - fraction)) < 10 * sigma


@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_keeps_what_is_exact_large_or_not_a_number(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    stored = every.clone()
    assert sgd_([stored], [torch.zeros_like(stored)], [], **SGD, seed=1) == DONE
    numbers = ~every.isnan()
    assert torch.equal(stored[numbers], every[numbers])
    assert torch.equal(stored.isnan(), every.isnan())
    # A finite result above the largest number is stored as to the nearest: the largest, or inf from half an ulp on.
    largest = torch.full((1000,), info.max, dtype=dtype)
    spacing = ulp(largest[:1], dtype).item()
    for share, expected in ((0.25, info.max), (0.75, math.inf)):
        p = largest.clone()
        g = torch.full_like(p, -share * spacing)
        assert sgd_([p], [g], [], **{**SGD, "lr": 1.0}, seed=2) == DONE
        assert (p == expected).all()


@pytest.mark.parametrize("dtype", HALF)
def test_seeds_streams_and_elements_differ(dtype: torch.dtype) -> None:
    def drawn(seed: int | None, count: int = 2) -> list[Tensor]:
        params = [torch.ones(1000, dtype=dtype) for _ in range(count)]
        grads = [torch.full_like(p, 2.0**-12) for p in params]
        assert sgd_(params, grads, [], **{**SGD, "lr": 1.0}, seed=seed) == DONE
        return params

    assert same(drawn(1), drawn(1))
    assert not torch.equal(drawn(1)[0], drawn(2)[0])
    assert not torch.equal(drawn(1)[0], drawn(1)[1])
    assert torch.equal(drawn(1)[0], drawn(1, count=5)[0])
    assert len(drawn(1)[0].unique()) == 2
    assert len(drawn(None)[0].unique()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_seed_does_not_change_full_precision(dtype: torch.dtype) -> None:
    seeded = AdamState([(300,)], dtype)
    plain = copy.deepcopy(seeded)
    grads = plain.grads()
    assert seeded.step(grads, seed=7) == plain.step(grads) == DONE
    assert same(seeded.all(), plain.all())


def test_stochastic_rounding_moves_bfloat16_weights_where_nearest_stalls() -> None:
    def after_100_steps(seed: int | None) -> float:
        n = 2000
        p = torch.ones(n, dtype=torch.bfloat16)
        m, v = torch.zeros(n), torch.zeros(n)
        t = torch.tensor(0.0)
        options = {**ADAM, "lr": 1e-3}
        for step in range(100):
            s = None if seed is None else seed + step
            assert adam_([p], [torch.ones_like(p)], [m], [v], [], [t], **options, seed=s) == DONE
        return p.float().mean().item()

    assert after_100_steps(None) == 1.0
    # A step of 1e-3 is a quarter of the spacing below 1: 100 draws scatter by 2⁻⁸·√(100·¼·¾), their mean by √2000 less.
    assert abs(after_100_steps(1000) - 0.9) < 5 * 2.0**-8 * math.sqrt(100 / 4 * 3 / 4 / 2000) + 2.0**-9
