"""One round trip: store pages, wipe them, load them into other blocks, and run attention."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kvcache.cli.selftest.kernels import AttentionKernel, TorchKernel
from kvcache.cli.selftest.samples import SIZES, Sample, Tensor

if TYPE_CHECKING:
    from kvcache.connectors.paged import AttachedCache, PagedCache
    from kvcache.connectors.transfer.autotune import BackendSelector
    from kvcache.connectors.transfer.streams import Device

ROUNDS = 3  # the first one compiles copies and, on a GPU, pins memory; the best one counts
SHARPNESS = 8.0  # of the queries: few tokens decide the result, so that it is not near zero
TOLERANCE = 0.05  # between the results of a kernel and of torch, which round differently


@dataclass
class RoundTrip:
    """The result of a round trip.

    Attributes:
        layout: the name of the sample.
        order: the order of the stored bytes.
        skipped: why there was none; empty if there was one.
        copied_by: the copy backends that copied.
        save_gib_s: the rate of the fastest save, in GiB per second; load_gib_s alike.
        wrong_elements: how many numbers of the cache are wrong after a load.
        attention: by kernel, how many numbers of its result differ from those before the wipe.
        errors: other failures.
    """

    layout: str
    order: str
    skipped: str = ""
    copied_by: list[str] = field(default_factory=list)
    save_gib_s: float = 0.0
    load_gib_s: float = 0.0
    wrong_elements: int = 0
    attention: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether anything differs, or a copy or a kernel raised an error."""
        return bool(self.wrong_elements or any(self.attention.values()) or self.errors)


def make_round_trip(
    sample: Sample,
    order: Literal["raw", "canonical"],
    kernels: Mapping[str, AttentionKernel],
    blocks: int,
    devices: dict[str, Device],
    on_rounds: Callable[[int], object] = lambda _: None,
) -> RoundTrip:
    """Make a round trip of `blocks` blocks of a sample that has twice as many.

    Args:
        kernels: those that run on this device.
        devices: the device of earlier round trips, by name, so that each GPU measures its copy
            backends once.
        on_rounds: called with the number of rounds that are done or left out since the last call.
    """
    from kvcache.connectors.layout import LayoutError
    from kvcache.connectors.paged import PagedCache
    from kvcache.sizes import Size
    from kvcache.slab import slot_nbytes_for
    from kvcache.stack import Stack
    from kvcache.tiers.dram import DramTier

    result = RoundTrip(sample.name, order)
    try:
        cache = PagedCache(sample.layers, sample.layout, order=order)
    except LayoutError as error:
        if order == "raw":  # which every layout has
            raise
        result.skipped = str(error)
        on_rounds(ROUNDS)
        return result
    if cache.device is not None:
        cache.device = devices.setdefault(cache.placement.device, cache.device)
    nbytes = cache.block_nbytes
    tier = DramTier(block_nbytes=nbytes, capacity=Size(blocks * slot_nbytes_for(nbytes)))
    tier.slab.wait_populated()
    readers = {name: kernel for name, kernel in kernels.items() if kernel.reads(sample.layout)}
    with Stack(tier, profile="selftest") as stack, cache.attach(stack) as attached:
        if (selector := _backend_selector(cache)) is not None:
            selector.used.clear()
        for number in range(ROUNDS):
            stack.clear()
            try:
                _run_round(result, sample, cache, attached, readers, blocks, number)
            except Exception as error:  # noqa: BLE001 - a copy failed; other layouts are tested too
                result.errors.append(f"{type(error).__name__}: {error}")
                on_rounds(ROUNDS - number)
                break
            on_rounds(1)
        result.copied_by = sorted(selector.used) if selector is not None else ["cpu"]
    return result


