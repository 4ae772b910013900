"""Profiles list tiers and their options; ``open_stack`` opens the stack of a profile.

Invariant: an open stack has exactly the tiers and sizes of its profile and the environment. If one
cannot be opened, ``open_stack`` raises one ``ProfileError``; it never opens a smaller stack.

    stack = open_stack(block_nbytes=2 * 1024**2)      # $KVCACHE_PROFILE, else l1-only

``open_tiers`` opens the tiers below L1 alone, for an engine that has host memory of its own.
"""

if __name__ == "profiles":
    raise ImportError("import kvcache.profiles, not profiles (you are in the source checkout)")

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

from kvcache import host_memory
from kvcache.guards import calls
from kvcache.keys import describe_namespace
from kvcache.lower.direct import DirectTiers
from kvcache.lower.direct_tier import DirectTier
from kvcache.lower.tier import LowerTier
from kvcache.profiles.errors import ProfileError, listed, show
from kvcache.profiles.load import Profile, load_profile, load_tables
from kvcache.profiles.options import options_of
from kvcache.profiles.source import shipped
from kvcache.profiles.tiers import VARIABLE, FrontOptions, Row
from kvcache.replay import recorder
from kvcache.replica import ALONE, Replica
from kvcache.sizes import Size, format_size
from kvcache.stack import Stack
from kvcache.tier import FrontTier, Tier
from kvcache.tiers.framed import Framed, frame_nbytes

__all__ = [
    "Profile",
    "ProfileError",
    "load_profile",
    "load_tables",
    "open_stack",
    "open_tiers",
    "shipped",
]

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
    _log_findings(loaded)
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
        _log_shares(loaded.tiers, replica)
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
            framed = _open_framed(
                opened, loaded, row, framed_arguments, element_nbytes, block_nbytes
            )
            with _located_errors(loaded, row):
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
            **first.options_for(FrontOptions),
            block_tokens=block_tokens,
            recorder=records,
        )
        opened.pop_all()  # from here on the stack closes them
    return stack


def open_tiers(
    profile: str | None = None,
    *,
    tiers: object = None,
    block_nbytes: int,
    namespace: bytes,
    element_nbytes: int = 2,
    identity: Mapping[str, object] | None = None,
    replica: Replica = ALONE,
    origin: str = "tiers",
) -> DirectTiers:
    """Open the lower tiers of a profile as direct tiers, for an engine with host memory of its own.

    The first tier of the profile (L1) is left out. Without ``profile`` and ``tiers``, the profile
    is the one that KVCACHE_PROFILE names.

    Args:
        profile: a shipped name, or a path to a TOML file.
        tiers: in place of a profile: a list of mappings, each with the keys of a [[tier]].
        block_nbytes: bytes of the largest block.
        namespace: as for :func:`open_stack`.
        element_nbytes: bytes of an element, for compression.
        identity: the fields that ``namespace`` is the digest of; ``kvcache inspect`` shows them.
        replica: the number of this engine among those that one command started on this host.
        origin: where ``tiers`` is written, for errors; also the profile's name in metrics.

    Raises:
        ProfileError: if the profile or ``tiers`` is invalid or has no lower tier, or one of the
            tiers cannot be opened.
    """
    if tiers is not None and profile is not None:
        raise ProfileError(origin, [f"{origin}: takes a profile or a list of tiers, not both"])
    if tiers is not None:
        loaded = load_tables(tiers, origin=origin, replicas=replica.count)
        rows: tuple[Row, ...] = loaded.tiers
    else:
        loaded = load_profile(profile, replicas=replica.count)
        rows = loaded.tiers[1:]
        if not rows:
            raise ProfileError(loaded.name, [_no_lower_tier(loaded)])
    _log_findings(loaded)
    _log_without_l1(loaded, rows)
    if replica.count > 1:
        _log_shares(rows, replica)
    arguments = {"block_nbytes": frame_nbytes(block_nbytes), "replica": replica}
    with ExitStack() as opened:
        direct = []
        for row in rows:
            framed = _open_framed(opened, loaded, row, arguments, element_nbytes, block_nbytes)
            with _located_errors(loaded, row):
                direct.append(
                    each := DirectTier(
                        framed,
                        name=row.name,
                        kind=row.kind,
                        block_nbytes=block_nbytes,
                        namespace=namespace,
                        about=describe_namespace(identity or {}),
                        **_direct_options(row),
                    )
                )
            opened.callback(each.channel.stop)  # if a later tier fails to open
        found = DirectTiers(direct, profile=loaded.name, block_nbytes=block_nbytes)
        opened.pop_all()  # from here on ``found`` closes them
    return found


def _direct_options(row: Row) -> dict[str, Any]:
    """Return the options of a direct tier that ``row`` sets.

    A shipped profile sets ``lookup = "load"`` for a stack, which loads a batch before it goes on.
    Another engine plans a whole load by the answer, so it gets the default, unless the user chose.
    """
    options = row.options_for(DirectTier)
    shipped_lookup = any(
        setting.option.name == "lookup" and not setting.set_by_user for setting in row.settings
    )
    if shipped_lookup:
        del options["lookup"]
    return options


def _no_lower_tier(loaded: Profile) -> str:
    """Return the problem of a profile that has only an L1."""
    allowed = []
    for name in shipped():
        with suppress(ProfileError):  # a package that it needs is not installed
            if len(load_profile(name, {}).tiers) > 1:
                allowed.append(name)
    return (
        f"{loaded.path}: lists no tier below L1, and direct tiers are the tiers below it; add one, "
        f"or set KVCACHE_PROFILE to one of {listed(allowed)} or to a file of your own"
    )


def _log_without_l1(loaded: Profile, rows: Sequence[Row]) -> None:
    """Log which part of a profile has no effect without an L1."""
    left_out = [row for row in loaded.tiers if row not in rows]
    ignored = [setting for row in left_out for setting in row.settings]
    ignored += [
        setting
        for row in rows
        for setting in row.settings
        if setting.option.name in options_of(LowerTier).keys() - options_of(DirectTier).keys()
    ]
    given = [setting.where for setting in ignored if setting.set_by_user]
    if left_out or given:
        log.log(
            logging.WARNING if any(VARIABLE in place for place in given) else logging.INFO,
            "kvcache: profile: %s: opened without L1 (the engine's own host memory takes its "
            "place); without effect: %s",
            loaded.name,
            "; ".join([*(f"tier {show(row.name)}" for row in left_out), *given]),
        )


def _open_framed(
    opened: ExitStack,
    profile: Profile,
    row: Row,
    arguments: Mapping[str, object],
    element_nbytes: int,
    block_nbytes: int,
) -> Framed:
    """Construct the tier of a row and its frames; ``opened`` closes the tier after an error."""
    tier = opened.enter_context(closing(_open(profile, row, arguments)))
    with _located_errors(profile, row):
        return Framed(
            tier,
            block_nbytes=block_nbytes,
            element_nbytes=element_nbytes,
            **row.options_for(Framed),
        )


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


def _log_findings(loaded: Profile) -> None:
    """Log the effect of another library's variables, and the variables that have none."""
    if report := loaded.aibrix:
        level = logging.WARNING if report.no_effect else logging.INFO
        log.log(level, "kvcache: profile: %s", report)
    if loaded.unknown:
        log.warning("kvcache: profile: unknown variables: %s", "; ".join(loaded.unknown))


def _log_shares(rows: Sequence[Row], replica: Replica) -> None:
    """Log the size of each share of memory, such as "50%", after division by the replicas."""
    for row in rows:
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
