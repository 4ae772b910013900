"""Notices that SGLang replaces the weights of a running engine.

SGLang keeps the storage backend over an update of the weights, and does not notify it. The hooks
here use SGLang's registry of hooks. `register` is one of its ``sglang.srt.plugins`` entry points:
SGLang calls it in every process before the engine starts, so no update is missed.

Invariants:

1. The count grows before weights change, after they have changed, and whenever SGLang has dropped
   all cached pages after that. So pages that were computed before an update and stored after it
   have other names than pages that were computed after it.
2. Without an update the count stays 0. A flush of the cache alone does not change it.
"""

from __future__ import annotations

import pkgutil
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, Literal

_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
UPDATES: Final = (
    f"{_UPDATER}.update_weights_from_disk",
    f"{_UPDATER}.update_weights_from_tensor",
    f"{_UPDATER}.update_weights_from_ipc",
    f"{_UPDATER}.load_weights_from_distributed",
    f"{_UPDATER}.begin_weight_update",
    f"{_UPDATER}.end_weight_update",
)
"""SGLang's functions that change weights. An update over RDMA has no function: it happens between
``begin_weight_update`` and ``end_weight_update``."""

RESET: Final = "sglang.srt.managers.cache_controller.HiCacheController.reset"
"""SGLang's function that ends the transfers of a cache and drops its pages."""

_SCHEDULER = "sglang.srt.managers.scheduler"


class WeightUpdates:
    """Counts the updates of the weights of this process.

    Attributes:
        count: 0 as long as the weights are those that the engine loaded at its start.
    """

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()
        self._registered: Literal["no", "before the start", "late"] = "no"

    def watch(self, *, before_start: bool) -> None:
        """Register the hooks, once.

        Args:
            before_start: whether the engine has not started yet. SGLang then installs the hooks
                after the last plugin has registered its own.
        """
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        with self._lock:
            if self._registered != "no":
                return
            self._registered = "before the start" if before_start else "late"
        for target in UPDATES:
            HookRegistry.register(target, self._around_update, HookType.AROUND)
        HookRegistry.register(RESET, self._around_reset, HookType.AROUND)
        if not before_start:
            HookRegistry.apply_hooks()

    def unseen_reason(self) -> str:
        """Return why an update may have been or may be missed; "" if none can be."""
        if self._registered != "before the start":
            return "SGLang did not load kvcache's plugin, which notices updates of the weights"
        for target in (*UPDATES, RESET):
            if not _is_hooked(target):
                return f"this SGLang has no {target}, by which kvcache notices updates"
        return ""

    def _add(self) -> None:
        with self._lock:
            self.count += 1

    def _around_update(self, update: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._add()
        try:
            return update(*args, **kwargs)
        finally:
            self._add()

    def _around_reset(self, reset: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return reset(*args, **kwargs)
        finally:
            if self.count:
                self._add()


def _is_hooked(target: str) -> bool:
    try:
        return hasattr(pkgutil.resolve_name(target), "__wrapped__")
    except (AttributeError, ImportError):
        return False


updates: Final = WeightUpdates()
"""The updates of this process."""


def register() -> None:
    """Watch the weights, in a process with a scheduler: only it has weights and a cache."""
    if _SCHEDULER in sys.modules:
        updates.watch(before_start=True)
