"""Which layers a forward pass waits for before it reads their blocks (vLLM's layer-wise load).

vLLM calls `wait_for_layer_load` from a layer's attention, but not for all layers and not in every
kind of pass: the replay of a FULL CUDA graph makes no calls.

Invariants:

1. A pass is expected to wait for the layers that the last pass of the same mode waited for.
2. A pass without a mode is expected to wait for none, and changes no expectation.
3. `end_pass` returns every layer that the pass was expected to wait for and did not.
"""

from __future__ import annotations


def pass_mode(forward_context: object) -> str | None:
    """Return the mode of a forward pass in which layers wait for their loads; else ``None``.

    vLLM's second model runner passes a context without attention metadata for a FULL graph.
    """
    mode = getattr(getattr(forward_context, "cudagraph_runtime_mode", None), "name", None)
    computes = getattr(forward_context, "attn_metadata", None) is not None
    return mode if computes and mode in ("NONE", "PIECEWISE") else None


class LayerSync:
    """The layers that the forward passes of one worker wait for.

    Attributes:
        expected: layers that this step's pass is expected to wait for.
    """

    def __init__(self) -> None:
        self.expected: frozenset[int] = frozenset()
        self._mode: str | None = None
        self._waited: set[int] = set()
        self._by_mode: dict[str, frozenset[int]] = {}  # what the last pass of the mode waited for

    def set_mode(self, mode: str | None) -> None:
        """Set the mode of this step's pass. With no loads to wait for, it may already have run."""
        self._mode = mode
        self.expected = self._by_mode.get(mode or "", frozenset())

    def add_wait(self, layer: int) -> None:
        """Note that the pass waits for a layer."""
        self._waited.add(layer)

    def end_pass(self) -> frozenset[int]:
        """End the pass, and return the layers it was expected to wait for and did not."""
        waited, missed = frozenset(self._waited), self.expected - self._waited
        if self._mode is not None:
            self._by_mode[self._mode] = waited
        self._waited = set()
        self.set_mode(None)
        return missed
