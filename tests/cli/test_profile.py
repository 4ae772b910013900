"""`kvcache profile`: its actions, secrets that it hides, and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvcache import cli
from kvcache.profiles import load_profile, shipped
from tests.support.packages import each_shipped_profile
from tests.support.profile_files import FRONT, GOOD

GUARDED = "tests.profiles.test_secrets:Guarded"
DISK = 'extends = "l1-disk"\n\n[[tier]]\nname = "disk"\npath = "/fast"\n'

Capture = pytest.CaptureFixture[str]


def printed(capsys: Capture, *argv: str, code: int = 0) -> str:
    assert cli.main(["profile", *argv]) == code
    return capsys.readouterr().out


def printed_json(capsys: Capture, *argv: str, code: int = 0) -> Any:
    return json.loads(printed(capsys, *argv, "--json", code=code))


# list


def test_list_prints_name_tiers_and_summary(capsys: Capture) -> None:
    lines = printed(capsys, "list").splitlines()
    assert [line.split()[0] for line in lines] == shipped()
    (disk,) = [line for line in lines if line.startswith("l1-disk ")]
    name, tiers, summary = (part for part in disk.split("  ") if part)
    assert (name, tiers.strip()) == ("l1-disk", "l1, disk")
    assert summary.strip() == "DRAM first, and a directory on a local disk below it"


def test_list_json_has_name_tiers_summary_and_path(capsys: Capture) -> None:
    found = {one["name"]: one for one in printed_json(capsys, "list")}
    assert list(found) == shipped()
    tiers = [{"name": "l1", "kind": "dram"}, {"name": "disk", "kind": "disk"}]
    assert found["l1-disk"]["tiers"] == tiers
    assert Path(found["l1-disk"]["path"]).is_file()


def test_list_every_shipped_profile_has_a_summary(capsys: Capture) -> None:
    for one in printed_json(capsys, "list"):
        assert 20 < len(one["summary"]) < 120


# show


def test_show_prints_a_loadable_profile_with_the_source_of_each_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    ours = tmp_path / "ours.toml"
    ours.write_text(DISK)
    monkeypatch.setenv("KVCACHE_PROFILE", str(ours))
    monkeypatch.setenv("KVCACHE__L1__EVICTION", "fifo")
    text = printed(capsys, "show")
    base = load_profile("l1-disk", {}).path
    head, *rest = text.splitlines()
    assert head == f"# ours: {ours} extends {base}"
    places = dict(line.split("  # ") for line in rest if "  # " in line)
    values = {line.split(" = ")[0]: (line, place) for line, place in places.items()}
    assert values["path"] == ('path = "/fast"'.ljust(len(values["path"][0])), "ours.toml, line 5")
    assert values["codec"][1].startswith("l1-disk.toml, line ")
    assert values["queue"][0].startswith('queue = "256MiB"')
    assert values["queue"][1] == "default"
    eviction = next(line for line in rest if line.startswith('eviction = "fifo"'))
    assert eviction.endswith("  # environment variable KVCACHE__L1__EVICTION")
    (capacity,) = [line for line in rest if line.startswith('capacity = "50%"')]
    assert "GiB; l1-disk.toml, line " in capacity

    shown = tmp_path / "shown.toml"
    shown.write_text(text)
    monkeypatch.undo()
    again = load_profile(str(shown), {})
    assert again.tiers[0].options["eviction"] == "fifo"
    assert again.tiers[1].options["path"] == "/fast"


@each_shipped_profile
def test_show_shipped_profile_prints_it(name: str, capsys: Capture) -> None:
    assert printed(capsys, "show", name).startswith(f"# {name}: ")


def test_show_json_has_values_and_sources(tmp_path: Path, capsys: Capture) -> None:
    ours = tmp_path / "ours.toml"
    ours.write_text(DISK)
    facts = printed_json(capsys, "show", str(ours))
    assert facts["name"] == "ours"
    assert facts["path"] == str(ours)
    assert [Path(path).name for path in facts["extends"]] == ["l1-disk.toml"]
    disk = facts["tiers"][1]
    assert (disk["name"], disk["kind"]) == ("disk", "disk")
    assert disk["options"]["path"] == {
        "given": "/fast", "value": "/fast", "from": f"{ours}, line 5",
    }  # fmt: skip
    assert disk["options"]["queue"] == {"given": "256MiB", "value": 256 << 20, "from": "default"}
    assert facts["aibrix"] is None


def test_show_prints_the_effect_of_aibrix_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("AIBRIX_KV_CACHE_OL_L1_CACHE_CAPACITY_GB", "2")
    monkeypatch.setenv("AIBRIX_KV_CACHE_OL_CHUNK_SIZE", "512")
    lines = printed(capsys, "show", "--ranks", "2").splitlines()
    assert lines[1].startswith("# AIBrix's variables: taken: AIBRIX_KV_CACHE_OL_L1_CACHE_CAPA")
    assert "no effect: AIBRIX_KV_CACHE_OL_CHUNK_SIZE (" in lines[1]
    assert any(
        line.startswith('capacity = "4GiB"     # environment variable AIBRIX') for line in lines
    )
    facts = printed_json(capsys, "show")
    assert facts["tiers"][0]["options"]["capacity"]["value"] == 2 << 30
    assert set(facts["aibrix"]) == {"taken", "overruled", "no_effect"}


def test_show_warns_of_unread_variables(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("KVCACHE_L1_CAPACITY", "1GiB")
    warning = (
        "environment variable KVCACHE_L1_CAPACITY: no such variable, so it has no effect; did you "
        "mean KVCACHE__L1__CAPACITY?"
    )
    assert f"# warning: {warning}" in printed(capsys, "show", "l1-only").splitlines()
    assert printed_json(capsys, "show", "l1-only")["unknown"] == [warning]


def test_show_prints_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("KV_PASSWORD", "hunter2")
    ours = tmp_path / "ours.toml"
    lines = ('password_env = "KV_PASSWORD"', 'password_env = "hunter2"', 'bypass = "hunter2"',
             'tokenizer = "hunter2"', 'home = "https://hunter2@host/"')  # fmt: skip
    for line in lines:
        ours.write_text(f'[[tier]]\nname = "l1"\nkind = "{GUARDED}"\n{line}\n')
        text, facts = printed(capsys, "show", str(ours)), printed_json(capsys, "show", str(ours))
        assert "hunter2" not in text + json.dumps(facts)
        assert ("KV_PASSWORD" in text) == ("KV_PASSWORD" in line)
        assert "use_auth = false" in text


def test_show_of_two_files_with_one_name_prints_their_folders(
    tmp_path: Path, capsys: Capture
) -> None:
    ours = tmp_path / "l1-disk.toml"
    ours.write_text(DISK)
    assert f"# {ours}, line 5" in printed(capsys, "show", str(ours))


def test_show_invalid_profile_prints_its_problems(capsys: Capture) -> None:
    assert cli.main(["profile", "show", "l1-onyl"]) == 1
    shown = capsys.readouterr()
    assert not shown.out
    assert 'did you mean "l1-only"?' in shown.err
    facts = printed_json(capsys, "show", "l1-onyl", code=1)
    assert facts["name"] == "l1-onyl"
    assert len(facts["problems"]) == 1


# check


def test_check_lists_every_problem_of_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("KVCACHE__NO_SUCH__TIER", "check ignores the environment")
    monkeypatch.setenv(
        "AIBRIX_KV_CACHE_OL_L1_CACHE_CAPACITY_GB", "check ignores AIBrix's variables"
    )
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(GOOD)
    bad.write_text(GOOD + "rome = 1\ncount = true\n")
    assert printed(capsys, "check", str(good)) == f"{good}: valid\n"
    assert printed_json(capsys, "check", str(good), "l1-only") == [
        {"file": str(good), "problems": []}, {"file": "l1-only", "problems": []},
    ]  # fmt: skip
    text = printed(capsys, "check", str(bad), str(good), code=1)
    assert f"{bad}, line 5: rome = 1: no such option" in text
    assert f"{bad}, line 6: count = true: takes a whole number" in text
    assert f"{good}: valid" in text
    wrong, right = printed_json(capsys, "check", str(bad), str(good), code=1)
    assert len(wrong["problems"]) == 2
    assert right["problems"] == []


def test_check_missing_file_is_a_problem(tmp_path: Path, capsys: Capture) -> None:
    assert "cannot read" in printed(capsys, "check", str(tmp_path / "no.toml"), code=1)


# Arguments


@pytest.mark.parametrize(
    ("argv", "error"),
    [([], "ACTION"), (["lsit"], "lsit"), (["check"], "FILE"), (["show", "a", "b"], "b")],
)
def test_invalid_arguments_end_with_code_2(argv: list[str], error: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ending:
        cli.main(["profile", *argv])
    assert ending.value.code == 2
    assert error in capsys.readouterr().err


def test_show_zero_ranks_end_with_code_2(capsys: Capture) -> None:
    assert cli.main(["profile", "show", "--ranks", "0"]) == 2
    assert "it must be 1 to 65536" in capsys.readouterr().err


def test_actions_import_no_heavy_module() -> None:
    code = (
        "import sys\n"
        "from kvcache.cli import main\n"
        "for action in (['list'], ['show', 'l1-disk'], ['check', 'l1-disk'], ['schema']):\n"
        "    assert main(['profile', *action]) == 0\n"
        "print('imported', *sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = done.stdout.split("imported")[-1].split()
    assert "kvcache.profiles.schema" in imported
    assert not set(imported) & {"jsonschema", "numba", "numpy", "torch", "vllm"}
    assert FRONT not in imported
