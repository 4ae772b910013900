"""Replay a trace of requests through L1 as the live stack runs it, and say what it would find.

TRACE is a file of Mooncake's format (one JSON object a line; gzip too), "-" for the standard input.
KVCACHE_RECORD=FILE makes a live engine write one. The index and the policies are those of the live
stack; the optimum is Belady's, which knows what comes. Only full blocks are kept and counted, as in
vLLM.

Exit code: 0 when done, 1 when a policy failed or a file could not be written, 2 for arguments that
cannot work and for a trace that is not one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvcache.cli.amounts import Amount, BlockSize, amounts, at_least, bytes_each
from kvcache.cli.progress import Bar
from kvcache.cli.table import painter
from kvcache.eviction import POLICIES
from kvcache.inputs import open_input
from kvcache.replay.trace import LINES, UNITS, USUAL_REQUESTS_PER_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvcache.replay.belady import Optimum
    from kvcache.replay.simulate import Outcome
    from kvcache.replay.trace import Trace

    Results = Sequence[Outcome | Optimum]

PLOTS = (".svg", ".html", ".png")
WORTH_A_PROCESS = 300_000  # blocks asked for, in all; less is done sooner than one has started
TRAFFIC = ("chat", "agent", "rag", "shift", "cyclic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvcache replay`."""
    add = parser.add_argument
    add("trace", nargs="?", metavar="TRACE", help='a file, or "-" for the standard input')
    add("--generate", choices=TRAFFIC, help="make traffic up instead")
    add("--requests", type=at_least(1), metavar="N", help="of made-up traffic (10000)")
    add("--seed", type=at_least(0), metavar="N", help="of made-up traffic and of hints (0)")
    add(
        "--policy", type=_policies, default=list(POLICIES), metavar="NAMES",
        help=f'of {", ".join(POLICIES)}, "pkg.mod:Class", with commas between, or "all" (all)',
    )  # fmt: skip
    add(
        "--capacity", type=amounts, metavar="LIST",
        help='of L1, in blocks ("10000") or bytes ("64GiB"), several with commas between '
        "(a tenth of the trace's distinct blocks)",
    )  # fmt: skip
    add("--tiers", type=amounts, metavar="LIST", help="capacities of L1 and of each tier below it")
    add("--bytes-per-token", type=bytes_each, metavar="SIZE", help="of KV cache, of all layers")
    add("--bytes-per-block", type=bytes_each, metavar="SIZE", help="the same for a block")
    add(
        "--block-tokens", type=at_least(1), metavar="N",
        help="tokens of a block (what the trace says, or 512)",
    )  # fmt: skip
    add(
        "--time-unit", choices=UNITS, default="ms",
        help="of the trace's timestamps (ms, as in Mooncake's format)",
    )  # fmt: skip
    add("--partial", action="store_true", help="keep and count last blocks that are not full, too")
    add(
        "--hints", type=_share, default=0.0, metavar="SHARE",
        help="have so many of the sessions that end say so, 0 to 1 (0)",
    )  # fmt: skip
    add("--processes", type=at_least(1), metavar="N", help="to use at most (all processors)")
    add("--json", action="store_true", help="print a JSON object a line for each policy, capacity")
    add(
        "--plot", type=Path, metavar="FILE",
        help="draw hits against DRAM around the capacity: .svg, .html or .png",
    )  # fmt: skip


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}; a share, from 0 to 1")
    return share


def _policies(text: str) -> list[str]:
    from kvcache.eviction import policy_class

    names = [name.strip() for name in text.split(",")]
    every = [each for name in names for each in (POLICIES if name == "all" else [name])]
    try:
        for name in every:
            policy_class(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return list(dict.fromkeys(every))


class UsageError(ValueError):
    """Arguments that do not go together; says what to change."""


class Asked(NamedTuple):
    """What to replay."""

    policies: list[str]
    capacities: list[tuple[int, ...]]  # of L1, or of several tiers
    marked: int  # which of them the user has; the others are there to be drawn
    size: BlockSize


def run(args: argparse.Namespace) -> int:
    """Replay and print; returns the exit code."""
    from kvcache.replay import jobs
    from kvcache.replay.trace import TraceError

    try:
        check(args)
        trace = _trace(args)
        asked = plan(args, trace)
    except (UsageError, TraceError) as error:
        print(f"kvcache replay: {error}", file=sys.stderr)
        return 2
    every: list[str | None] = [None, *asked.policies]
    work = [jobs.ReplayJob(policy, tiers) for tiers in asked.capacities for policy in every]
    several = len(work) * len(trace.blocks) > WORTH_A_PROCESS
    processes = args.processes or (jobs.processors() if several else 1)
    try:
        with Bar(sys.stderr, len(work) * len(trace)) as bar:
            results = jobs.run(trace, work, processes, bar.add)
    except jobs.JobError as error:
        print(f"kvcache replay: {error}", file=sys.stderr)
        return 1
    return _say(args, trace, asked, results)


def check(args: argparse.Namespace) -> None:
    """Refuse what can be told to be wrong without a look at the trace."""
    if (args.trace is None) == (args.generate is None):
        raise UsageError("give a TRACE, or --generate traffic, and not both")
    _check_traffic(args)
    if args.capacity and args.tiers:
        raise UsageError("--tiers has the capacity of L1 already: leave --capacity out")
    if args.bytes_per_token and args.bytes_per_block:
        raise UsageError("give --bytes-per-token or --bytes-per-block, not both")
    given: list[Amount] = args.capacity or args.tiers or []
    if not (args.bytes_per_token or args.bytes_per_block):
        for amount in given:
            if amount.nbytes:
                raise UsageError(
                    f"{amount.text} is in bytes: say how many a block takes, with "
                    "--bytes-per-token or --bytes-per-block, or give a number of blocks"
                )
    if args.plot:
        _check_plot(args)


def _check_traffic(args: argparse.Namespace) -> None:
    if args.requests and args.requests > LINES:
        raise UsageError(f"--requests is {args.requests:,}; it is at most {LINES:,}")
    if args.generate is None and args.requests:
        raise UsageError("--requests is of made-up traffic: it goes with --generate")
    if args.generate is None and not args.hints and args.seed is not None:
        raise UsageError("--seed is of made-up traffic or hints: give --generate, or --hints")
    if args.generate and args.time_unit != "ms":
        raise UsageError("--time-unit is of a trace; made-up traffic has times of its own")
    if args.generate and args.block_tokens:
        raise UsageError("--block-tokens is of a trace; made-up traffic has blocks of 512 tokens")


def _check_plot(args: argparse.Namespace) -> None:
    if args.plot.suffix not in PLOTS:
        raise UsageError(f"--plot {args.plot}: the name ends in {', '.join(PLOTS)}")
    if args.tiers or len(args.capacity or ()) > 1:
        raise UsageError("--plot draws around one --capacity of L1: give one, and no --tiers")
    if not args.plot.absolute().parent.is_dir():
        raise UsageError(f"--plot {args.plot}: there is no such folder")
    if args.plot.exists() and not (args.plot.is_file() or args.plot.is_dir()):
        raise UsageError(f"--plot {args.plot}: it is there, and is no regular file")
    if args.plot.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "a .png needs matplotlib: pip install 'kvcache[plot]'; .svg and .html do not"
        )


