"""AIBrix's variables: what becomes of each, so that a deployment's environment goes on working.

The table has the 62 of aibrix_kvcache 0.8.0. A variable is *taken*, as an option of a tier, or has
*no effect*, for a reason; one can be *refused*, where going on would do what it says not to do.

Always true: ours win, option by option. A KVCACHE__ variable does, and so does a file of the
user's; the defaults of a shipped profile do not, whether the user chose it or not. No value of
theirs is repeated but those that are taken and those that are wrong.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvcache.profiles.errors import listed, nearest, show
from kvcache.profiles.tiers import Row, Wish, override_of
from kvcache.sizes import Size

PREFIX = "AIBRIX_KV_CACHE_OL_"
SYNC = "VLLM_AIBRIX_SYNC_GRANULARITY"  # the one without the prefix
_ENABLED = "L1_CACHE_ENABLED"


@dataclass(frozen=True, slots=True)
class Taken:
    """Sets an option, of the first tier or of those ``below`` it, to what ``value`` makes of it."""

    says: str
    option: str
    value: Callable[[str, int], object]  # of the text and the number of ranks
    below: bool = False


@dataclass(frozen=True, slots=True)
class NoEffect:
    """Changes nothing, because of what it says. Some values are what is done ``anyway``."""

    says: str
    anyway: tuple[str, ...] = ()


def _gib_per_rank(text: str, ranks: int) -> object:
    try:
        gib = float(text)
    except ValueError:
        gib = math.nan
    nbytes = int(gib * ranks * 2**30) if 0 < gib < 2**30 else 0  # nan is neither
    if not nbytes:
        raise ValueError("takes a number above zero, of GiB")
    return f"{nbytes >> 30}GiB" if not nbytes % 2**30 else nbytes


def _one_of(**choices: object) -> Callable[[str, int], object]:
    def value(text: str, _: int) -> object:
        if text.upper() not in choices:
            raise ValueError(f"takes one of {listed(choices)}{nearest(text, choices)}")
        return choices[text.upper()]

    return value


def _all(names: str, entry: NoEffect) -> dict[str, Taken | NoEffect]:
    return dict.fromkeys(names.split(), entry)


_NO_TIER = "AIBrix's backends are not here; below L1 are the tiers of the profile, in l1-only none"
_SHARED = "`l1-redis` has a server that engines share"
_SPANS = "spans have the time of every operation, whenever something collects them"
_MEMBERS = "no tier asks AIBrix's meta service for its servers"

VARIABLES: dict[str, Taken | NoEffect] = {
    "L1_CACHE_ENABLED": NoEffect("L1 is always there; `0` is refused", ("1", "true")),
    "L1_CACHE_CAPACITY_GB": Taken(
        "`capacity` of the first tier, in GiB, times the engine's ranks, which share it",
        "capacity",
        _gib_per_rank,
    ),
    "L1_CACHE_EVICTION_POLICY": Taken(
        "`eviction` of the first tier",
        "eviction",
        _one_of(FIFO="fifo", LRU="lru", S3FIFO="s3fifo"),
    ),
    "DEVICE": NoEffect("L1 is in this machine's DRAM", ("cpu",)),
    "S3FIFO_SMALL_TO_MAIN_PROMO_THRESHOLD": NoEffect("it is 1, AIBrix's default", ("1",)),
    "S3FIFO_SMALL_FIFO_CAPACITY_RATIO": NoEffect("it is 0.3, AIBrix's default", ("0.3",)),
    "L2_CACHE_INGESTION_TYPE": Taken(
        "`writes` of the tiers below the first: `ALL` is `all`, `HOT` is `hot`, and `EVICTED` is "
        "`all`, since what is evicted has no time left to be written",
        "writes",
        _one_of(ALL="all", HOT="hot", EVICTED="all"),
        below=True,
    ),
    "L2_CACHE_BACKEND": NoEffect(_NO_TIER),
    "L2_CACHE_NAMESPACE": NoEffect(
        "a namespace is made of weights, settings, data types and layout: engines that differ in "
        "these never meet, those that agree share blocks; `cache_salt` keeps requests apart"
    ),
    "L2_CACHE_COMPRESSION": NoEffect("nor in AIBrix; `codec` of a tier compresses"),
    "L2_CACHE_OP_BATCH": NoEffect("batches are cut by bytes"),
    "L2_CACHE_PER_TOKEN_TIMEOUT_MS": NoEffect(
        "an answer has one deadline, however many tokens it is for: `deadline_s` of a tier"
    ),
    "L2_CACHE_PLACEMENT_POLICY": NoEffect(_MEMBERS),
    "L2_CACHE_KEY_BUILDER": NoEffect("keys are vLLM's own block hashes"),
    "L2_CACHE_INGESTION_MAX_INFLIGHT_TOKENS": NoEffect(
        "writes are always behind the engine's back, bounded in bytes: `queue` of a tier"
    ),
    "L2_CACHE_NUM_ASYNC_WORKERS": NoEffect("each tier has threads of its own: its `calls`"),
    "DOUBLE_GET_THRESHOLD": NoEffect(
        "tiers below L1 are asked for whatever it lacks, and used where that is faster than "
        "computing: `if_slower` of a tier"
    ),
    "BLOCK_SIZE": NoEffect("a block is the engine's: vLLM's `--block-size`", ("-1",)),
    "CHUNK_SIZE": NoEffect("blocks are not moved in chunks of tokens"),
    "MAX_SEQ_LEN": NoEffect("no sequence is cut", ("-1",)),
    "TOKEN_VALIDATION_ENABLED": NoEffect(
        "every block from below L1 is checked, bytes and key, and there is no other way"
    ),
    "TIME_MEASUREMENT_ENABLED": NoEffect(_SPANS),
    "BREAKDOWN_MEASUREMENT_ENABLED": NoEffect(_SPANS),
    "PROFILING_ENABLED": NoEffect(_SPANS, ("0", "false")),
    "PROFILING_SERVER_ADDRESS": NoEffect(_SPANS),
    **_all(
        "META_SERVICE_BACKEND META_SERVICE_URL META_SERVICE_CLUSTER_META_KEY"
        " META_SERVICE_REFRESH_INTERVAL_S",
        NoEffect(_MEMBERS),
    ),
    **_all(
        "MOCK_USE_RDMA MOCK_USE_MPUT_MGET MOCK_USE_GDR_PUT MOCK_USE_GDR_GET MOCK_USE_NOOP",
        NoEffect("there is no mock tier"),
    ),
    **_all(
        "ROCKSDB_ROOT ROCKSDB_TTL_S ROCKSDB_WRITE_BUFFER_SIZE ROCKSDB_TARGET_FILE_SIZE_BASE"
        " ROCKSDB_MAX_WRITE_BUFFER_NUMBER ROCKSDB_MAX_TOTAL_WAL_SIZE ROCKSDB_MAX_BACKGROUND_JOBS",
        NoEffect("there is no RocksDB tier; `l1-disk` has a local disk"),
    ),
    **_all(
        "INFINISTORE_HOST_ADDR INFINISTORE_SERVICE_PORT INFINISTORE_CONNECTION_TYPE"
        " INFINISTORE_IB_PORT INFINISTORE_LINK_TYPE INFINISTORE_VISIBLE_DEV_LIST"
        " INFINISTORE_USE_GDR",
        NoEffect(f"there is no InfiniStore tier; {_SHARED}"),
    ),
    **_all(
        "HPKV_REMOTE_ADDR HPKV_REMOTE_PORT HPKV_LOCAL_ADDR HPKV_LOCAL_PORT HPKV_USE_GDR",
        NoEffect(f"there is no HPKV tier; {_SHARED}"),
    ),
    **_all(
        "PRISKV_REMOTE_ADDR PRISKV_REMOTE_PORT PRISKV_PASSWORD PRISKV_USE_MPUT_MGET"
        " PRISKV_USE_ZERO_COPY",
        NoEffect(f"there is no PrisKV tier; {_SHARED}"),
    ),
    "EIC_CONFIG_FILE": NoEffect(f"there is no EIC tier; {_SHARED}"),
    "SHFS_ROOT": NoEffect(f"there is no tier on a shared file system; {_SHARED}"),
    "TRANSPORT_RDMA_ADDR_RANGE": NoEffect("no tier speaks RDMA"),
    SYNC: NoEffect("ranks share one L1, and need not agree on what it has"),
}
"""By name, less ``AIBRIX_KV_CACHE_OL_``. What is said is what docs/aibrix.md says."""


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """What became of the variables that were set. Each is a sentence, or part of one."""

    taken: tuple[str, ...] = ()
    overruled: tuple[str, ...] = ()
    no_effect: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = {
            "taken": self.taken, "overruled by ours": self.overruled, "no effect": self.no_effect,
        }  # fmt: skip
        said = [f"{name}: {'; '.join(what)}" for name, what in parts.items() if what]
        return "of AIBrix's variables: " + ". ".join(said)


@dataclass(frozen=True, slots=True)
class Theirs:
    """What the environment has of AIBrix's, before it is known which tiers there are."""

    wishes: tuple[Wish, ...]
    so_anyway: tuple[str, ...]
    no_effect: tuple[tuple[str, str], ...]  # variable, reason
    problems: tuple[str, ...]
    off: str = ""  # the variable that says to have no L1, and what it was given

    def report(self, rows: Sequence[Row]) -> tuple[MigrationReport | None, list[str]]:
        """What became of it with these tiers, and what is refused with them.

        The report is None if the environment has nothing of theirs.
        """
        taken, overruled, refused = [*self.so_anyway], list[str](), list[str]()
        no_effect = [*self.no_effect]
        if self.off and rows:
            # The user said how much memory L1 may take, in a place that overrides theirs.
            if any(
                one.chosen and one.option.hint is Size and one.place not in self.places
                for one in rows[0].settings
            ):
                overruled.append(
                    f"{self.off.partition(' = ')[0]} (there is an L1, since its size is set)"
                )
            else:
                refused.append(f"environment variable {self.off}: {_refusal(rows[0].name)}")
        for wish in self.wishes:
            name = wish.place.rpartition(" ")[2]
            met = [
                (row, setting)
                for row in (rows[1:] if wish.below else rows[:1])
                for setting in row.settings
                if setting.option.name == wish.option
            ]
            for row, setting in met:
                whose = f"{wish.option} of {row.name}"
                if setting.place == wish.place:
                    taken.append(f"{name} as {whose} = {show(wish.value)}")
                else:
                    overruled.append(f"{name} ({whose} is from {setting.place})")
            if not met:
                tiers = "tier below the first" if wish.below else "first tier"
                no_effect.append((name, f"no {tiers} has the option {wish.option}"))
        if not (taken or overruled or no_effect):
            return None, refused
        return MigrationReport(
            tuple(taken), tuple(overruled), tuple(_by_reason(no_effect))
        ), refused

    @property
    def places(self) -> set[str]:
        """The places of what they ask for."""
        return {wish.place for wish in self.wishes}


