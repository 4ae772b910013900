"""`kvcache selftest`: round trips in every layout, and the calls of attention kernels."""

from __future__ import annotations

import ctypes
import io
import json
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvcache import cli
from kvcache.cli import selftest
from kvcache.cli.selftest.kernels import KERNELS, AttentionKernel, Flashinfer, TorchKernel
from kvcache.cli.selftest.round_trip import ROUNDS, make_round_trip
from kvcache.cli.selftest.samples import BLOCKS_OUTERMOST, SIZES, open_sample, sample_names
from kvcache.connectors.layout import LAYOUTS
from kvcache.connectors.transfer.cpu import CpuCopier

BLOCKS = 3
TOKENS = SIZES["tokens"]


def attend(queries: Any, keys: Any, values: Any, table: Sequence[int], length: int) -> torch.Tensor:
    """Attention of `queries` over pages `[blocks, tokens, heads, dim]`, by torch."""
    parts = (
        part[list(table)].flatten(0, 1)[:length].transpose(0, 1)[None] for part in (keys, values)
    )
    return scaled_dot_product_attention(queries[None, :, None], *parts)[0, :, 0]


def flash_attn_with_kvcache(
    q: Any, k_cache: Any, v_cache: Any, *, cache_seqlens: Any, block_table: Any
) -> torch.Tensor:
    """As in flash-attn: q is [batch, 1, heads, dim], pages are [blocks, tokens, heads, dim]."""
    assert q.dim() == k_cache.dim() == v_cache.dim() == 4
    assert k_cache.shape[1] % 256 == 0
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1  # else flash-attn copies all pages
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    [table], [length] = block_table.tolist(), cache_seqlens.tolist()
    return attend(q[0, 0], k_cache, v_cache, table, length)[None, None]


class PagedBlockDiagonalPaddedKeysMask:
    """The mask of xFormers: page_size tokens of each block of block_tables, up to kv_seqlen."""

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: torch.Tensor,
        page_size: int,
    ) -> SimpleNamespace:
        assert list(q_seqlen) == [1] * len(block_tables)
        return SimpleNamespace(lengths=kv_seqlen, tables=block_tables, page_size=page_size)


def memory_efficient_attention_forward(
    query: Any, key: Any, value: Any, attn_bias: Any
) -> torch.Tensor:
    """As in xFormers: [1, tokens of all sequences, heads, dim]."""
    assert query.shape[0] == key.shape[0] == 1
    keys, values = (part[0].unflatten(0, (-1, attn_bias.page_size)) for part in (key, value))
    [table], [length] = attn_bias.tables.tolist(), attn_bias.lengths
    return attend(query[0, 0], keys, values, table, length)[None, None]


class BatchDecodeWithPagedKVCacheWrapper:
    """As in FlashInfer: `plan` has the block table, `run` the queries and the pages."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert not float_workspace_buffer.any()
        self.kv_layout = kv_layout

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert indptr.tolist() == [0, len(indices)]
        assert 1 <= last_page_len[0] <= page_size
        assert q_data_type == kv_data_type == torch.bfloat16
        self.sizes = (page_size, num_kv_heads, head_dim)
        self.table = indices.tolist()
        self.length = (len(indices) - 1) * page_size + int(last_page_len[0])

    def run(self, q: torch.Tensor, paged_kv_cache: Any) -> torch.Tensor:
        if isinstance(paged_kv_cache, tuple):
            keys, values = paged_kv_cache
        else:
            keys, values = paged_kv_cache.unbind(1)
        if self.kv_layout == "HND":
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        assert tuple(keys.shape[1:]) == tuple(values.shape[1:]) == self.sizes
        return attend(q[0], keys, values, self.table, self.length)[None]


FMHA = SimpleNamespace(
    attn_bias=SimpleNamespace(PagedBlockDiagonalPaddedKeysMask=PagedBlockDiagonalPaddedKeysMask),
    memory_efficient_attention_forward=memory_efficient_attention_forward,
)
STAND_INS: dict[str, dict[str, Any]] = {
    "flash_attn": {"flash_attn_with_kvcache": flash_attn_with_kvcache},
    "xformers": {},
    "xformers.ops": {"fmha": FMHA},
    "flashinfer": {"BatchDecodeWithPagedKVCacheWrapper": BatchDecodeWithPagedKVCacheWrapper},
}
"""Modules with the signatures of the real ones, which compute with torch on a CPU."""


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, AttentionKernel]:
    """Install the stand-ins, and return kernels that run on a CPU."""
    for name, members in STAND_INS.items():
        install(monkeypatch, name, **members)
    for kernel in KERNELS.values():
        monkeypatch.setattr(type(kernel), "needs_gpu", False)
    return {**KERNELS, "flashinfer": Flashinfer()}


@pytest.fixture
def corrupt_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flip one bit of the last byte of the first slot before each load."""
    scatter = CpuCopier.scatter

    def corrupted(self: CpuCopier, slots: Any, blocks: Any, **options: Any) -> Any:
        geometry = self.geometries[0]
        ends = geometry.slab[0] + geometry.nbytes + slots[0] * geometry.slot_nbytes
        last = ctypes.c_uint8.from_address(int(ends.max()) - 1)
        last.value ^= 1
        return scatter(self, slots, blocks, **options)

    monkeypatch.setattr(CpuCopier, "scatter", corrupted)


