"""Many rows by few statements: the same as one by one, whatever their number."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from liteerresult.manyrows import AT_ONCE, execute_for_rows

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def sql() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE t (number INTEGER PRIMARY KEY, a, b, c DEFAULT 'same')")
        yield connection


@pytest.mark.parametrize("count", [0, 1, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 3 * AT_ONCE + 7])
def test_all_rows_in_their_order(sql: sqlite3.Connection, count: int) -> None:
    rows = [(f"row {number}", number) for number in range(count)]
    execute_for_rows(sql, "INSERT INTO t (a, b) VALUES (?, ?)", rows)
    assert sql.execute("SELECT a, b, c FROM t ORDER BY number").fetchall() == [(*row, "same") for row in rows]
    execute_for_rows(
        sql,
        "UPDATE t SET b = new.column1 FROM (VALUES (?, ?)) AS new WHERE a = new.column2",
        [(-b, a) for a, b in rows],
    )
    assert sql.execute("SELECT b FROM t ORDER BY number").fetchall() == [(-number,) for number in range(count)]


def test_few_statements(sql: sqlite3.Connection) -> None:
    seen: list[str] = []
    sql.set_trace_callback(seen.append)
    execute_for_rows(sql, "INSERT INTO t (a) VALUES (?)", [(number,) for number in range(2 * AT_ONCE + 3)])
    assert len(seen) == 2 + 3


def test_what_a_row_refuses_goes_to_the_caller(sql: sqlite3.Connection) -> None:
    rows = [(number, number) for number in range(AT_ONCE)]
    with pytest.raises(sqlite3.IntegrityError):
        execute_for_rows(sql, "INSERT INTO t (number, a) VALUES (?, ?)", [*rows, (0, 0)])
    with pytest.raises(sqlite3.IntegrityError):
        execute_for_rows(sql, "INSERT INTO t (number, a) VALUES (?, ?)", rows)
