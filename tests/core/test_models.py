"""Models: layers and KV cache groups from configurations; tests/vllm compares them with vLLM."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.models import PRESETS, preset, read_model
from kvcache.models.config import model_of
from kvcache.models.families import FAMILIES
from kvcache.resume import Needs

GEMMA_4 = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "global_head_dim": 512,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 4,
    "sliding_window": 1024,
    "dtype": "bfloat16",
}
CHUNKS = PRESETS["llama-4-scout"]


def groups(config: dict[str, Any], **engine: int) -> list[tuple[Needs, int, int, int]]:
    return [
        (group.needs, group.layers, group.block_tokens, group.block_nbytes)
        for group in model_of("a model", config, {}).groups(**engine)
    ]


@pytest.mark.parametrize(
    ("name", "engine", "expected"),
    [
        (
            "gemma-3-27b",
            {},
            [
                (Needs("all"), 10, 16, 10 * 16 * 16 * 128 * 2 * 2),
                (Needs("window", 1024), 52, 16, 52 * 16 * 16 * 128 * 2 * 2),
            ],
        ),
        (
            "gpt-oss-120b",
            {"block_tokens": 32, "cache_nbytes": 1},
            [
                (Needs("all"), 18, 32, 18 * 32 * 8 * 64 * 2),
                (Needs("window", 128), 18, 32, 18 * 32 * 8 * 64 * 2),
            ],
        ),
        (
            "qwen3.5-9b",  # a page of attention has room for a state after 528 tokens
            {},
            [
                (Needs("all"), 8, 528, 8 * 528 * 4 * 256 * 2 * 2),
                (Needs("state"), 24, 528, 24 * (3 * 8192 * 2 + 32 * 128 * 128 * 4)),
            ],
        ),
        (
            "qwen3.5-9b",  # two ranks hold each KV head, and each has an eighth of a state
            {"ranks": 8},
            [
                (Needs("all"), 8, 272, 8 * 272 * 4 * 256 * 2 * 2),
                (Needs("state"), 24, 272, 24 * (3 * 8192 * 2 + 32 * 128 * 128 * 4)),
            ],
        ),
        ("mistral-7b-v0.1", {}, [(Needs("window", 4096), 32, 16, 2 << 20)]),
        ("deepseek-v3", {"ranks": 8}, [(Needs("all"), 61, 16, 61 * 16 * 576 * 2)]),
        ("llama-3.1-8b", {"ranks": 16}, [(Needs("all"), 32, 16, 2 << 20)]),
    ],
)
def test_groups_of_a_preset_are_known(
    name: str, engine: dict[str, int], expected: list[tuple[Needs, int, int, int]]
) -> None:
    assert groups(PRESETS[name], **engine) == expected


def test_groups_with_other_pages_have_more_tokens_in_a_block() -> None:
    full, window = groups(GEMMA_4)
    assert full == (Needs("all"), 2, 32, 2 * 32 * 4 * 512 * 2 * 2)
    assert window == (Needs("window", 1024), 10, 16, 10 * 16 * 16 * 256 * 2 * 2)


def test_groups_with_several_numbers_of_heads_keep_a_copy_of_each_rank() -> None:
    """The connector cannot see which of these ranks hold the same heads."""
    one, two = groups(GEMMA_4, ranks=4), groups(GEMMA_4, ranks=8)
    assert one[0][2:] == (32, 2 * 32 * 4 * 512 * 2 * 2)
    assert two[0][2:] == (16, 2 * 16 * 8 * 512 * 2 * 2)  # 4 heads on 8 ranks
    assert two[1] == one[1]  # 16 heads


def test_group_needs_the_blocks_of_its_rule() -> None:
    full, window = preset("gemma-3-27b").groups()
    assert [full.needed_blocks(end) for end in (0, 16, 4096)] == [0, 1, 256]
    assert [window.needed_blocks(end) for end in (0, 16, 1024, 4096)] == [0, 1, 64, 64]
    _, chunk = model_of("a model", CHUNKS, {}).groups()
    assert [chunk.needed_blocks(end) for end in (8176, 8192, 8208)] == [511, 0, 1]
    _, state = preset("qwen3.5-9b").groups()
    assert [state.needed_blocks(end) for end in (528, 5280)] == [1, 1]


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"model_type": "kimi_linear", "linear_attn_config": {}}, None),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "has layers of sliding_attent"),
        ({"sliding_window": 4096}, "has a sliding window of 4096 tokens, and plan does not know"),
        ({"model_type": "new", "full_attention_interval": 4}, "its model_type 'new'; plan knows"),
        ({"model_type": "glm_moe_dsa", "index_topk": 2048}, "has index_topk"),
        (CHUNKS | {"no_rope_layers": [1, 0]}, "no_rope_layers does not list the 48 layers"),
        (CHUNKS | {"layer_types": 3, "model_type": "cohere2"}, "layer_types does not list the 48"),
        (PRESETS["gemma-2-9b"] | {"layer_types": ["odd"] * 42}, "layer_types has 'odd'; plan kno"),
        (PRESETS["gemma-3-4b"] | {"sliding_window_pattern": 0}, "pattern is 0; it must be above"),
        (PRESETS["qwen3.5-9b"] | {"mamba_ssm_dtype": "int4"}, "mamba_ssm_dtype has 'int4'"),
        ({"model_type": "nemotron_h", "num_attention_heads": 8}, "missing: hybrid_override_patt"),
        ({"model_type": "lfm2"}, "missing: num_hidden_layers"),
    ],
)
def test_model_of_unknown_layers_is_refused(config: dict[str, Any], error: str | None) -> None:
    error = error or "missing: num_hidden_layers"
    with pytest.raises(ValueError, match=error):
        model_of("a model", config, {})


def test_model_of_unknown_layers_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="plan knows such layers of gemma2, ") as info:
        model_of("a model", {"model_type": "new", "attention_chunk_size": 8}, {})
    assert all(family in str(info.value) for family in FAMILIES)


def test_numbers_beside_several_kinds_of_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="--kv-heads cannot be set: the model has layers of sever"):
        preset("gemma-3-4b", {"kv_heads": 2})
    assert preset("llama-3.1-8b", {"kv_heads": 2}).groups()[0].block_nbytes == 512 << 10


@pytest.mark.parametrize("name", ["qwen3.5-9b", "lfm2-1.2b"])
def test_states_that_ranks_cannot_divide_are_refused(name: str) -> None:
    config = PRESETS[name] | {"num_attention_heads": 96, "num_key_value_heads": 96}
    with pytest.raises(ValueError, match="3 ranks cannot divide the state of a layer"):
        model_of("a model", config, {}).groups(ranks=3)


broken = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.floats(), st.just(1 << 60),
    st.text(max_size=3),
    st.lists(st.sampled_from(["full_attention", 1, None, {}]), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(0, 3), max_size=2),
)  # fmt: skip
KEYS = sorted({key for config in [*PRESETS.values(), GEMMA_4] for key in config} - {"model_type"})
MORE_KEYS = (
    "per_layer_config", "layer_types", "layers_block_type", "hybrid_override_pattern",
    "no_rope_layers", "mamba_d_ssm", "mamba_d_head", "mamba_n_heads", "n_groups", "hidden_size",
    "mamba_ssm_cache_dtype", "sliding_window_pattern",
)  # fmt: skip


@given(
    st.sampled_from([*FAMILIES, "llama"]),
    st.sampled_from([*PRESETS.values(), GEMMA_4]),
    st.dictionaries(st.sampled_from([*KEYS, *MORE_KEYS]), broken, max_size=4),
    st.integers(1, 9),
)
def test_broken_configuration_is_a_model_or_a_value_error(
    family: str, config: dict[str, Any], changes: dict[str, Any], ranks: int
) -> None:
    with suppress(ValueError):
        model = model_of("a model", {**config, "model_type": family, **changes}, {})
        assert model.description()
        assert all(group.block_nbytes >= 0 for group in model.groups(ranks=ranks))


def test_preset_that_does_not_exist_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no model 'gpt-5'; kvcache knows gemma-2-9b, "):
        preset("gpt-5")


def test_read_model_with_images_reads_its_language_model(tmp_path: Path) -> None:
    text = PRESETS["gemma-3-12b"]
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    inner = {key: value for key, value in text.items() if key not in ("model_type", "dtype")}
    config = {**whole, "torch_dtype": "bfloat16", "text_config": {**inner, "dtype": None}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_model(tmp_path, {})
    assert model.name == "Gemma3ForConditionalGeneration"
    assert model.warnings == ()
    assert model.groups() == preset("gemma-3-12b").groups()
