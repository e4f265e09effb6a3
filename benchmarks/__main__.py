"""``python -m benchmarks [NAME ...]``: measure the rows whose name contains a NAME (all by default)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import functions, instruments, language, optimizers, report
from benchmarks.harness import Row, measure
from benchmarks.memory import MemoryRow, available, measure_memory


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of row names, e.g. 'AdamW, small'; all rows by default")
    parser.add_argument("--quick", action="store_true", help="under a minute: small shapes, fewer rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads of both sides (default: 2)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), help="folder of the JSON file and the chart"
    )
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    rows: list[Row | MemoryRow] = [
        *functions.rows(),
        *optimizers.rows(),
        *instruments.rows(),
        *language.rows(),
        *((*optimizers.memory_rows(), *language.memory_rows()) if available() else ()),
    ]
    rows = [
        r for r in rows if not args.names or any(name in (r.name, r.group) or name in r.name for name in args.names)
    ]
    rows = [r for r in rows if r.quick or not args.quick]
    if not rows:
        print(f"no row's name contains any of {args.names}", file=sys.stderr)
        return 2
    environment = report.environment()
    print(*(f"{k}: {v}" for k, v in environment.items()), sep="\n")
    results = []
    for row in rows:
        print(f"\r\033[K{row.name} against {row.against} ...", end="", file=sys.stderr, flush=True)
        results.append(measure(row, 6.0 if args.quick else 1.0) if isinstance(row, Row) else measure_memory(row))
    growth = [] if args.names else optimizers.growth(seconds=0.3 if args.quick else 3.0)
    print("\r\033[K", end="", file=sys.stderr)
    print(report.table(results))
    args.out.mkdir(parents=True, exist_ok=True)
    report.write_json(args.out / "benchmarks.json", environment, results, growth)
    report.write_chart(args.out / "benchmarks.png", environment, results, growth)
    print(f"\nwritten: {args.out / 'benchmarks.json'}, {args.out / 'benchmarks.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