def selftest_json(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["selftest", "--device", "cpu", "--json", *options])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("layout", sample_names())
def test_selftest_of_each_layout_passes(layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = selftest_json(capsys, "--layout", layout, "--blocks", str(BLOCKS))
    assert code == 0
    assert not found["failed"]
    assert {each["layout"] for each in found["round_trips"]} == {layout}
    made = [each for each in found["round_trips"] if not each["skipped"]]
    orders = {"raw"} if layout == "opaque" else {"raw", "canonical"}
    assert {each["order"] for each in made} == orders
    for each in made:
        assert each["attention"] == {"torch": 0}
        assert each["copied_by"] == ["cpu"]
        assert each["save_gib_s"] > 0 < each["load_gib_s"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_selftest_on_a_terminal_draws_a_progress_bar_and_erases_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    code, found = selftest_json(capsys, "--layout", "opaque", "--blocks", "1")
    assert (code, found["failed"]) == (0, False)
    drawn = terminal.getvalue()
    assert drawn.startswith("\r" + "." * 30 + "   0% ")
    assert drawn.endswith("\r\x1b[K")


@pytest.mark.parametrize(("layout", "order"), [("pair", "raw"), ("opaque", "canonical")])
def test_round_trip_reports_all_rounds(layout: str, order: Any) -> None:
    """A skipped one too, so that the progress bar reaches its end."""
    rounds: list[int] = []
    sample = open_sample(layout, 2 * BLOCKS, "cpu")
    make_round_trip(sample, order, {}, BLOCKS, {}, on_rounds=rounds.append)
    assert sum(rounds) == ROUNDS


def test_round_trip_with_a_copy_that_fails_reports_all_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError("no copy")

    monkeypatch.setattr(CpuCopier, "scatter", refuse)
    rounds: list[int] = []
    sample = open_sample("pair", 2 * BLOCKS, "cpu")
    result = make_round_trip(sample, "raw", {}, BLOCKS, {}, on_rounds=rounds.append)
    assert result.failed
    assert sum(rounds) == ROUNDS


def test_selftest_with_a_corrupted_byte_fails_with_layout_and_number(
    corrupt_load: None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "--layout", "kv-first", "--blocks", str(BLOCKS)]
    assert cli.main(["selftest", *options]) == 1
    out = capsys.readouterr().out
    assert "FAIL: kv-first, raw: 3 wrong numbers in the cache" in out  # one in each round
    assert "2 of 2 round trips failed" in out


def test_selftest_with_other_attention_fails_with_kernel_and_number(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Unsteady(TorchKernel):
        """Returns another number in each call."""

        calls = 0

        def attend(self, *arguments: Any) -> Any:
            self.calls += 1
            out = super().attend(*arguments)
            out[0, 0] += self.calls
            return out

    args = cli.parser().parse_args(
        ["selftest", "--device", "cpu", "--layout", "pair", "--blocks", "2"]
    )
    assert selftest.run(args, {"unsteady": Unsteady()}) == 1
    out = capsys.readouterr().out
    assert "FAIL: pair, raw: unsteady: 6 wrong numbers in the result of attention" in out


def test_selftest_reports_a_kernel_that_computes_other_attention_than_torch(
    stand_ins: dict[str, AttentionKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_all_zeros(*arguments: Any, **options: Any) -> Any:
        return torch.zeros_like(arguments[0])

    install(monkeypatch, "flash_attn", flash_attn_with_kvcache=of_all_zeros)
    sample = open_sample("pair", 2 * BLOCKS, "cpu")
    result = make_round_trip(sample, "raw", {"flash-attn": stand_ins["flash-attn"]}, BLOCKS, {})
    assert result.attention == {"flash-attn": 0}
    assert "numbers are unlike those of torch" in result.errors[0]
    assert result.failed


def test_selftest_reports_a_kernel_that_raises(
    stand_ins: dict[str, AttentionKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel image")

    install(monkeypatch, "flash_attn", flash_attn_with_kvcache=refuse)
    sample = open_sample("pair", 2 * BLOCKS, "cpu")
    kernels = {name: stand_ins[name] for name in ("torch", "flash-attn")}
    result = make_round_trip(sample, "raw", kernels, BLOCKS, {})
    assert "flash-attn: RuntimeError: no kernel image" in result.errors
    assert result.attention == {"torch": 0}
    assert result.failed


READ = [
    (name, sample)
    for name, kernel in KERNELS.items()
    for sample, layout in sample_names().items()
    if name != "torch" and kernel.reads(layout)
]


@pytest.mark.parametrize(("kernel", "sample"), READ)
def test_kernel_reads_pages_as_its_package_documents(
    kernel: str, sample: str, stand_ins: dict[str, AttentionKernel]
) -> None:
    """The stand-in checks the arguments, and computes what torch computes from the same pages."""
    result = make_round_trip(
        open_sample(sample, 2 * BLOCKS, "cpu"), "raw", {kernel: stand_ins[kernel]}, BLOCKS, {}
    )
    assert not result.errors
    assert result.attention == {kernel: 0}
    assert not result.failed


def test_every_kernel_of_an_extra_reads_the_layouts_that_its_row_names() -> None:
    readers = {"flash-attn": "flash-attn", "xFormers": "xformers", "FlashInfer": "flashinfer"}
    for layout in LAYOUTS.values():
        for named, kernel in readers.items():
            if named in layout.used_by and "vLLM" not in layout.used_by:
                assert KERNELS[kernel].reads(layout.name), layout


@pytest.mark.parametrize("name", sample_names())
def test_sample_views_have_keys_and_values_of_every_page(name: str) -> None:
    sample = open_sample(name, 2, "cpu")
    for layer in sample.layers:
        keys, values = sample.keys_and_values(layer)
        assert keys.shape[:2] == values.shape[:2] == (2, TOKENS)
        keys[1, 5, 0] = 7  # views: a write changes the tensors
    wiped = [int((tensor == 7).sum()) for tensor, _ in sample.tensors()]
    assert sum(wiped) >= len(sample.layers) * 128


def test_layers_of_a_block_lie_together_where_blocks_are_outermost() -> None:
    first, second = open_sample(BLOCKS_OUTERMOST, 2, "cpu").layers
    page = TOKENS * SIZES["heads"] * 2 * SIZES["dim"]
    assert second.data_ptr() - first.data_ptr() == page * first.element_size()
    assert first.stride(0) == 2 * page


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--layout", "kv-last"], "there is no layout 'kv-last'; there are blocks-first, "),
        (["--kernel", "sdpa"], "there is no kernel 'sdpa'; there are flash-attn, flashinfer, "),
        (["--kernel", "xformers"], "kernel xformers: "),
        (["--device", "gpu"], "--device is 'gpu'; it must be"),
        (["--device", "cuda:99"], "--device is 'cuda:99'; this machine has"),
        (["--device", "meta"], "--device is 'meta'; it must be"),
        (["--device", "cpu:0"], "--device is 'cpu:0'; it must be"),
    ],
)
def test_selftest_of_an_unknown_name_ends_with_one_error(
    options: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    device = [] if "--device" in options else ["--device", "cpu"]
    assert cli.main(["selftest", *device, *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert error in printed.err
    assert len(printed.err.splitlines()) == 1


def test_selftest_of_a_layout_that_the_kernel_does_not_read_ends_with_one_error(
    stand_ins: dict[str, AttentionKernel], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "--kernel", "xformers", "--layout", "mla"]
    assert cli.main(["selftest", *options]) == 2
    error = "selftest: kernel xformers does not read layout mla\n"
    assert capsys.readouterr().err == error


def test_selftest_lists_why_a_kernel_does_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, "flash_attn")
    monkeypatch.setitem(sys.modules, "xformers", None)
    code, found = selftest_json(capsys, "--layout", "mla", "--blocks", "1")
    assert code == 0
    assert found["kernels"]["torch"] == ""
    assert found["kernels"]["flash-attn"] == "needs a GPU"
    assert found["kernels"]["xformers"] == "not installed: pip install 'kvcache[xformers]'"
