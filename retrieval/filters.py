"""Conditions on columns, from a mapping or from `column=value` strings, to LanceDB's own expressions: never to SQL."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping, Sequence
from functools import reduce

import pyarrow as pa
from lancedb.expr import Expr, col, lit

from .rows import HIDDEN

OPERATORS = {
    "=": lambda column, value: column == lit(value),
    "!=": lambda column, value: column != lit(value),
    "<": lambda column, value: column < lit(value),
    "<=": lambda column, value: column <= lit(value),
    ">": lambda column, value: column > lit(value),
    ">=": lambda column, value: column >= lit(value),
}
Filter = Mapping[str, object] | Sequence[str] | str


def parse_filter(conditions: Sequence[str] | str) -> dict[str, dict[str, list]]:
    """`column=value` strings (also != < <= > >=) as column -> operator -> values, all of them still strings.

    The value is all that follows the first operator, spaces and quotes included. Equalities of one column are
    alternatives; everything else must hold together.

    Raises:
        ValueError: a string without an operator or without a column.

    Example:
        >>> parse_filter(["color=Red", "color=Blue", "price<=50"])
        {'color': {'=': ['Red', 'Blue']}, 'price': {'<=': ['50']}}
    """
    parsed: dict[str, dict[str, list]] = {}
    for condition in [conditions] if isinstance(conditions, str) else conditions:
        found = re.match(r"\s*([^=<>!]+?)\s*(!=|<=|>=|=|<|>)(.*)", condition, re.DOTALL)
        if not found:
            raise ValueError(
                f"filter {condition!r} is no condition; wanted column=value, or != < <= > >= in place of =, such as "
                "'category=Tops' or 'price<50'."
            )
        column, operator, value = found.groups()
        parsed.setdefault(column, {}).setdefault(operator, []).append(value.strip())
    return parsed


def filter_expression(conditions: Filter | None, schema: pa.Schema) -> Expr | None:
    """What LanceDB takes as `where`.

    Args:
        conditions: {"category": "Tops"} (equal), {"color": ["Red", "Blue"]} (one of them), {"price": {"<": 50, ">=":
            10}} (both), or strings for `parse_filter`. All of them must hold; a row without a value meets none.
        schema: of the catalogue.

    Raises:
        ValueError: a column that the catalogue has not (its columns are listed) or cannot compare, an unknown
            operator, or a value that is not of the column's kind.
    """
    if not conditions:
        return None
    if not isinstance(conditions, Mapping):
        conditions = parse_filter(conditions)
    parts = []
    for name, wanted in conditions.items():
        kind = _kind(name, schema)
        wanted = wanted if isinstance(wanted, Mapping) else {"=": wanted}
        parts += [_compare(name, kind, operator, value) for operator, value in wanted.items()]
    return reduce(lambda left, right: left & right, parts)


def filterable(schema: pa.Schema) -> list[str]:
    """Names of the columns that a filter may speak of."""
    return [field.name for field in schema if _comparable(field.type) and field.name not in HIDDEN]


def _comparable(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean, pa.types.is_integer)
    tests += (pa.types.is_floating, pa.types.is_date, pa.types.is_timestamp)
    return any(test(kind) for test in tests)


def _kind(name: str, schema: pa.Schema) -> pa.DataType:
    known = filterable(schema)
    if name not in known:
        why = "cannot compare column" if name in schema.names else "has no column"
        raise ValueError(f"the catalogue {why} {name!r}; a filter may use {', '.join(known)}.")
    return schema.field(name).type


def _compare(name: str, kind: pa.DataType, operator: str, value: object) -> Expr:
    if operator not in OPERATORS:
        raise ValueError(f"filter on {name!r} has the operator {operator!r}; wanted one of {' '.join(OPERATORS)}.")
    values = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
    if not values:
        raise ValueError(f"filter on {name!r} lists no value; give at least one, or leave the column out.")
    values = [_cast(one, kind, name) for one in values]
    if operator == "=" and len(values) > 1:
        return col(name).isin(values)
    return reduce(lambda left, right: left & right, [OPERATORS[operator](col(name), one) for one in values])


def _cast(value: object, kind: pa.DataType, name: str) -> object:
    """The value as the Python type that compares with the column; strings are read as it."""
    try:
        if value is None:
            raise ValueError
        if pa.types.is_boolean(kind):
            return _boolean(value)
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            return _number(value)
        if pa.types.is_date(kind) and not isinstance(value, datetime.date):
            return datetime.date.fromisoformat(str(value))
        if pa.types.is_timestamp(kind) and not isinstance(value, datetime.datetime):
            return datetime.datetime.fromisoformat(str(value))
    except ValueError as error:
        raise ValueError(f"filter on {name!r}: {value!r} is no {kind}, which the column holds.") from error
    return value if isinstance(value, (datetime.date, datetime.datetime)) else str(value)


def _boolean(value: object) -> bool:
    known = {"true": True, "false": False, "1": True, "0": False}
    if str(value).lower() not in known:
        raise ValueError
    return known[str(value).lower()]


def _number(value: object) -> int | float:
    """LanceDB compares either with any number column; it has no larger integers than 64 bits."""
    try:
        number = float(value) if isinstance(value, float) else int(str(value))
    except ValueError:
        number = float(str(value))
    if not math.isfinite(number) or (isinstance(number, int) and abs(number) >= 2**63):
        raise ValueError(f"{number} is out of range")
    return number
