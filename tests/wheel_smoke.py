"""Test an installed wheel in an environment that holds nothing else: `wheel_smoke.py SETUP_PY`.

SETUP_PY is the checkout's `setup.py`, which names the compiled modules. This file imports no test
package and nothing of the checkout, so it runs where only the wheel and its requirements are.
"""

import ast
import os
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path


def compiled_modules(setup_py: Path) -> tuple[str, ...]:
    """Return `MODULES` of `setup.py`, read without running it."""
    for node in ast.parse(setup_py.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="MODULES")], value=value):
                return tuple(ast.literal_eval(value))
    raise SystemExit(f"{setup_py} has no MODULES")


def check_modules_are_compiled(setup_py: Path) -> None:
    for module in compiled_modules(setup_py):
        file = import_module("kvcache." + module.replace("/", ".")).__file__ or ""
        assert file.endswith(".so"), f"{file} is not compiled"


def check_version() -> None:
    """The module, the metadata and the command agree."""
    import kvcache

    command = Path(sys.executable).with_name("kvcache")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert metadata.version("kvcache") == kvcache.__version__
    assert done.stdout.split() == ["kvcache", kvcache.__version__]


def check_a_block_comes_back() -> None:
    """Store more blocks than L1 has slots, so that eviction runs too, and load the last of them."""
    from kvcache import block_keys
    from kvcache.profiles import open_stack

    os.environ["KVCACHE__L1__CAPACITY"] = "1MiB"
    nbytes = 16 * 1024
    with open_stack(block_nbytes=nbytes) as stack:
        for first in range(0, 128, 8):  # 64 slots for 128 blocks
            chain = block_keys(range(first, first + 8 * 32), block_tokens=32)
            with stack.reserve(chain) as lease:
                for view in lease.views:
                    view[:] = bytes([first]) * nbytes
        with stack.fetch(stack.match(chain).result()).result() as lease:
            assert [bytes(view) for view in lease.views] == [bytes([first]) * nbytes] * 8


if __name__ == "__main__":
    check_modules_are_compiled(Path(sys.argv[1]))
    check_version()
    check_a_block_comes_back()
    print(metadata.version("kvcache"), "works")
