"""AIBrix's variables: the effect of each, so that the environment of a deployment keeps working.

``VARIABLES`` has the 62 variables of aibrix_kvcache 0.8.0. A variable sets an option of a tier, or
has no effect for a stated reason. ``L1_CACHE_ENABLED=0`` is refused, since the opposite would
happen.

Invariant: kvcache's own settings win, option by option. A KVCACHE__ variable and a user's profile
override AIBrix's variables; the defaults of a shipped profile do not, even if the user chose it.
Messages contain the value of an AIBrix variable only if it is used or wrong.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvcache.profiles.errors import listed, nearest, show
from kvcache.profiles.tiers import RequestedOption, Row, override_of
from kvcache.sizes import Size

PREFIX = "AIBRIX_KV_CACHE_OL_"
SYNC = "VLLM_AIBRIX_SYNC_GRANULARITY"  # the only variable without the prefix
_ENABLED = "L1_CACHE_ENABLED"


@dataclass(frozen=True, slots=True)
class MappedVariable:
    """A variable that sets ``option`` of the first tier, or of the tiers ``below`` it.

    ``text`` describes the option; ``convert`` makes its value from the variable's text and the
    number of ranks.
    """

    text: str
    option: str
    convert: Callable[[str, int], object]
    below: bool = False


@dataclass(frozen=True, slots=True)
class NoEffect:
    """A variable without effect, with the reason.

    ``already_so`` has the values that request what kvcache always does.
    """

    text: str
    already_so: tuple[str, ...] = ()


def _gib_per_rank(text: str, ranks: int) -> object:
    try:
        gib = float(text)
    except ValueError:
        gib = math.nan
    nbytes = int(gib * ranks * 2**30) if 0 < gib < 2**30 else 0  # nan fails both comparisons
    if not nbytes:
        raise ValueError("takes a number above zero, of GiB")
    return f"{nbytes >> 30}GiB" if not nbytes % 2**30 else nbytes


def _one_of(**choices: object) -> Callable[[str, int], object]:
    def convert(text: str, _: int) -> object:
        if text.upper() not in choices:
            raise ValueError(f"takes one of {listed(choices)}{nearest(text, choices)}")
        return choices[text.upper()]

    return convert


_MAPPED: dict[str, MappedVariable] = {
    "L1_CACHE_CAPACITY_GB": MappedVariable(
        "`capacity` of the first tier, in GiB, times the engine's ranks, which share it",
        "capacity",
        _gib_per_rank,
    ),
    "L1_CACHE_EVICTION_POLICY": MappedVariable(
        "`eviction` of the first tier",
        "eviction",
        _one_of(FIFO="fifo", LRU="lru", S3FIFO="s3fifo"),
    ),
    "L2_CACHE_INGESTION_TYPE": MappedVariable(
        "`writes` of the tiers below the first: `ALL` is `all`, `HOT` is `hot`, and `EVICTED` is "
        "`all`, since an evicted block has no time left to be written",
        "writes",
        _one_of(ALL="all", HOT="hot", EVICTED="all"),
        below=True,
    ),
}

_SHARED = "`l1-redis` has a server that engines share"

# Variables without effect, by reason. NAME=a,b: kvcache already does what a and b request.
_WITHOUT_EFFECT: dict[str, str] = {
    "L1 is always there; `0` is refused": "L1_CACHE_ENABLED=1,true",
    "L1 is in this machine's DRAM": "DEVICE=cpu",
    "it is 1, AIBrix's default": "S3FIFO_SMALL_TO_MAIN_PROMO_THRESHOLD=1",
    "it is 0.3, AIBrix's default": "S3FIFO_SMALL_FIFO_CAPACITY_RATIO=0.3",
    "kvcache has none of AIBrix's backends; the profile lists the lower tiers (l1-only has none)": (
        "L2_CACHE_BACKEND"
    ),
    "a namespace is made of weights, settings, data types and layout: engines that differ in these "
    "never share blocks, engines that agree do; `cache_salt` keeps requests apart": (
        "L2_CACHE_NAMESPACE"
    ),
    "AIBrix ignores it too; `codec` of a tier compresses": "L2_CACHE_COMPRESSION",
    "batches are cut by bytes": "L2_CACHE_OP_BATCH",
    "a call has one deadline, whatever its number of tokens: `deadline_s` of a tier": (
        "L2_CACHE_PER_TOKEN_TIMEOUT_MS"
    ),
    "no tier asks AIBrix's meta service for its servers": (
        "L2_CACHE_PLACEMENT_POLICY META_SERVICE_BACKEND META_SERVICE_URL"
        " META_SERVICE_CLUSTER_META_KEY META_SERVICE_REFRESH_INTERVAL_S"
    ),
    "keys are vLLM's own block hashes": "L2_CACHE_KEY_BUILDER",
    "write-behind never holds the engine up, and is bounded in bytes: `queue` of a tier": (
        "L2_CACHE_INGESTION_MAX_INFLIGHT_TOKENS"
    ),
    "each tier has its own threads: its `calls`": "L2_CACHE_NUM_ASYNC_WORKERS",
    "every block that L1 lacks is looked up in the lower tiers, and loaded if that is faster than "
    "computing: `if_slower` of a tier": "DOUBLE_GET_THRESHOLD",
    "the engine sets the size of a block: vLLM's `--block-size`": "BLOCK_SIZE=-1",
    "blocks are not moved in chunks of tokens": "CHUNK_SIZE",
    "sequences of any length are kept": "MAX_SEQ_LEN=-1",
    "the bytes and the key of every block from a lower tier are always verified": (
        "TOKEN_VALIDATION_ENABLED"
    ),
    "spans have the time of every operation, whenever a collector reads them": (
        "TIME_MEASUREMENT_ENABLED BREAKDOWN_MEASUREMENT_ENABLED PROFILING_ENABLED=0,false"
        " PROFILING_SERVER_ADDRESS"
    ),
    "there is no mock tier": (
        "MOCK_USE_RDMA MOCK_USE_MPUT_MGET MOCK_USE_GDR_PUT MOCK_USE_GDR_GET MOCK_USE_NOOP"
    ),
    "there is no RocksDB tier; `l1-disk` has a local disk": (
        "ROCKSDB_ROOT ROCKSDB_TTL_S ROCKSDB_WRITE_BUFFER_SIZE ROCKSDB_TARGET_FILE_SIZE_BASE"
        " ROCKSDB_MAX_WRITE_BUFFER_NUMBER ROCKSDB_MAX_TOTAL_WAL_SIZE ROCKSDB_MAX_BACKGROUND_JOBS"
    ),
    f"there is no InfiniStore tier; {_SHARED}": (
        "INFINISTORE_HOST_ADDR INFINISTORE_SERVICE_PORT INFINISTORE_CONNECTION_TYPE"
        " INFINISTORE_IB_PORT INFINISTORE_LINK_TYPE INFINISTORE_VISIBLE_DEV_LIST"
        " INFINISTORE_USE_GDR"
    ),
    f"there is no HPKV tier; {_SHARED}": (
        "HPKV_REMOTE_ADDR HPKV_REMOTE_PORT HPKV_LOCAL_ADDR HPKV_LOCAL_PORT HPKV_USE_GDR"
    ),
    f"there is no PrisKV tier; {_SHARED}": (
        "PRISKV_REMOTE_ADDR PRISKV_REMOTE_PORT PRISKV_PASSWORD PRISKV_USE_MPUT_MGET"
        " PRISKV_USE_ZERO_COPY"
    ),
    f"there is no EIC tier; {_SHARED}": "EIC_CONFIG_FILE",
    f"there is no tier on a shared file system; {_SHARED}": "SHFS_ROOT",
    "no tier speaks RDMA": "TRANSPORT_RDMA_ADDR_RANGE",
    "ranks share one L1, so that they always agree on its blocks": SYNC,
}


def _without_effect(table: Mapping[str, str]) -> dict[str, NoEffect]:
    """The table by variable."""
    entries = {}
    for reason, variables in table.items():
        for variable in variables.split():
            name, _, values = variable.partition("=")
            entries[name] = NoEffect(reason, tuple(filter(None, values.split(","))))
    return entries


VARIABLES: dict[str, MappedVariable | NoEffect] = _MAPPED | _without_effect(_WITHOUT_EFFECT)
"""By name without the prefix. docs/aibrix.md has the same texts."""


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """The effect of the variables that are set, a phrase for each."""

    taken: tuple[str, ...] = ()
    overruled: tuple[str, ...] = ()
    no_effect: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = {
            "taken": self.taken,
            "overruled by kvcache's own settings": self.overruled,
            "no effect": self.no_effect,
        }
        texts = [f"{name}: {'; '.join(items)}" for name, items in parts.items() if items]
        return "AIBrix's variables: " + ". ".join(texts)


@dataclass(frozen=True, slots=True)
class AibrixSettings:
    """AIBrix's variables of an environment, read before the tiers are known.

    Attributes:
        requests: the options that they set.
        already_so: sentences for variables that request what kvcache always does.
        no_effect: variables without effect, each with the reason.
        problems: sentences for variables with wrong values.
        disabled_by: the variable that disables L1, with its value; "" without one.
    """

    requests: tuple[RequestedOption, ...]
    already_so: tuple[str, ...]
    no_effect: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]
    disabled_by: str = ""

    def report(self, rows: Sequence[Row]) -> tuple[MigrationReport | None, list[str]]:
        """Return the effect of the variables on these tiers, and the problems with them.

        The report is None if the environment has no variable of AIBrix.
        """
        taken, overruled, refused = [*self.already_so], list[str](), list[str]()
        no_effect = [*self.no_effect]
        if self.disabled_by and rows:
            places = {request.place for request in self.requests}
            # The user set the size of L1 in a place that overrides AIBrix's variables.
            if any(
                setting.set_by_user and setting.option.hint is Size and setting.place not in places
                for setting in rows[0].settings
            ):
                variable = self.disabled_by.partition(" = ")[0]
                overruled.append(f"{variable} (there is an L1, since its size is set)")
            else:
                refused.append(f"environment variable {self.disabled_by}: {_refusal(rows[0].name)}")
        for request in self.requests:
            variable = request.place.rpartition(" ")[2]
            matching = [
                (row, setting)
                for row in (rows[1:] if request.below else rows[:1])
                for setting in row.settings
                if setting.option.name == request.option
            ]
            for row, setting in matching:
                target = f"{request.option} of {row.name}"
                if setting.place == request.place:
                    taken.append(f"{variable} as {target} = {show(request.value)}")
                else:
                    overruled.append(f"{variable} ({target} is from {setting.place})")
            if not matching:
                tiers = "tier below the first" if request.below else "first tier"
                no_effect.append((variable, f"no {tiers} has the option {request.option}"))
        if not (taken or overruled or no_effect):
            return None, refused
        report = MigrationReport(tuple(taken), tuple(overruled), tuple(_by_reason(no_effect)))
        return report, refused


def read_aibrix(environ: Mapping[str, str], *, ranks: int) -> AibrixSettings:
    """Read AIBrix's variables from ``environ``; variables with empty values count as not set."""
    found = {
        variable: text.strip()
        for variable, text in environ.items()
        if (variable.startswith(PREFIX) or variable == SYNC) and text.strip()
    }
    requests, problems, no_effect, already_so, disabled_by = [], [], [], [], ""
    for variable, text in found.items():
        name = _table_name(variable)
        entry, place = VARIABLES.get(name), f"environment variable {variable}"
        if name == _ENABLED and text.lower() in ("0", "false"):
            disabled_by = f"{variable} = {show(text)}"
        elif name == _ENABLED and text.lower() not in ("1", "true"):
            problems.append(f'{place} = {show(text)}: takes "1", "true", "0" or "false"')
        elif isinstance(entry, MappedVariable):
            try:
                value = entry.convert(text, ranks)
            except ValueError as error:
                problems.append(f"{place} = {show(text)}: {error}")
            else:
                requests.append(RequestedOption(place, entry.option, value, entry.below))
        elif entry is None:
            known = (f"{PREFIX}{name}" for name in VARIABLES if name != SYNC)
            no_effect.append((variable, f"AIBrix has no such variable{nearest(variable, known)}"))
        elif text.lower() not in entry.already_so:
            no_effect.append((variable, entry.text.replace("`", "")))
        else:
            already_so.append(f"{variable} = {text}, as it is anyway")
    return AibrixSettings(
        tuple(requests), tuple(already_so), tuple(no_effect), tuple(problems), disabled_by
    )


def _table_name(variable: str) -> str:
    """The variable's name in the table. Earlier versions of AIBrix spelled PRISKV_ as PRIS_."""
    name = variable.removeprefix(PREFIX)
    return f"PRISKV_{name.removeprefix('PRIS_')}" if name.startswith("PRIS_") else name


def _refusal(tier: str) -> str:
    return (
        "it asks for no L1, but every stack has an L1; set its size with "
        f"{override_of(tier, 'capacity')} or in your own profile"
    )


def _by_reason(no_effect: Sequence[tuple[str, str]]) -> list[str]:
    """A sentence for each reason, with the variables that share it."""
    variables_by_reason: dict[str, list[str]] = {}
    for variable, reason in no_effect:
        variables_by_reason.setdefault(reason, []).append(variable)
    return [f"{', '.join(names)} ({reason})" for reason, names in variables_by_reason.items()]
