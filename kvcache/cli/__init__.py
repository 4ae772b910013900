"""The command line: what `kvcache COMMAND` does, a module for each command.

This is the roof of the house: a command may use every room, but imports it inside its `run`, so
that `kvcache --help` needs neither an engine nor torch nor numpy.

A command is a module here with two functions: `add_arguments(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

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


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; the chosen command's function is `args.run`."""
    top = argparse.ArgumentParser(
        prog="kvcache", description="Keep the KV cache of an LLM engine outside the engine."
    )
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

    Arguments that do not parse end the process with code 2, as argparse does; Ctrl-C makes 130.
    """
    args = parser().parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        return 130
