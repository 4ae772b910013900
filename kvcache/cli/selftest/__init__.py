"""Store pages, wipe them, load them into other blocks, and run attention over them on this machine.

For every layout that an installed attention kernel reads, in raw and in canonical order: all bytes
and all results of attention must be the same as before the wipe. Kernels: torch (on every device),
and flash-attn, xFormers and FlashInfer (on a GPU, if installed). With 64 blocks of up to 576 KiB it
needs up to 250 MiB on the device and 40 MiB of memory, and takes less than a minute. On a terminal
it draws a progress bar meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from kvcache.cli.amounts import at_least
from kvcache.cli.progress import ProgressBar
from kvcache.cli.selftest.kernels import KERNELS, AttentionKernel
from kvcache.cli.table import pairs

if TYPE_CHECKING:
    from kvcache.cli.selftest.round_trip import RoundTrip
    from kvcache.connectors.transfer.streams import Device

ORDERS: tuple[Literal["raw"], Literal["canonical"]] = ("raw", "canonical")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kvcache selftest`."""
    add = parser.add_argument
    add("--device", help='"cpu", "cuda" or "cuda:1" (a GPU if there is one)')
    add("--layout", help="test this layout only (all)")
    add("--kernel", help=f"run this kernel only: {', '.join(KERNELS)} (all that are installed)")
    add("--blocks", type=at_least(1), default=64, help="blocks of a round trip (64)")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace, kernels: Mapping[str, AttentionKernel] = KERNELS) -> int:
    """Make all round trips and print them; return 1 if anything differs, 2 if none can be made.

    Args:
        kernels: by name; others for tests.
    """
    from kvcache.cli.selftest.samples import sample_names

    device = args.device or _default_device()
    if problem := _device_shortage(device):
        print(f"selftest: {problem}", file=sys.stderr)
        return 2
    for option, known in (("layout", sample_names()), ("kernel", kernels)):
        value = getattr(args, option)
        if value is not None and value not in known:
            print(
                f"selftest: there is no {option} {value!r}; there are {', '.join(sorted(known))}",
                file=sys.stderr,
            )
            return 2
    asked = {name: kernels[name] for name in kernels if args.kernel in (None, name)}
    obstacles = {name: kernel.obstacle(device) for name, kernel in asked.items()}
    ready = {name: kernel for name, kernel in asked.items() if not obstacles[name]}
    if not ready:
        print(f"selftest: kernel {args.kernel}: {obstacles[args.kernel]}", file=sys.stderr)
        return 2
    names = [
        name
        for name, layout in sample_names().items()
        if args.layout in (None, name) and any(kernel.reads(layout) for kernel in ready.values())
    ]
    if not names:
        print(f"selftest: kernel {args.kernel} does not read layout {args.layout}", file=sys.stderr)
        return 2
    results = _make_round_trips(device, names, ready, args.blocks)
    if args.json:
        print(json.dumps(_as_json(device, args.blocks, obstacles, results)))
    else:
        print(_render(device, args.blocks, obstacles, results))
    return 1 if any(result.failed for result in results) else 0


def _make_round_trips(
    device: str, names: Sequence[str], kernels: Mapping[str, AttentionKernel], blocks: int
) -> list[RoundTrip]:
    """Make the round trips of the samples with these names, in both orders."""
    import torch

    from kvcache.cli.selftest.round_trip import ROUNDS, make_round_trip
    from kvcache.cli.selftest.samples import open_sample

    results = []
    devices: dict[str, Device] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two runs of torch on a CPU then add numbers in the same order
    try:
        with ProgressBar(sys.stderr, len(names) * len(ORDERS) * ROUNDS) as bar:
            for name, order in [(name, order) for name in names for order in ORDERS]:
                bar.add(0)  # draws the bar before the first round ends
                sample = open_sample(name, 2 * blocks, device)
                result = make_round_trip(sample, order, kernels, blocks, devices, on_rounds=bar.add)
                results.append(result)
    finally:
        torch.set_num_threads(threads)
    return results


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _device_shortage(device: str) -> str | None:
    """Return why nothing can be tested on this device; None if it exists."""
    import torch

    if device == "cpu":
        return None
    try:
        parsed = torch.device(device)
    except RuntimeError:
        parsed = None
    if parsed is None or parsed.type != "cuda":
        return f'--device is {device!r}; it must be "cpu", "cuda" or "cuda:1"'
    count = torch.cuda.device_count()
    if (parsed.index or 0) >= count:
        return f"--device is {device!r}; this machine has {count} CUDA devices"
    return None


def _device_name(device: str) -> str:
    import torch

    return "the CPU" if device == "cpu" else f"{torch.cuda.get_device_name(device)}"


def _as_json(
    device: str, blocks: int, obstacles: Mapping[str, str], results: Sequence[RoundTrip]
) -> dict[str, Any]:
    return {
        "device": device,
        "device_name": _device_name(device),
        "blocks": blocks,
        "kernels": dict(obstacles),
        "round_trips": [asdict(result) | {"failed": result.failed} for result in results],
        "failed": any(result.failed for result in results),
    }


def _render(
    device: str, blocks: int, obstacles: Mapping[str, str], results: Sequence[RoundTrip]
) -> str:
    rows: list[Sequence[str]] = [("layout", "order", "save", "load", "copied by", "attention")]
    for result in results:
        rates = [f"{rate:.2f}" for rate in (result.save_gib_s, result.load_gib_s)]
        if result.skipped:
            rates = ["-", "-"]
        same = ", ".join(name for name, wrong in result.attention.items() if not wrong)
        outcome = "skipped" if result.skipped else "FAIL" if result.failed else f"same: {same}"
        copied_by = ", ".join(result.copied_by)
        rows.append((result.layout, result.order, *rates, copied_by, outcome))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{blocks} blocks on {_device_name(device)}; save and load in GiB/s", ""]
    for row in rows:
        cells = map(str.ljust, row, widths)
        lines.append("  ".join(cells).rstrip())
    states = [(name, obstacle or "runs") for name, obstacle in obstacles.items()]
    lines += ["", pairs([("kernel", ""), *states]), ""]
    lines += _failures(results)
    made = [result for result in results if not result.skipped]
    failed = sum(result.failed for result in made)
    trips = f"{len(made)} round trip{'s' if len(made) != 1 else ''}"
    if failed:
        lines.append(f"{failed} of {trips} failed")
    else:
        lines.append(f"{trips}: every byte and all attention is the same")
    return "\n".join(lines)


def _failures(results: Sequence[RoundTrip]) -> list[str]:
    """Describe each failure in a line."""
    lines = []
    for result in results:
        where = f"{result.layout}, {result.order}"
        if result.skipped:
            lines.append(f"skipped: {where}: {result.skipped}")
        if result.wrong_elements:
            lines.append(f"FAIL: {where}: {result.wrong_elements} wrong numbers in the cache")
        lines += [
            f"FAIL: {where}: {name}: {wrong} wrong numbers in the result of attention"
            for name, wrong in result.attention.items()
            if wrong
        ]
        lines += [f"FAIL: {where}: {error}" for error in dict.fromkeys(result.errors)]
    return lines
