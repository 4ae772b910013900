"""How the bytes of a block lie in an engine's tensors, as data: a layout is the names of axes.

A layout has one word per axis of each tensor of a layer, in the order of the tensor's shape:
``"blocks kv tokens heads dim"``. Names joined by a dot share an axis, the first outside the second
(``kv.dim``: all of K, then all of V); a name that comes twice is split over two axes, the first
outside the second (``dim tokens dim``); ``...`` stands for axes of whatever meaning.

Always true here:

* Shapes say what an axis means, strides where it lies: another order in memory than that of the
  shape is no layout of its own.
* What fits no layout, or several, is refused with what was seen and what is known; never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

FIXED = {"kv": 2, "one": 1}
"""Axes whose size their name says: keys and values; an axis that is there for its rank alone."""

REST = "..."


class LayoutError(ValueError):
    """These tensors cannot be laid out as was said, or in no one way that is known."""


class Tensor(Protocol):
    """What is asked of a tensor. One of torch has it; nothing here needs torch."""

    shape: Any
    dtype: Any
    device: Any

    def stride(self) -> tuple[int, ...]: ...
    def element_size(self) -> int: ...
    def data_ptr(self) -> int: ...


Layer = Tensor | Sequence[Tensor]
"""The tensors of one layer: one, or several in the order of the layout's."""


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
    def has_meaning(self) -> bool:
        """Whether every axis has a name, so that the layout can be told from a shape."""
        return not any(REST in axes for axes in self.tensors)

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
        Layout("packed", ("blocks heads tokens kv.dim",), "vLLM 0.29 and later"),
        Layout("pair", ("blocks tokens heads dim",) * 2, "flash-attn, xFormers, FlashInfer NHD"),
        Layout("pair-hnd", ("blocks heads tokens dim",) * 2, "FlashInfer HND, K and V apart"),
        Layout(
            "paged-attention",
            ("blocks heads dim tokens dim", "blocks heads dim tokens"),
            "PagedAttention, as of XFormers in vLLM",
        ),
        Layout("mla", ("blocks tokens latent",), "multi-head latent attention"),
        Layout("mla-packed", ("blocks one tokens latent",), "the same, in vLLM 0.29 and later"),
        Layout("opaque", ("blocks ...",), "whatever is only copied, such as vLLM on a CPU"),
    )
}


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a tensor, or a part of one: ``size`` steps of ``stride`` bytes."""

    name: str
    size: int
    stride: int


def tensors_of(layer: Layer) -> tuple[Tensor, ...]:
    """The tensors of a layer, be it one or several."""
    return tuple(layer) if isinstance(layer, (tuple, list)) else (layer,)  # type: ignore[return-value]


def find(
    layers: Mapping[str, Layer], layout: str | Layout | None, sizes: Mapping[str, int]
) -> Layout:
    """The one layout that all ``layers`` have.

    Args:
        layers: at least one, by name.
        layout: its name if it is known, or one of your own; ``None`` to tell it from the shapes.
        sizes: what axes are known to have, by name, such as ``{"tokens": 16, "heads": 8}``.

    Raises:
        LayoutError: when no layout fits all layers, or more than one.
    """
    if isinstance(layout, Layout):
        return layout
    if layout is not None:
        if layout not in LAYOUTS:
            raise LayoutError(f"there is no layout {layout!r}; there are {', '.join(LAYOUTS)}")
        return LAYOUTS[layout]
    fitting = told = [layout for layout in LAYOUTS.values() if layout.has_meaning]
    what = ""
    for name, layer in layers.items():
        what = f"layer {name} is {seen(layer)}" + (f", with {dict(sizes)}" if sizes else "")
        fitting = [layout for layout in fitting if _fits(layer, layout, sizes)]
        if not fitting:
            raise LayoutError(
                f"{what}, which fits no layout that is known, or none that the layers before it"
                f" have: {_listed(told)}; say layout='opaque' if its blocks are its first axis and"
                " are only to be copied, or give a Layout of your own"
            )
    if len(fitting) > 1:
        raise LayoutError(
            f"{what}: it may be {_listed(fitting)}; say which with layout=, or sizes that only one"
            f" of them can have ({', '.join(sorted(_names(fitting)))})"
        )
    return fitting[0]


def axes_of(
    layer: Layer, layout: Layout, sizes: Mapping[str, int], name: str = ""
) -> list[list[Axis]]:
    """The axes of each tensor of a layer, outermost of the shape first.

    A name that comes more than once has its outer part first. ``name`` is the layer's, for
    messages.

    Raises:
        LayoutError: when the layer does not have this layout and these sizes.
    """
    try:
        return _read(tensors_of(layer), layout, sizes)
    except _MisfitError as why:
        raise LayoutError(
            f"layer {name} is {seen(layer)}, and not laid out as {layout}: {why}"
        ) from None


def seen(layer: Layer) -> str:
    """What a layer's tensors look like, for messages."""
    return " and ".join(
        f"{tensor.dtype} of shape {tuple(tensor.shape)}, strides {tuple(tensor.stride())}"
        for tensor in tensors_of(layer)
    )


