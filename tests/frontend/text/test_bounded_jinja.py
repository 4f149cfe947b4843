"""Chat templates that would run for ever or make gigabytes end in one error, soon, and others notice nothing."""

# ruff: noqa: E501  a template is one line, however long
from __future__ import annotations

import time
import tracemalloc
from datetime import datetime
from typing import Any

import pytest
from jinja2.ext import LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from frontend.text.bounded_jinja import BUDGET, BoundedEnvironment, Budget
from frontend.text.chat_template import ChatTemplate, ChatTemplateError

NOW = datetime(2031, 5, 6)
HI = [{"role": "user", "content": "Hi"}]
DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = BODY %}{% endfor %}"
NESTING = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"

ENDLESS = {
    "two nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested ranges with a condition": (
        "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}"
    ),
    "lists in a loop": "{% for a in range(99999) %}{% set x = range(99999) | map('abs') | list %}{% endfor %}",
    "sums in a loop": "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "attributes in a loop": "{% for a in range(99999) %}{{ range(99999) | map(attribute='x') | list }}{% endfor %}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a recursive loop": "{% for x in [1,2] recursive %}{% if loop.depth < 90 %}{{ loop([1,2]) }}{% endif %}{% endfor %}",
    "lipsum": "{{ lipsum(99999) }}",
    "a wide %-format": "{{ '%1000000000d' | format(1) }}",
    "a wide %-format by an operator": "{{ '%1000000000d' % 1 }}",
    "a width that is a value": "{{ '%*d' | format(1000000000, 1) }}",
    "a wide str.format": "{{ '{:1000000000d}'.format(1) }}",
    "a str.format whose width is a value": "{{ '{:{w}d}'.format(1, w=1000000000) }}",
    "a deep indentation": "{{ messages | tojson(indent=100000000) }}",
    "a text times a number": "{{ 'a' * 1000000000 }}",
    "a number times a text": "{{ 1000000000 * 'a' }}",
    "a list times a number": "{{ ([1] * 1000000000) | length }}",
    "a power": "{{ (10 ** 100000000) % 7 }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "doubling by +": DOUBLING.replace("BODY", "ns.x + ns.x"),
    "doubling by ~": DOUBLING.replace("BODY", "ns.x ~ ns.x"),
    "doubling by replace": DOUBLING.replace("BODY", "ns.x | replace('a', ns.x)"),
    "doubling by a method": DOUBLING.replace("BODY", "ns.x.replace('a', ns.x)"),
    "doubling by join": DOUBLING.replace("BODY", "[ns.x, ns.x] | join"),
    "doubling by a method's join": DOUBLING.replace("BODY", "ns.x.join([ns.x, ns.x])"),
    "doubling by join of attributes": DOUBLING.replace(
        "BODY", "[{'a': ns.x}, {'a': ns.x}] | map(attribute='a') | join"
    ),
    "doubling by format": DOUBLING.replace("BODY", "'%s%s' | format(ns.x, ns.x)"),
    "doubling by %": DOUBLING.replace("BODY", "'%s%s' % (ns.x, ns.x)"),
    "doubling by str.format": DOUBLING.replace("BODY", "'{0}{0}'.format(ns.x)"),
    "doubling by a block": (
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = y %}{% endfor %}"
    ),
    "padding": "{{ 'a'.ljust(1000000000) }}{{ 'a' | center(1000000000) }}",
    "zeros": "{{ 'a'.zfill(1000000000) }}",
    "tabs": "{{ '\t'.expandtabs(1000000000) }}",
    "indent": "{{ ('a\n' * 100000) | indent(100000) }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list | length }}",
    "slice": "{{ [1] | slice(1000000000) | list | length }}",
    "much text of the template's own in a loop": "{% for i in range(99999) %}" + "a" * 10_000 + "{% endfor %}",
    "much text of its own in a block": "{% set x %}{% for i in range(99999) %}"
    + "a" * 9_999
    + "{% endfor %}{% endset %}",
    "slices in a loop": "{% set x = 'a' * 1000000 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "searches in a loop": "{% set x = 'a' * 1000000 %}{% for i in range(99999) %}{% if 'b' in x %}{% endif %}{% endfor %}",
    "a list of lists written": NESTING + "{{ ns.x }}",
    "a namespace written": NESTING + "{{ ns }}",
    "a list of lists as text": NESTING + "{{ ns.x | string | length }}",
    "a list of lists as JSON": NESTING + "{{ ns.x | tojson | length }}",
    "a list of lists formatted": NESTING + "{{ '%s' | format(ns.x) | length }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_template_without_end_is_an_error_in_bounded_memory(source: str):
    began = time.thread_time()
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render(HI, now=NOW)
    assert time.thread_time() - began < 5, "seconds of processor time"


