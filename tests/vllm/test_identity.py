"""The namespace has all that must be equal before engines share blocks, and nothing else."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.identity.fields import UNSHARED, identity, log_sharing
from kvcache.connectors.vllm.vllm_names import FIXED_HASH_SEED, has_name
from kvcache.connectors.weights import started_ns
from kvcache.keys import namespace

pytestmark = pytest.mark.engine

DAY_NS = 86400 * 10**9
COMMIT = 40 * "a"


def write_model(folder: Path, weights: bytes = b"weights") -> str:
    """Write a folder with one weight file, and return its path."""
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(weights)
    return str(folder)


def write_snapshot(cache: Path, commit: str, weights: bytes) -> str:
    """Write a model as a Hugging Face cache keeps it, and return the path of its snapshot."""
    repository = cache / "models--meta--llama"
    for folder in (repository / "blobs", repository / "snapshots" / commit, repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "blobs" / weights.hex()).write_bytes(weights)
    link = repository / "snapshots" / commit / "model.bin"
    link.symlink_to(Path("..", "..", "blobs", weights.hex()))
    (repository / "refs" / "main").write_text(commit)
    return str(link.parent)


@pytest.fixture(autouse=True)
def started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines of these tests start after the test has written its files."""
    later = time.time_ns() + DAY_NS
    monkeypatch.setattr("kvcache.connectors.vllm.identity.fields.started_ns", lambda: later)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_model(tmp_path / "model")


def fields(
    model: str,
    *,
    load_format: str = "auto",
    download_dir: str | None = None,
    model_weights: str = "",
    config: dict[str, Any] | None = None,
    auto_map: dict[str, str] | None = None,
    committed: str | None = None,
    length: int = 1024,
    architecture: str = "Llama",
    dtype: str = "torch.bfloat16",
    quantization: str | None = None,
    media: dict[str, Any] | None = None,
    cache_dtype: str = "auto",
    algorithm: str = "sha256",
    block_tokens: int = 32,
    heads: int = 2,
    layers: tuple[str, ...] = ("one", "two"),
    tensor: int = 1,
    pipeline: int = 1,
    served: str = "chat",
    draft: str | None = None,
    transfer: object = None,
    loader: dict[str, Any] | None = None,
    classes: dict[str, str] | None = None,
) -> dict[str, object]:
    """Return the identity of an engine with these settings."""
    import torch
    from vllm.config.load import LoadConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(
        block_size=block_tokens, num_kv_heads=heads, head_size=32, dtype=torch.bfloat16
    )
    text = json.dumps({"layers": 2, "_name_or_path": model} | (config or {}))

    def model_config(path: str) -> SimpleNamespace:
        return SimpleNamespace(
            model=path,
            model_weights=model_weights,
            revision="main",
            hf_config=SimpleNamespace(
                to_json_string=lambda use_diff: text, auto_map=auto_map, _commit_hash=committed
            ),
            max_model_len=length,
            architecture=architecture,
            trust_remote_code=auto_map is not None,
            dtype=dtype,
            quantization=quantization,
            multimodal_config=media and SimpleNamespace(**media),
            served_model_name=served,
            model_class_overrides=classes,
        )

    engine: Any = SimpleNamespace(
        model_config=model_config(model),
        load_config=LoadConfig(
            load_format=load_format,
            download_dir=download_dir,
            model_loader_extra_config=loader or {},
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=pipeline, tensor_parallel_size=tensor
        ),
        cache_config=SimpleNamespace(
            cache_dtype=cache_dtype,
            prefix_caching_hash_algo=algorithm,
        ),
        speculative_config=draft and SimpleNamespace(draft_model_config=model_config(draft)),
        weight_transfer_config=transfer,
        device_config=SimpleNamespace(device_type="cpu"),
    )
    cache: Any = SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(layer_names=list(layers), kv_cache_spec=spec)],
    )
    return identity(engine, cache)


