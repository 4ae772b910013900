"""LoRA adapters: the digest of an adapter's files goes into the keys of its requests' blocks.

vLLM's hashes cover an adapter's name and path, but not its files, which may change. Workers
read the files when they first need the adapter, and again after they dropped it, at times that the
scheduler does not know.

Invariants:

1. Blocks of an adapter are kept if its files are older than this engine: every worker then read the
   files that the digest covers.
2. If the files, or a link to them, are younger or change, no block of that adapter is found or kept
   until the engine is restarted, and one warning is logged. The blocks that a step stored are
   published only after another check of the files.
3. A snapshot of a Hugging Face cache is identified by its commit, however young it is.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvcache.connectors.vllm.identity.fields import settings_of
from kvcache.connectors.weights import (
    UnknownWeightsError,
    identify,
    trail,
    weight_files,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

log = logging.getLogger(__name__)

SETTINGS: Final = ("lora_dtype", "target_modules", "enable_tower_connector_lora")
"""The settings of vLLM's LoRA config that change what an adapter computes."""

MOST_ADAPTERS: Final = 4096  # in each table

_Name = tuple[str, str]  # name and path
_Stamp = tuple[tuple[int, ...], ...]


class _Adapter(NamedTuple):
    digest: bytes
    files: tuple[Path, ...]
    links: tuple[Path, ...]  # on the way to the files
    stamp: _Stamp


class Adapters:
    """The adapters of one engine.

    Args:
        settings: of the engine, which change what an adapter computes.
        trusted: whether equal names and paths mean equal adapters, as the user has promised.
        started_ns: when the engine was started, in nanoseconds since 1970; ``None`` is now.
    """

    def __init__(
        self,
        settings: Sequence[str] = (),
        *,
        trusted: bool = False,
        started_ns: int | None = None,
    ) -> None:
        self._settings = "\n".join(settings).encode()
        self._trusted = trusted
        self._started_ns = time.time_ns() if started_ns is None else started_ns
        self._known: OrderedDict[_Name, _Adapter] = OrderedDict()
        self._refused: OrderedDict[_Name, None] = OrderedDict()
        self._ids: OrderedDict[int, _Name] = OrderedDict()
        self._used: set[_Name] = set()  # by stores of steps that may not have ended

    @classmethod
    def of(cls, vllm_config: VllmConfig, *, trusted: bool) -> Adapters:
        """Return the adapters of an engine that starts now."""
        config = getattr(vllm_config, "lora_config", None)
        return cls(settings_of(config, SETTINGS), trusted=trusted)

    def keeps(self, request: Request) -> bool:
        """Whether blocks of ``request`` may be found and kept."""
        lora = request.lora_request
        if lora is None or self._trusted:
            return True
        name = _name(lora)
        if self._ids.setdefault(lora.lora_int_id, name) != name:
            self._refuse(self._ids[lora.lora_int_id], "another one was loaded in its place")
            self._ids[lora.lora_int_id] = name
        _bound(self._ids)
        if getattr(lora, "load_inplace", False):
            self._refuse(name, "it was loaded in place")
        if name not in self._refused and name not in self._known:
            self._identify(name)
        return name not in self._refused

    def keys(self, request: Request, keys: list[bytes]) -> list[bytes]:
        """Return ``keys`` combined with the adapter of ``request``; none where `keeps` is false.

        The function is its own inverse: from combined keys it returns the original ones.
        """
        lora = request.lora_request
        if lora is None or not keys:
            return keys
        if not self.keeps(request):
            return []
        name, nbytes = _name(lora), len(keys[0])
        weights = b""
        if not self._trusted:
            weights = self._known[name].digest
            self._used.add(name)
        layout = b"3d" if getattr(lora, "is_3d_lora_weight", False) else b"2d"
        digest = blake2b(weights + layout + self._settings, digest_size=nbytes).digest()
        mask = int.from_bytes(digest, "little")
        return [(int.from_bytes(key, "little") ^ mask).to_bytes(nbytes, "little") for key in keys]

    def changed(self, *, done: bool) -> bool:
        """Whether the files of an adapter in use have changed.

        Call it when a step has ended, before its stores are published. ``done`` is whether no store
        is in progress.
        """
        changed = False
        for name in self._used:
            if (adapter := self._known.get(name)) is not None:
                try:
                    same = _stamp(adapter.files, adapter.links) == adapter.stamp
                except OSError:
                    same = False
                if not same:
                    self._refuse(name, "its files changed")
            changed |= name in self._refused
        if done or changed:
            self._used.clear()
        return changed

    def _identify(self, name: _Name) -> None:
        """Identify an adapter if its files have not changed since the engine started."""
        place = Path(name[1]).expanduser().absolute()
        try:
            if not place.is_dir():
                self._refuse(name, "its path is no folder on this host")
                return
            files = (place, *weight_files(place).values())
            links = tuple(
                path
                for path in {each for file in files for each in trail(file)}
                if path.is_symlink()
            )
            stamp = _stamp(files, links)
            found = identify(place, self._started_ns)
            digest = blake2b(found.encode(), person=b"kvcache.lora").digest()
            if _stamp(files, links) != stamp:
                self._refuse(name, "its files changed")
                return
        except (OSError, UnknownWeightsError) as error:
            self._refuse(name, str(error))
            return
        self._known[name] = _Adapter(digest, files, links, stamp)
        _bound(self._known)

    def _refuse(self, name: _Name, reason: str) -> None:
        if name not in self._refused:
            log.warning(
                "kvcache: adapters: LoRA adapter %r of %r refused (%s); "
                "its blocks are neither found nor kept",
                *name,
                reason,
            )
        self._refused[name] = None
        self._known.pop(name, None)
        _bound(self._refused)


def _name(lora: LoRARequest) -> _Name:
    return lora.lora_name, lora.lora_path


def _stamp(files: Iterable[Path], links: Iterable[Path]) -> _Stamp:
    """Return values; at least one of them changes when a file is replaced or written."""
    found = [*(file.stat() for file in files), *(link.lstat() for link in links)]
    return tuple(
        (each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns)
        for each in found
    )


def _bound(table: OrderedDict[Any, Any]) -> None:
    """Forget the oldest entries. Their adapters are identified again when they are next used."""
    while len(table) > MOST_ADAPTERS:
        table.popitem(last=False)
