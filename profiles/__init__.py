"""Profiles list tiers and their options; ``open_stack`` opens the stack of a profile.

Invariant: an open stack has exactly the tiers and sizes of its profile and the environment. If one
cannot be opened, ``open_stack`` raises one ``ProfileError``; it never opens a smaller stack.

    stack = open_stack(block_nbytes=2 * 1024**2)      # $KVCACHE_PROFILE, else l1-only
"""

if __name__ == "profiles":
    raise ImportError("import kvcache.profiles, not profiles (you are in the source checkout)")

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from kvcache import host_memory
from kvcache.guards import calls
from kvcache.keys import describe_namespace
from kvcache.lower.tier import LowerTier
from kvcache.profiles.errors import ProfileError
from kvcache.profiles.load import Profile, load_profile
from kvcache.profiles.source import shipped
from kvcache.profiles.tiers import Row
from kvcache.replay import recorder
from kvcache.replica import ALONE, Replica
from kvcache.sizes import Size, format_size
from kvcache.stack import Stack
from kvcache.tier import FrontTier, Tier
from kvcache.tiers.framed import Framed, frame_nbytes

__all__ = ["Profile", "ProfileError", "load_profile", "open_stack", "shipped"]

log = logging.getLogger(__name__)


def open_stack(
    profile: str | None = None,
    *,
    block_nbytes: int,
    namespace: bytes = b"",
    element_nbytes: int = 2,
    block_tokens: int = 0,
    ranks: int = 1,
    identity: Mapping[str, object] | None = None,
    replica: Replica = ALONE,
    nodes: Sequence[int] = (),
) -> Stack:
    """Open the stack of ``profile``, else of the one that KVCACHE_PROFILE names, else of l1-only.

    Args:
        profile: a shipped name, or a path to a TOML file.
        block_nbytes: bytes of a block of all ``ranks``.
        namespace: the digest (``kvcache.namespace``) under which blocks leave this process:
            engines with the same namespace share blocks in lower tiers.
        element_nbytes: bytes of an element, for compression.
        block_tokens: tokens of a block, for spans; 0 if unknown.
        ranks: the ranks of the engine.
        identity: the fields that ``namespace`` is the digest of; ``kvcache inspect`` shows them.
        replica: the number of this engine among those that one command started on this host. These
            engines divide shares of memory and the capacity of a disk.
        nodes: the NUMA nodes from which L1's memory comes while they have some; empty for no
            preference.

    Raises:
        ProfileError: if the profile is invalid, needs more memory than is free, or one of its tiers
            cannot be opened.
    """
    loaded = load_profile(profile, ranks=ranks, replicas=replica.count)
    if report := loaded.aibrix:
        level = logging.WARNING if report.no_effect else logging.INFO
        log.log(level, "kvcache: profile: %s", report)
    if loaded.unknown:
        log.warning("kvcache: profile: unknown variables: %s", "; ".join(loaded.unknown))
    problems = [
        f"{setting.where}: {shortage}"
        for setting in loaded.tiers[0].settings
        if setting.option.hint is Size
        and isinstance(setting.value, int)
        and (
            shortage := host_memory.shortage(
                setting.value, huge_nbytes=loaded.tiers[0].huge_nbytes(setting.value)
            )
        )
    ]
    if problems:
        raise ProfileError(loaded.name, problems)
    if replica.count > 1:
        _log_shares(loaded, replica)
    arguments: dict[str, object] = {
        "block_nbytes": block_nbytes,
        "replica": replica,
        "nodes": tuple(nodes),
    }
    framed_arguments = arguments | {"block_nbytes": frame_nbytes(block_nbytes)}
    with ExitStack() as opened:
        front = opened.enter_context(closing(_open(loaded, loaded.tiers[0], arguments)))
        assert isinstance(front, FrontTier)  # ``read_rows`` checks that
        lower = []
        for row in loaded.tiers[1:]:
            tier = opened.enter_context(closing(_open(loaded, row, framed_arguments)))
            with _located_errors(loaded, row):
                framed = Framed(
                    tier,
                    block_nbytes=block_nbytes,
                    element_nbytes=element_nbytes,
                    **row.options_for(Framed),
                )
                lower.append(
                    each := LowerTier(
                        framed,
                        name=row.name,
                        kind=row.kind,
                        front=front,
                        namespace=namespace,
                        about=describe_namespace(identity or {}),
                        **row.options_for(LowerTier),
                    )
                )
            opened.callback(each.channel.stop)  # if a later tier fails to open
        try:
            records = opened.enter_context(closing(recorder.open_recorder(block_tokens)))
        except ValueError as error:
            raise ProfileError(loaded.name, [str(error)]) from None
        first = loaded.tiers[0]
        stack = Stack(
            front,
            lower,
            profile=loaded.name,
            name=first.name,
            kind=first.kind,
            block_tokens=block_tokens,
            recorder=records,
        )
        opened.pop_all()  # from here on the stack closes them
    return stack


@contextmanager
def _located_errors(profile: Profile, row: Row) -> Iterator[None]:
    """Turn an error of the row's class into a ProfileError with the place of the option."""
    try:
        yield
    except BaseException as error:
        if calls.raised_by_signal(error):
            raise
        # Shipped classes raise ValueError for a wrong option; other classes may raise anything.
        kind, text = calls.describe_error(error)
        text = text if isinstance(error, ValueError) else f"{kind}: {text}"
        raise ProfileError(profile.name, [row.locate(text)]) from error


def _log_shares(profile: Profile, replica: Replica) -> None:
    """Log the size of each share of memory, such as "50%", after division by the replicas."""
    for row in profile.tiers:
        for setting in row.settings:
            if setting.option.hint is Size and "%" in str(setting.given):
                log.info(
                    "kvcache: profile: replica %d of %d: %s: %s, since %d replicas share it",
                    replica.index,
                    replica.count,
                    setting.where,
                    format_size(int(str(setting.value))),
                    replica.count,
                )


def _open(profile: Profile, row: Row, arguments: Mapping[str, object]) -> Tier:
    """Construct the tier of a row, with the ``arguments`` that its constructor has."""
    parameters = inspect.signature(row.cls).parameters
    known: dict[str, Any] = {name: arguments[name] for name in arguments if name in parameters}
    with _located_errors(profile, row):
        return row.cls(**known, **row.options_for(row.cls))
