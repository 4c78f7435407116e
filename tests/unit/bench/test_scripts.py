"""The benchmarks are run rarely, so their imports are tested: a renamed module breaks them here, not months later."""

import importlib

import pytest


@pytest.mark.parametrize("module", ["bench.operator.__main__", "bench.operator.scenarios", "bench.bench_checkpoint"])
def test_benchmark_can_be_imported(module: str) -> None:
    importlib.import_module(module)
