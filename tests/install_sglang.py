"""Install what the tests of the SGLang backend need into this interpreter's environment.

The environment is a copy of the one with vLLM (`make sglang`), which has torch for CPU and most of
what SGLang imports. SGLang requires gigabytes of CUDA libraries that a CPU cannot use, so its wheel
is installed without its requirements, and of these only the few that its host pools and its cache
controller import. The tests replace torchvision, which these import and do not use.

SGLang has wheels for some versions of Python only. Where it has none, this installs nothing and
says so, and the tests are skipped.
"""

import subprocess
import sys

VERSION = "0.5.23"
PYTHONS = ((3, 11), (3, 12), (3, 13))
"""Versions of Python for which SGLang has a wheel, among those that kvcache supports."""

IMPORTED = ("gguf", "ipython", "orjson")


def pip_install(*arguments: str) -> None:
    """Run `pip install`; print its output only if it fails."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
    done = subprocess.run(
        [*pip, "install", "--only-binary=:all:", *arguments],
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\ninstalling {' '.join(arguments)} failed")


def main() -> None:
    """Install SGLang's wheel, and what it imports."""
    if sys.prefix == sys.base_prefix:
        sys.exit("this installs into a virtual environment: make one and run this with its python")
    if sys.version_info[:2] not in PYTHONS:
        print(f"SGLang {VERSION} has no wheel for this Python; its tests will be skipped")
        return
    print(f"installing SGLang {VERSION}", flush=True)
    pip_install("--no-deps", f"sglang=={VERSION}")
    pip_install(*IMPORTED)


if __name__ == "__main__":
    main()
