"""The extents in which a slab is pinned."""

from __future__ import annotations

from random import Random

import pytest

pytest.importorskip("numpy")

from kvcache.connectors.transfer import pinning
from kvcache.connectors.transfer.pinning import SlabPinning
from tests.support.reordering_device import ReorderingDevice

ADDRESS, PAGE = 1 << 30, 4096


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> ReorderingDevice:
    monkeypatch.setattr(pinning, "EXTENT_NBYTES", 10 * PAGE)
    return ReorderingDevice(Random(0))


def slab_pinning(device: ReorderingDevice, slots: int, pages: int) -> SlabPinning:
    return SlabPinning(device, address=ADDRESS, slots=slots, slot_nbytes=pages * PAGE)


@pytest.mark.parametrize(
    ("pages", "extent"), [(1, 10), (3, 9), (10, 10), (11, 11)], ids=lambda pages: f"{pages} pages"
)
def test_pin_slots_pins_extents_of_whole_slots(
    pages: int, extent: int, device: ReorderingDevice
) -> None:
    pinned = slab_pinning(device, 20, pages)
    pinned.pin_slots(20)
    nbytes = list(device.pinned.values())
    assert set(nbytes[:-1]) == {extent * PAGE}
    assert sum(nbytes) == pinned.pinned_nbytes == 20 * pages * PAGE
    ends = [address + count for address, count in device.pinned.items()]
    assert list(device.pinned) == [ADDRESS, *ends[:-1]]


def test_pin_slots_before_the_last_slot_pins_full_extents_alone(device: ReorderingDevice) -> None:
    pinned = slab_pinning(device, 25, 1)
    for slots, nbytes in [(9, 0), (19, 10), (19, 10), (20, 20), (24, 20), (25, 25)]:
        pinned.pin_slots(slots)
        assert pinned.pinned_nbytes == nbytes * PAGE
    assert len(device.pinned) == 3


def test_pin_slots_pauses_after_each_extent(device: ReorderingDevice) -> None:
    pauses: list[float] = []
    SlabPinning(device, address=ADDRESS, slots=25, slot_nbytes=PAGE, pause=pauses.append).pin_slots(
        25
    )
    assert len(pauses) == 3
    assert min(pauses) >= 0


def test_pin_slots_after_a_failure_pins_no_more(device: ReorderingDevice) -> None:
    pinned = slab_pinning(device, 20, 1)
    pinned.pin_slots(10)
    device.pin_error = "out of memory"
    pinned.pin_slots(20)
    device.pin_error = ""
    pinned.pin_slots(20)
    assert (pinned.pinned_nbytes, pinned.error) == (10 * PAGE, "out of memory")


def test_close_unpins_all_and_later_calls_pin_nothing(device: ReorderingDevice) -> None:
    pinned = slab_pinning(device, 20, 1)
    pinned.pin_slots(10)
    pinned.close()
    pinned.pin_slots(20)
    assert device.pinned == {}
