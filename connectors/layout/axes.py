"""Layouts: how the bytes of a block lie in an engine's tensors, written as the names of axes.

A layout has one word for each axis of each tensor of a layer, in the order of the tensor's shape:
``"blocks kv tokens heads dim"``.

* Names joined by a dot share an axis, the outer one first: ``kv.dim`` is all of K, then all of V.
* A name that occurs twice is split over two axes, the outer one first: ``dim tokens dim``.
* ``...`` stands for any number of axes of unknown meaning.

Invariants:

* A layout follows from shapes. Strides only place an axis in memory, so tensors that differ only in
  strides have the same layout.
* Tensors that match no layout, or several, are refused with a description of the tensors and of
  the layouts. A layout is never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

FIXED_SIZES = {"kv": 2, "one": 1}
"""The sizes that a name implies: keys and values, and an axis that only adds a dimension."""

ANY_AXES = "..."


class LayoutError(ValueError):
    """The tensors do not have the given layout, or no single known one."""


class Tensor(Protocol):
    """The part of torch's tensor that is used here, so that this package does not need torch."""

    shape: Any
    dtype: Any
    device: Any

    def stride(self) -> tuple[int, ...]: ...
    def element_size(self) -> int: ...
    def data_ptr(self) -> int: ...


Layer = Tensor | Sequence[Tensor]
"""The tensor of one layer, or its tensors in the order of the layout."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The axes of each tensor of a layer. With two tensors, the first is K and the second V."""

    name: str
    tensors: tuple[str, ...]
    used_by: str = ""

    def __post_init__(self) -> None:
        for axes in self.tensors or ("",):
            if axes.split().count("blocks") != 1:
                raise LayoutError(f"layout {self.name}: one axis of {axes!r} must be blocks")

    @property
    def names_all_axes(self) -> bool:
        """Whether every axis has a name, so that a shape can match or not match."""
        return not any(ANY_AXES in axes for axes in self.tensors)

    def __str__(self) -> str:
        return f"{self.name} " + " + ".join(f"[{', '.join(a.split())}]" for a in self.tensors)


LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("kv-first", ("kv blocks tokens heads dim",), "FlashAttention of vLLM to 0.22"),
        Layout("kv-first-hnd", ("kv blocks heads tokens dim",), "the same, heads first"),
        Layout(
            "blocks-first",
            ("blocks kv tokens heads dim",),
            "FlashInfer NHD; FlashAttention of vLLM 0.23 to 0.25",
        ),
        Layout("blocks-first-hnd", ("blocks kv heads tokens dim",), "FlashInfer HND"),
        Layout("packed", ("blocks heads tokens kv.dim",), "vLLM 0.28 and later"),
        Layout("pair", ("blocks tokens heads dim",) * 2, "flash-attn, xFormers, FlashInfer NHD"),
        Layout("pair-hnd", ("blocks heads tokens dim",) * 2, "FlashInfer HND, K and V apart"),
        Layout(
            "paged-attention",
            ("blocks heads dim tokens dim", "blocks heads dim tokens"),
            "PagedAttention, as of XFormers in vLLM",
        ),
        Layout("mla", ("blocks tokens latent",), "multi-head latent attention"),
        Layout("mla-packed", ("blocks one tokens latent",), "the same, in vLLM 0.28 and later"),
        Layout(
            "opaque", ("blocks ...",), "pages that are only copied, such as those of vLLM on a CPU"
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of a tensor, or one name of a shared axis: ``size`` steps of ``stride`` bytes."""

    name: str
    size: int
    stride: int


def tensors_of(layer: Layer) -> tuple[Tensor, ...]:
    """Return the tensors of a layer as a tuple."""
    return tuple(layer) if isinstance(layer, (tuple, list)) else (layer,)  # type: ignore[return-value]


def find_layout(
    layers: Mapping[str, Layer], layout: str | Layout | None, sizes: Mapping[str, int]
) -> Layout:
    """Return the one layout that all ``layers`` have.

    Args:
        layers: at least one layer, by name.
        layout: a name, or a layout of the caller's; ``None`` to find it from the shapes.
        sizes: known sizes of axes, by name, such as ``{"tokens": 16, "heads": 8}``.

    Raises:
        LayoutError: when no layout fits all layers, or more than one does.
    """
    if isinstance(layout, Layout):
        return layout
    if layout is not None:
        if layout not in LAYOUTS:
            raise LayoutError(f"there is no layout {layout!r}; there are {', '.join(LAYOUTS)}")
        return LAYOUTS[layout]
    known = [layout for layout in LAYOUTS.values() if layout.names_all_axes]
    candidates = known
    for name, layer in layers.items():
        tensors = describe(layer) + (f", with {dict(sizes)}" if sizes else "")
        candidates = [layout for layout in candidates if _matches(layer, layout, sizes)]
        if not candidates:
            raise LayoutError(
                f"layer {name} is {tensors}, which has no known layout, or none that the layers"
                f" before it have: {_joined(known)}; pass layout='opaque' if blocks are its first"
                " axis and are only copied, or pass a Layout"
            )
    if len(candidates) > 1:
        raise LayoutError(
            f"layer {name} is {tensors}: its layout may be {_joined(candidates)}; pass layout=, or"
            f" a size that only one of them can have ({', '.join(sorted(_axis_names(candidates)))})"
        )
    return candidates[0]


def axes_of(
    layer: Layer, layout: Layout, sizes: Mapping[str, int], name: str = ""
) -> list[list[Axis]]:
    """Return the axes of each tensor of a layer, in the order of its shape.

    Of a name that occurs more than once, the outer axis comes first. ``name`` is the layer's name,
    for error messages.

    Raises:
        LayoutError: when the layer does not have this layout and these sizes.
    """
    try:
        return _match_layer(tensors_of(layer), layout, sizes)
    except _MismatchError as mismatch:
        raise LayoutError(
            f"layer {name} is {describe(layer)}, which does not have layout {layout}: {mismatch}"
        ) from None


def describe(layer: Layer) -> str:
    """Describe the tensors of a layer for an error message."""
    return " and ".join(
        f"{tensor.dtype} of shape {tuple(tensor.shape)}, strides {tuple(tensor.stride())}"
        for tensor in tensors_of(layer)
    )


class _MismatchError(Exception):
    """The reason why tensors do not have a layout."""


def _matches(layer: Layer, layout: Layout, sizes: Mapping[str, int]) -> bool:
    try:
        _match_layer(tensors_of(layer), layout, sizes)
    except _MismatchError:
        return False
    return True


def _match_layer(
    tensors: Sequence[Tensor], layout: Layout, sizes: Mapping[str, int]
) -> list[list[Axis]]:
    """Return the axes of each tensor. A name must have the same size in all of them."""
    if len(tensors) != len(layout.tensors):
        raise _MismatchError(f"a layer of it has {len(layout.tensors)} tensors, not {len(tensors)}")
    if layout.names_all_axes and (unknown := sizes.keys() - _axis_names([layout])):
        raise _MismatchError(f"it has no axis {' and no axis '.join(sorted(unknown))}")
    result = []
    known = {**FIXED_SIZES, **sizes}
    for tensor, words in zip(tensors, layout.tensors, strict=True):
        result.append(_match_tensor(tensor, words.split(), known))
        for name, size in sizes_of(result[-1]).items():
            if known.setdefault(name, size) != size:
                raise _MismatchError(f"{name} is {size}, not {known[name]}")
    return result


def _match_tensor(tensor: Tensor, words: list[str], known: Mapping[str, int]) -> list[Axis]:
    """Return the axes of one tensor, one or two for each word. ``known`` are sizes of names."""
    shape = tuple(tensor.shape)
    if ANY_AXES in words:
        at = words.index(ANY_AXES)
        after = words[at + 1 :]
        words = [*words[:at], *map(str, range(at, len(shape) - len(after))), *after]
    if len(shape) != len(words):
        raise _MismatchError(f"a tensor of it has {len(words)} axes")
    axes: list[Axis] = []
    for word, size, stride in zip(words, shape, tensor.stride(), strict=True):
        outer, _, inner = word.rpartition(".")
        parts = known.get(outer, 0) if outer else 1
        if not parts or size % parts or not size:
            raise _MismatchError(f"{word} cannot have size {size}")
        step = stride * tensor.element_size()
        if outer:
            axes.append(Axis(outer, parts, step * (size // parts)))
        axes.append(Axis(inner, size // parts, step))
    return axes


def sizes_of(axes: Iterable[Axis]) -> dict[str, int]:
    """Return the size of every name: the product over all axes that have it."""
    sizes: dict[str, int] = {}
    for axis in axes:
        sizes[axis.name] = sizes.get(axis.name, 1) * axis.size
    return sizes


def _axis_names(layouts: Iterable[Layout]) -> set[str]:
    words = {word for layout in layouts for axes in layout.tensors for word in axes.split()}
    return {name for word in words for name in word.split(".")} - {*FIXED_SIZES, ANY_AXES, ""}


def _joined(layouts: Sequence[Layout]) -> str:
    return ", ".join(map(str, layouts))
