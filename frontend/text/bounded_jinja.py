"""Jinja's sandbox with a budget: what one rendering may do grows with the conversation, and no further. Pure.

Jinja keeps a template from escaping, not from looping for hours or making gigabytes. Here every rendering has a
`Budget` of steps (passes of loops, calls, filters) and of characters (read or made by an operation, in its worst case,
before it runs). What costs is found in the template's tree, which is rewritten before it is compiled: loops, `~`,
slices and comparisons go through filters of ours. Filters, tests, calls and operators are intercepted by the sandbox.
`lipsum` is not there. Compiling is bounded by the length of the source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sized, ValuesView
from typing import Any, Final, cast

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg, pass_context
from jinja2.visitor import NodeTransformer

BUDGET: Final = " budget"  # a name in the context that no template can write, as are the filters' below
_PASSES, _CONCAT, _READ, _READ_ALL = " passes", " concat", " read", " read_all"
_MAX_INT_BITS: Final = 4096
_VALUE_CHARACTERS: Final = 16  # what a value counts beside its text, so that looking at many is bounded as well
# Filters and methods of str whose result may be as long as the value times the longest, or greatest, argument.
_GROWING: Final = frozenset(
    {
        *("batch", "center", "format", "indent", "join", "replace", "slice", "tojson", "wordwrap", "xmlattr"),
        *("expandtabs", "format_map", "ljust", "rjust", "translate", "zfill"),
    }
)
_INSTANT: Final = frozenset({"abs", "count", "d", "default", "first", "float", "last", "length"})
_COMPARING: Final = ("==", "!=", "eq", "ne", "equalto", "in", "lower", "upper", "<", ">", "<=", ">=", "lt", "gt")
# Widths of four digits, widths that are arguments, widths within a field: in %-formats and in str.format's.
_WIDE: Final = re.compile(r"%[^a-zA-Z%]*(?:\d{4}|\*)|\{[^{}]*:[^{}]*(?:\d{4}|\{)")


class TooMuchError(jinja2.TemplateRuntimeError):
    """The template wants to do more than the conversation accounts for."""


class Budget:
    """Counts what one rendering may still spend."""

    __slots__ = ("_characters", "_steps")

    def __init__(self, steps: int, characters: int) -> None:
        self._steps = steps
        self._characters = characters

    @classmethod
    def of(cls, values: object) -> Budget:
        """For a rendering of these values. Measured: to use all of a short conversation's up takes a second."""
        num_values, num_characters = _extent(values)
        return cls(100_000 + 200 * num_values, 2**23 + 16 * num_characters + 2048 * num_values)

    def spend(self, steps: int, characters: int) -> None:
        """Raises TooMuchError, before it is done, for what there is no budget for."""
        self._steps -= steps
        self._characters -= characters
        if self._steps < 0 or self._characters < 0:
            what = "steps" if self._steps < 0 else "characters"
            raise TooMuchError(f"the chat template takes more {what} than it is allowed for this conversation")

    def length(self, value: object) -> int:
        """How long a value is when it is written out; not counted on beyond what is left."""
        if isinstance(value, str):
            return len(value)
        total, open_values = 0, [value]
        while open_values and total <= self._characters:
            value = open_values.pop()
            total += _VALUE_CHARACTERS + (len(value) if isinstance(value, Sized) else 0)
            if isinstance(value, Mapping):
                open_values += [*value.keys(), *value.values()]
            elif isinstance(value, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
                open_values += value
            elif isinstance(value, Namespace):
                open_values.append(object.__getattribute__(value, "_Namespace__attrs"))
            elif isinstance(value, int):
                total += value.bit_length() // 3
        return total


def _extent(values: object) -> tuple[int, int]:
    """How many values and characters a value holds: (values, characters)."""
    num_values = num_characters = 0
    open_values = [values]
    while open_values:
        value = open_values.pop()
        num_values += 1
        if isinstance(value, str):
            num_characters += len(value)
        elif isinstance(value, Mapping):
            open_values += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            open_values += value
    return num_values, num_characters


def _budget(context: Context) -> Budget:
    found = context.parent[BUDGET]
    assert isinstance(found, Budget)
    return found


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates that render within the `Budget` that stands under BUDGET among their values."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        """`filters` come beside Jinja's own."""
        super().__init__(finalize=_written, **options)
        del self.globals["lipsum"]
        every = {**self.filters, **filters}
        self.filters = {name: _bounded_filter(name, function) for name, function in every.items()}
        self.filters |= {_PASSES: _passes, _CONCAT: _concat, _READ: _read, _READ_ALL: _read_all}
        self.tests |= {name: _bounded_test(cast(Callable[..., Any], self.tests[name])) for name in _COMPARING}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Rewriter().visit(super()._parse(source, name, filename))
        return tree

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget = _budget(__context)
        of = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(of, str):
            args = tuple(list(a) if isinstance(a, Iterator) else a for a in args)
            growing = __obj.__name__ in _GROWING
            arguments = (*args, *kwargs.values())
            budget.spend(0, _longest(budget, __obj.__name__, of, arguments) if growing else len(of))
        elif isinstance(__obj, LoopContext):  # a recursive loop's next depth
            budget.spend(sum(len(value) for value in args if isinstance(value, Sized)), 0)
        result = super().call(__context, __obj, *args, **kwargs)
        budget.spend(1, len(result) if isinstance(result, Sized) else 0)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _budget(context).spend(1, _binop_cost(_budget(context), operator, left, right))
        return super().call_binop(context, operator, left, right)


# --- what operations cost ---


def _longest(budget: Budget, name: str, value: Any, args: tuple[Any, ...]) -> int:
    """How long the result of a filter or a method of str in _GROWING can be."""
    match name, args:
        case (("format" | "format_map"), _):
            if _WIDE.search(value):
                raise TooMuchError("the chat template formats with a width that is too great or comes from a value")
            num_fields = int(value.count("%") + value.count("{"))
            return len(value) + num_fields * sum(map(budget.length, args))
        case "replace", (str(old), str(new), *_) if old and isinstance(value, str):
            return len(value) + value.count(old) * len(new)
        case "join", (str(between),) if isinstance(value, Sized) and not isinstance(value, str):
            return budget.length(value) + len(value) * len(between)
        case "join", (Sized() as parts,) if isinstance(value, str):
            return budget.length(parts) + len(parts) * len(value)
    factors = [abs(argument) if isinstance(argument, int) else budget.length(argument) for argument in args]
    return (budget.length(value) + 1) * max(factors, default=1)


def _binop_cost(budget: Budget, operator: str, left: Any, right: Any) -> int:
    """How many characters an operator makes at most."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * (max(1, abs(right)) if operator == "**" else 1) + right.bit_length()
        if bits > _MAX_INT_BITS:
            raise TooMuchError(f"the chat template computes a number of {bits} bits")
        return 0
    if operator == "*":
        return next((len(a) * abs(b) for a, b in ((left, right), (right, left)) if isinstance(a, Sized)), 0)
    if operator == "%" and isinstance(left, str):
        return _longest(budget, "format", left, (right,))
    return sum(len(side) for side in (left, right) if isinstance(side, Sized))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @pass_context
    def bounded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        if isinstance(value, Iterator):
            value = list(value)
            budget.spend(len(value), 0)
        budget.spend(1, 0 if name in _INSTANT else budget.length(value))
        if name in _GROWING:
            budget.spend(0, _longest(budget, name, value, (*args, *kwargs.values())))
        result = _pass(function, context)(value, *args, **kwargs)
        budget.spend(0, len(result) if isinstance(result, str | list) else 0)
        return result

    return bounded


def _bounded_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @pass_context
    def bounded(context: Context, value: Any, *args: Any) -> Any:
        budget = _budget(context)
        budget.spend(1, budget.length(value) + sum(map(budget.length, args)))
        return _pass(function, context)(value, *args)

    return bounded


def _pass(function: Callable[..., Any], context: Context) -> Callable[..., Any]:
    """The function, given what it asks Jinja for."""
    match _PassArg.from_obj(function):
        case _PassArg.context:
            return lambda *args, **kwargs: function(context, *args, **kwargs)
        case _PassArg.eval_context:
            return lambda *args, **kwargs: function(context.eval_ctx, *args, **kwargs)
        case _PassArg.environment:
            return lambda *args, **kwargs: function(context.environment, *args, **kwargs)
        case _:
            return function


# --- what the rewritten tree calls ---


class _Rewriter(NodeTransformer):
    """Lets loops, concatenations, slices and comparisons of a template pass through the filters below."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        weight = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        node.iter = _filter(node.iter, _PASSES, nodes.Const(weight, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        first, *rest = node.nodes
        return _filter(first, _CONCAT, *rest)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter(node.node, _READ)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:  # noqa: N802
        self.generic_visit(node)
        node.expr = _filter(node.expr, _READ_ALL)
        for operand in node.ops:
            is_search = operand.op in ("in", "notin")
            operand.expr = _filter(operand.expr, _READ if is_search else _READ_ALL)
        return node


def _filter(node: nodes.Node, name: str, *args: nodes.Node) -> nodes.Filter:
    values = cast(list[nodes.Expr], list(args))
    return nodes.Filter(cast(nodes.Expr, node), name, values, [], None, None, lineno=node.lineno)


@pass_context
def _passes(context: Context, values: Iterable[Any], weight: int) -> Iterator[Any]:
    """Each pass of a loop is a step, and writes at most the text that stands in the loop."""
    budget = _budget(context)
    for value in values:
        budget.spend(1, weight)
        yield value


@pass_context
def _concat(context: Context, *values: Any) -> str:
    budget = _budget(context)
    budget.spend(1, sum(map(budget.length, values)))
    return "".join(map(str, values))


@pass_context
def _read(context: Context, value: Any) -> Any:
    _budget(context).spend(0, len(value) if isinstance(value, str | list | tuple) else 0)
    return value


@pass_context
def _read_all(context: Context, value: Any) -> Any:
    budget = _budget(context)
    budget.spend(0, budget.length(value))
    return value


@pass_context
def _written(context: Context, value: Any) -> Any:
    return _read_all(context, value)
