"""`kvcache replay --model`: its output, and the arguments that it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvcache import cli
from kvcache.models import PRESETS

GENERATED = ["replay", "--generate", "chat", "--requests", "200"]


def test_replay_of_a_model_prints_hits_lost_tokens_and_bytes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [*GENERATED, "--model", "gemma-3-27b", "--policy", "lru,gittins", "--json"]
    assert cli.main([*argv, "--capacity", "20GiB,40GiB"]) == 0
    rows: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["policy"] for row in rows] == ["lru", "gittins"] * 2
    for row in rows:
        assert row["model"] == "gemma-3-27b"
        assert 0 < row["token_hit_ratio"] < 1
        assert 0 <= row["lost_token_ratio"] < 1
        assert list(row["held_bytes"]) == ["full", "window 1024"]
        assert 0 < sum(row["held_bytes"].values()) <= row["capacity_bytes"] <= 40 << 30
        assert row["read_bytes"] > 0 < row["written_bytes"]


def test_replay_of_a_model_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GENERATED, "--model", "qwen3.5-27b", "--policy", "gittins"]) == 0
    head, groups, *table = capsys.readouterr().out.splitlines()
    assert head.startswith("chat: 200 requests, ")
    assert "full: 16 layers" in groups
    assert "state: 48 layers" in groups
    assert any("gittins" in line for line in table)


def test_replay_of_a_configuration_reads_its_groups(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["gpt-oss-20b"]))
    assert cli.main([*GENERATED, "--model", str(tmp_path), "--policy", "lru"]) == 0
    assert "window 128: 12 layers" in capsys.readouterr().out


def test_replay_of_an_unknown_model_lists_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ending:
        cli.main([*GENERATED, "--model", "gemma-99"])
    assert ending.value.code == 2
    printed = capsys.readouterr().err
    assert "cannot read gemma-99" in printed
    assert "gpt-oss-20b" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tiers", "1GiB,2GiB"], "--tiers does not go together with --model"),
        (["--plot", "a.svg"], "--plot does not go together with --model"),
        (["--partial"], "--partial does not go together with --model"),
        (["--bytes-per-token", "1KiB"], "--bytes-per-token does not go together with --model"),
        (["--bytes-per-block", "1KiB"], "--bytes-per-block does not go together with --model"),
        (["--capacity", "1000"], "--capacity 1000 is a number of blocks"),
        (["--capacity", "1KiB"], "a capacity of 1KiB is less than one slot"),
    ],
)
def test_options_that_do_not_fit_a_model_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*GENERATED, "--model", "gemma-3-4b", *options]) == 2
    assert message in capsys.readouterr().err
