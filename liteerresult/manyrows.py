"""
Many rows by few statements.

SQLite sets a statement up for each execution: cursors, a journal of its own, a frame for each trigger. For rows as
small as ours, that takes longer than the row. So many rows go into one statement.
"""

from __future__ import annotations

from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

__all__ = ["execute_for_rows"]

AT_ONCE = 50
"""Rows of one statement; more of them gain nothing, and take longer to compile."""


def execute_for_rows(connection: sqlite3.Connection, sql: str, rows: Sequence[Sequence[Any]]) -> None:
    """
    Run a statement for each of *rows*, in order.

    Args:
        connection: In a transaction.
        sql: A statement with one ``VALUES (?, ...)``, which takes as many rows as it is given.
        rows: As many parameters each as there are question marks.
    """
    whole = len(rows) - len(rows) % AT_ONCE
    if whole:
        for_many = _for_many(sql)
        for start in range(0, whole, AT_ONCE):
            connection.execute(for_many, tuple(chain.from_iterable(rows[start : start + AT_ONCE])))
    connection.executemany(sql, rows[whole:])


@cache
def _for_many(sql: str) -> str:
    before, values, rest = sql.partition("VALUES ")
    row, end, after = rest.partition(")")
    return before + values + ", ".join([row + end] * AT_ONCE) + after
