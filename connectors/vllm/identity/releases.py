"""Releases of vLLM, and which of them compute the same bytes from the same tokens.

A release may change a kernel, the order of the bytes of a page, or the last bits of a number, and
vLLM does not report such a change. So each release has a namespace of its own, apart from releases
that were measured to compute equal bytes. A release that this module does not know shares blocks
with no other one.

To add a release: `tests/e2e/test_upgrade.py` compares its blocks with those of the oldest release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.model import ModelConfig

EQUAL_RELEASES: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "cpu": (("0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0"),),
}
"""By vLLM's device type: groups of releases that compute equal bytes with the same torch."""

_BUILDS: Final = r"\+(cpu|cu\d+|rocm\d+)$"
"""Suffixes of a version that name the device of a build, not other source."""


def release_fields(vllm_config: VllmConfig) -> dict[str, object]:
    """Return the fields of the namespace that depend on the installed software."""
    import torch
    import transformers
    import vllm

    device, model = vllm_config.device_config.device_type, vllm_config.model_config
    return {
        "vllm": first_equal(vllm.__version__, device),
        "torch": torch.__version__,
        "transformers": transformers.__version__ if _computes_with_transformers(model) else None,
    }


def _computes_with_transformers(model: ModelConfig) -> bool:
    """Whether code of transformers may compute: a model, or the inputs from images and sounds."""
    return bool(
        str(getattr(model, "architecture", "")).startswith("Transformers")
        or getattr(model, "multimodal_config", None) is not None
        or getattr(model, "trust_remote_code", True)
    )


def first_equal(version: str, device: str) -> str:
    """Return the first release that computes the same bytes as ``version``; else ``version``."""
    release = re.sub(_BUILDS, "", version)
    groups = EQUAL_RELEASES.get(device, ())
    return next((group[0] for group in groups if release in group), version)
