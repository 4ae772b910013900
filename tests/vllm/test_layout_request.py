"""The layout of the KV cache that the connector requests, as vLLM resolves it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.transfer.base import CopyGeometry
from kvcache.connectors.transfer.merged_runs import MergedRuns
from kvcache.connectors.vllm.vllm_names import LAYOUTS, has_name
from kvcache.connectors.vllm.worker.pages import RankPages
from tests.support.grouped_caches import full, grouped_caches, layers, state, window

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not has_name(LAYOUTS), reason="vLLM before 0.29 has no such layouts"),
]

NAME = {
    "kv_connector": "KVCacheConnector",
    "kv_connector_module_path": "kvcache.connectors.vllm",
    "kv_role": "kv_both",
}
ALL_LAYOUTS = ["LBNHC", "LBHNC", "BLNHC", "BLHNC", "BHLNC", "LHBNC"]


class FakeCuda:
    """The platform of a GPU of this compute capability."""

    device_type = "cuda"

    def __init__(self, major: int) -> None:
        self.major = major

    def is_cuda(self) -> bool:
        return True

    def get_device_capability(self) -> Any:
        return SimpleNamespace(major=self.major)


@pytest.fixture(params=[9], ids=["sm90"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)
    monkeypatch.setattr(vllm.platforms, "current_platform", FakeCuda(request.param))


def engine_config(**options: Any) -> Any:
    """Return the fields of a vLLM config that decide about the layout."""
    from vllm.config import KVTransferConfig

    options = {
        "block_size": 16,
        "own_block_size": False,
        "backend": None,
        "hybrid": False,
    } | options
    return SimpleNamespace(
        kv_transfer_config=KVTransferConfig(**options.get("transfer", NAME)),
        model_config=SimpleNamespace(is_hybrid=options["hybrid"], use_mla=False),
        cache_config=SimpleNamespace(
            kv_cache_layout=None,
            block_size=options["block_size"],
            user_specified_block_size=options["own_block_size"],
            kv_cache_dtype_skip_layers=options.get("skipped", []),
        ),
        attention_config=SimpleNamespace(
            backend=options["backend"], hisparse_config=options.get("hisparse")
        ),
    )


def backend(*names: str) -> Any:
    """Return a chosen backend that supports these layouts; all, without names."""
    layouts = tuple(SimpleNamespace(name=name) for name in names) or None
    of_class = SimpleNamespace(supported_kv_cache_layouts=lambda: layouts)
    return SimpleNamespace(get_class=lambda: of_class)


def resolved(config: Any, supported: list[str] = ALL_LAYOUTS) -> str:
    """Return the layout that vLLM uses if its backends support these."""
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout

    return str(resolve_kv_cache_layout(config, [supported]).name)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({}, "BLNHC"),
        ({"own_block_size": True}, "BLNHC"),
        ({"own_block_size": True, "block_size": 64}, "BLNHC"),
        ({"own_block_size": True, "block_size": 128}, "LBNHC"),  # FlashInfer would split it
        ({"hybrid": True}, "LBNHC"),
        ({"skipped": ["0"]}, "LBNHC"),
        ({"hisparse": object()}, "LBNHC"),
        ({"backend": backend()}, "BLNHC"),
        ({"backend": backend("LBHNC", "BLHNC")}, "BLHNC"),
        ({"backend": backend("LBNHC")}, "LBNHC"),
    ],
)
def test_layout_has_blocks_outermost_where_no_block_is_split(
    options: dict[str, Any], layout: str
) -> None:
    assert resolved(engine_config(**options)) == layout


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("platform", [10], indirect=True)
def test_layout_has_heads_first_on_gpus_where_flashinfer_needs_it() -> None:
    assert resolved(engine_config(), ["LBHNC", "BLHNC"]) == "BLHNC"


@pytest.mark.usefixtures("platform")
def test_layout_that_a_backend_does_not_support_is_replaced_by_vllm() -> None:
    assert resolved(engine_config(), ["LBHNC"]) == "LBHNC"


@pytest.mark.usefixtures("platform")
def test_layout_in_the_environment_has_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBNHC")
    assert resolved(engine_config()) == "LBNHC"


def test_no_layout_is_requested_on_a_cpu() -> None:
    assert resolved(engine_config()) == "LBNHC"


@pytest.mark.usefixtures("platform")
def test_no_layout_is_requested_under_multiconnector() -> None:
    """There it could contradict another connector, and the engine would not start."""
    other = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    transfer = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [NAME, other]},
    }
    assert resolved(engine_config(transfer=transfer)) == "LBHNC"


MODELS = {
    "one kind": layers(full=(32, full())),
    "windows": layers(window=(10, window()), full=(2, full())),
    "pages of two sizes": layers(window=(4, window(heads=4)), full=(2, full())),
    "states": layers(state=(6, state()), full=(2, full())),
}


@pytest.mark.parametrize("layout", ["BLNHC", "BLHNC", "LBNHC", "LBHNC"])
@pytest.mark.parametrize("model", MODELS)
def test_block_is_one_run_with_blocks_outermost(model: str, layout: str) -> None:
    """vLLM makes the groups and allocates their memory."""
    cache = grouped_caches(MODELS[model], layout=layout)
    pages = RankPages(cache.config, cache.caches)
    for member, nbytes in enumerate(pages.nbytes):
        runs = pages.runs(member, 0, nbytes)
        geometry = CopyGeometry(runs, slab_address=1 << 20, slots=2, slot_nbytes=nbytes)
        assert len(runs) == len(cache.config.kv_cache_groups[member].layer_names)
        assert len(MergedRuns(geometry)) == (1 if layout.startswith("BL") else len(runs))
