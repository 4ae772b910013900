"""Write a plan as text."""

from __future__ import annotations

from typing import Any

from kvcache.cli.table import YELLOW, Painter, pairs
from kvcache.models import Model
from kvcache.resume import Needs
from kvcache.sizes import format_size


def text(model: Model, figures: dict[str, Any], paint: Painter) -> str:
    """Return the plan as text."""
    size, ranks = format_size, figures["tensor_parallel_size"]
    token, block = figures["token_nbytes"], figures["block_nbytes"]
    each = f" ({size(figures['rank_token_nbytes'])} in each of {ranks} ranks)" if ranks > 1 else ""
    engine = f"{size(figures['engine_nbytes'])} for the engine ({figures['engine_source']})"
    one = is_one_chain(figures)
    rows = [
        ("model", f"{model.description()}, {figures['dtype']}"),
        ("a token", size(token) + each),
        *(
            [("a block", f"{size(block)}: {figures['block_tokens']} tokens, all layers and ranks")]
            if one
            else [*_group_rows(figures), *_prefix_rows(figures)]
        ),
        ("memory", f"{size(figures['pod_nbytes'])} ({figures['pod_source']}), {engine}"),
        ("L1", f"KVCACHE__L1__CAPACITY={size(figures['l1_nbytes'])}"),
        *_capacity_rows(figures, "l1"),
        *_capacity_rows(figures, "disk"),
    ]
    parts = [pairs(rows), pairs(_time_rows(figures)), _aibrix_note(figures)]
    parts += [paint(f"warning: {warning}", YELLOW) for warning in figures["warnings"]]
    return "\n\n".join(parts)


def is_one_chain(figures: dict[str, Any]) -> bool:
    """Return if every layer of the model needs all tokens."""
    return [group["kind"] for group in figures["groups"]] == ["all"]


def _group_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a row for each kept group: its blocks, and which of them a hit needs."""
    rows = []
    for group in figures["groups"]:
        needed, parts = group["needed_tokens"], group["parts"]
        rule = {
            "all": "all blocks",
            "window": f"those of the last {needed - 1:,} tokens",
            "chunk": f"those of the current {needed:,} tokens",
            "state": "the last one",
        }[group["kind"]]
        state = group["kind"] == "state"
        what = "a state" if state else f"a block of {group['block_tokens']} tokens"
        block = f"{format_size(group['block_nbytes'])}: {what}"
        slots = f"{parts} slot{'s' if parts > 1 else ''} of L1"
        text = f"{block}, {group['layers']} layers, in {slots}; a hit needs {rule}"
        rows.append((Needs(group["kind"], needed).label, text))
    return rows


def _prefix_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a prefix takes in L1."""
    chunk = f"prefill chunks of {figures['max_num_batched_tokens']:,} tokens"
    states = any(group["kind"] == "state" for group in figures["groups"])
    at = f"; states at the ends of {chunk}" if states else ""
    resume, stored = (format_size(figures[f"{what}_nbytes"]) for what in ("resume", "stored"))
    return [
        ("a prefix", f"{resume} to resume after {figures['prefix_tokens']:,} tokens"),
        ("all of it", f"{stored} with every block stored{at}"),
    ]


def _capacity_rows(figures: dict[str, Any], tier: str) -> list[tuple[str, str]]:
    if f"{tier}_blocks" not in figures:
        return []
    prefixes = f"{figures[f'{tier}_prefixes']:,} prefixes of {figures['prefix_tokens']:,} tokens"
    count = figures[f"{tier}_blocks"]
    if is_one_chain(figures):
        held = f"{figures[f'{tier}_tokens']:,} tokens in {count:,} blocks: {prefixes}"
    else:
        all_of = f"{figures[f'{tier}_stored_prefixes']:,} with every block stored"
        held = f"{prefixes} in {count:,} slots; {all_of}"
    name = "it holds" if tier == "l1" else "the disk"
    return [(name, held if tier == "l1" else f"{format_size(figures['disk_nbytes'])}: {held}")]


def _time_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    rate = f"{figures['bandwidth_nbytes_per_s'] / 2**30:.3g} GiB/s"
    rows = [("from L1", f"{_time(figures['l1_load_s'])} ({rate}: {figures['bandwidth_source']})")]
    if "disk_load_s" in figures:
        rows.append(("from disk", _time(figures["disk_load_s"])))
    if "compute_s" in figures:
        even = f"{figures['break_even_nbytes_per_s'] / 2**30:.3g} GiB/s"
        rows.append(("computed", f"{_time(figures['compute_s'])}; a tier is faster above {even}"))
    return [(f"a prefix {name}", time) for name, time in rows]


def _aibrix_note(figures: dict[str, Any]) -> str:
    ranks, rank_nbytes = figures["tensor_parallel_size"], max(0, figures["aibrix_rank_nbytes"])
    pod, engine = format_size(figures["pod_nbytes"]), format_size(figures["engine_nbytes"])
    return (
        f"AIBrix: P / TP - E = {pod} / {ranks} - {engine} = {format_size(rank_nbytes)} for each "
        f"rank, {format_size(rank_nbytes * ranks)} on the node.\n"
        "There, every rank has its own L1 and setting, and each subtracts E. Here, the ranks of\n"
        "a node share one L1: P - E, with E for the whole engine, minus the index and the page\n"
        f"tables of {ranks + 1} processes."
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
