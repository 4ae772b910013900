"""KV events of a secondary tier, which vLLM publishes: blocks that it stored, and that are gone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from vllm.v1.kv_offload.base import OffloadingEvent

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import Locality, Medium

MOST_ANNOUNCED: Final = 1 << 18
"""The keys that are remembered as announced; the oldest are forgotten, and never retracted."""


class AnnouncedBlocks:
    """The blocks that were announced as stored, and the events since the last `take`.

    Args:
        medium: vLLM's name of where the blocks are.
        locality: whether that is this host; ``None`` if unknown.
        most: the most keys to remember.
    """

    def __init__(
        self, medium: Medium, locality: Locality | None, most: int = MOST_ANNOUNCED
    ) -> None:
        self._medium = medium
        self._locality = locality
        self._most = most
        self._announced: OrderedDict[Any, None] = OrderedDict()
        self._events: list[OffloadingEvent] = []

    def stored(self, keys: Iterable[Any]) -> None:
        """Announce blocks that a tier holds now, unless they were announced already."""
        new = [key for key in keys if key not in self._announced]
        self._announced.update(dict.fromkeys(new))
        while len(self._announced) > self._most:
            self._announced.popitem(last=False)
        self._add(new, removed=False)

    def gone(self, keys: Iterable[Any]) -> None:
        """Retract the announced blocks among ``keys``: every tier lost or removed them."""
        known = [key for key in keys if key in self._announced]
        for key in known:
            del self._announced[key]
        self._add(known, removed=True)

    def cleared(self) -> None:
        """Retract all blocks."""
        self.gone(list(self._announced))

    def take(self) -> list[OffloadingEvent]:
        """Return the events since the last call."""
        taken, self._events = self._events, []
        return taken

    def _add(self, keys: list[Any], *, removed: bool) -> None:
        if keys:
            self._events.append(
                OffloadingEvent(
                    keys=keys, medium=self._medium, removed=removed, locality=self._locality
                )
            )
