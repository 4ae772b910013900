"""The tier in a Mooncake pool.

All engines of the pool share the blocks. The names in the pool::

    kvcache:1:<namespace, hex>:<key, hex>  ->  one value: a block in its frame

Invariants:

* Mooncake can report success with wrong bytes: for a key that is twice in a batch, and for a block
  that was removed by force while it is read. So each key is in a batch once, and nothing is removed
  by force. The tier is used in frames, which detect what remains.
* A block that is leased cannot be removed. It is gone for this tier at once, and the next store of
  its key replaces it.
* A load returns when nothing writes to its buffers any more.
* A code for one key is a miss or a decline of that key, and is logged once for each code. A call
  without any answer raises ConnectionError.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, Final, Literal

from opentelemetry.trace import INVALID_SPAN, Span

from kvcache import host_memory, telemetry
from kvcache.inputs import check_timeout
from kvcache.keys import DIGEST_NBYTES, Branch
from kvcache.process import bind_to_process
from kvcache.reasons import ReasonCounter
from kvcache.sizes import Size
from kvcache.tier import Tier, TierUsage
from kvcache.tiers.mooncake import library
from kvcache.tiers.mooncake.client import ClientOpener, PoolClient, local_address
from kvcache.tiers.mooncake.gone_keys import GoneKeys
from kvcache.tiers.mooncake.library import describe_code
from kvcache.tiers.mooncake.memory import (
    AnyMemory,
    DaemonMemory,
    RegisteredMemory,
    TransferMemory,
    address_of,
)
from kvcache.tiers.mooncake.options import (
    check_hostname,
    metadata_address,
    parse_address,
)

log = logging.getLogger(__name__)

MAX_TRANSFERS: Final = 1024
"""The most blocks of one call of the library, which was seen to fail from 2260 on over TCP."""

UNLOGGED_CODES: Final = {library.ABSENT, library.EXISTS, library.LEASED}
"""Codes that are normal."""


class MooncakeTier(Tier):
    """A tier in a Mooncake pool.

    Args:
        master: ``HOST:PORT`` of the pool's ``mooncake_master``.
        metadata: ``P2PHANDSHAKE``, or the URL of the pool's metadata server.
        hostname: this host's name or address for the other hosts; "" is its IP address on the way
            to the master.
        protocol: how blocks are transferred between hosts.
        devices: the RDMA devices, separated by commas; "" finds them.
        share: how much memory this engine lends to the pool; by default none.
        daemon: ``HOST:PORT`` of this host's ``mooncake_client``, which then transfers the blocks
            and lends the memory; "" transfers them in this process.
        timeout_s: seconds after which the master counts as not answering.

    Attributes:
        abandoned_transfer_s: after how many seconds a failed transfer may still go on.

    Raises:
        ValueError: an option is invalid. A master that cannot be reached is logged instead, because
            it may come back.
        ImportError: Mooncake is not installed, or lacks a library of the system.
    """

    call_nbytes = 16 << 20
    abandoned_transfer_s: float = 55.0  # Mooncake stops waiting for a transfer after 60 s

    def __init__(
        self,
        *,
        master: str,
        metadata: str = "P2PHANDSHAKE",
        hostname: str = "",
        protocol: Literal["tcp", "rdma"] = "tcp",
        devices: str = "",
        share: Size = Size(0),  # noqa: B008 - a number
        daemon: str = "",
        timeout_s: float = 1.0,
    ) -> None:
        check_timeout(timeout_s)
        self._master = parse_address("master", master)
        self._server = parse_address("daemon", daemon) if daemon else self._master
        found = metadata_address(metadata)
        check_hostname(hostname)
        if devices and protocol != "rdma":
            raise ValueError('devices is for protocol = "rdma"')
        if daemon and (share or devices or protocol == "rdma"):
            raise ValueError(
                "daemon is set; share, protocol and devices are options of mooncake_client then"
            )
        if share and (shortage := host_memory.shortage(share)):
            raise ValueError(f"share {shortage}")
        self._settings: dict[str, object] = {
            "metadata_server": metadata,
            "global_segment_size": share,
            "local_buffer_size": 0,  # for calls that return bytes, which the tier does not make
            "protocol": protocol,
            "rdma_devices": devices,
            "master_server_addr": master,
        }
        self._hostname = hostname
        self._uses_daemon = bool(daemon)
        self._memory: TransferMemory
        if daemon:
            self._memory = DaemonMemory(self._server, timeout_s)
        else:
            self._memory = RegisteredMemory() if protocol == "rdma" else AnyMemory()
        self._library = library.load_library(timeout_s)
        self._gone = GoneKeys()
        self._errors = ReasonCounter()  # by code, of all methods
        self._declined = ReasonCounter()
        addresses = [self._server] if daemon or found is None else [self._server, found]
        self._opener = ClientOpener(
            addresses,
            self._open_daemon_client if daemon else self._open_client,
            timeout_s,
        )
        self._opener.wait_first_attempt(timeout_s)
        bind_to_process(self)

    def _open_client(self) -> PoolClient:
        """Open a client that transfers in this process. Raises OSError if that fails."""
        hostname = self._hostname or local_address(self._master)
        opened = self._library()
        code = opened.setup({"local_hostname": hostname, **self._settings})
        return self._prepared(opened, code)

    def _open_daemon_client(self) -> PoolClient:
        """Open a client of the host's daemon. Raises OSError if that fails."""
        opened = self._library()
        host, port = self._server
        code = opened.setup_dummy(0, 0, f"{host}:{port}")
        return self._prepared(opened, code)

    def _prepared(self, opened: Any, code: int) -> PoolClient:
        if code:
            raise OSError(f"Mooncake cannot open a client ({describe_code(code)})")
        client = PoolClient(opened)
        try:
            self._memory.attach(client)
        except BaseException:
            client.close()
            raise
        return client

    def allocate(self, nbytes: int) -> memoryview | None:
        """As the contract says: ``None`` over TCP, which transfers any memory.

        Raises:
            ConnectionError: no client is open yet, or it refuses the memory.
        """
        return self._memory.allocate(self._opener.client(), nbytes)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        asked, _ = self._gone.split([*dict.fromkeys(keys)])
        codes = self._call(self._opener.client(), "batch_is_exist", asked)
        self._check_answered("batch_is_exist", codes)
        held = {key for key, code in zip(asked, codes, strict=True) if code == 1}
        return [key in held for key in keys]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        """As the contract says; a value that can never be loaded is replaced by the next store."""
        buffers: dict[bytes, memoryview] = {}  # of a key twice, only the last would be filled
        for key, view in zip(keys, into, strict=True):
            if key not in self._gone:
                buffers.setdefault(key, view)
        asked, views = list(buffers), list(buffers.values())
        client = self._opener.client()
        with self._memory.lend(client, views) as lent:
            codes = self._transfer(client, "batch_get_into", asked, lent)
            for view, own, code in zip(views, lent, codes, strict=True):
                if own is not view and code > 0:
                    view[:code] = own[:code]
        self._check_answered("batch_get_into", codes)
        too_long = [
            key
            for key, view, code in zip(asked, views, codes, strict=True)
            if code == library.INVALID and client.call("get_size", block_name(key)) > len(view)
        ]
        if not too_long:
            self._check_memory(lent, codes)
        damaged = [
            key for key, code in zip(asked, codes, strict=True) if code == library.WRONG_CHECKSUM
        ]
        self._gone.add([*too_long, *damaged])
        nbytes = {key: max(0, code) for key, code in zip(asked, codes, strict=True)}
        for key, view in zip(keys, into, strict=True):
            if key in buffers and view is not buffers[key]:
                view[: nbytes[key]] = buffers[key][: nbytes[key]]
        return [nbytes.get(key, 0) for key in keys]

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        """As the contract says; an empty block is declined: loading it would look like a miss."""
        first: dict[bytes, memoryview] = {}  # of a key twice, the last block would be kept
        for key, block in zip(keys, blocks, strict=True):
            first.setdefault(key, block)
        new, gone = self._gone.split([key for key, block in first.items() if len(block)])
        client = self._opener.client()
        kept: set[bytes] = set()
        found: dict[bytes, int] = {}
        for method, some in ("batch_put_from", new), ("batch_upsert_from", gone):
            views = [first[key] for key in some]
            with self._memory.lend(client, views) as lent:
                for view, own in zip(views, lent, strict=True):
                    if own is not view:
                        own[:] = view
                codes = self._transfer(client, method, some, lent)
            self._check_answered(method, codes)
            self._check_memory(lent, codes)
            found.update(zip(some, codes, strict=True))
            kept.update(
                key
                for key, code in zip(some, codes, strict=True)
                if code == 0 or (code == library.EXISTS and method == "batch_put_from")
            )
        self._gone.discard(kept)
        for key in keys:
            if key not in kept:
                reason = library.decline_reason(found[key]) if key in found else "empty"
                if self._declined.add(reason) and reason == "empty":
                    log.warning("kvcache: mooncake: a block is empty; such blocks are declined")
        return [key in kept for key in keys]

    def store_branches(
        self, branches: Sequence[Branch], blocks: Sequence[memoryview]
    ) -> list[bool]:
        return self.store([key for keys, _ in branches for key in keys], blocks)

    def remove(self, keys: Sequence[bytes]) -> None:
        """As the contract says. A block that cannot be removed now is gone for this tier only."""
        asked = [*dict.fromkeys(keys)]
        codes = self._call(self._opener.client(), "batch_remove", asked, False)
        self._gone.add(
            key for key, code in zip(asked, codes, strict=True) if code not in {0, library.ABSENT}
        )
        self._check_answered("batch_remove", codes)

    def usage(self) -> TierUsage:
        return TierUsage(declined_blocks=self._declined.counts())

    def close(self) -> None:
        self._opener.close()

    def _transfer(
        self, client: PoolClient, method: str, keys: Sequence[bytes], views: Sequence[memoryview]
    ) -> list[int]:
        """Transfer blocks, ``MAX_TRANSFERS`` in each call of the library.

        Returns:
            the code of each key, when nothing uses ``views`` any more.
        """
        codes: list[int] = []
        for start in range(0, len(keys), MAX_TRANSFERS):
            part = slice(start, start + MAX_TRANSFERS)
            found = self._transfer_part(client, method, keys[part], views[part])
            codes += found
            if is_unanswered(found):  # each further call would wait for its timeout
                return codes + [found[-1]] * (len(keys) - len(codes))
        return codes

    def _transfer_part(
        self, client: PoolClient, method: str, keys: Sequence[bytes], views: Sequence[memoryview]
    ) -> list[int]:
        """Call a method that transfers blocks; return when nothing uses ``views`` any more."""
        begun = time.monotonic()
        addresses, sizes = [address_of(view) for view in views], [len(view) for view in views]
        codes = self._call(client, method, keys, addresses, sizes)
        if codes and library.RPC_FAILED.issuperset(codes):
            self._memory.wait_quiet(client, views)
        seconds = time.monotonic() - begun
        is_abandoned = library.TRANSFER_FAILED in codes and seconds >= self.abandoned_transfer_s
        if is_abandoned and not self._uses_daemon:
            self._opener.replace(client)
        return codes

    def _call(
        self, client: PoolClient, method: str, keys: Sequence[bytes], *arguments: object
    ) -> list[int]:
        """Return Mooncake's code for each key, in a client span."""
        if not keys:
            return []
        span = self._start_span(method, len(keys))
        codes: list[int] = []
        try:
            codes = client.call(method, [block_name(key) for key in keys], *arguments)
        finally:
            failed = [code for code in codes if code < 0 and code not in UNLOGGED_CODES]
            error = describe_code(failed[0]).partition(":")[0] if failed else None
            telemetry.end_span(
                span,
                {"db.response.status_code": error} if error else {},
                error=error if codes else "exception",
            )
        self._log_codes(failed)
        return codes

    def _check_answered(self, method: str, codes: Sequence[int]) -> None:
        """Raise ConnectionError if no key got an answer."""
        if is_unanswered(codes):
            cause = f"{method} returned {describe_code(codes[0])}"
            self._opener.record_failure(cause)
            raise ConnectionError(cause)
        if codes:
            self._opener.record_success()

    def _check_memory(self, views: Sequence[memoryview], codes: Sequence[int]) -> None:
        """Raise ConnectionError if the call was refused because the daemon lost the memory."""
        if set(codes) == {library.INVALID} and self._memory.forget_lost(views):
            raise ConnectionError("the daemon was restarted and lost the shared memory")

    def _log_codes(self, codes: Sequence[int]) -> None:
        for code in codes:
            if code not in library.UNANSWERED and self._errors.add(str(code)):
                log.warning(
                    "kvcache: mooncake: the pool returned an error (%s); its keys are missed or "
                    "declined", describe_code(code),
                )  # fmt: skip

    def _start_span(self, method: str, count: int) -> Span:
        """Start a span for one call of the library, by OpenTelemetry's conventions for clients."""
        parent = telemetry.current_span()
        if not parent.is_recording():
            return INVALID_SPAN
        host, port = self._server
        attributes: dict[str, str | int] = {
            "db.system.name": "mooncake",
            "db.operation.name": method,
            "server.address": host,
            "server.port": port,
        }
        if count > 1:
            attributes["db.operation.batch.size"] = count
        return telemetry.start_client_child(parent, method, attributes)


def is_unanswered(codes: Sequence[int]) -> bool:
    """Whether ``codes`` are those of a call that no server answered."""
    return bool(codes) and library.UNANSWERED.issuperset(codes)


def block_name(key: bytes) -> str:
    """Return the name of a block in the pool: its namespace and its key, in hex."""
    return f"kvcache:1:{key[:DIGEST_NBYTES].hex()}:{key[DIGEST_NBYTES:].hex()}"
