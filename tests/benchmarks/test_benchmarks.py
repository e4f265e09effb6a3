"""That the benchmarks measure what they say: without a clock, whose readings no test can foresee."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import __main__ as command
from benchmarks import harness, memory, optimizers, report
from benchmarks.harness import Result, Row, Traffic


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine two threads spend most of the time waiting for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.reads = self.writes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += sum(isinstance(arg, torch.Tensor) for arg in args)
        self.writes += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("reads", "writes"), [(4, 3), (3, 2), (5, 3), (2, 1), (1, 1)])
def test_sweep_reads_and_writes_what_a_step_must(reads, writes):
    traffic = Traffic(4096, reads, writes)
    sweep = traffic.sweep()
    with Count() as count:
        sweep()
    assert (count.reads, count.writes) == (reads, writes)
    assert traffic.moved == 4096 * (reads + writes)


def scripted(monkeypatch, seconds):
    """Let the harness believe that a call takes what ``seconds`` yields for it, and record who was called when."""
    order = []

    def timed(call, repeat):
        order.append(call)
        return next(seconds[call])

    monkeypatch.setattr(harness, "timed", timed)
    return order


def test_ratio_is_of_calls_that_follow_one_another(monkeypatch):
    """The machine slows down tenfold half-way: the ratio stays what it is, though medians of the sides need not."""
    stock, ours = (lambda: "stock"), (lambda: "ours")
    mood = [1.0] * 11 + [10.0] * 11

    order = scripted(monkeypatch, {stock: iter([3.0 * m for m in mood]), ours: iter([1.0, *(1.5 * m for m in mood)])})
    row = Row("x", "y", make=lambda: (stock, ours, lambda: None))
    ticks = iter([0.0] * 22 + [9.0] * 9)
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(ticks))
    result = harness.measure(row)
    assert result.ratio == pytest.approx(2.0)
    assert result.low == pytest.approx(2.0)
    rounds = [tuple(order[i : i + 2]) for i in range(1, 43, 2)]  # after the call that finds out how often to repeat
    assert set(rounds) == {(stock, ours), (ours, stock)}


def test_sides_that_differ_are_an_error():
    def same():
        raise AssertionError("they differ")

    with pytest.raises(AssertionError, match="they differ"):
        harness.measure(Row("x", "y", make=lambda: (lambda: 1, lambda: 2, same)))


def test_every_row_computes_the_same_on_both_sides():
    for row in optimizers.rows():
        if row.group != "large":
            *_, same = row.make()
            same()


@pytest.mark.skipif(not memory.available(), reason="this system does not tell a process its peak")
def test_peak_counts_what_was_freed_again():
    def call(n):
        temporary = torch.ones(n // 4)
        return temporary[:1].clone()

    n = 96 * 2**20
    assert n * 0.98 < memory.peak_of(call, n) < n * 1.3
    assert memory.peak_of(lambda _: None, n) < n * 0.3


def test_table():
    result = Result("a", "b", "small", 2e-3, 1e-6, 2000.0, 1.0, 3.0, 9, limit=5e-7, reached=0.5, target=3000)
    peak = Result("c", "d", "memory", 3e9, 1.5e6, 2000.0, 1.0, 3.0, 3, target=1, unit="B")
    *_, first, second = report.table([result, peak]).splitlines()
    assert first == "| a | b | 2 ms | 1 µs | 2000.00 | 1.00 - 3.00 | >= 3000 (missed) | 500 ns | 50% |"
    for ratio, missed in ((0.951, ""), (1.049, ""), (0.94, " (missed)"), (1.06, " (missed)")):
        assert Result("a", "itself", "small", 1, 1, ratio, 1, 1, 9, tolerance=0.05).aim == f"1 ± 0.05{missed}"
    assert second == "| c | d | 3 GB | 1.5 MB | 2000.00 | 1.00 - 3.00 | >= 1 | - | - |"


def test_command_writes_table_json_and_chart(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "10 x 100", "--quick", "--threads=1", f"--out={tmp_path}"])
    assert command.main() == 0
    data = json.loads((tmp_path / "benchmarks.json").read_text())
    assert [row["name"] for row in data["results"]] == ["AdamW, 10 x 100"]
    assert "| AdamW, 10 x 100 | AdamW(fused=True) |" in capsys.readouterr().out
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_row_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "nonsense"])
    assert command.main() == 2
    assert "nonsense" in capsys.readouterr().err
