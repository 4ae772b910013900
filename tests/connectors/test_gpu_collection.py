"""`pytest -m gpu` starts on a machine with few packages besides torch for CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = {
    "iniconfig": "iniconfig",
    "opentelemetry": "opentelemetry-api",
    "packaging": "packaging",
    "pluggy": "pluggy",
    "py": "pytest",
    "pygments": "pygments",
    "pytest": "pytest",
    "typing_extensions": "typing-extensions",
    "xxhash": "xxhash",
}
"""The packages to install for `pytest -m gpu` besides torch, Triton, numpy and what these need: by
the name of a module, the name in the package index. All but xxhash are pure Python."""

ABSENT = ("hypothesis", "numba", "opentelemetry.sdk", "redis", "vllm", "xdist")

COLLECT = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None  # an import raises ImportError
import torch, numpy
try:
    import triton
except ImportError:
    pass
before = {{name.partition(".")[0] for name in sys.modules}}
import pytest
status = pytest.main(["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"])
# The tests import these when they run.
import kvcache.connectors.paged, kvcache.connectors.transfer.cuda, kvcache.profiles
for name in {{name.partition(".")[0] for name in sys.modules}} - before:
    path = getattr(sys.modules.get(name), "__file__", None) or ""
    if "site-packages" in path or "dist-packages" in path:
        print("package", name)
sys.exit(status)
"""


def test_tests_on_a_gpu_are_collected_with_few_packages() -> None:
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [sys.executable, "-c", COLLECT],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for name in ("test_cuda.py", "test_cuda_layers.py", "test_paged_gpu.py"):
        assert any(line.startswith(f"tests/connectors/{name}::") for line in lines), done.stdout
    imported = {line.removeprefix("package ") for line in lines if line.startswith("package ")}
    private = {name for name in imported if name.startswith("_")}  # of pytest and of this checkout
    assert imported - private <= PACKAGES.keys()
