"""Profiles: which tiers, in which order. The one room that puts a stack together.

Always true: a stack that was opened has exactly what its profile and the environment say; what
cannot be had is one ``ProfileError`` at start, never a smaller stack.

    stack = open_stack(block_nbytes=2 * 1024**2)      # $KVCACHE_PROFILE, else l1-only
"""

if __name__ == "profiles":
    raise ImportError("import kvcache.profiles, not profiles (you are in the source checkout)")

import inspect
import logging
from collections.abc import Iterator, Mapping
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
) -> Stack:
    """Open the stack of ``profile``, else of the one KVCACHE_PROFILE names, else of l1-only.

    ``profile`` is a shipped name or a path to a TOML file. ``block_nbytes`` is the bytes of a block
    of all ``ranks``, of elements of ``element_nbytes``; ``block_tokens`` are its tokens, if known,
    for spans. ``namespace`` is the namespace under which blocks leave this process
    (``kvcache.namespace``): whoever has the same may find them; ``identity`` are the fields it is
    the digest of, which ``kvcache inspect`` shows. ``replica`` says which of the engines this is
    that one command has started on this host: they divide shares of memory, and a disk.

    Raises ProfileError if the profile is wrong or asks for more memory than is free.
    """
    chosen = load_profile(profile, ranks=ranks, replicas=replica.count)
    if theirs := chosen.theirs:
        log.log(logging.WARNING if theirs.no_effect else logging.INFO, "kvcache: %s", theirs)
    if chosen.unknown:
        log.warning("kvcache: profile: %s", "; ".join(chosen.unknown))
    problems = [
        f"{setting.where}: {shortage}"
        for setting in chosen.tiers[0].settings
        if setting.option.hint is Size
        and isinstance(setting.value, int)
        and (shortage := host_memory.shortage(setting.value))
    ]
    if problems:
        raise ProfileError(chosen.name, problems)
    if replica.count > 1:
        _log_shares(chosen, replica)
    given: dict[str, object] = {"block_nbytes": block_nbytes, "replica": replica}
    framed_given = given | {"block_nbytes": frame_nbytes(block_nbytes)}
    with ExitStack() as opened:
        front = opened.enter_context(closing(_open(chosen, chosen.tiers[0], given)))
        assert isinstance(front, FrontTier)  # the loader saw to it
        lower = []
        for row in chosen.tiers[1:]:
            tier = opened.enter_context(closing(_open(chosen, row, framed_given)))
            with _blamed(chosen, row):
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
            opened.callback(each.channel.stop)  # where one of the next fails
        try:
            records = opened.enter_context(closing(recorder.opened(block_tokens)))
        except ValueError as error:
            raise ProfileError(chosen.name, [str(error)]) from None
        first = chosen.tiers[0]
        stack = Stack(
            front,
            lower,
            profile=chosen.name,
            name=first.name,
            kind=first.kind,
            block_tokens=block_tokens,
            recorder=records,
        )
        opened.pop_all()  # the stack closes them from here on
    return stack


@contextmanager
def _blamed(profile: Profile, row: Row) -> Iterator[None]:
    """Where an option of a row is refused, or its class fails, say which, and who gave it."""
    try:
        yield
    except BaseException as error:
        if calls.raised_by_signal(error):
            raise
        # A third-party class may raise anything; ours raise ValueError for what is wrong.
        kind, text = calls.describe_error(error)
        text = text if isinstance(error, ValueError) else f"{kind}: {text}"
        raise ProfileError(profile.name, [row.blame(text)]) from error


def _log_shares(profile: Profile, replica: Replica) -> None:
    """Log what became of shares of memory, such as "50%", which the replicas divide."""
    for row in profile.tiers:
        for setting in row.settings:
            if setting.option.hint is Size and "%" in str(setting.given):
                log.info(
                    "kvcache: replica %d of %d: %s: %s, of the memory of %d replicas",
                    replica.index,
                    replica.count,
                    setting.where,
                    format_size(int(str(setting.value))),
                    replica.count,
                )


def _open(profile: Profile, row: Row, known: Mapping[str, object]) -> Tier:
    """The tier of a row; it gets what is ``known`` beside its options, as far as it takes it."""
    takes = inspect.signature(row.cls).parameters
    given: dict[str, Any] = {name: value for name, value in known.items() if name in takes}
    with _blamed(profile, row):
        return row.cls(**given, **row.options_for(row.cls))
