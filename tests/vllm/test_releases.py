"""Releases of vLLM share blocks only if they were measured to compute equal bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
import transformers
import vllm

from kvcache.connectors.vllm.identity.releases import EQUAL_RELEASES, first_equal, release_fields

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("version", ["0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0"])
@pytest.mark.parametrize("build", ["", "+cpu"])
def test_first_equal_of_measured_releases_is_the_oldest(version: str, build: str) -> None:
    assert first_equal(version + build, "cpu") == "0.28.0"


@pytest.mark.parametrize(
    "version",
    ["0.32.1", "0.33.0", "0.34.0", "0.32.1.dev5+g0a1b2c3", "0.32.0rc1", "0.32.0+ours", "dev"],
)
def test_first_equal_of_an_unknown_release_is_itself(version: str) -> None:
    assert first_equal(version, "cpu") == version


def test_first_equal_on_a_device_without_measurements_is_the_release_itself() -> None:
    assert first_equal("0.29.0", "cuda") == "0.29.0"


def test_equal_releases_are_in_one_group_each() -> None:
    for groups in EQUAL_RELEASES.values():
        releases = [release for group in groups for release in group]
        assert len(releases) == len(set(releases))


def config(**model: object) -> Any:
    """Return the config of an engine on a GPU, of a text model that vLLM implements."""
    text = {"architecture": "Llama", "multimodal_config": None, "trust_remote_code": False}
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type="cuda"),
        model_config=SimpleNamespace(**text | model),
    )


def test_release_fields_of_a_text_model_are_vllm_and_torch() -> None:
    found = release_fields(config())
    assert found == {
        "vllm": vllm.__version__, "torch": torch.__version__, "transformers": None
    }  # fmt: skip


@pytest.mark.parametrize(
    "model",
    [
        {"architecture": "TransformersForCausalLM"},
        {"multimodal_config": object()},
        {"trust_remote_code": True},
    ],
    ids=lambda model: next(iter(model)),
)
def test_release_fields_of_a_model_that_transformers_computes_have_its_version(
    model: dict[str, object],
) -> None:
    assert release_fields(config(**model))["transformers"] == transformers.__version__
