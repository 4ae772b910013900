"""The demo's checkpoint has the shape of its arguments, and the same bytes each time."""

import json
from pathlib import Path

import pytest

from kvcache.cli.demo import checkpoint

pytestmark = pytest.mark.engine

TINY = {
    "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "intermediate": 96,
    "vocabulary": 128, "positions": 512,
}  # fmt: skip


def test_checkpoint_same_arguments_write_the_same_files(tmp_path: Path) -> None:
    one = checkpoint.write(tmp_path / "one", **TINY)
    two = checkpoint.write(tmp_path / "two", **TINY)
    other = checkpoint.write(tmp_path / "other", **TINY, seed=1)
    for name in ("config.json", "model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    weights = "model.safetensors"
    assert (one / weights).read_bytes() != (other / weights).read_bytes()


def test_checkpoint_weights_fit_the_config_and_have_normal_scale(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    path = checkpoint.write(tmp_path, **TINY)
    config = json.loads((path / "config.json").read_text())
    weights = load_file(path / "model.safetensors")
    assert config["num_hidden_layers"] == 2
    assert len(weights) == 3 + 2 * 9
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert weights["model.embed_tokens.weight"].shape == (128, 64)
    assert weights["model.layers.1.self_attn.k_proj.weight"].shape == (2 * 32, 64)
    down = weights["model.layers.0.mlp.down_proj.weight"].float()
    assert down.shape == (64, 96)
    assert down.std().item() == pytest.approx(96**-0.5, rel=0.1)