def _run_round(
    result: RoundTrip,
    sample: Sample,
    cache: PagedCache,
    attached: AttachedCache,
    readers: Mapping[str, AttentionKernel],
    blocks: int,
    number: int,
) -> None:
    """Store, wipe, load and compare once. Each round has blocks and numbers of its own."""
    import torch

    from kvcache import block_keys

    tokens = SIZES["tokens"]
    ids = random.Random(number).sample(range(2 * blocks), 2 * blocks)
    stored, loaded = ids[:blocks], ids[blocks:]
    sample.fill(number)
    originals = sample.pages(stored)
    length = blocks * tokens - tokens // 3  # the last page is not full
    reference = _attend(result, TorchKernel(), sample, stored, length)
    before = {TorchKernel.name: reference}
    for name in readers.keys() - before.keys():
        before[name] = _attend(result, readers[name], sample, stored, length)
    keys = block_keys(range(number, number + blocks * tokens), tokens)
    gib = blocks * cache.block_nbytes / 2**30

    _synchronize(originals[0])
    begin = time.perf_counter()
    saved = attached.save(stored, keys)
    result.save_gib_s = max(result.save_gib_s, gib / (time.perf_counter() - begin))
    sample.wipe()
    _synchronize(originals[0])
    begin = time.perf_counter()
    count = attached.load(keys, loaded)
    result.load_gib_s = max(result.load_gib_s, gib / (time.perf_counter() - begin))
    if (saved.stored, count) != (blocks, blocks):
        result.errors.append(f"{saved.stored} blocks stored and {count} loaded, of {blocks}")

    for page, original in zip(sample.pages(loaded), originals, strict=True):
        result.wrong_elements += _count_different(page, original)
    for wiped in sample.pages(stored):  # the load must not write to these blocks
        result.wrong_elements += int(torch.count_nonzero(~torch.isnan(wiped)))
    for name, kernel in readers.items():
        expected, found = before[name], _attend(result, kernel, sample, loaded, length)
        if expected is not None and found is not None and reference is not None:
            different = sum(map(_count_different, found, expected))
            result.attention[name] = result.attention.get(name, 0) + different
            if distant := sum(map(_count_distant, expected, reference)):
                result.errors.append(f"{name}: {distant} numbers are unlike those of torch")


def _attend(
    result: RoundTrip, kernel: AttentionKernel, sample: Sample, table: Sequence[int], length: int
) -> list[Tensor] | None:
    """Return the attention of every layer; None if the kernel raised an error."""
    import torch

    outs = []
    for number, layer in enumerate(sample.layers):
        keys, _ = sample.keys_and_values(layer)
        generator = torch.Generator(keys.device).manual_seed(number)
        shape = (keys.shape[2], keys.shape[3:].numel())
        queries = torch.randn(shape, generator=generator, device=keys.device) * SHARPNESS
        try:
            out = kernel.attend(queries.to(keys.dtype), sample, layer, table, length)
        except Exception as error:  # noqa: BLE001 - a kernel of another package
            result.errors.append(f"{kernel.name}: {type(error).__name__}: {error}")
            return None
        outs.append(out)
    return outs


def _count_different(one: Tensor, other: Tensor) -> int:
    """Count the numbers that differ in a bit; NaN does not equal itself."""
    import torch

    return int(torch.count_nonzero(one.view(torch.int16) != other.view(torch.int16)))


def _count_distant(one: Tensor, other: Tensor) -> int:
    """Count the numbers that differ by more than the tolerance, or are NaN."""
    near = (one.float() - other.float()).abs() <= TOLERANCE  # False for NaN
    return int(near.numel()) - int(near.sum())


def _synchronize(tensor: Tensor) -> None:
    """Wait until the device has done all work."""
    import torch

    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def _backend_selector(cache: PagedCache) -> BackendSelector | None:
    """Return what chooses a GPU's copy backends, after its trial has ended; None on a CPU."""
    if cache.device is not None:
        from kvcache.connectors.transfer.cuda import CudaDevice

        if isinstance(cache.device, CudaDevice):
            cache.device.wait_for_trial()
            return cache.device.selector
    return None
