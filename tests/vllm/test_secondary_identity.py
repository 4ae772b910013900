"""Which engines find each other's rows: weights, configuration, what vLLM's own code passes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("kvcache.connectors.vllm.secondary", exc_type=ImportError)  # from vLLM 0.32 on

from kvcache.connectors.vllm.identity.fields import UNSHARED
from kvcache.connectors.vllm.secondary.rows_identity import (
    element_nbytes,
    engine_configs,
    rows_identity,
)
from tests.support.played_tiering import (
    SharedFaultyTier,
    engine_settings,
    keep,
    keys_of,
    played,
)

pytestmark = pytest.mark.engine

DAY_NS = 86400 * 10**9
OPTIONS: dict[str, object] = {"tiers": [SharedFaultyTier.table()]}


@pytest.fixture(autouse=True)
def no_blocks() -> None:
    """No blocks of another test are found."""
    SharedFaultyTier.shared.clear()


@pytest.fixture
def started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines of a test start after the test has written its files."""
    later = time.time_ns() + DAY_NS
    monkeypatch.setattr("kvcache.connectors.vllm.identity.fields.started_ns", lambda: later)


def write_model(folder: Path, weights: bytes) -> str:
    """Write a folder with one weight file, and return its path."""
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(weights)
    return str(folder)


def found(**arguments: Any) -> list[bool]:
    """Return which of three blocks a new engine finds."""
    with played(OPTIONS, **arguments) as engine:
        request = engine.start("finds")
        held = engine.find(request, keys_of("a", 3))
        engine.finish(request)
        return held


@pytest.mark.usefixtures("started_later")
def test_engines_share_blocks_of_equal_weights_only(tmp_path: Path) -> None:
    first = write_model(tmp_path / "first", b"weights")
    same = write_model(tmp_path / "same", b"weights")
    other = write_model(tmp_path / "other", b"other weights")
    keep(OPTIONS, keys_of("a", 3), settings={"model": first})
    assert found(settings={"model": same}) == [True] * 3
    assert found(settings={"model": other}) == [False] * 3


def test_unknown_weights_are_shared_with_no_other_engine(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        keep(OPTIONS, keys_of("a", 3), settings={"model": "no/such-model"})
    assert "weights not identified" in caplog.text
    assert found(settings={"model": "no/such-model"}) == [False] * 3


def test_engine_without_a_known_configuration_shares_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHE_IDENTITY", "the same weights")
    with caplog.at_level(logging.WARNING):
        keep(OPTIONS, keys_of("a", 3), settings=None)
    assert "vLLM's configuration was not found" in caplog.text
    assert found(settings=None) == [False] * 3
    assert found() == [False] * 3


@pytest.mark.usefixtures("started_later")
def test_engine_with_lora_shares_only_by_explicit_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": write_model(tmp_path / "model", b"weights"), "lora": SimpleNamespace()}
    keep(OPTIONS, keys_of("a", 3), settings=settings)
    assert found(settings=settings) == [False] * 3
    monkeypatch.setenv("KVCACHE_IDENTITY", "the same weights and adapters")
    keep(OPTIONS, keys_of("a", 3), settings=settings)
    assert found(settings=settings) == [True] * 3


def test_configuration_of_another_engine_is_not_taken() -> None:
    def construct(vllm_config: Any, kv_cache_config: Any) -> Any:
        return engine_configs("mine")

    def outer(vllm_config: Any, kv_cache_config: Any) -> Any:
        return construct(*engine_settings("other"))

    configs = outer(*engine_settings("mine"))
    assert configs is not None
    assert configs.vllm.kv_transfer_config.engine_id == "mine"
    assert construct(*engine_settings("other")) is None


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("KVCACHE_IDENTITY", "the same weights")
    with played(OPTIONS) as engine:
        yield engine.spec


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("", "blocks_per_chunk", 2),
        ("", "replicated_layout", True),
        ("config", "worker_kv_bytes_per_block", 8192),
        ("config", "canonical_layout", True),
        ("config", "kv_cache_layout", "BLHNC"),
        ("config.cache", "tokens_per_hash", 32),
        ("config.model", "dtype", "fp8"),
        ("config.parallel", "tp_size", 2),
        ("config.parallel", "pp_size", 2),
        ("config.parallel", "pcp_size", 2),
        ("config.parallel", "dcp_size", 2),
        ("config.parallel", "world_size", 2),
        ("config", "groups", ()),
    ],
)
def test_identity_has_every_part_of_a_row(spec: Any, part: str, name: str, value: object) -> None:
    from kvcache.connectors.vllm.secondary.rows_identity import EngineConfigs

    configs = EngineConfigs(*engine_settings("x"))
    before = rows_identity(spec, 4096, configs)
    assert before == rows_identity(spec, 4096, configs)
    assert before != rows_identity(spec, 8192, configs)
    owner = spec
    for each in filter(None, part.split(".")):
        owner = getattr(owner, each)
    object.__setattr__(owner, name, value)
    assert before != rows_identity(spec, 4096, configs)


def test_identity_has_the_attention_and_differs_from_that_of_the_connector(spec: Any) -> None:
    from kvcache.connectors.vllm.identity.fields import identity
    from kvcache.connectors.vllm.secondary.rows_identity import EngineConfigs

    vllm_config, kv_cache_config = engine_settings("x")
    before = rows_identity(spec, 4096, EngineConfigs(vllm_config, kv_cache_config))
    assert identity(vllm_config, kv_cache_config).items() < before.items()
    vllm_config.attention_config = SimpleNamespace(backend="FLASHINFER")
    assert before != rows_identity(spec, 4096, EngineConfigs(vllm_config, kv_cache_config))
    assert UNSHARED not in before


def test_element_nbytes_is_that_of_vllms_data_types() -> None:
    names = ["bfloat16", "float16", "float32", "fp8", "fp8_e4m3", "fp8_ds_mla", "auto"]
    assert [element_nbytes(name) for name in names] == [2, 2, 4, 1, 1, 1, 2]