class _MisfitError(Exception):
    """Why tensors do not have a layout."""


def _fits(layer: Layer, layout: Layout, sizes: Mapping[str, int]) -> bool:
    try:
        _read(tensors_of(layer), layout, sizes)
    except _MisfitError:
        return False
    return True


def _read(tensors: Sequence[Tensor], layout: Layout, sizes: Mapping[str, int]) -> list[list[Axis]]:
    """The axes of each tensor, whose names have one size in all of them."""
    if len(tensors) != len(layout.tensors):
        raise _MisfitError(f"a layer has {len(layout.tensors)} tensors in it, not {len(tensors)}")
    if layout.has_meaning and (unknown := sizes.keys() - _names([layout])):
        raise _MisfitError(f"it has no {' and no '.join(sorted(unknown))}")
    found = []
    known = {**FIXED, **sizes}
    for tensor, words in zip(tensors, layout.tensors, strict=True):
        found.append(_axes(tensor, words.split(), known))
        for name, total in sizes_of(found[-1]).items():
            if known.setdefault(name, total) != total:
                raise _MisfitError(f"{name} is {total}, and not {known[name]}")
    return found


def _axes(tensor: Tensor, words: list[str], known: Mapping[str, int]) -> list[Axis]:
    """The axes of one tensor by these words."""
    shape = tuple(tensor.shape)
    if REST in words:
        at = words.index(REST)
        after = words[at + 1 :]
        words = [*words[:at], *map(str, range(at, len(shape) - len(after))), *after]
    if len(shape) != len(words):
        raise _MisfitError(f"it has {len(words)} axes")
    axes: list[Axis] = []
    for word, size, stride in zip(words, shape, tensor.stride(), strict=True):
        outer, _, inner = word.rpartition(".")
        parts = known.get(outer, 0) if outer else 1
        if not parts or size % parts or not size:
            raise _MisfitError(f"{size} is not a size that {word} can have")
        step = stride * tensor.element_size()
        if outer:
            axes.append(Axis(outer, parts, step * (size // parts)))
        axes.append(Axis(inner, size // parts, step))
    return axes


def sizes_of(axes: Iterable[Axis]) -> dict[str, int]:
    """The whole size of every name, over all axes it is split over."""
    sizes: dict[str, int] = {}
    for axis in axes:
        sizes[axis.name] = sizes.get(axis.name, 1) * axis.size
    return sizes


def _names(layouts: Iterable[Layout]) -> set[str]:
    words = {word for layout in layouts for axes in layout.tensors for word in axes.split()}
    return {name for word in words for name in word.split(".")} - {*FIXED, REST, ""}


def _listed(layouts: Sequence[Layout]) -> str:
    return ", ".join(map(str, layouts))