@pytest.mark.parametrize(
    "other",
    [
        {"config": {"layers": 3}},
        {"length": 2048},
        {"architecture": "Gemma"},
        {"load_format": "pt"},
        {"load_format": "sharded_state", "loader": {"pattern": "other-{rank}-{part}.safetensors"}},
        {"classes": {"Llama": "ours:Llama"}},
        {"dtype": "torch.float16"},
        {"quantization": "fp8"},
        {"media": {"mm_processor_kwargs": {"crop": True}}},
        {"cache_dtype": "fp8"},
        {"algorithm": "sha256_cbor"},
        {"block_tokens": 64},
        {"heads": 4},
        {"layers": ("one",)},
        {"tensor": 2},
        {"pipeline": 2},
    ],
    ids=lambda other: next(iter(other)),
)
def test_identity_setting_that_changes_bytes_changes_it(model: str, other: dict[str, Any]) -> None:
    usual = {name: other[name] for name in ("load_format",) if "loader" in other}
    assert namespace(fields(model, **other)) != namespace(fields(model, **usual))


@pytest.mark.parametrize("variable", ["PYTHONHASHSEED", "VLLM_BATCH_INVARIANT"])
def test_identity_variable_that_changes_blocks_changes_it(
    model: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "0")
    before = fields(model)
    monkeypatch.setenv(variable, "1")
    assert fields(model) != before


