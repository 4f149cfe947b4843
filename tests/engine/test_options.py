"""Flags declared on fields: one declaration makes the flag, its bounds and the field's value."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from engine.bounds import default, limits, seconds
from engine.config import DeploymentConfig
from engine.flags import make_parser
from engine.options import Flag, Group, add_flags, make, num_bytes
from engine.wire import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    size: Annotated[int, Meta(ge=1, le=9), Flag("how large (default: %(default)s)", short="-s")] = 3
    wait_s: Annotated[float, seconds(0.5), Flag("how long", name="--wait")] = 1.0
    names: Annotated[tuple[str, ...], Flag("of whom")] = ()
    is_on: Annotated[bool, Flag("on")] = True
    is_off: Annotated[bool, Flag("off")] = False
    is_kept: Annotated[bool, Flag("kept", name="--disable-keeping")] = True
    limit: Annotated[Annotated[int, Meta(ge=1)] | None, Flag("at most", parse=num_bytes)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    inner: Annotated[Inner, Group("inner ones")]
    word: Annotated[Literal["a", "b"], Flag("which", group="others")] = "a"
    known: str = "nobody's flag"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(exit_on_error=False)
    add_flags(made, Outer)
    return made


def parsed(*arguments: str) -> Outer:
    return make(Outer, vars(parser().parse_args(arguments)))


def test_without_flags_every_field_has_its_default():
    assert parsed() == Outer(inner=Inner())


def test_every_kind_of_flag_fills_its_field():
    flags = "-s 9 --wait 2 --names x y --no-is-on --is-off --disable-keeping --limit 2K --word b"
    inner = Inner(size=9, wait_s=2.0, names=("x", "y"), is_on=False, is_off=True, is_kept=False, limit=2000)
    assert parsed(*flags.split()) == Outer(inner=inner, word="b")
    assert parsed("--size", "1").inner.size == 1


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--size", "0"), "whole number from 1 to 9 value: '0'"),
        (("--size", "10"), "'10'"),
        (("--size", "1.5"), "'1.5'"),
        (("--wait", "0.4"), "number of seconds from 0.5 value: '0.4'"),
        (("--wait", "nan"), "'nan'"),
        (("--wait", "inf"), "'inf'"),
        (("--limit", "0"), "number of bytes value: '0'"),
        (("--word", "c"), "'c'"),
        (("--names", "\udcff"), "UTF-8 text value"),
    ],
)
def test_a_value_beyond_its_bounds_is_refused_by_its_flag(flags: tuple[str, ...], complaint: str):
    with pytest.raises(argparse.ArgumentError, match=complaint):
        parsed(*flags)


@given(st.integers(-5, 15))
def test_a_flag_takes_what_a_message_takes(size: int):
    def is_taken(take: Any) -> bool:
        try:
            take()
        except (argparse.ArgumentError, msgspec.ValidationError):
            return False
        return True

    by_flag = is_taken(lambda: parsed("--size", str(size)))
    assert by_flag == is_taken(lambda: msgspec.convert({"size": size}, Inner))


def test_help_is_by_section_and_shows_defaults():
    shown = parser().format_help()
    assert shown.index("inner ones:") < shown.rindex("--size") < shown.index("others:") < shown.rindex("--word")
    assert "how large (default: 3)" in shown


def test_every_default_of_the_command_line_is_within_its_own_bounds():
    for action in make_parser()._actions:
        if callable(action.type) and isinstance(action.default, int | float):
            assert action.type(str(action.default)) == action.default, action.option_strings


def test_bounds_and_defaults_are_read_from_the_declaration():
    assert limits(Inner, "size") == {"ge": 1, "le": 9}
    assert limits(Inner, "limit") == {"ge": 1}
    assert limits(Inner, "names") == {}
    assert limits(SamplingParams, "logit_bias") == {}  # those of its items are not its own
    assert default(Inner, "size") == 3
    assert default(DeploymentConfig, "num_engines") == 1
