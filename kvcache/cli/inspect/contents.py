"""What a tier was found to hold, by namespace, in figures and in words."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from kvcache.cli.table import GREEN, RED, Painter, pairs, render
from kvcache.inputs import check_document
from kvcache.keys import DIGEST_NBYTES
from kvcache.secrets import escape_unprintable
from kvcache.sizes import format_size

SHOWN = 16  # hex digits of a namespace in a table; `--json` has them all
FIELD = 200  # characters of a field of an identity
HARMLESS = frozenset({"codec", "changed"})
"""Reasons that are nobody's damage: zstd is not installed here; a block left while we looked."""


def namespace_of(key: bytes) -> str:
    """The namespace that a key begins with, in hex; empty for a key that is no longer than one."""
    return key[:DIGEST_NBYTES].hex() if len(key) > DIGEST_NBYTES else ""


@dataclass(slots=True)
class Held:
    """What one namespace has. `intact` and `rejected` count blocks, where they were verified.

    `identity` are the fields that the namespace is a digest of, where an engine described it.
    """

    blocks: int = 0
    nbytes: int = 0  # as they are kept: frames, compressed or not
    intact: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    identity: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Contents:
    """What one tier holds. `facts` is what there is to say of its kind, by name."""

    where: str
    kind: str
    facts: dict[str, str | int | None]
    namespaces: dict[str, Held] = field(default_factory=dict)
    verified: bool = False

    def of(self, key: bytes) -> Held:
        """What the namespace of `key` has; to be counted up."""
        return self.namespaces.setdefault(namespace_of(key), Held())

    def describe(self, name: str, about: str | bytes) -> None:
        """Note what an engine said of the namespace `name`: a JSON object, else it is ignored."""
        try:
            fields = json.loads(about)
            check_document(fields)
        except (ValueError, RecursionError):
            return
        if isinstance(fields, dict) and (held := self.namespaces.get(name)):
            held.identity = fields

    @property
    def damaged(self) -> int:
        """Blocks that ought to verify and do not."""
        return sum(
            count
            for held in self.namespaces.values()
            for reason, count in held.rejected.items()
            if reason not in HARMLESS
        )

    def figures(self) -> dict[str, Any]:
        """For `--json`."""
        namespaces = {
            name: {"blocks": held.blocks, "nbytes": held.nbytes}
            | ({"intact": held.intact, "rejected": dict(held.rejected)} if self.verified else {})
            | ({"identity": held.identity} if held.identity else {})
            for name, held in self.namespaces.items()
        }
        return {"tier": self.where, "kind": self.kind} | self.facts | {"namespaces": namespaces}

    def text(self, paint: Painter) -> str:
        """For people: where, what kind of place it is, and a row for each namespace."""
        facts = [_words(name, fact) for name, fact in self.facts.items() if fact is not None]
        head = pairs([("tier", f"{self.where} ({self.kind})"), *facts])
        if not self.namespaces:
            return f"{head}\n\nIt holds no blocks."
        columns = ["blocks", "size"] + (["intact", "rejected"] if self.verified else [])
        rows = []
        for name, held in sorted(self.namespaces.items(), key=lambda item: -item[1].nbytes):
            row = [name[:SHOWN] or "none", f"{held.blocks:,}", format_size(held.nbytes)]
            if self.verified:
                why = ", ".join(f"{count:,} {reason}" for reason, count in held.rejected.items())
                row += [f"{held.intact:,}", why or "none"]
            rows.append(row)
        table = render([("held", ["namespace", *columns])], rows, paint=paint, strong="")
        return "\n\n".join([head, table, *self._identities(), *self._verdict(paint)])

    def _identities(self) -> list[str]:
        """What each namespace is, as its engines described it."""
        return [
            pairs([("namespace", name[:SHOWN]), *map(_said, held.identity.items())])
            for name, held in self.namespaces.items()
            if held.identity
        ]

    def _verdict(self, paint: Painter) -> list[str]:
        if not self.verified:
            return []
        if self.damaged:
            said = "An engine that asks for such a block computes it, and drops it from the tier."
            return [paint(f"Damaged: {self.damaged:,} blocks.", RED) + f" {said}"]
        return [paint("Every block that was read is what was stored.", GREEN)]


def _said(field: tuple[str, Any]) -> tuple[str, str]:
    """A field of an identity for people; any program may have written it."""
    name, value = field
    text = value if isinstance(value, str) else json.dumps(value)
    return escape_unprintable(name)[:FIELD], escape_unprintable(text)[:FIELD]


def _words(name: str, fact: str | int) -> tuple[str, str]:
    """A fact for people: `slot_nbytes` is the size of a slot."""
    if name.endswith("_nbytes"):
        return name.removesuffix("_nbytes"), format_size(int(fact))
    counted = isinstance(fact, int) and not name.endswith("_process")
    return name.replace("_", " "), f"{fact:,}" if counted else str(fact)