@pytest.mark.parametrize("package", ["vllm", "torch"])
def test_identity_of_another_release_changes(
    model: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fields(model)
    monkeypatch.setattr(f"{package}.__version__", "99.0.0")
    assert namespace(fields(model)) != namespace(before)


def test_identity_of_another_transformers_is_equal(model: str) -> None:
    """The code of a text model is vLLM's."""
    after = {"transformers_version": "99.0.0"}
    assert fields(model, config=after) == fields(model, config={"transformers_version": "5.0.0"})


def test_identity_of_two_equal_engines_is_equal(model: str) -> None:
    """Also if their served names differ."""
    assert fields(model) == fields(model, served="another name")


def test_identity_weights_replaced_in_place_changes_it(model: str) -> None:
    before = fields(model)
    Path(model, "model.bin").write_bytes(b"trained")
    assert fields(model) != before


def test_identity_of_equal_files_at_two_paths_is_equal(model: str, tmp_path: Path) -> None:
    copy = str(tmp_path / "elsewhere")
    shutil.copytree(model, copy)
    assert fields(copy) == fields(model)


def test_identity_drafter_weights_replaced_changes_it(model: str, tmp_path: Path) -> None:
    draft = write_model(tmp_path / "draft")
    before = fields(model, draft=draft)
    assert before != fields(model)
    Path(draft, "model.bin").write_bytes(b"trained")
    assert fields(model, draft=draft) != before


def test_identity_revision_at_another_commit_changes_it(tmp_path: Path) -> None:
    write_snapshot(tmp_path, COMMIT, b"old")
    before = fields("meta/llama", download_dir=str(tmp_path))
    assert before["weights"] == f"commit {COMMIT}"
    write_snapshot(tmp_path, 40 * "b", b"new")
    after = fields("meta/llama", download_dir=str(tmp_path))
    assert after["weights"] == f"commit {40 * 'b'}"


def test_identity_of_a_snapshot_by_path_and_by_name_is_equal(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, COMMIT, b"old")
    assert fields(path) == fields("meta/llama", download_dir=str(tmp_path))


UNIDENTIFIED: dict[str, dict[str, Any]] = {
    "dummy weights": {"load_format": "dummy"},
    "streamer": {"load_format": "tensorizer"},
    "unknown loader": {"load_format": "ours"},
    "object store": {"model_weights": "s3://models/llama"},
    "transferred weights": {"transfer": object()},
    "scales elsewhere": {"media": {"mm_encoder_fp8_scale_path": "/scales.json"}},
    "code elsewhere": {"auto_map": {"AutoModel": "other/repository--modeling.Model"}},
}


@pytest.mark.parametrize("how", UNIDENTIFIED.values(), ids=UNIDENTIFIED)
def test_identity_weights_of_unknown_origin_are_shared_with_no_process(
    model: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = fields(model, **how), fields(model, **how)
    assert first[UNSHARED] == second[UNSHARED]
    assert namespace(first) != namespace(second)
    monkeypatch.setenv("KVCACHE_IDENTITY", "run 7")
    assert fields(model, **how) == fields(model, **how)


def test_identity_model_without_files_is_shared_with_no_process(tmp_path: Path) -> None:
    assert UNSHARED in fields("meta/llama", download_dir=str(tmp_path))
    assert UNSHARED in fields(str(tmp_path))  # a folder without weights


def test_identity_weights_of_modelscope_are_no_snapshot_of_hugging_face(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshot(tmp_path, COMMIT, b"old")
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    assert UNSHARED in fields("meta/llama", download_dir=str(tmp_path))


def test_identity_snapshot_that_moved_since_the_start_is_shared_with_no_process(
    tmp_path: Path,
) -> None:
    write_snapshot(tmp_path, COMMIT, b"old")
    options: dict[str, Any] = {"download_dir": str(tmp_path)}
    assert UNSHARED not in fields("meta/llama", committed=COMMIT, **options)
    assert UNSHARED in fields("meta/llama", committed=40 * "b", **options)


def test_identity_files_younger_than_the_engine_are_shared_with_no_process(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine may have loaded the earlier files."""
    monkeypatch.setattr("kvcache.connectors.vllm.identity.fields.started_ns", started_ns)
    assert UNSHARED in fields(model)


def test_started_ns_is_between_this_process_and_a_later_one() -> None:
    began = started_ns()
    assert began <= time.time_ns()
    code = "import time; print(time.time_ns())"
    later = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert began < int(later.stdout)


def test_identity_explicit_text_replaces_the_weights(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHE_IDENTITY", "run 7")
    before = fields(model)
    Path(model, "model.bin").write_bytes(b"trained")
    assert fields(model) == before
    monkeypatch.setenv("KVCACHE_IDENTITY", "run 8")
    assert fields(model) != before


@pytest.mark.parametrize(("lower", "level"), [(True, logging.WARNING), (False, logging.INFO)])
def test_log_sharing_unidentified_weights_are_logged_with_the_reason(
    model: str,
    lower: bool,
    level: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # vLLM 0.28 has no fixed seed, which is logged too
    with caplog.at_level(logging.INFO, "kvcache"):
        log_sharing(fields(model, load_format="dummy"), lower=lower)
    [record] = caplog.records
    assert record.levelno == level
    assert "dummy" in record.getMessage()
    assert ("KVCACHE_IDENTITY" in record.getMessage()) == lower


def hash_seed_warnings(found: dict[str, object], caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "kvcache"):
        log_sharing(found, lower=True)
    return [record.getMessage() for record in caplog.records]


def test_log_sharing_hashes_with_a_random_seed_are_logged(
    model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    [message] = hash_seed_warnings(fields(model, algorithm="xxhash"), caplog)
    assert "PYTHONHASHSEED" in message
    fixed = has_name(FIXED_HASH_SEED)
    assert len(hash_seed_warnings(fields(model), caplog)) == (0 if fixed else 1)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert hash_seed_warnings(fields(model, algorithm="xxhash"), caplog) == []


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"])
def test_identity_hash_seed_is_random_where_vllm_makes_a_random_one(
    model: str, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.utils import hashing
    from vllm.v1.core import kv_cache_utils

    pytest.importorskip("xxhash")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", b"", raising=False)
    seeds = set()
    for _ in range(2):
        kv_cache_utils.init_none_hash(getattr(hashing, algorithm))
        seeds.add(kv_cache_utils.NONE_HASH)
    found = fields(model, algorithm=algorithm)
    assert found["hash seed"] == ("random" if len(seeds) > 1 else None)
