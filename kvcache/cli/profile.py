"""List, show and check profiles.

  list    the shipped profiles
  show    the values that an engine would use now, and the source of each
  check   list every problem of files, without the environment
  schema  the JSON schema of a profile, for editors

Exit code: 0 if every profile is valid, 1 if one is not, 2 for invalid arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcache.profiles import Profile
    from kvcache.profiles.tiers import Row


MAX_RANKS = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `kvcache profile`, and the arguments of each."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, (action, summary) in _ACTIONS.items():
        sub = actions.add_parser(name, help=summary, description=action.__doc__)
        sub.add_argument("--json", action="store_true", help="print one JSON value")
        sub.set_defaults(action=action)
        if name == "show":
            sub.add_argument(
                "name", nargs="?", metavar="NAME",
                help="a shipped name or a path (default: $KVCACHE_PROFILE, or l1-only)",
            )  # fmt: skip
            sub.add_argument(
                "--ranks", type=int, default=1, metavar="N",
                help="ranks of the engine; AIBrix's variables set the memory of each (1)",
            )  # fmt: skip
        if name == "check":
            sub.add_argument("files", nargs="+", metavar="FILE")


def run(args: argparse.Namespace) -> int:
    """Run the action, and return its exit code."""
    return int(args.action(args))


def list_(args: argparse.Namespace) -> int:
    """List the shipped profiles: name, tiers and summary."""
    from kvcache.profiles.source import find_profile, read_or_raise, shipped, summary_of

    found: list[dict[str, Any]] = []
    for name in shipped():
        path = find_profile(name, Path())
        _, tables = read_or_raise(path)
        tiers = [{"name": table.name, "kind": table.value("kind")} for table in tables]
        found.append({"name": name, "tiers": tiers, "summary": summary_of(path), "path": str(path)})
    if args.json:
        print(json.dumps(found))
        return 0
    rows = [(one["name"], ", ".join(tier["name"] for tier in one["tiers"])) for one in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for (name, names), one in zip(rows, found, strict=True):
        print(f"{name:{widths[0]}}  {names:{widths[1]}}  {one['summary']}")
    return 0


def show(args: argparse.Namespace) -> int:
    """Show a profile with the environment applied, as one file, with the source of each value."""
    from kvcache.profiles import ProfileError, load_profile

    if not 1 <= args.ranks <= MAX_RANKS:
        print(f"--ranks is {args.ranks}; it must be 1 to {MAX_RANKS}", file=sys.stderr)
        return 2
    try:
        profile = load_profile(args.name, ranks=args.ranks)
    except ProfileError as error:
        if args.json:
            print(json.dumps({"name": error.profile, "problems": error.problems}))
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(_to_json(profile)) if args.json else _text(profile))
    return 0


def check(args: argparse.Namespace) -> int:
    """Check files without the environment, and list every problem."""
    from kvcache.profiles import ProfileError, load_profile

    found: list[dict[str, Any]] = []
    for file in args.files:
        try:
            load_profile(file, {})
        except ProfileError as error:
            found.append({"file": file, "problems": error.problems})
            text = str(error)
        else:
            found.append({"file": file, "problems": []})
            text = f"{file}: valid"
        if not args.json:
            print(text)
    if args.json:
        print(json.dumps(found))
    return 1 if any(one["problems"] for one in found) else 0


def schema(args: argparse.Namespace) -> int:
    """Print the JSON schema of a profile with the tiers that are installed here."""
    from kvcache.profiles import schema

    print(json.dumps(schema.schema(), indent=None if args.json else 2))
    return 0


_ACTIONS = {
    "list": (list_, "list the shipped profiles"),
    "show": (show, "show the values that an engine would use now"),
    "check": (check, "list every problem of files"),
    "schema": (schema, "print the JSON schema of a profile"),
}


def _values(row: Row) -> dict[str, dict[str, Any]]:
    """Return the given text, the value and the source of each option of a tier, without secrets."""
    from kvcache.profiles.schema import as_written

    values: dict[str, dict[str, Any]] = {}
    settings = {setting.option.name: setting for setting in row.settings}
    for name, option in row.accepted.items():
        if setting := settings.get(name):
            given, value, place = setting.given, setting.value, setting.place
        else:
            given, value, place = as_written(option.default, option.hint), option.default, "default"
        if given is not None:
            values[name] = {
                "given": _hide_secrets(name, given),
                "value": _hide_secrets(name, value),
                "from": place,
            }
    return values


def _hide_secrets(name: str, value: object) -> object:
    """Return ``value`` as JSON, with possible secrets hidden."""
    from kvcache import secrets

    return json.loads(json.dumps(secrets.hide(name, value), default=str))


def _to_json(profile: Profile) -> dict[str, Any]:
    report = profile.aibrix
    return {
        "name": profile.name,
        "path": str(profile.path),
        "extends": [str(path) for path in profile.bases],
        "tiers": [
            {
                "name": row.name,
                "kind": row.kind,
                "class": f"{row.cls.__module__}:{row.cls.__qualname__}",
                "options": _values(row),
            }
            for row in profile.tiers
        ],
        "aibrix": report and {
            "taken": report.taken, "overruled": report.overruled, "no_effect": report.no_effect,
        },
        "unknown": profile.unknown,
    }  # fmt: skip


def _distinct_names(files: Sequence[Path]) -> bool:
    return len({path.name for path in files}) == len(files)


def _text(profile: Profile) -> str:
    """Return the profile as one TOML file without ``extends``."""
    from kvcache.sizes import DiskSize, Size, format_size

    files = [profile.path, *profile.bases]
    short = {str(path): path.name for path in files} if _distinct_names(files) else {}
    lines = [f"# {profile.name}: {' extends '.join(map(str, files))}"]
    if profile.aibrix:
        lines.append(f"# {profile.aibrix}")
    lines += [f"# warning: {unknown}" for unknown in profile.unknown]
    for row in profile.tiers:
        lines += ["", "[[tier]]", f'name = "{row.name}"', f"kind = {json.dumps(row.kind)}"]
        values = _values(row)
        texts = {name: f"{name} = {json.dumps(one['given'])}" for name, one in values.items()}
        width = max(map(len, texts.values()), default=0)
        for name, one in values.items():
            path, line, number = one["from"].rpartition(", line ")
            place = f"{short.get(path, path)}{line}{number}"
            if row.accepted[name].hint in (Size, DiskSize):
                size = format_size(one["value"])
                place = place if size == one["given"] else f"{size}; {place}"
            lines.append(f"{texts[name]:{width}}  # {place}")
    return "\n".join(lines)
