"""The command line: a module or package for each `kvcache COMMAND`.

A command has two functions, `add_arguments(parser)` and `run(args) -> int`. It may use every
package of kvcache, but imports it inside functions, so that `kvcache --help` needs neither an
engine nor torch nor numpy.

Invariants: a command ends with its output or with one error line. `main` turns an unexpected
exception into one line, and nothing here prints a traceback.
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
    "demo": "play chats on a real vLLM, with kvcache and without it, and compare",
    "bench": "measure memory copies, stores, loads and lookups on this machine",
    "replay": "replay a trace of requests: hits of L1 by policy and capacity",
    "profile": "list, show and check profiles, and print their JSON schema",
    "selftest": "store, wipe and load pages in every layout, and compare attention over them",
    "doctor": "check this machine for a profile: print each problem with its fix",
    "inspect": "print what a disk, Redis or object tier holds, by namespace, and verify it",
    "plan": "from a model and a pod's memory: what fits, L1's capacity, load against compute",
    "top": "show what the tiers of a running engine do: usage, hits, bandwidth, pins, queues",
}

EXTRAS = {
    "mooncake": "mooncake",
    "numba": "torch",
    "numpy": "torch",
    "obstore": "object",
    "opentelemetry": "otel",
    "redis": "redis",
    "safetensors": "vllm",
    "torch": "torch",
    "transformers": "vllm",
    "vllm": "vllm",
    "zstandard": "zstd",
}
"""The extra that installs a module which a command needs."""


class _Parser(argparse.ArgumentParser):
    """Keeps secrets out of the message about an invalid argument."""

    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; `args.run` is the function of the chosen command."""
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
    """Run the command in `argv` (default: the arguments of the process); return its exit code.

    Invalid arguments end the process with code 2, as in argparse. Ctrl-C returns 130, and a closed
    pipe (`| head`) 141: a shell reports the same codes for programs that these signals end. Any
    other exception is one line on the standard error, and code 1 or 2.
    """
    name = " ".join(["kvcache", *(argv if argv is not None else sys.argv[1:])[:1]])
    name = name if name.removeprefix("kvcache ") in COMMANDS else "kvcache"
    with _usable_streams():
        try:
            return _run(argv)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError as error:  # a closed output, or a closed connection
            if any(_is_closed(stream) for stream in (sys.stdout, sys.stderr)):
                return 141
            text, code = _describe(error)
        except Exception as error:
            if sys.flags.dev_mode:
                raise
            text, code = _describe(error)
        with suppress(OSError):
            print(f"{name}: {text}", file=sys.stderr)
        return code


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = parser().parse_args(argv)
        return int(args.run(args))
    finally:  # --help raises SystemExit
        sys.stdout.flush()


def _describe(error: Exception) -> tuple[str, int]:
    """Return the line for an unexpected exception, and the exit code."""
    text = redact(str(error))
    match error:
        case ImportError(name=str(module)) if extra := EXTRAS.get(module.partition(".")[0]):
            return f"{module} is not installed: pip install 'kvcache[{extra}]'", 2
        case RecursionError():
            return "the input is nested too deeply", 2
        case MemoryError():
            return f"not enough memory ({text or 'no details'})", 1
        case OSError():
            return text, 1
    return f"unexpected {type(error).__name__} ({text}): python -X dev -m kvcache shows where", 1


@contextmanager
def _usable_streams() -> Iterator[None]:
    """Make the standard output and error printable, and close them without an error."""
    with ExitStack() as opened:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:  # closed when the process started
                null = opened.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                setattr(sys, name, null)
                opened.callback(setattr, sys, name, None)
            elif isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                _flush_or_drop(stream)


def _is_closed(stream: TextIO) -> bool:
    """Return whether the reader of this stream closed it."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except OSError:  # the stream is not a file
        return False


def _flush_or_drop(stream: TextIO) -> None:
    """Write the stream's buffer, or drop it; the interpreter would print an error for it."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
            stream.flush()