@pytest.mark.parametrize("name", ["a text times a number", "doubling by ~", "a wide %-format", "a deep indentation"])
def test_what_is_refused_is_refused_before_it_costs_memory(name: str):
    tracemalloc.start()
    try:
        with pytest.raises(ChatTemplateError):
            ChatTemplate(ENDLESS[name], {}).render(HI, now=NOW)
        assert tracemalloc.get_traced_memory()[1] < 150_000_000
    finally:
        tracemalloc.stop()


ORDINARY = [
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ '\n' if not loop.last }}{% endfor %}",
    "{% for m in messages[1:] %}{{ loop.index0 ~ ':' ~ loop.length ~ ':' ~ loop.revindex }}{{ m.content[::-1] }}{% endfor %}",
    "{% if messages[0].role == 'system' and 'tools' not in messages[0] %}{{ messages[0].content.split('e')[-1] }}{% endif %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(' + ') }}",
    "{% set ns = namespace(found=false, n=0) %}{% for m in messages | reverse %}{% if m.role == 'user' and not ns.found %}"
    "{% set ns.found = true %}{% set ns.n = loop.index0 * 2 + 1 %}{% endif %}{% endfor %}{{ ns.found }}{{ ns.n }}",
    "{% macro say(m, end='.') %}{{ m.content | upper }}{{ end }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "{{ messages | tojson(indent=2) }}{{ '%s is %03d' | format('x', 7) }}{{ '{:>5}|{}'.format('a', 2) }}{{ 'x%s' % 1 }}",
    "{{ messages | map(attribute='role') | unique | sort | list }}{{ [3, 1] | sort | first }}{{ {'a': 1}.items() | list }}",
    "{{ 'abc' is string }}{{ messages is iterable }}{{ nothing is defined }}{{ nothing | default('d') }}{{ 3 is in [3] }}",
    "{% for a, b in {'x': 1, 'y': 2} | dictsort %}{{ a }}{{ b }}{% else %}none{% endfor %}{{ [1, 2] + [3] }}{{ 2 ** 10 }}",
    "{% for k, v in messages[0].items() %}{{ k | capitalize }}={{ v | replace('e', '€') | indent(4) }};{% endfor %}",
    "{% for x in [[1, [2]], [3]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}{{ cycler('a', 'b').next() }}",
    "{% for m in messages if m.role != 'system' %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{{ messages[-1].content.strip().startswith('Wh') }}{{ messages | length > 2 }}{{ (messages | last).content | safe }}",
]


@pytest.mark.parametrize("source", ORDINARY)
def test_an_ordinary_template_gives_what_jinjas_own_sandbox_gives(source: str):
    messages = [
        {"role": "system", "content": "Be brief, 100% 2024 {a:1234}."},
        {"role": "user", "content": " Where? "},
        {"role": "assistant", "content": "Here."},
        {"role": "user", "content": "Why?"},
    ]
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [LoopControlExtension]}
    expected = ImmutableSandboxedEnvironment(**options).from_string(source).render(messages=messages)
    values = {"messages": messages, BUDGET: Budget.of(messages)}
    assert BoundedEnvironment({}, **options).from_string(source).render(values) == expected


def test_a_long_conversation_and_a_long_message_have_budget_enough():
    source = (
        "{% for m in messages %}{% if loop.index0 == 0 and m.role == 'system' %}S{% endif %}"
        "{% set text = m.content | trim %}{% if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}"
        "{{ '<|' + m.role + '|>' + text.replace('<|end of text|>', '') + '\n' }}{% endfor %}"
    )
    many = [{"role": "user", "content": "Hi"}] * 20_000
    assert len(ChatTemplate(source, {}).render(many, now=NOW)) == 20_000 * len("<|user|>Hi\n")
    long = [{"role": "user", "content": "a b" * 1_300_000}]
    assert len(ChatTemplate(source, {}).render(long, now=NOW)) == 3_900_000 + len("<|user|>\n")


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in x %}" * 60 + "{% endfor %}" * 60,
        "{{ " + "(" * 3_000 + "1" + ")" * 3_000 + " }}",
        "{% if x %}" * 3_000 + "{% endif %}" * 3_000,
        "{{ x }}" * 200_000,
        "{{ 1 +",
        "{% macro %}",
    ],
    ids=[
        "60 loops",
        "3000 parentheses",
        "3000 conditions",
        "a megabyte",
        "an unfinished one",
        "a macro without a name",
    ],
)
def test_a_template_that_does_not_compile_is_one_error(source: str):
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {})
