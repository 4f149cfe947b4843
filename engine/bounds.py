"""The bounds of values from outside, declared with a field's type and checked wherever it comes in. Pure.

A field says `Annotated[int, Meta(ge=0)]`, or one of the names here. msgspec checks it in messages (`engine.wire`), the
command line in flags (`engine.options`), and the API servers in what clients send (`limits`).
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Annotated, Any, get_args, get_type_hints

from msgspec import Meta

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
NumProcesses = Annotated[int, Meta(ge=1, le=256)]
Port = Annotated[int, Meta(ge=0, le=65535)]
# NOTE: nothing compares with not-a-number, so any bound keeps it out; infinities need both.
Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
Text = Annotated[str, Meta(min_length=1, pattern=r"\A[^\0]*\Z")]  # names a file, a host or a model


def seconds(low: float) -> Meta:
    """A bound of a float: a time that is no shorter, and ends."""
    return Meta(ge=low, le=sys.float_info.max)


def one_of(*words: str) -> Meta:
    """A bound of text: it is one of these."""
    return Meta(pattern=rf"\A(?:{'|'.join(words)})\Z")


def limits(kind: type, name: str) -> dict[str, float]:
    """The bounds of a field's value, as `ge`, `gt`, `le` and `lt`, where it has them."""
    return {
        limit: value
        for meta in _metas(get_type_hints(kind, include_extras=True)[name])
        for limit in ("ge", "gt", "le", "lt")
        if (value := getattr(meta, limit)) is not None
    }


def _metas(hint: Any) -> list[Meta]:
    """Of the type itself or of what it is beside None, not of what it holds."""
    if isinstance(hint, Meta):
        return [hint]
    is_outer = hasattr(hint, "__metadata__") or type(None) in get_args(hint)
    return [meta for one in get_args(hint) for meta in _metas(one)] if is_outer else []


def default(kind: type, name: str) -> Any:
    """The field's value where nothing is said."""
    return next(field.default for field in fields(kind) if field.name == name)
