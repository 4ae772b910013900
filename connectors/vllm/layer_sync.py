"""Which layers a forward pass asks for before it reads them: not all of them, and not always.

Always true here:
* A layer is trusted to be asked for when the last pass of the same kind has asked for it.
* A pass of no kind is trusted with no layer, and teaches nothing.
* A pass that did not do what it was trusted to do is told of.
"""

from __future__ import annotations


def kind_of(forward_context: object) -> str | None:
    """How this forward pass runs, if it asks for layers before it reads them; else ``None``.

    The replay of a FULL graph asks for nothing. Its context says so, or, in vLLM's second runner,
    is made for the call alone and says nothing of a pass.
    """
    mode = getattr(getattr(forward_context, "cudagraph_runtime_mode", None), "name", None)
    computes = getattr(forward_context, "attn_metadata", None) is not None
    return mode if computes and mode in ("NONE", "PIECEWISE") else None


class LayerSync:
    """The forward passes of one worker.

    Attributes:
        trusted: layers that this step's pass will ask for.
    """

    def __init__(self) -> None:
        self.trusted: frozenset[int] = frozenset()
        self._kind: str | None = None
        self._asked: set[int] = set()
        self._seen: dict[str, frozenset[int]] = {}  # by kind: what the last one has asked for

    def is_of(self, kind: str | None) -> None:
        """This step's pass is. Where nothing is loaded before it, it may have been made already."""
        self._kind = kind
        self.trusted = self._seen.get(kind or "", frozenset())

    def asks(self, layer: int) -> None:
        self._asked.add(layer)

    def ends(self) -> frozenset[int]:
        """The pass has been made; the layers that it was trusted to ask for, and did not."""
        asked, missed = frozenset(self._asked), self.trusted - self._asked
        if self._kind is not None:
            self._seen[self._kind] = asked
        self._asked = set()
        self.is_of(None)
        return missed
