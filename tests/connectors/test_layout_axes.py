"""Layouts: how they are found from shapes, why they are refused, and where the runs lie."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcache.connectors.layout.axes import LAYOUTS, Layout, LayoutError
from kvcache.connectors.layout.canonical import canonical_format_id
from kvcache.connectors.layout.placement import MAX_RUNS, BlockRun, Placement, place
from tests.support.paged_caches import KINDS, LATENT, Geometry, tensors

ALL = KINDS | LATENT
ROOT = Path(__file__).resolve().parents[2]


def block_bytes(placement: Placement, block: int) -> bytes:
    return b"".join(
        ctypes.string_at(page.address + block * page.stride, page.nbytes)
        for page in placement.runs()
    )


# Found from shapes


@pytest.mark.parametrize("name", ALL)
def test_place_finds_the_layout_from_shapes_and_sizes(name: str) -> None:
    kind = ALL[name]
    layers = kind.make(Geometry(heads=1 if name in LATENT else 3))
    sizes = {"tokens": 16} if name in KINDS else {"tokens": 16, "latent": 32}
    placement = place(layers, None, **sizes)
    assert placement.layout.name == kind.layout
    assert placement.blocks == 12
    assert placement.device == "cpu"
    assert placement.element_nbytes == 2
    assert placement.format_id == place(layers, kind.layout).format_id


AMBIGUOUS: dict[str, tuple[Any, dict[str, int], list[str]]] = {
    "two blocks": (torch.zeros(2, 2, 16, 8, 4), {"tokens": 16}, ["kv-first", "blocks-first"]),
    "as many heads as tokens": (
        torch.zeros(2, 9, 16, 16, 4),
        {"tokens": 16, "heads": 16},
        ["kv-first", "kv-first-hnd"],
    ),
    "no block size": (torch.zeros(9, 2, 16, 8, 4), {}, ["blocks-first", "blocks-first-hnd"]),
    "one head, or a latent": (torch.zeros(9, 1, 16, 64), {"tokens": 16}, ["packed", "mla-packed"]),
    "a pair": ((torch.zeros(9, 8, 16, 4), torch.zeros(9, 8, 16, 4)), {}, ["pair", "pair-hnd"]),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_place_of_an_ambiguous_shape_raises_with_the_candidates(name: str) -> None:
    layer, sizes, layouts = AMBIGUOUS[name]
    with pytest.raises(LayoutError, match="its layout may be") as raised:
        place([layer], None, **sizes)
    message = str(raised.value).partition("its layout may be")[2].partition("; pass")[0]
    assert re.findall(r"[a-z-]+(?= \[)", message) == layouts
    for layout in layouts:
        assert place([layer], layout, **sizes).layout.name == layout


def test_place_with_a_size_of_one_candidate_finds_it() -> None:
    cache = torch.zeros(9, 1, 16, 64)
    assert place([cache], latent=64).layout.name == "mla-packed"
    assert place([cache], heads=1).layout.name == "packed"
    assert place([cache], dim=32).layout.name == "packed"


def test_place_with_one_unambiguous_layer_finds_the_layout_of_all() -> None:
    two, three = torch.zeros(2, 2, 16, 8, 4), torch.zeros(2, 3, 16, 8, 4)
    with pytest.raises(LayoutError, match="several block counts: 2, 3"):
        place([two, three], tokens=16)  # kv-first fits both, and then their block counts differ


def test_place_of_an_unknown_shape_raises_with_the_shape_and_all_layouts() -> None:
    cache = torch.zeros(3, 9, 16, dtype=torch.float16).transpose(0, 2)
    with pytest.raises(LayoutError) as raised:
        place({"model.layers.0": cache, "model.layers.1": cache}, tokens=5)
    message = str(raised.value)
    assert message.startswith(
        "layer model.layers.0 is torch.float16 of shape (16, 9, 3), strides (1, 16, 144),"
        " with {'tokens': 5}, which has no known layout"
    )
    for layout in LAYOUTS.values():
        assert (str(layout) in message) == (layout.name != "opaque")
    assert "layout='opaque'" in message


MISMATCHES: dict[str, tuple[Any, str, dict[str, int], str]] = {
    "no such name": (torch.zeros(9, 16, 4), "nhd", {}, "no layout 'nhd'; there are kv-first, "),
    "rank": (torch.zeros(2, 9, 16, 4), "kv-first", {}, "a tensor of it has 5 axes"),
    "not two": (torch.zeros(3, 9, 16, 8, 4), "kv-first", {}, "kv is 3, not 2"),
    "one tensor": (torch.zeros(9, 16, 8, 4), "pair", {}, "a layer of it has 2 tensors, not 1"),
    "size": (torch.zeros(9, 16, 4), "mla", {"tokens": 32}, "tokens is 16, not 32"),
    "no such axis": (torch.zeros(9, 16, 4), "mla", {"heads": 8}, "it has no axis heads"),
    "odd size": (torch.zeros(9, 2, 16, 5), "packed", {}, "kv.dim cannot have size 5"),
    "empty": (torch.zeros(9, 0, 4), "mla", {}, "tokens cannot have size 0"),
    "K and V differ": (
        (torch.zeros(9, 2, 4, 16, 8), torch.zeros(9, 2, 64, 16)),
        "paged-attention",
        {},
        "dim is 64, not 32",
    ),
    "elements at one address": (
        torch.zeros(9, 1, 4).expand(9, 16, 4), "mla", {}, "elements overlap along axis tokens",
    ),
    "blocks at one address": (
        torch.zeros(1, 16, 4).expand(9, 16, 4), "mla", {}, "elements overlap along axis blocks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISMATCHES)
def test_place_with_a_layout_that_does_not_fit_raises(name: str) -> None:
    layer, layout, sizes, message = MISMATCHES[name]
    with pytest.raises(LayoutError, match=re.escape(message)):
        place([layer], layout, **sizes)


def test_place_with_too_many_runs_raises() -> None:
    cache = torch.zeros(65, 65, 9).transpose(0, 2)
    with pytest.raises(LayoutError, match=rf"has {65 * 65} runs of 4 bytes; at most {MAX_RUNS}"):
        place([cache], "mla")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "there are no layers"),
        ([torch.zeros(9, 16, 4), torch.zeros(8, 16, 4)], "several block counts: 8, 9"),
        ([torch.zeros(9, 16, 4), torch.zeros(9, 16, 4, device="meta")], "several devices"),
        ([torch.ones(9, 16, 4)] * 2, "are the same memory"),
    ],
)
def test_place_of_incompatible_layers_raises(layers: list[Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        place(layers, "mla")


def test_place_with_a_custom_layout_uses_its_axes() -> None:
    custom = Layout("custom", ("heads blocks tokens dim", "heads blocks tokens width"))
    keys, values = torch.randn(2, 9, 16, 8), torch.randn(2, 9, 16, 4)
    placement = place([(keys, values)], custom, tokens=16)
    assert placement.blocks == 9
    assert len(placement.runs()) == 4  # a run of K, and of V, for each head
    both = keys[:, 3].numpy().tobytes() + values[:, 3].numpy().tobytes()
    assert block_bytes(placement, 3) == both
    with pytest.raises(LayoutError, match=r"no canonical order: .* this layout has 2, and width"):
        canonical_format_id(placement)


@pytest.mark.parametrize(
    ("tensors", "shapes", "wrong"),
    [
        (("blocks layers tokens heads dim",), [(9, 2, 16, 3, 8)], "this layout has 1, and layers"),
        (("blocks kv tokens dim",) * 2, [(9, 2, 16, 8)] * 2, "this layout has 2, and kv"),
        (("blocks tokens dim",) * 3, [(9, 16, 8)] * 3, "this layout has 3, and no others"),
    ],
)
def test_canonical_order_of_unsupported_tensors_raises(
    tensors: tuple[str, ...], shapes: list[tuple[int, ...]], wrong: str
) -> None:
    layer = [torch.zeros(shape) for shape in shapes]
    placement = place([layer], Layout("custom", tensors))
    assert placement.block_nbytes == sum(tensor[0].nbytes for tensor in layer)
    with pytest.raises(LayoutError, match=wrong):
        canonical_format_id(placement)


def test_layout_without_an_axis_of_blocks_raises() -> None:
    with pytest.raises(LayoutError, match="one axis of 'tokens heads' must be blocks"):
        Layout("custom", ("blocks tokens", "tokens heads"))


def test_documentation_lists_every_layout() -> None:
    page = (ROOT / "docs/layouts.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"(?m)^\| `([a-z-]+)` \| (.* \|)$", page))
    assert list(rows) == list(LAYOUTS)
    for name, layout in LAYOUTS.items():
        axes, used_by = rows[name].removesuffix(" |").rsplit(" | ", 1)
        assert used_by == layout.used_by
        assert re.findall(r"`(.*?)`", axes) == list(dict.fromkeys(layout.tensors))


# Where the runs lie


@pytest.mark.parametrize("name", ALL)
def test_runs_of_all_blocks_cover_the_cache_once(name: str) -> None:
    """Mark the runs of every block, and check that this marks every byte of the cache."""
    kind = ALL[name]
    g = Geometry(heads=1 if name in LATENT else 3)
    layers = kind.make(g)
    placement = place(layers, kind.layout)
    assert placement.block_nbytes * g.blocks == sum(tensor.nbytes for tensor in tensors(layers))
    for page in placement.runs():
        for block in range(g.blocks):
            at = page.address + block * page.stride
            before = ctypes.string_at(at, page.nbytes)
            assert before == bytes(page.nbytes)  # no other run has marked it
            ctypes.memset(at, block + 1, page.nbytes)
    marked = torch.stack([tensor.view(torch.uint8).min() for tensor in tensors(layers)])
    assert marked.min() == 1
    for keys, values in map(kind.view, layers):
        for part in (keys, values):
            for block in range(g.blocks):
                assert (part[block].contiguous().view(torch.uint8) == block + 1).all()


RUNS = {  # of a block of a layer
    "kv-first": 2,
    "blocks-first": 1,
    "blocks-first-hnd": 1,
    "packed": 1,
    "packed, tokens first in memory": 1,
    "packed, layers interleaved": 1,
    "packed, heads outside blocks": 3,
    "pair": 2,
    "paged-attention": 2,
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_of_a_block_are_as_few_as_possible(name: str) -> None:
    placement = place(KINDS[name].make(Geometry(layers=1)), KINDS[name].layout)
    assert len(placement.runs()) == RUNS[name]


def test_format_id_depends_on_meaning_and_not_on_strides() -> None:
    g = Geometry(tokens=32)
    format_id = {name: tuple(place(k.make(g), k.layout).format_id) for name, k in KINDS.items()}
    assert format_id["kv-first"] == format_id["blocks-first"]  # K, then V, tokens by tokens
    assert format_id["kv-first-hnd"] == format_id["blocks-first-hnd"]
    assert format_id["kv-first-hnd"] == format_id["kv-first, heads first in memory"]
    assert format_id["packed"] == format_id["packed, layers interleaved"]
    assert format_id["packed"] == format_id["packed, heads outside blocks"]
    assert len(set(format_id.values())) == 7
    one = KINDS["kv-first"]
    others = [Geometry(tokens=64), Geometry(tokens=32, dim=64), Geometry(tokens=32, layers=3)]
    others += [Geometry(tokens=32, dtype=torch.float16)]
    assert len({tuple(place(one.make(o), one.layout).format_id) for o in (g, *others)}) == 5


@st.composite
def strided(draw: st.DrawFn) -> tuple[Any, int]:
    """Draw a tensor with axes in any order in memory and gaps between, and its axis of blocks."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), 1
    for axis in order:
        strides[axis] = step
        step *= shape[axis] + draw(st.integers(0, 2))
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.int64]))
    memory = torch.arange(step + 3).to(dtype)
    return memory.as_strided(shape, strides, draw(st.integers(0, 3))), draw(
        st.integers(0, len(shape) - 1)
    )