def _trace(args: argparse.Namespace) -> Trace:
    from kvcache.replay.oracle import with_hints

    trace = _without_hints(args)
    return with_hints(trace, args.hints, args.seed or 0) if args.hints else trace


def _without_hints(args: argparse.Namespace) -> Trace:
    from kvcache.replay.generators import generate
    from kvcache.replay.trace import read

    if args.generate:
        requests, seed = args.requests or 10_000, args.seed or 0
        return generate(args.generate, requests, seed, partial=args.partial)
    stdin = args.trace == "-"
    name = "standard input" if stdin else args.trace
    try:
        # Another command's output may be long in coming; a file by name is not.
        with os.fdopen(os.dup(0), "rb") if stdin else open_input(Path(name)) as file:
            trace = read(
                file, name, block_tokens=args.block_tokens, partial=args.partial,
                unit=args.time_unit,
            )  # fmt: skip
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}") from error
    _check_rate(trace, args.time_unit)
    return trace


def _check_rate(trace: Trace, unit: str) -> None:
    """Warn where the unit of the timestamps is probably not the one that was given."""
    slowest, fastest = USUAL_REQUESTS_PER_S
    rate = trace.requests_per_s
    if rate is not None and not slowest <= rate <= fastest:
        print(
            f"kvcache replay: {len(trace):,} requests, {rate:,.3g} a second, are implausible; the "
            f"timestamps were read in {unit}: if they are in another unit, give --time-unit",
            file=sys.stderr,
        )


def plan(args: argparse.Namespace, trace: Trace) -> Asked:
    """Which capacities, in blocks of this trace."""
    per_token = args.bytes_per_token
    size = BlockSize(per_token * trace.block_tokens if per_token else args.bytes_per_block)
    try:
        given = [size.blocks(amount) for amount in args.capacity or args.tiers or ()]
    except ValueError as error:
        raise UsageError(str(error)) from None
    if args.tiers:
        return Asked(args.policy, [tuple(given)], 0, size)
    capacities = given or [max(1, trace.distinct // 10)]
    if not args.plot:
        return Asked(args.policy, [(capacity,) for capacity in capacities], 0, size)
    drawn = around(capacities[0], trace.distinct)
    return Asked(args.policy, [(n,) for n in drawn], drawn.index(capacities[0]), size)


def around(capacity: int, enough: int) -> list[int]:
    """`capacity`, its halves, and its doubles until all fits; three and five of them at most."""
    smaller = {capacity >> halved for halved in range(1, 4)} - {0}
    larger = [capacity << doubled for doubled in range(1, 6)]
    needed = [each for each in larger if each // 2 < enough]
    return [*sorted(smaller), capacity, *(needed or larger[:1])]


def _say(args: argparse.Namespace, trace: Trace, asked: Asked, results: Results) -> int:
    from kvcache.cli.replay.results import Replayed

    replayed = Replayed(trace, asked.size, results)
    if args.json:
        for figures in replayed.figures():
            print(json.dumps(figures))
    else:
        name = args.generate or ("standard input" if args.trace == "-" else Path(args.trace).name)
        print(replayed.text(name, partial=args.partial, paint=painter(sys.stdout)))
    if args.plot:
        from kvcache.cli.replay import plot

        title = args.generate or Path(args.trace).name
        try:
            plot.write(replayed.curves(title, asked.marked), args.plot)
        except OSError as error:
            print(f"kvcache replay: cannot write {args.plot}: {error.strerror}", file=sys.stderr)
            return 1
    return 0
