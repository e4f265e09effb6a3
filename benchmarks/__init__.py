"""Stock and torchcalc side by side: ``python -m benchmarks``. See :mod:`benchmarks.harness` for how it measures."""
