"""A small demo with three real engines, and an engine that cannot start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvcache.cli.demo import checkpoint
from kvcache.cli.demo.chats import Chats
from kvcache.cli.demo.engine import EngineError, EngineSetup, cpu_dtype, play


@pytest.mark.parametrize(
    ("capability", "dtype"), [("AVX512", "auto"), ("AVX2", "float32"), ("DEFAULT", "float32")]
)
def test_cpu_dtype_without_bfloat16_instructions_is_float32(capability: str, dtype: str) -> None:
    assert cpu_dtype(capability) == dtype


@pytest.mark.engine
def test_demo_has_equal_answers_and_no_pinned_slot(tmp_path: Path) -> None:
    model = checkpoint.write(tmp_path, layers=2, hidden=256, heads=4, kv_heads=2, intermediate=512)
    done = subprocess.run(
        [sys.executable, "-m", "kvcache", "demo", "--json", "--model", str(model),
         "--users", "3", "--turns", "2", "--system-tokens", "64", "--document-tokens", "2000"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["identical_outputs"] is True
    assert figures["first_difference"] is None
    assert figures["pinned_slots_after"] == 0
    assert figures["prompt_tokens"] == 3 * (2112 + 2176)
    # In second turns all but the system prompt comes from DRAM, up to the last full block.
    assert figures["l1_hit_tokens"] == 3 * (2112 - 64)
    assert 0 < figures["dram_used_bytes"] <= figures["dram_capacity_bytes"]
    for name in ("cold", "hit", "own_cache"):
        assert figures[f"ttft_p50_{name}_s"] > 0
    cached = {
        (row["engine"], row["user"], row["turn"]): row["cached_tokens"]
        for row in figures["turns_played"]
    }
    for user in (1, 2, 3):
        assert cached["without", user, 2] == 64
        assert cached["kvcache", user, 2] == cached["own_cache", user, 2] == 2112


@pytest.mark.engine
def test_engine_that_cannot_start_raises_the_cause_and_keeps_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = str(tmp_path / "no-such-model")
    with pytest.raises(EngineError, match="no-such-model") as failure:
        play(EngineSetup(model, context_tokens=512, blocks=20), Chats(2, 2, 1, 1))
    [log] = tmp_path.glob("kvcache-demo-*.log")
    assert str(log) in str(failure.value)
    assert "Traceback" in log.read_text()
