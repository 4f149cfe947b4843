"""Flags declared where their values are kept: on the fields of configuration classes. Pure.

    block_size: Annotated[int, Meta(ge=1, le=1024), Flag("tokens in a KV block (default: %(default)s)")] = 16

declares name, type, bounds, help and default of `--block-size` at once. A field that is a configuration itself is a
section: `Annotated[CacheConfig, Group("engine")]` puts its flags under that heading of `--help`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from msgspec import Meta

from metrics.catalogue import parse_overrides


@dataclass(frozen=True, slots=True)
class Flag:
    """What the field's declaration does not say. The name is the field's, if it is not given; so is the meaning of
    the text, by the field's type. `group` is for a field that lies in no section."""

    help: str
    name: str = ""
    short: str = ""
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None  # raises ValueError
    group: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """The heading of a section's flags."""

    title: str


ConfigT = TypeVar("ConfigT")


# --- what a flag's text means ---


def named(name: str) -> Callable[[Callable[[str], Any]], Callable[[str], Any]]:
    """What a complaint calls such a value."""

    def name_it(parse: Callable[[str], Any]) -> Callable[[str], Any]:
        parse.__name__ = name
        return parse

    return name_it


@named("UTF-8 text")
def text(value: str) -> str:
    """Text that can be sent on: bytes that are not UTF-8 cannot."""
    value.encode()
    return value


@named("printable name")
def printable(value: str) -> str:
    """A name for clients and logs."""
    if not value or not value.isprintable():  # what is no UTF-8 is not printable either
        raise ValueError
    return value


@named("number of bytes")
def num_bytes(value: str) -> int:
    """A number of bytes, or of K, M, G (1000) or Ki, Mi, Gi (1024)."""
    powers = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "K": 10**3, "M": 10**6, "G": 10**9}
    suffix = next((s for s in powers if value.endswith(s)), "")
    number = float(value.removesuffix(suffix)) * powers.get(suffix, 1)
    if not (math.isfinite(number) and number >= 1):
        raise ValueError
    return int(number)


@named("http:// or https:// URL")
def url(value: str) -> str:
    """Of somebody who receives."""
    parts = urlsplit(text(value))
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError
    return value


@named("JSON")
def buckets(value: str) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """Bounds by family."""
    try:
        return parse_overrides(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _number(kind: Callable[[str], float], unit: str, metas: list[Meta]) -> Callable[[str], float]:
    low = max((meta.ge for meta in metas if meta.ge is not None), default=-math.inf)
    high = min((meta.le for meta in metas if meta.le is not None), default=math.inf)

    @named(f"{unit} from {low:g}" + ("" if high >= sys.float_info.max else f" to {high:g}"))
    def number(value: str) -> float:
        found = kind(value)
        if not (math.isfinite(found) and low <= found <= high):
            raise ValueError
        return found

    return number


# --- from declarations to a parser, and from what it finds to configurations ---


def add_flags(parser: argparse.ArgumentParser, kind: type) -> None:
    """Every flag that the class and its sections declare."""
    groups: dict[str, Any] = {}
    for place, field, hint, title in _declared(kind):
        base, marks = _unwrapped(hint)
        for flag in marks:
            if isinstance(flag, Flag):
                name = flag.group or title
                if name not in groups:
                    groups[name] = parser.add_argument_group(name)
                _add(groups[name], place, field, base, [m for m in marks if isinstance(m, Meta)], flag)


def _declared(kind: type, place: str = "", title: str = "") -> Iterator[tuple[str, Field[Any], Any, str]]:
    """(place, field, type, title of its section) of every field that is no section, in their order."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        here, (base, marks) = f"{place}{field.name}", _unwrapped(hints[field.name])
        if is_dataclass(base) and isinstance(base, type):
            yield from _declared(base, f"{here}.", next(m.title for m in marks if isinstance(m, Group)))
        else:
            yield here, field, hints[field.name], title


def _unwrapped(hint: Any) -> tuple[Any, list[Any]]:
    """The type without its marks and without None, and the marks."""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
    elif type(None) in get_args(hint):
        inner, marks = next(one for one in get_args(hint) if one is not type(None)), []
    else:
        return hint, []
    base, more = _unwrapped(inner)
    return base, [*more, *marks]


def _add(group: Any, place: str, field: Field[Any], base: Any, metas: list[Meta], flag: Flag) -> None:
    name = flag.name or f"--{field.name.replace('_', '-')}"
    default = None if field.default is MISSING else field.default
    how: dict[str, Any] = {"type": flag.parse or text, "metavar": flag.metavar or name.strip("-").upper()}
    if base is bool:
        switch = "store_false" if name.startswith("--disable-") else argparse.BooleanOptionalAction
        how = {"action": switch if default else "store_true"}
    elif get_origin(base) is Literal:
        how = {"choices": get_args(base)}
    elif get_args(base) == (str, ...):
        how["nargs"] = "+"
    elif base is int:
        how = {"type": flag.parse or _number(int, "whole number", metas), "metavar": flag.metavar or "N"}
    elif base is float:
        how = {"type": _number(float, "number of seconds", metas), "metavar": "S"}
    names = (name, flag.short) if flag.short else (name,)
    group.add_argument(*names, dest=place, default=default, help=flag.help, **how)


def make(kind: type[ConfigT], found: Mapping[str, Any], place: str = "", **known: Any) -> ConfigT:
    """The configuration, with its sections, of what a parser with these flags has found; `known` is its fields that
    no flag sets."""
    hints = get_type_hints(kind)
    for field in fields(kind):  # type: ignore[arg-type]
        here = f"{place}{field.name}"
        if is_dataclass(hints[field.name]):
            known[field.name] = make(hints[field.name], found, f"{here}.")
        elif here in found:
            known[field.name] = tuple(found[here]) if isinstance(found[here], list) else found[here]
    return kind(**known)
