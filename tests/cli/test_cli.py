"""The command line: arguments, exit codes, and which modules `--help` imports."""

import importlib.util
import subprocess
import sys

import pytest

from kvcache import cli, host_memory
from kvcache.cli import demo
from kvcache.cli.demo import engine
from kvcache.cli.demo.chats import Chats


def test_help_imports_no_heavy_module() -> None:
    code = (
        "import sys\n"
        "from kvcache.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print('imported', *sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    help_text, imported = done.stdout.split("imported")
    assert "demo" in help_text
    assert "bench" in help_text
    assert not set(imported.split()) & {"numba", "numpy", "packaging", "torch", "vllm"}


def test_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvcache", "demo", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "usage: kvcache demo" in done.stdout


def test_demo_arguments_are_parsed() -> None:
    args = cli.parser().parse_args(["demo", "--users", "3", "--model", "m", "--json"])
    assert args.run is demo.run
    assert (args.users, args.model, args.json) == (3, "m", True)
    assert args.system_tokens + args.document_tokens > 2000  # long enough to compare times


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        ([], "COMMAND"),
        (["dmeo"], "dmeo"),
        (["demo", "--users", "1"], "'1'; a whole number, at least 2"),
        (["demo", "--turns", "many"], "'many'; a whole number, at least 2"),
        (["demo", "--document-tokens", "-5"], "--document-tokens"),
    ],
)
def test_invalid_arguments_end_with_code_2(
    argv: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        cli.main(argv)
    assert ending.value.code == 2
    assert error in capsys.readouterr().err


def test_demo_without_vllm_ends_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == 2
    assert "needs vLLM" in capsys.readouterr().err


def test_demo_larger_than_a_quarter_of_memory_ends_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    played = []

    def play(setup: engine.EngineSetup, chats: Chats) -> engine.EngineRun:
        played.append(setup)
        return engine.EngineRun([], block_nbytes=1 << 20, l1=engine.L1Usage())

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(engine, "play", play)
    monkeypatch.setattr(host_memory, "limit", lambda: host_memory.HostMemory(1 << 30, "a test"))
    assert cli.main(["demo", "--model", "m"]) == 2
    assert len(played) == 1
    assert "quarter of the memory, 256MiB" in capsys.readouterr().err


def test_demo_with_a_failed_engine_ends_with_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def play(*_: object) -> engine.EngineRun:
        raise engine.EngineError("the engine failed: cause")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(engine, "play", play)
    assert cli.main(["demo", "--model", "m"]) == 1
    assert "demo: the engine failed: cause" in capsys.readouterr().err


def test_ctrl_c_ends_with_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo"]) == 130
