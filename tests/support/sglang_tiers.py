"""Tiers for tests of the SGLang backend, which an option names by their class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from tests.support.failing_parts import DictTier, FaultyTier

PATIENT = {"deadline_s": 60.0}  # on a busy machine, a call of these tests may take seconds


class OpenedFaultyTier(FaultyTier):
    """A tier that fails on command; a test finds those that a backend has opened.

    Args:
        shared: tiers with the same text share their blocks, as those of one server do.

    Attributes:
        opened: the tiers of this process, in the order in which they were opened.
        parents: the parent of each segment that was stored.
    """

    opened: ClassVar[list[OpenedFaultyTier]] = []
    _shared: ClassVar[dict[str, DictTier]] = {}

    def __init__(self, *, shared: str = "") -> None:
        inner = self._shared.setdefault(shared, DictTier()) if shared else DictTier()
        super().__init__(inner)
        self.held = inner.held
        self.parents: list[bytes | None] = []
        self.opened.append(self)

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        self.parents.append(parent)
        return super().store(keys, blocks, parent)


def faulty(name: str = "faulty", **options: Any) -> dict[str, Any]:
    """Return the table of a tier that fails on command."""
    return {"name": name, "kind": f"{__name__}:{OpenedFaultyTier.__name__}", **PATIENT, **options}


def disk(path: object, name: str = "disk", **options: Any) -> dict[str, Any]:
    """Return the table of a disk tier."""
    return {
        "name": name,
        "kind": "disk",
        "path": str(path),
        "capacity": "8MiB",
        **PATIENT,
        **options,
    }
