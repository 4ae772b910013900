"""Lets vLLM import text models in modules that also process images, without torchvision.

The environment of the tests has no torchvision (`tests/install_engine.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

NAMES = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")


def stub_torchvision() -> None:
    """Put empty modules in the place of torchvision, and have vLLM inspect models in this process.

    By default vLLM inspects them in a process of its own, which would not have the empty modules.
    """
    for name in (*NAMES, f"{NAMES[-1]}.functional"):
        module = ModuleType(name)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    from vllm.model_executor.models import registry

    vars(registry)["_run_in_subprocess"] = _call


def _call(function: Callable[[], Any]) -> Any:
    return function()
