"""The command line: what `kvcache COMMAND` does, a module for each command.

This is the roof of the house: a command may use every room, but imports it inside its `run`, so
that `kvcache --help` needs neither an engine nor torch nor numpy.

A command is a module here with two functions: `add_arguments(parser)` and `run(args) -> int`.

Always true: a command ends with its output, or with one error. `main` turns into one line
whatever a command did not expect, and nothing here prints a traceback.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn, TextIO

from kvcache import __version__
from kvcache.secrets import redact

COMMANDS = {
    "demo": "play chats against a real vLLM, with kvcache and without it, and compare",
    "bench": "measure memory copies, stores, loads and look-ups on this machine",
    "replay": "replay a trace of requests: what L1 would find, by policy and capacity",
    "profile": "list, show and check profiles, and print their JSON schema",
    "doctor": "what is in the way on this machine, and what to do about it",
    "inspect": "what a disk or Redis tier holds, by namespace, and whether it is whole",
    "plan": "from a model and a pod's memory: what fits, what to give L1, load against compute",
    "top": "what the tiers of a running engine do: room, hits, bandwidth, pins, queues",
}


EXTRAS = {
    "matplotlib": "plot",
    "numba": "torch",
    "numpy": "torch",
    "opentelemetry": "otel",
    "redis": "redis",
    "safetensors": "vllm",
    "torch": "torch",
    "transformers": "vllm",
    "vllm": "vllm",
    "zstandard": "zstd",
}
"""The extra that installs a module, for a command that cannot do without it."""


class _Parser(argparse.ArgumentParser):
    """Repeats no secret when it says which argument is wrong."""

    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; the chosen command's function is `args.run`."""
    top = _Parser(
        prog="kvcache", description="Keep the KV cache of an LLM engine outside the engine."
    )
    top.add_argument("--version", action="version", version=f"kvcache {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        module = import_module(f"kvcache.cli.{name}")
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (default: the process's own) and return its exit code.

    Arguments that do not parse end the process with code 2, as argparse does. Ctrl-C makes 130,
    and a closed pipe, as behind `| head`, 141: the codes that a shell gives a program which the
    signal ended. Whatever else goes wrong is one line on the standard error, and code 1 or 2.
    """
    name = " ".join(["kvcache", *(argv if argv is not None else sys.argv[1:])[:1]])
    name = name if name.removeprefix("kvcache ") in COMMANDS else "kvcache"
    with _streams():
        try:
            return _run(argv)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError as error:  # of the output, or of a connection
            if any(_is_closed(stream) for stream in (sys.stdout, sys.stderr)):
                return 141
            said, code = _said(error)
        except Exception as error:
            if sys.flags.dev_mode:
                raise
            said, code = _said(error)
        with suppress(OSError):
            print(f"{name}: {said}", file=sys.stderr)
        return code


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = parser().parse_args(argv)
        return int(args.run(args))
    finally:  # also behind --help, which ends with SystemExit
        sys.stdout.flush()


def _said(error: Exception) -> tuple[str, int]:
    """What is said of an exception that a command did not expect, and the exit code."""
    what = redact(str(error))
    match error:
        case ImportError(name=str(module)) if extra := EXTRAS.get(module.partition(".")[0]):
            return f"{module} is not installed: pip install 'kvcache[{extra}]'", 2
        case RecursionError():
            return "what it read is nested too deeply", 2
        case MemoryError():
            return f"not enough memory ({what or 'no more said'})", 1
        case OSError():
            return what, 1
    return f"unexpected {type(error).__name__} ({what}): python -X dev -m kvcache shows where", 1


@contextmanager
def _streams() -> Iterator[None]:
    """Standard output and error that can be printed to, and that end without a word."""
    with ExitStack() as opened:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:  # was closed when the process started
                null = opened.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                setattr(sys, name, null)
                opened.callback(setattr, sys, name, None)
            elif isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                _settle(stream)


def _is_closed(stream: TextIO) -> bool:
    """Whether the reader of this stream has gone."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except OSError:  # no file behind it
        return False


def _settle(stream: TextIO) -> None:
    """Where what was printed cannot be written, drop it: the interpreter would try, and say so."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
            stream.flush()
