"""The contents of a tier by namespace, as JSON and as text."""

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

_NAMESPACE_LENGTH = 16  # hex digits of a namespace in a table; `--json` has all
_FIELD_LENGTH = 200  # characters of a field of an identity in the text
HARMLESS = frozenset({"codec", "changed"})
"""Reasons without damage: zstd is not installed here; a block was removed during the check."""


@dataclass(slots=True)
class NamespaceContents:
    """The blocks of one namespace. `intact` and `rejected` count verified blocks.

    Attributes:
        nbytes: of the stored frames, compressed or not.
        identity: the fields that the namespace is a digest of, if an engine described it.
    """

    blocks: int = 0
    nbytes: int = 0
    intact: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    identity: dict[str, Any] = field(default_factory=dict)

    def add_block(self, nbytes: int) -> None:
        """Count a block with a frame of ``nbytes`` bytes."""
        self.blocks += 1
        self.nbytes += nbytes


@dataclass(slots=True)
class TierContents:
    """The contents of one tier. `facts` are properties of its kind, by their names in `--json`."""

    place: str
    kind: str
    facts: dict[str, str | int | None]
    namespaces: dict[str, NamespaceContents] = field(default_factory=dict)
    verified: bool = False

    def namespace_of(self, key: bytes) -> NamespaceContents:
        """Return the namespace of ``key``; that of a key without one is the empty name."""
        name = key[:DIGEST_NBYTES].hex() if len(key) > DIGEST_NBYTES else ""
        return self.namespaces.setdefault(name, NamespaceContents())

    def describe(self, name: str, description: str | bytes) -> None:
        """Set the identity of the namespace ``name``, if ``description`` is a JSON object."""
        try:
            fields = json.loads(description)
            check_document(fields)
        except (ValueError, RecursionError):
            return
        if isinstance(fields, dict) and (namespace := self.namespaces.get(name)):
            namespace.identity = fields

    @property
    def damaged(self) -> int:
        """The number of damaged blocks."""
        return sum(
            count
            for namespace in self.namespaces.values()
            for reason, count in namespace.rejected.items()
            if reason not in HARMLESS
        )

    def to_json(self) -> dict[str, Any]:
        """Return the contents as a JSON object."""
        namespaces = {
            name: {"blocks": each.blocks, "nbytes": each.nbytes}
            | ({"intact": each.intact, "rejected": dict(each.rejected)} if self.verified else {})
            | ({"identity": each.identity} if each.identity else {})
            for name, each in self.namespaces.items()
        }
        return {"tier": self.place, "kind": self.kind} | self.facts | {"namespaces": namespaces}

    def text(self, paint: Painter) -> str:
        """Return the contents as text: the tier, and a row for each namespace."""
        facts = [_fact(name, value) for name, value in self.facts.items() if value is not None]
        head = pairs([("tier", f"{self.place} ({self.kind})"), *facts])
        if not self.namespaces:
            return f"{head}\n\nIt holds no blocks."
        columns = ["blocks", "size"] + (["intact", "rejected"] if self.verified else [])
        rows = []
        for name, each in sorted(self.namespaces.items(), key=lambda item: -item[1].nbytes):
            row = [name[:_NAMESPACE_LENGTH] or "none", f"{each.blocks:,}", format_size(each.nbytes)]
            if self.verified:
                reasons = ", ".join(
                    f"{count:,} {reason}" for reason, count in each.rejected.items()
                )
                row += [f"{each.intact:,}", reasons or "none"]
            rows.append(row)
        table = render([("contents", ["namespace", *columns])], rows, paint=paint, strong="")
        return "\n\n".join([head, table, *self._identities(), *self._verdict(paint)])

    def _identities(self) -> list[str]:
        return [
            pairs(
                [("namespace", name[:_NAMESPACE_LENGTH]), *map(_identity_field, identity.items())]
            )
            for name, each in self.namespaces.items()
            if (identity := each.identity)
        ]

    def _verdict(self, paint: Painter) -> list[str]:
        if not self.verified:
            return []
        if self.damaged:
            effect = "An engine that reads such a block removes it, and computes it again."
            return [paint(f"Damaged: {self.damaged:,} blocks.", RED) + f" {effect}"]
        return [paint("Every block that was read is intact.", GREEN)]


def _identity_field(field: tuple[str, Any]) -> tuple[str, str]:
    """Return a field of an identity as text; any program may have written it."""
    name, value = field
    text = value if isinstance(value, str) else json.dumps(value)
    return escape_unprintable(name)[:_FIELD_LENGTH], escape_unprintable(text)[:_FIELD_LENGTH]


def _fact(name: str, value: str | int) -> tuple[str, str]:
    """Return a fact as text: `slot_nbytes` is the size of a slot."""
    if name.endswith("_nbytes"):
        return name.removesuffix("_nbytes"), format_size(int(value))
    is_count = isinstance(value, int) and not name.endswith("_process")
    return name.replace("_", " "), f"{value:,}" if is_count else str(value)
