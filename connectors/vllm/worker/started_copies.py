"""The copies that one rank has started, and the transfers that each of them copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcache import telemetry
from kvcache.connectors.transfer.base import Copy
from kvcache.connectors.vllm.messages import Rank, Transfer
from kvcache.connectors.vllm.worker.rank_pieces import Operation


@dataclass(frozen=True, slots=True)
class StartedCopy:
    """One copy for one transfer or several.

    Attributes:
        nbytes: that are copied for each transfer.
        started_ns: when it was started, in ns since 1970.
    """

    operation: Operation
    transfers: Sequence[Transfer]
    nbytes: Sequence[int]
    started_ns: int
    copy: Copy

    def seconds_of_transfers(self) -> list[float]:
        """Return each transfer's share of the duration, by its bytes. The copy is done.

        If nothing was copied, each has all of it.
        """
        seconds, total = self.copy.seconds, sum(self.nbytes)
        return [seconds * nbytes / total if total else seconds for nbytes in self.nbytes]

    def record_spans(self, rank: Rank, error: str | None) -> None:
        """Record a span for each transfer with a recorded parent. The copy is done, or failed."""
        if not any(transfer.trace for transfer in self.transfers):
            return
        ended_ns = self.started_ns + round(self.copy.seconds * 1e9)
        for transfer, nbytes in zip(self.transfers, self.nbytes, strict=True):
            telemetry.end_span(
                telemetry.start_remote_child(transfer.trace, telemetry.COPY, self.started_ns),
                {
                    telemetry.DIRECTION: self.operation,
                    telemetry.RANK: "pp{} tp{}".format(*rank),
                    telemetry.REQUESTED: len(set(transfer.slots)),
                    telemetry.PAYLOAD: nbytes,
                },
                error=error,
                ended_ns=ended_ns,
            )


class StartedCopies:
    """The copies that have not ended, in the order in which they were started."""

    def __init__(self) -> None:
        self._copies: list[StartedCopy] = []

    def add(self, started: StartedCopy) -> None:
        self._copies.append(started)

    def take_ended(self) -> list[StartedCopy]:
        """Return the copies that have ended, and forget them."""
        ended, unended = list[StartedCopy](), list[StartedCopy]()
        for started in self._copies:
            (ended if started.copy.done else unended).append(started)
        self._copies = unended
        return ended