def read(environ: Mapping[str, str], *, ranks: int) -> Theirs:
    """Read AIBrix's variables."""
    theirs = {
        variable: text.strip()
        for variable, text in environ.items()
        if (variable.startswith(PREFIX) or variable == SYNC) and text.strip()
    }
    wishes, problems, no_effect, so_anyway, off = [], [], [], [], ""
    for variable, text in theirs.items():
        name = _name(variable)
        entry, place = VARIABLES.get(name), f"environment variable {variable}"
        if name == _ENABLED and text.lower() in ("0", "false"):
            off = f"{variable} = {show(text)}"
        elif name == _ENABLED and text.lower() not in ("1", "true"):
            problems.append(f'{place} = {show(text)}: takes "1", "true", "0" or "false"')
        elif isinstance(entry, Taken):
            try:
                value = entry.value(text, ranks)
            except ValueError as error:
                problems.append(f"{place} = {show(text)}: {error}")
            else:
                wishes.append(Wish(place, entry.option, value, entry.below))
        elif entry is None:
            known = (f"{PREFIX}{name}" for name in VARIABLES if name != SYNC)
            no_effect.append((variable, f"AIBrix has no such variable{nearest(variable, known)}"))
        elif text.lower() not in entry.anyway:
            no_effect.append((variable, entry.says.replace("`", "")))
        else:
            so_anyway.append(f"{variable} = {text}, as it is anyway")
    return Theirs(tuple(wishes), tuple(so_anyway), tuple(no_effect), tuple(problems), off)


def _name(variable: str) -> str:
    """The variable's name in the table. PRIS_ is how PRISKV_ was spelled once."""
    name = variable.removeprefix(PREFIX)
    return f"PRISKV_{name.removeprefix('PRIS_')}" if name.startswith("PRIS_") else name


def _refusal(tier: str) -> str:
    return (
        "blocks are kept in L1 before anywhere else, so there is always one, and this says to take "
        f"no memory for it; say how much it may take in {override_of(tier, 'capacity')}, or in a "
        "profile of yours"
    )


def _by_reason(no_effect: Sequence[tuple[str, str]]) -> list[str]:
    """A sentence for each reason, with the variables that share it."""
    reasons: dict[str, list[str]] = {}
    for variable, reason in no_effect:
        reasons.setdefault(reason, []).append(variable)
    return [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]
