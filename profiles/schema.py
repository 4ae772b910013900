"""The JSON schema of a profile, made from the constructors of the installed tiers.

Invariant: the schema accepts every profile that the loader accepts. The loader refuses more,
because a schema knows neither classes given by path, nor the tiers of a base, nor this machine.
"""

import inspect
import re
from typing import Any, Literal, get_args, get_origin

from kvcache.eviction import POLICIES, Eviction
from kvcache.profiles.options import Option, allowed_values, options_of
from kvcache.profiles.tiers import WRAPPERS, FrontOptions, known_kinds, tier_class
from kvcache.sizes import DiskSize, Size, format_size, parse_size
from kvcache.tier import FrontTier

Schema = dict[str, Any]

_NUMBER = r"^\s*\+?[0-9]+(\.[0-9]+)?\s*"
_UNIT = r"([kKmMgGtT][iI]?[bB]|[bB])?"
_TYPES: dict[object, Schema] = {
    Eviction: {"anyOf": [{"enum": list(POLICIES)}, {"type": "string", "pattern": ":"}]},
    Size: {
        "anyOf": [
            {"type": "integer", "minimum": 1},
            {"type": "string", "pattern": rf"{_NUMBER}({_UNIT}|%)\s*$"},
        ]
    },
    DiskSize: {
        "anyOf": [
            {"type": "integer", "minimum": 1},
            {"type": "string", "pattern": rf"{_NUMBER}{_UNIT}\s*$"},
        ]
    },
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    str: {"type": "string"},
}
_NAME: Schema = {
    "type": "string",
    "pattern": "^[a-z0-9]+([-_][a-z0-9]+)*$",
    "description": "The name of this tier in variables, spans and messages.",
}
_ARGUMENT = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)


def schema() -> Schema:
    """Return the schema (draft 2020-12). A tier with missing packages accepts any option."""
    first: dict[str, Schema] = {}
    below: dict[str, Schema] = {}
    for kind in known_kinds():
        try:
            cls = tier_class(kind)
        except ValueError as error:
            below[kind] = {"description": str(error)}
            continue
        if issubclass(cls, FrontTier):
            first[kind] = _options(kind, cls, FrontOptions)
        below[kind] = _options(kind, cls, *WRAPPERS)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A profile of kvcache: tiers, nearest first",
        "type": "object",
        "properties": {
            "extends": {
                "type": "string",
                "description": "The base profile: a shipped name, or a path from this file.",
            },
            "without": {
                "type": "array",
                "items": _NAME,
                "description": "Tiers of the base to leave out.",
            },
            "tier": {"type": "array"},
        },
        "additionalProperties": False,
        "if": {"required": ["extends"]},
        "then": {"properties": {"tier": {"items": {"$ref": "#/$defs/changed"}}}},
        "else": {
            "required": ["tier"],
            "properties": {
                "without": False,
                "tier": {
                    "minItems": 1,
                    "prefixItems": [{"$ref": "#/$defs/first"}],
                    "items": {"$ref": "#/$defs/below"},
                },
            },
        },
        "$defs": {
            "first": _row(first),
            "below": _row(below),
            "changed": {
                "type": "object",
                "properties": {"name": _NAME, "kind": {"type": "string"}},
                "required": ["name"],
            },
        },
    }


def _row(kinds: dict[str, Schema]) -> Schema:
    """Return the schema of a row of one of ``kinds``, or of a class path with any options."""
    return {
        "type": "object",
        "properties": {
            "name": _NAME,
            "kind": {
                "description": 'A tier that kvcache knows, or a class: "package.module:Class".',
                "anyOf": [{"enum": sorted(kinds)}, {"type": "string", "pattern": ":"}],
            },
        },
        "required": ["name", "kind"],
        "allOf": [
            {"if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]}, "then": options}
            for kind, options in sorted(kinds.items())
        ],
    }


def _options(kind: str, *classes: type) -> Schema:
    """Return the schema of a row of this kind: the options of all ``classes``."""
    properties: Schema = {"name": True, "kind": True}
    required = []
    for cls in classes:
        descriptions = dict(_ARGUMENT.findall(inspect.getdoc(cls) or ""))
        for name, option in options_of(cls).items():
            properties[name] = _option(option, descriptions.get(name, ""))
            if option.required:
                required.append(name)
    return {
        "title": f"The options of kind {kind}",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _option(option: Option, description: str) -> Schema:
    text = " ".join(description.replace("``", "").split()) or allowed_values(option.hint)
    described: Schema = {"description": text}
    if get_origin(option.hint) is Literal:
        described["enum"] = list(get_args(option.hint))
    else:
        described |= _TYPES.get(option.hint, {})
    if option.name.endswith("_env"):
        described["pattern"] = "^([A-Za-z_][A-Za-z0-9_]*)?$"
    if (default := as_written(option.default, option.hint)) is not None:
        described["default"] = default
    return described


def as_written(value: object, hint: object) -> object:
    """Return the value of an option as a profile contains it; None if no profile can."""
    if hint in (Size, DiskSize) and isinstance(value, int):
        if value == 0:
            return None  # a default that means "none"; no profile can have it
        size = format_size(value)
        return size if parse_size(size) == value else value
    return value if type(value) in (bool, float, int, str) else None
