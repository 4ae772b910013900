"""How commands end: a closed pipe, a full disk, Ctrl-C, a missing package, an unexpected error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvcache import cli
from kvcache.cli import demo
from tests.support import hostile_inputs

MODULE = [sys.executable, "-m", "kvcache"]
REPLAY = ["replay", "--generate", "rag", "--requests", "50", "--policy", "lru"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argv", [["plan", "--help"], ["profile", "schema"], REPLAY], ids=" ".join)
def test_command_with_a_closed_pipe_prints_no_error(argv: list[str], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*MODULE, *argv], stdout=writer, stderr=subprocess.PIPE, check=False,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    finally:
        os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 141 or "--help" in argv  # argparse ignores the closed pipe


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_command_with_an_unwritable_output_prints_one_error_line(unbuffered: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*MODULE, "profile", "list"], stdout=full, stderr=subprocess.PIPE, check=False,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == b"kvcache profile: [Errno 28] No space left on device\n"


def test_command_without_standard_streams_succeeds() -> None:
    code = f"exec {sys.executable} -m kvcache profile list <&- >&- 2>&-"
    assert subprocess.run(["/bin/sh", "-c", code], check=False).returncode == 0


def test_command_escapes_characters_that_its_output_cannot_encode() -> None:
    done = subprocess.run(
        [*MODULE, *REPLAY], capture_output=True, check=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert b"\\xb5s/block" in done.stdout


def test_interrupted_command_ends_with_code_130_and_prints_nothing() -> None:
    reached = threading.Event()

    def silent(peer: object, ended: threading.Event) -> None:
        reached.set()
        ended.wait()

    with hostile_inputs.server(silent) as port:
        command = [*MODULE, "inspect", f"redis://127.0.0.1:{port}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert reached.wait(60)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")


@pytest.mark.parametrize(
    ("module", "argv", "extra"),
    [
        ("numpy", ["bench", "--rounds", "1", "--blocks", "1"], "torch"),
        ("torch", ["demo"], "torch"),
        ("safetensors.torch", ["demo"], "vllm"),
    ],
)
def test_command_with_a_missing_package_names_the_extra(
    module: str, argv: list[str], extra: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if argv == ["demo"]:
        pytest.importorskip("torch")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err == f"kvcache {argv[0]}: {module} is not installed: pip install 'kvcache[{extra}]'\n"


def test_command_that_copies_without_numba_names_the_extra() -> None:
    pytest.importorskip("numpy")
    code = (
        "import sys\nsys.modules['numba'] = None\nfrom kvcache import cli\n"
        "sys.exit(cli.main(['bench', '--rounds', '1', '--blocks', '1']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "kvcache bench: numba is not installed: pip install 'kvcache[torch]'\n"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RecursionError("x"), 2, "the input is nested too deeply"),
        (MemoryError(), 1, "not enough memory"),
        (PermissionError(13, "Permission denied", "/x"), 1, "Permission denied"),
        (BrokenPipeError(32, "Broken pipe"), 1, "Broken pipe"),  # a closed connection
        (KeyError("x"), 1, "unexpected KeyError"),
        (ImportError("no module", name="ours"), 1, "unexpected ImportError"),
        (ValueError("redis://me:hunter2@host\x1b[31m"), 1, "redis://***@host\\x1b[31m"),
    ],
)
def test_unexpected_exception_is_one_error_line(
    error: Exception, code: int, text: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def run(args: object) -> int:
        raise error

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kvcache demo: ")
    assert text in line
    assert "hunter2" not in line


def test_development_mode_prints_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from kvcache import cli\nfrom kvcache.cli import demo\n"
        "def run(args): raise KeyError('x')\ndemo.run = run\ncli.main(['demo'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "line 3" in done.stderr