@given(strided())
def test_runs_of_any_strides_are_in_memory_order(drawn: tuple[Any, int]) -> None:
    tensor, axis = drawn
    names = [f"n{at}" for at in range(tensor.ndim)]
    names[axis] = "blocks"
    placement = place([tensor], Layout("any", (" ".join(names),)))
    assert placement.blocks == tensor.shape[axis]
    [part] = placement.tensors
    for block in range(placement.blocks):
        inside = tensor.select(axis, block)
        found = torch.frombuffer(bytearray(block_bytes(placement, block)), dtype=tensor.dtype)
        assert sorted(found.tolist()) == sorted(inside.flatten().tolist())
        in_order = [names.index(a.name) for a in part.axes_by_stride]
        in_order = [at - (at > axis) for at in in_order]
        rest = [at for at in range(inside.ndim) if at not in in_order]
        assert found.tolist() == inside.permute((*rest, *in_order)).flatten().tolist()


@pytest.mark.parametrize("shape", [(0, 8, 1), (8, 7, 1), (8, 8, 0)])
def test_block_run_with_invalid_sizes_raises(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        BlockRun(0, *shape)


def test_import_of_placement_loads_no_torch_numba_or_numpy() -> None:
    code = "import sys, kvcache.connectors.layout.placement; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "numba", "numpy"} & set(done.stdout.split())
