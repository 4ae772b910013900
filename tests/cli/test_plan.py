"""`kvcache plan` for models of known size, and its errors for missing numbers."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvcache import cli, host_memory
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.tiers.disk import DiskTier
from kvcache.tiers.disk.reader import DiskReader
from kvcache.tiers.dram import DramTier
from kvcache.tiers.framed import frame_nbytes

LLAMA_8B = {  # DeepSeek-R1-Distill-Llama-8B
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
}
QWEN_32B = {
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 5120,  # not heads times head_dim
    "sliding_window": 32768,
    "use_sliding_window": False,
    "dtype": "bfloat16",
}
LLAMA_7B = {  # multi-head attention: it has no key for KV heads
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "torch_dtype": "float16",
}
DEEPSEEK_V3 = {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "torch_dtype": "bfloat16",
}
FALCON_7B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "multi_query": True,
    "hidden_size": 4544,
    "torch_dtype": "bfloat16",
}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "torch_dtype": "float32"}
MULTIMODAL = {"architectures": ["Both"], "dtype": "bfloat16", "text_config": LLAMA_8B}

POD = ["--pod-memory", "120GiB", "--engine-memory", "20GiB", "--bandwidth", "16GiB"]


def planned(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: dict[str, Any], *more: str
) -> dict[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["plan", str(tmp_path), *POD, "--json", *more]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("config", "arguments", "rank", "node"),
    [
        (LLAMA_8B, [], 128 << 10, 128 << 10),
        (LLAMA_8B, ["--dtype", "fp8"], 64 << 10, 64 << 10),
        (LLAMA_8B, ["--dtype", "fp8_e5m2"], 64 << 10, 64 << 10),
        (LLAMA_8B, ["--tp", "4"], 32 << 10, 128 << 10),
        (LLAMA_8B, ["--tp", "16"], 16 << 10, 128 << 10),  # two ranks hold each head: one copy
        (LLAMA_8B, ["--kv-heads", "32"], 512 << 10, 512 << 10),
        (QWEN_32B, [], 256 << 10, 256 << 10),
        (LLAMA_7B, [], 512 << 10, 512 << 10),
        (DEEPSEEK_V3, [], 61 * 576 * 2, 61 * 576 * 2),
        (DEEPSEEK_V3, ["--tp", "8"], 61 * 576 * 2, 61 * 576 * 2),  # one copy for all ranks
        (FALCON_7B, [], 32 * 2 * 64 * 2, 32 * 2 * 64 * 2),
        (GPT2, [], 12 * 2 * 768 * 2, 12 * 2 * 768 * 2),
        (MULTIMODAL, [], 128 << 10, 128 << 10),
    ],
)
def test_plan_token_has_the_known_size(
    config: dict[str, Any],
    arguments: list[str],
    rank: int,
    node: int,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    found = planned(capsys, tmp_path, config, *arguments)
    assert (found["rank_token_nbytes"], found["token_nbytes"]) == (rank, node)
    assert found["block_nbytes"] == 16 * node


def test_plan_options_without_a_config_are_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--layers", "32", "--kv-heads", "8", "--head-dim", "128"]
    assert cli.main(["plan", *shape, *POD, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["token_nbytes"] == 128 << 10
    assert cli.main(["plan", "--layers", "61", "--latent-dim", "576", *POD, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["token_nbytes"] == 61 * 576 * 2


def test_plan_capacities_are_those_of_real_tiers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One layer and blocks of two pages, so that the test can allocate both tiers."""
    shape = ["--layers", "1", "--kv-heads", "1", "--head-dim", "128", "--block-tokens", "16"]
    room = ["--pod-memory", "3MiB", "--engine-memory", "1MiB", "--bandwidth", "1GiB"]
    assert (
        cli.main(["plan", *shape, *room, "--disk", "1MiB", "--prefix-tokens", "40", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    block = found["block_nbytes"]
    assert block == 2 * PAGE
    l1 = DramTier(block_nbytes=block, capacity=Size(found["l1_nbytes"]))
    l1.slab.wait_populated()
    assert l1.stats().capacity_blocks == found["l1_blocks"]
    l1.close()
    assert (
        found["l1_blocks"] * (2 * PAGE + 512)
        < 2 << 20
        < (found["l1_blocks"] + 2) * (2 * PAGE + 700)
    )
    assert found["l1_prefixes"] == found["l1_blocks"] // 2  # full blocks have 32 of 40 tokens
    assert found["l1_tokens"] == 16 * found["l1_blocks"]
    path = tmp_path / "disk"
    DiskTier(
        block_nbytes=frame_nbytes(block), path=str(path), capacity=found["disk_nbytes"]
    ).close()
    with closing(DiskReader(path)) as reader:
        slots = reader.geometry.slots
    assert slots <= found["disk_blocks"] <= slots + 1


def test_plan_l1_is_for_the_node_and_aibrix_for_a_rank(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = planned(capsys, tmp_path, LLAMA_8B, "--tp", "4")
    assert found["aibrix_rank_nbytes"] == 10 << 30
    assert found["aibrix_node_nbytes"] == 40 << 30
    assert 0.98 * (100 << 30) < found["l1_nbytes"] < 100 << 30


def test_plan_compares_loading_with_computing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = planned(
        capsys, tmp_path, LLAMA_8B,
        "--prefix-tokens", "8192", "--disk-bandwidth", "2GiB", "--prefill-tokens-per-s", "4096",
    )  # fmt: skip
    assert found["l1_load_s"] == 1 / 16
    assert found["disk_load_s"] == 1 / 2
    assert found["compute_s"] == 2
    assert found["break_even_nbytes_per_s"] == 512 << 20


def test_plan_without_bandwidth_measures_a_copy(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--layers", "32", "--kv-heads", "8", "--head-dim", "128"]
    assert cli.main(["plan", *shape, *POD[:-2], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bandwidth_source"].startswith("a copy of memory")
    assert found["l1_load_s"] * found["bandwidth_nbytes_per_s"] == pytest.approx(512 << 20)


def test_plan_without_pod_memory_uses_the_container_limit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "limit", lambda: host_memory.HostMemory(8 << 30, "a test"))
    shape = ["--layers", "32", "--kv-heads", "8", "--head-dim", "128", "--bandwidth", "1GiB"]
    assert cli.main(["plan", *shape, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pod_nbytes"], found["pod_source"]) == (8 << 30, "a test")
    assert (found["engine_nbytes"], found["engine_source"]) == (4 << 30, "assumed")


@pytest.mark.parametrize(
    ("more", "warning"),
    [
        ({"layer_types": ["full_attention"] * 2, "sliding_window": 128}, None),
        ({"torch_dtype": "float32"}, "has dtype float32; bfloat16 is assumed"),
        ({"torch_dtype": None}, "has no dtype"),
    ],
)
def test_plan_dtype_that_vllm_changes_is_a_warning(
    more: dict[str, Any], warning: str | None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    warnings = planned(capsys, tmp_path, LLAMA_8B | more)["warnings"]
    assert [warning in each for each in warnings if warning] == ([True] if warning else [])
    assert bool(warnings) == bool(warning)


def test_plan_of_several_groups_counts_what_a_prefix_needs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["plan", "gemma-3-27b", *POD, "--prefix-tokens", "32768", "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    full, window = 1_310_720, 6_815_744
    assert [(g["kind"], g["block_nbytes"], g["parts"]) for g in found["groups"]] == [
        ("all", full, 1),
        ("window", window, 5),
    ]
    assert found["resume_blocks"] == [2048, 64]
    assert found["resume_nbytes"] == 2048 * full + 64 * window
    assert found["stored_blocks"] == [2048, 2048]
    assert found["stored_nbytes"] == 2048 * (full + window)
    assert found["l1_prefixes"] == found["l1_blocks"] // (2048 + 5 * 64)
    assert found["l1_stored_prefixes"] == found["l1_blocks"] // (2048 + 5 * 2048)
    assert found["l1_load_s"] == found["resume_nbytes"] / (16 << 30)
    assert found["token_nbytes"] == (full + window) // 16


def test_plan_of_states_counts_one_for_a_prefix_and_one_for_each_chunk(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["plan", "qwen3.5-9b", *POD, "--prefix-tokens", "16384", "--tp", "2"]
    assert cli.main([*arguments, "--max-num-batched-tokens", "2048", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["resume_blocks"] == [31, 1]  # 31 blocks of 528 tokens
    assert found["stored_blocks"] == [31, 11]  # chunks of 3 blocks, and the end
    assert found["rank_token_nbytes"] * 2 == found["token_nbytes"] == 32 << 10
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    for part in (
        "8 layers, 4 KV heads of 256; 24 layers with a state",
        "16.5MiB: a block of 528 tokens, 8 layers, in 1 slot of L1; a hit needs all blocks",
        "49.12MiB: a state, 24 layers, in 3 slots of L1; a hit needs the last one",
        "to resume after 16,384 tokens",
        "states at the ends of prefill chunks of 8,192 tokens",
    ):
        assert part in out


def test_plan_of_chunks_counts_the_blocks_that_a_request_can_need(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["plan", "llama-4-scout", *POD, "--prefix-tokens", "20000", "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["resume_blocks"] == [1250, 226]  # 20,000 - 2 * 8,192 tokens
    assert found["stored_blocks"] == [1250, 1248]  # less the last one of two chunks


def test_plan_of_unknown_layers_ends_with_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"sliding_window": 4096}))
    assert cli.main(["plan", str(tmp_path), *POD]) == 2
    assert "has a sliding window of 4096 tokens, and plan does not" in capsys.readouterr().err


def test_plan_text_has_the_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    assert (
        cli.main(["plan", str(tmp_path), *POD, "--tp", "2", "--prefill-tokens-per-s", "1e4"]) == 0
    )
    out = capsys.readouterr().out
    for part in (
        "32 layers, 8 KV heads of 128, bfloat16",
        "128KiB (64KiB in each of 2 ranks)",
        "2MiB: 16 tokens",
        "KVCACHE__L1__CAPACITY=99.",
        "120GiB / 2 - 20GiB = 40GiB for each rank, 80GiB on the node",
        "a tier is faster above 1.22 GiB/s",
    ):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "num_hidden_layers (--layers), num_key_value_heads (--kv-heads), head_dim"),
        (["--layers", "0"], "--layers is 0"),
        (["--layers", "2", "--kv-heads", "8", "--head-dim", "64", "--tp", "3"], "3 ranks cannot"),
        (["no-such-folder"], "cannot read no-such-folder"),
        (["openai/gpt-oss-20b"], "No such file or directory; known models: gemma-2-9b"),
        (["--layers", "2", "--latent-dim", "9", "--pod-memory", "lots"], "--pod-memory is 'lots'"),
        (
            ["--layers", "2", "--latent-dim", "9", "--engine-memory", "100%"],
            "no room for one block",
        ),
        (
            ["--layers", "2", "--latent-dim", "9", "--prefill-tokens-per-s", "0"],
            "--prefill-tokens-per-s is 0.0",
        ),
    ],
)
def test_plan_invalid_argument_ends_with_code_2(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *arguments]) == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a model's configuration"),
        ('{"num_hidden_layers": [1, 2]}', "num_hidden_layers is [1, 2], not one whole number"),
    ],
)
def test_plan_file_that_is_not_a_model_ends_with_code_2(
    text: str, error: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    assert cli.main(["plan", str(file)]) == 2
    err = capsys.readouterr().err
    assert error in err
    assert str(file) in err


def test_plan_prints_the_example_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs/operations.md").read_text(encoding="utf-8")
    _, after = page.split("```bash\nkvcache plan ", 1)
    command, rest = after.split("```", 1)
    _, shown = rest.split("```text\n", 1)
    assert cli.main(["plan", *command.replace("\\\n", " ").split()]) == 0
    assert capsys.readouterr().out == shown.split("```", 1)[0]
