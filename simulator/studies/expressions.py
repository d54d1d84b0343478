"""Filters such as `tensor * pipeline <= 64`, evaluated without ever executing code.

The text is parsed to a syntax tree, every node of which must be on a short list: numbers, texts,
names, arithmetic, comparisons, `and`/`or`/`not`, conditional expressions, lists, and a few pure
functions. There are no attributes of objects (a dotted name is looked up as a whole), no
subscripts, no comprehensions, no other calls; texts take no part in arithmetic and integers are
bounded, so that no filter can run long or use much memory.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from simulator.errors import InputError, nearest

#: Longest text of a filter; longer ones are surely no filter written by a person.
MAX_LENGTH = 2000
#: Results of integer arithmetic stay below two to this power.
MAX_BITS = 256

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "ceil": math.ceil,
    "floor": math.floor,
    "gcd": math.gcd,
    "log2": math.log2,
    "max": max,
    "min": min,
    "sqrt": math.sqrt,
}
_EXAMPLE = "expected a condition such as 'tensor * pipeline <= 64'"


@dataclass(frozen=True)
class Filter:
    """A parsed, checked condition.

    Attributes
    ----------
    text:
        As it was written.
    names:
        The (dotted) names that it uses, sorted.
    """

    text: str
    names: tuple[str, ...]
    _tree: ast.expr
    _place: str | None = None

    @classmethod
    def parse(cls, text: object, *, place: str | None = None) -> Filter:
        """Parse and check one condition.

        Raises
        ------
        InputError
            If it is no expression, or uses anything beyond names, numbers, texts, lists,
            arithmetic, comparisons, `and`/`or`/`not`/`if` and the functions `abs`, `ceil`,
            `floor`, `gcd`, `log2`, `max`, `min`, `sqrt`.
        """
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{_EXAMPLE}, got {text!r}", place=place)
        if len(text) > MAX_LENGTH:
            raise InputError(f"a filter has at most {MAX_LENGTH} characters", place=place)
        try:
            tree = ast.parse(text.strip(), mode="eval").body
            names = sorted(set(_check(tree)))
        except SyntaxError:
            raise InputError(f"{_EXAMPLE}, got {text!r}", place=place) from None
        except InputError as error:
            raise (error.at(place) if place else error) from None
        except (RecursionError, MemoryError, ValueError):
            raise InputError(f"too deep or not text: {text[:60]!r}", place=place) from None
        return cls(text.strip(), tuple(names), tree, place)

    def __call__(self, values: Mapping[str, Any]) -> bool:
        """Whether the condition holds for `values` (by name).

        Raises
        ------
        InputError
            If a name is unknown, or an operation is not defined for the values.
        """
        try:
            return bool(_value(self._tree, values))
        except InputError as error:
            raise InputError(f"{error.problem} in {self.text!r}", place=self._place) from None
        except (ArithmeticError, TypeError, ValueError) as error:
            message = str(error) or type(error).__name__
            raise InputError(f"{message} in {self.text!r}", place=self._place) from None


def _dotted(node: ast.expr) -> str | None:
    """`a.b.c` as one name, None if the node is anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return ".".join([node.id, *reversed(parts)])


def _check(node: ast.expr) -> Iterator[str]:
    """Names used below `node`; raises `InputError` for anything that is not allowed."""
    name = _dotted(node)
    if name is not None:
        yield name
    elif isinstance(node, ast.Constant):
        if not isinstance(node.value, bool | int | float | str | None):
            raise InputError(f"{node.value!r} is no number or text")
    elif isinstance(node, ast.BoolOp):
        for inner in node.values:
            yield from _check(inner)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.UAdd):
        yield from _check(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        yield from _check(node.left)
        yield from _check(node.right)
    elif isinstance(node, ast.Compare):
        for inner in (node.left, *node.comparators):
            yield from _check(inner)
    elif isinstance(node, ast.IfExp):
        for inner in (node.test, node.body, node.orelse):
            yield from _check(inner)
    elif isinstance(node, ast.List | ast.Tuple):
        for inner in node.elts:
            yield from _check(inner)
    elif isinstance(node, ast.Call):
        function = _dotted(node.func)
        if function not in _FUNCTIONS or node.keywords:
            raise InputError(
                f"{ast.unparse(node)[:60]!r} is not allowed; functions: {', '.join(_FUNCTIONS)}"
            )
        for inner in node.args:
            yield from _check(inner)
    else:
        raise InputError(f"{ast.unparse(node)[:60]!r} is not allowed in a filter")


def _number(value: Any, node: ast.expr) -> Any:
    if isinstance(value, int | float):  # bool is an int
        return value
    if value is None:
        raise InputError(f"{ast.unparse(node)} has no value in this experiment")
    raise InputError(f"{ast.unparse(node)} is {value!r}, no number")


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    name = _dotted(node)
    if name is not None:
        if name not in values:
            guess = nearest(name, values)
            hint = f"; did you mean {guess!r}?" if guess else ""
            raise InputError(f"unknown name {name!r}{hint}")
        return values[name]
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.BoolOp):
        wanted = isinstance(node.op, ast.Or)
        return any(_value(inner, values) for inner in node.values) if wanted else all(
            _value(inner, values) for inner in node.values
        )  # fmt: skip
    if isinstance(node, ast.UnaryOp):
        operand = _value(node.operand, values)
        if isinstance(node.op, ast.Not):
            return not operand
        number = _number(operand, node.operand)
        return -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, ast.BinOp):
        left = _number(_value(node.left, values), node.left)
        right = _number(_value(node.right, values), node.right)
        if isinstance(node.op, ast.Pow):
            size = abs(right) * math.log2(abs(left)) if abs(left) > 1 else 0.0
            if size > MAX_BITS:
                raise InputError(f"{ast.unparse(node)} is too large")
        result = _ARITHMETIC[type(node.op)](left, right)
        if isinstance(result, complex):
            raise InputError(f"{ast.unparse(node)} is no real number")
        if isinstance(result, int) and result.bit_length() > MAX_BITS:
            raise InputError(f"{ast.unparse(node)} is too large")
        return result
    if isinstance(node, ast.Compare):
        return _compare(node, values)
    if isinstance(node, ast.IfExp):
        return _value(node.body if _value(node.test, values) else node.orelse, values)
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(inner, values) for inner in node.elts]
    assert isinstance(node, ast.Call)
    function = _dotted(node.func) or ""
    return _FUNCTIONS[function](*(_number(_value(inner, values), inner) for inner in node.args))


def _compare(node: ast.Compare, values: Mapping[str, Any]) -> bool:
    left_node, left = node.left, _value(node.left, values)
    for op, right_node in zip(node.ops, node.comparators, strict=True):
        right = _value(right_node, values)
        if isinstance(op, ast.Eq | ast.Is):
            holds = left == right
        elif isinstance(op, ast.NotEq | ast.IsNot):
            holds = left != right
        elif isinstance(op, ast.In | ast.NotIn):
            if not isinstance(right, list | tuple):
                raise InputError(f"{ast.unparse(right_node)} is no list")
            holds = (left in right) == isinstance(op, ast.In)
        else:
            holds = _ORDER[type(op)](_number(left, left_node), _number(right, right_node))
        if not holds:
            return False
        left_node, left = right_node, right
    return True
