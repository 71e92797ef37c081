"""The file's format: what schema.sql makes, fills in, refuses and shows, and how it comes up to date."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import time
from contextlib import closing
from importlib import resources
from typing import TYPE_CHECKING, Any

import pytest

import liteerresult
from liteerresult import ResultStore, SchemaMismatch, schema
from tests.support import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TEXT = resources.files(liteerresult).joinpath("schema.sql").read_text(encoding="utf-8")


def connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None)


def objects(sql: sqlite3.Connection) -> set[tuple[Any, ...]]:
    rows = sql.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema").fetchall()
    return {(*row[:3], row[3] and row[3].strip()) for row in rows}


@pytest.fixture
def sql(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """Yield a plain SQL writer on a new file."""
    with closing(connect(tmp_path / "results.db")) as connection:
        schema.prepare(connection, str(tmp_path / "results.db"))
        yield connection


def one(sql: sqlite3.Connection, columns: str, task_id: str = "t") -> tuple[Any, ...]:
    row: tuple[Any, ...] = sql.execute(f"SELECT {columns} FROM tasks WHERE id = ?", (task_id,)).fetchone()
    return row


class TestMaking:
    @pytest.mark.skipif(not shutil.which("sqlite3"), reason="needs the sqlite3 shell")
    def test_the_shell_makes_the_same_file(self, sql: sqlite3.Connection, tmp_path: Path) -> None:
        shell = tmp_path / "shell.db"
        done = subprocess.run(
            ["sqlite3", "-bail", shell], input=TEXT, capture_output=True, text=True, check=False, timeout=30
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout in ("", "wal\n")
        with closing(connect(shell)) as other:
            assert objects(other) == objects(sql)
            for pragma in ("application_id", "user_version", "page_size", "journal_mode"):
                assert other.execute(f"PRAGMA {pragma}").fetchone() == sql.execute(f"PRAGMA {pragma}").fetchone(), (
                    pragma
                )

    @pytest.mark.skipif(not shutil.which("sqlite3"), reason="needs the sqlite3 shell")
    def test_a_store_opens_what_the_shell_made(self, tmp_path: Path) -> None:
        shell = tmp_path / "shell.db"
        lines = [
            "INSERT INTO tasks (id, name) VALUES ('frame-7', 'render');",
            """UPDATE tasks SET status = 'DONE', result = '{"rows": 3}' WHERE id = 'frame-7';""",
            "INSERT INTO groups (id) VALUES ('film');",
            "INSERT INTO group_members (group_id, position, task_id) VALUES ('film', 0, 'frame-7');",
        ]
        subprocess.run(
            ["sqlite3", "-bail", shell],
            input=TEXT + "\n".join(lines),
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        with ResultStore(shell) as store:
            group = store.restore_group("film")
            assert group is not None
            assert group.join(timeout=0) == [{"rows": 3}]

    def test_all_tables_are_strict(self, sql: sqlite3.Connection) -> None:
        tables = {row[1]: row for row in sql.execute("PRAGMA table_list") if row[0] == "main" and row[2] == "table"}
        own = {name for name in tables if not name.startswith("sqlite_")}
        assert own >= {"tasks", "groups", "group_members", "owners", "attempts"}
        assert all(tables[name][5] for name in own)

    def test_the_file_says_what_it_is(self, sql: sqlite3.Connection) -> None:
        assert sql.execute("PRAGMA application_id").fetchone() == (schema.APPLICATION_ID,)
        assert schema.APPLICATION_ID.to_bytes(4, "big") == b"lerr"
        assert sql.execute("PRAGMA user_version").fetchone() == (schema.FORMAT,)
        assert sql.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert sql.execute("PRAGMA page_size").fetchone() == (2048,)
        assert f"file format {schema.FORMAT}." in TEXT.splitlines()[0]

    def test_the_link_at_the_top_is_the_package_s(self) -> None:
        if (ROOT / "liteerresult").is_dir():  # else these are the tests alone, of an installed package
            assert (ROOT / "schema.sql").is_symlink()
        assert (ROOT / "schema.sql").read_text(encoding="utf-8") == TEXT

    @pytest.mark.parametrize("name", ["a?b.db", "a#b.db", "100%41.db", "a b ä.db"])
    def test_a_name_is_no_uri(self, tmp_path: Path, name: str) -> None:
        ResultStore(tmp_path / name).close()
        assert schema.check_format(str(tmp_path / name))
        assert [file.name for file in tmp_path.glob("*.db")] == [name]

    def test_check_format(self, tmp_path: Path, sql: sqlite3.Connection) -> None:
        assert schema.check_format(str(tmp_path / "results.db"))
        assert not schema.check_format(str(tmp_path / "none.db"))
        (tmp_path / "empty.db").touch()
        assert not schema.check_format(str(tmp_path / "empty.db"))
        assert (tmp_path / "empty.db").stat().st_size == 0
        assert not (tmp_path / "none.db").exists()

    def test_check_format_takes_any_name(self, tmp_path: Path) -> None:
        for name in ("50% off?.db", "a#b.db", "ü ö.db", "file:x.db"):
            path = tmp_path / name
            with closing(connect(path)) as made:
                schema.prepare(made, str(path))
            assert schema.check_format(str(path)), name

    def test_an_empty_file_becomes_a_store(self, tmp_path: Path) -> None:
        (tmp_path / "empty.db").touch()
        with ResultStore(tmp_path / "empty.db") as store:
            store.mark_as_done("a", 1)
            assert store.get_task_meta("a").result == 1

    def test_preparing_twice_changes_nothing(self, tmp_path: Path, sql: sqlite3.Connection) -> None:
        before = sql.execute("PRAGMA data_version").fetchone(), objects(sql)
        with closing(connect(tmp_path / "results.db")) as other:
            schema.prepare(other, str(tmp_path / "results.db"))
            assert other.total_changes == 0
        assert (sql.execute("PRAGMA data_version").fetchone(), objects(sql)) == before


class TestComments:
    """The page explains itself: one who only has the file knows what to write."""

    def tables(self) -> dict[str, str]:
        return dict(re.findall(r"^CREATE TABLE (\w+) \(\n(.*?)^\)", TEXT, re.MULTILINE | re.DOTALL))

    def test_each_column_is_explained(self, sql: sqlite3.Connection) -> None:
        tables = self.tables()
        names = {
            row[0]
            for row in sql.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'")
        }
        assert tables.keys() == names
        comments = "\n".join(re.findall(r"--.*", TEXT))
        silent = []
        for table, body in tables.items():
            head = TEXT[: TEXT.index(f"CREATE TABLE {table} (")].rstrip().rpartition("\n\n")[2]
            for column in (row[1] for row in sql.execute(f"PRAGMA table_info({table})")):
                lines = body.splitlines()
                at = next(n for n, line in enumerate(lines) if re.match(rf"\s+{column}\s+[A-Z]", line))
                own = "--" in lines[at]
                block = at  # comments above it, and above its neighbours up to an empty line
                while block > 0 and lines[block - 1].strip():
                    block -= 1
                above = any("--" in line for line in lines[block:at])
                told = re.search(
                    rf"\b{column}\b|\b{column.removesuffix('_id').removesuffix('_at').removesuffix('_number')}",
                    comments,
                )
                if not (own or above or head.startswith("--") or told):
                    silent.append(f"{table}.{column}")
        assert not silent

    def test_each_table_is_introduced(self) -> None:
        for table in self.tables():
            before = TEXT[: TEXT.index(f"CREATE TABLE {table} (")].rstrip().splitlines()[-1]
            assert before.startswith("--"), table

    def test_the_examples_at_the_top_run(self, sql: sqlite3.Connection) -> None:
        examples = re.findall(r"^--   \w+: +(.*;)$|^-- {12,}(INSERT.*;)$", TEXT, re.MULTILINE)
        statements = [statement for pair in examples for statement in pair if statement]
        assert len(statements) >= 6
        kinds = {"Create": statements[1], "Finish": statements[2], "Fail": statements[3], "Again": statements[4]}
        sql.execute(kinds["Create"])
        sql.execute(kinds["Fail"])
        sql.execute(kinds["Again"])
        sql.execute(kinds["Finish"])
        for statement in statements[5:]:
            sql.execute(statement)
        assert sql.execute("SELECT status, size, done FROM group_overview").fetchall() == [("DONE", 1, 1)]
        for statement in re.findall(r"SELECT \* FROM \w+;", statements[0]):
            assert sql.execute(statement).fetchall()


class TestCost:
    def test_no_trigger_builds_a_table_to_compare_with(self, sql: sqlite3.Connection) -> None:
        """SQLite makes one of an IN (...) of more than two constants, anew each time it enters the trigger."""
        triggers = sql.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        assert [name for name, text in triggers if re.search(r"IN \((\s*'[^']*'\s*,){2,}", text)] == []


class TestFillingIn:
    """What a plain SQL writer leaves out."""

    def test_a_new_row(self, sql: sqlite3.Connection) -> None:
        before = time.time()
        sql.execute("INSERT INTO tasks (id) VALUES ('t')")
        status, retries, created, *rest = one(
            sql, "status, retries, created_at, started_at, done_at, done_number, result, owner, encoding"
        )
        assert (status, retries) == ("PENDING", 0)
        assert before - 0.01 <= created <= time.time() + 0.01
        assert rest == [None] * 6

    @pytest.mark.parametrize("status", ["DONE", "FAILURE", "REVOKED"])
    @pytest.mark.parametrize("way", ["UPDATE", "INSERT"])
    def test_a_finish(self, sql: sqlite3.Connection, status: str, way: str) -> None:
        before = time.time()
        if way == "INSERT":
            sql.execute("INSERT INTO tasks (id, status, result) VALUES ('t', ?, '3')", (status,))
        else:
            sql.execute("INSERT INTO tasks (id) VALUES ('t')")
            sql.execute("UPDATE tasks SET status = ?, result = '3' WHERE id = 't'", (status,))
        result, encoding, done_at, number = one(sql, "result, encoding, done_at, done_number")
        assert (result, encoding, number) == ("3", "json", 1)
        assert before - 0.01 <= done_at <= time.time() + 0.01

    def test_what_the_writer_gives_is_kept(self, sql: sqlite3.Connection) -> None:
        sql.execute("INSERT INTO tasks (id, created_at) VALUES ('t', 1.0)")
        sql.execute("UPDATE tasks SET status = 'STARTED', started_at = 2.0")
        sql.execute("UPDATE tasks SET status = 'DONE', done_at = 3.0, result = x'00', encoding = 'pickle'")
        assert one(sql, "created_at, started_at, done_at, result, encoding") == (1.0, 2.0, 3.0, b"\0", "pickle")

    def test_completion_numbers_go_on(self, sql: sqlite3.Connection) -> None:
        sql.executemany("INSERT INTO tasks (id) VALUES (?)", [("a",), ("b",), ("c",)])
        sql.execute("UPDATE tasks SET status = 'DONE' WHERE id = 'b'")
        sql.execute("UPDATE tasks SET status = 'FAILURE' WHERE id = 'a'")
        assert sql.execute("SELECT id FROM tasks WHERE done_number > 0 ORDER BY done_number").fetchall() == [
            ("b",),
            ("a",),
        ]
        sql.execute("DELETE FROM tasks WHERE id = 'a'")
        sql.execute("UPDATE tasks SET status = 'DONE' WHERE id = 'c'")
        assert one(sql, "done_number", "c") == (3,)
        sql.execute("DELETE FROM tasks")
        sql.execute("INSERT INTO tasks (id, status) VALUES ('d', 'FAILURE')")
        assert one(sql, "done_number", "d") == (4,)
        sql.execute("UPDATE tasks SET status = 'PENDING', retries = retries + 1")
        assert one(sql, "done_number", "d") == (None,)
        sql.execute("UPDATE tasks SET status = 'DONE'")
        assert one(sql, "done_number", "d") == (5,)

    def test_many_rows_in_one_statement_get_a_number_each(self, sql: sqlite3.Connection) -> None:
        sql.executemany("INSERT INTO tasks (id) VALUES (?)", [(str(n),) for n in range(50)])
        sql.execute("UPDATE tasks SET status = 'DONE'")
        assert {row[0] for row in sql.execute("SELECT done_number FROM tasks")} == set(range(1, 51))

    @pytest.mark.parametrize("way", ["UPDATE", "INSERT"])
    def test_a_start(self, sql: sqlite3.Connection, way: str) -> None:
        before = time.time()
        if way == "INSERT":
            sql.execute("INSERT INTO tasks (id, status) VALUES ('t', 'STARTED')")
        else:
            sql.execute("INSERT INTO tasks (id) VALUES ('t')")
            sql.execute("UPDATE tasks SET status = 'STARTED' WHERE id = 't'")
        (started,) = one(sql, "started_at")
        assert started is not None
        assert before - 0.01 <= started <= time.time() + 0.01

    def test_a_second_start_has_its_own_time(self, sql: sqlite3.Connection) -> None:
        sql.execute("INSERT INTO tasks (id, started_at, status) VALUES ('t', 5.0, 'STARTED')")
        sql.execute("UPDATE tasks SET status = 'RETRY'")
        sql.execute("UPDATE tasks SET status = 'STARTED'")
        assert one(sql, "started_at")[0] > 1e9

    @pytest.mark.parametrize("unready", ["PROGRESS", "CUSTOM"])
    @pytest.mark.parametrize("final", ["DONE", "FAILURE", "REVOKED"])
    @pytest.mark.parametrize("between", ["", "STARTED", "STARTED AT"])
    def test_what_a_custom_state_left_is_not_the_value(
        self, sql: sqlite3.Connection, unready: str, final: str, between: str
    ) -> None:
        sql.execute("INSERT INTO tasks (id) VALUES ('t')")
        sql.execute("UPDATE tasks SET status = ?, result = '{\"current\": 3}'", (unready,))
        if between == "STARTED":
            sql.execute("UPDATE tasks SET status = 'STARTED'")
        elif between:
            sql.execute("UPDATE tasks SET status = 'STARTED', started_at = 1.7e9")
        sql.execute("UPDATE tasks SET status = ?", (final,))
        assert one(sql, "result, encoding") == (None, "json")

    @pytest.mark.parametrize("between", ["", "STARTED", "STARTED AT"])
    def test_what_a_retry_left_is_not_the_value(self, sql: sqlite3.Connection, between: str) -> None:
        sql.execute("INSERT INTO tasks (id) VALUES ('t')")
        sql.execute("UPDATE tasks SET status = 'RETRY', result = '\"no\"', traceback = 'Traceback'")
        if between == "STARTED":
            sql.execute("UPDATE tasks SET status = 'STARTED'")
        elif between:
            sql.execute("UPDATE tasks SET status = 'STARTED', started_at = 1.7e9")
        sql.execute("UPDATE tasks SET status = 'DONE'")
        assert one(sql, "result, encoding") == (None, "json")

    def test_what_a_custom_state_left_in_pickle_is_gone_whole(self, sql: sqlite3.Connection, tmp_path: Path) -> None:
        """Else a store that takes JSON only would refuse a value of None as pickled."""
        sql.execute("INSERT INTO tasks (id) VALUES ('t')")
        sql.execute("UPDATE tasks SET status = 'PROGRESS', result = x'8004', encoding = 'pickle'")
        sql.execute("UPDATE tasks SET status = 'DONE'")
        assert one(sql, "result, encoding") == (None, "json")

    @pytest.mark.parametrize("end", ["status = 'DONE', result = '1'", "status = 'FAILURE', result = '\"disk full\"'"])
    def test_the_traceback_of_an_earlier_attempt_is_not_this_one_s(self, sql: sqlite3.Connection, end: str) -> None:
        sql.execute("INSERT INTO tasks (id) VALUES ('t')")
        sql.execute("UPDATE tasks SET status = 'RETRY', result = '\"no\"', traceback = 'Traceback of attempt 0'")
        sql.execute("UPDATE tasks SET status = 'STARTED'")
        sql.execute(f"UPDATE tasks SET {end}")
        assert one(sql, "traceback") == (None,)

    @pytest.mark.parametrize("value", ["'{\"current\": 2}'", "'{\"current\": 3}'", "'4'", "NULL"])
    def test_a_value_that_is_given_counts_also_after_a_custom_state(self, sql: sqlite3.Connection, value: str) -> None:
        sql.execute("INSERT INTO tasks (id) VALUES ('t')")
        sql.execute("UPDATE tasks SET status = 'PROGRESS', result = '{\"current\": 2}'")
        sql.execute(f"UPDATE tasks SET status = 'DONE', result = {value}")
        assert one(sql, "result, encoding") == (value.strip("'") if value != "NULL" else None, "json")

    def test_attempts_are_kept(self, sql: sqlite3.Connection) -> None:
        sql.execute("INSERT INTO tasks (id) VALUES ('t')")
        sql.execute("UPDATE tasks SET status = 'STARTED', owner = 'w1', started_at = 1.0")
        sql.execute("UPDATE tasks SET status = 'RETRY', result = '\"first\"', traceback = 'tb 1'")
        assert one(sql, "status, retries") == ("RETRY", 1)
        sql.execute("UPDATE tasks SET status = 'STARTED', owner = 'w2', started_at = 2.0")
        sql.execute("UPDATE tasks SET status = 'FAILURE', result = '\"second\"', done_at = 3.0, traceback = 'tb 2'")
        sql.execute("UPDATE tasks SET status = 'PENDING', retries = retries + 1")
        assert one(sql, "status, retries, result, encoding, traceback, owner, started_at, done_at, done_number") == (
            "PENDING", 2, *[None] * 7,
        )  # fmt: skip
        sql.execute("UPDATE tasks SET status = 'REVOKED'")
        sql.execute("UPDATE tasks SET status = 'PENDING', retries = retries + 1")
        rows = sql.execute(
            "SELECT attempt, status, result, traceback, owner, started_at FROM attempts ORDER BY attempt"
        ).fetchall()
        assert rows == [
            (0, "RETRY", '"first"', "tb 1", "w1", 1.0),
            (1, "FAILURE", '"second"', "tb 2", "w2", 2.0),
            (2, "REVOKED", None, None, None, None),
        ]
        (first, second, third) = (row[0] for row in sql.execute("SELECT done_at FROM attempts ORDER BY attempt"))
        assert first > 1e9
        assert second == 3.0
        assert third > 1e9
        sql.execute("DELETE FROM tasks")
        assert sql.execute("SELECT count(*) FROM attempts").fetchone() == (0,)

    def test_a_resubmission_may_name_the_next_owner(self, sql: sqlite3.Connection) -> None:
        sql.execute("INSERT INTO tasks (id, status, owner) VALUES ('t', 'FAILURE', 'one')")
        sql.execute("UPDATE tasks SET status = 'PENDING', retries = 1, owner = 'two'")
        assert one(sql, "owner") == ("two",)

    def test_a_group_of_a_member_appears(self, sql: sqlite3.Connection) -> None:
        sql.execute("INSERT INTO group_members (group_id, position, task_id) VALUES ('G', 0, 't')")
        assert sql.execute("SELECT id, saved, size, members, created_at > 1e9 FROM groups").fetchall() == [
            ("G", 1, 1, 1, 1)
        ]


AGAIN = "UPDATE tasks SET status = 'PENDING', retries = retries + 1"
OWNED = "another owner runs the task"
IDENTITY = "id and number of a task never change"
BEGUN = "the task has begun"
KEPT = "can't be replaced"
UNNUMBERED = "leave done_number out"
FINAL = "the task is final: DONE never changes; FAILURE and REVOKED only go to PENDING"
ITSELF = "a group can't contain itself"
ADD_TASK = "INTO group_members (group_id, position, task_id) VALUES"
ADD_GROUP = "INTO group_members (group_id, position, child_id) VALUES"
EXISTS = "the group exists: change its members instead"
FINAL_ROW = "INSERT INTO tasks (id, status, result, owner) VALUES ('t', 'FAILURE', '1', 'me')"
MEMBERS = "INSERT INTO group_members (group_id, position, task_id) VALUES ('G', 0, 't')"
NESTED = MEMBERS + "; INSERT INTO group_members (group_id, position, child_id) VALUES ('H', 0, 'G')"

REFUSALS = [
    *(
        (FINAL_ROW, f"UPDATE tasks SET {change}", FINAL)
        for change in (
            "status = 'DONE'", "status = 'PENDING'", "result = '2'", "result = NULL", "encoding = 'pickle'",
            "traceback = 'x'", "retries = 1",
            "owner = NULL", "started_at = 1", "done_at = 1", "done_number = 7", "done_number = NULL",
            "status = 'PENDING', retries = retries + 2", "status = 'PROGRESS', retries = retries + 1",
        )
    ),
        ("INSERT INTO tasks (id, status) VALUES ('t', 'STARTED')", "UPDATE tasks SET status = 'STARTED'", BEGUN),
        ("INSERT INTO tasks (id, status) VALUES ('t', 'STARTED')", "UPDATE tasks SET status = 'PENDING'", BEGUN),
        ("INSERT INTO tasks (id, status) VALUES ('t', 'RETRY')", "UPDATE tasks SET status = 'PENDING'", BEGUN),
        ("INSERT INTO tasks (id, status) VALUES ('t', 'PROGRESS')", "UPDATE tasks SET status = 'PENDING'", BEGUN),
        ("INSERT INTO tasks (id, status) VALUES ('t', 'PROGRESS')", AGAIN, BEGUN),
        ("INSERT INTO tasks (id, status, owner) VALUES ('t', 'STARTED', 'a')", "UPDATE tasks SET owner = 'b'", OWNED),
        ("INSERT INTO tasks (id) VALUES ('t')", "UPDATE tasks SET id = 'u'", IDENTITY),
        ("INSERT INTO tasks (id) VALUES ('t')", "UPDATE tasks SET number = 99", IDENTITY),
        (FINAL_ROW, "INSERT OR REPLACE INTO tasks (id) VALUES ('t')", KEPT),
        (FINAL_ROW, "REPLACE INTO tasks (id, status) VALUES ('t', 'FAILURE')", KEPT),
        (MEMBERS, f"INSERT {ADD_TASK} ('G', 0, 'u')", "the position is taken"),
        (MEMBERS, f"INSERT OR REPLACE {ADD_TASK} ('G', 0, 'u')", "the position is taken"),
        (MEMBERS, f"INSERT {ADD_GROUP} ('G', 1, 'none')", "the nested group is not saved yet"),
        (MEMBERS, f"INSERT {ADD_GROUP} ('G', 1, 'G')", ITSELF),
        (NESTED, f"INSERT {ADD_GROUP} ('G', 1, 'H')", ITSELF),
        (MEMBERS, "UPDATE group_members SET task_id = 'u'", "delete the member and insert another"),
        (MEMBERS, "UPDATE groups SET id = 'X'", "id and number of a group never change"),
        (MEMBERS, "INSERT OR REPLACE INTO groups (id) VALUES ('G')", EXISTS),
        (NESTED, "DELETE FROM groups WHERE id = 'G'", "another group contains this one"),
    ("INSERT INTO tasks (id) VALUES ('t')", "UPDATE tasks SET done_number = 5", UNNUMBERED),
    ("INSERT INTO tasks (id) VALUES ('t')", "INSERT INTO tasks (id, done_number) VALUES ('u', 5)", UNNUMBERED),
]  # fmt: skip


class TestWrittenAhead:
    @pytest.mark.parametrize("status", ["PENDING", "STARTED"])
    def test_a_result_written_before_the_end_is_the_value(self, sql: sqlite3.Connection, status: str) -> None:
        sql.execute("INSERT INTO tasks (id, status) VALUES ('t', ?)", (status,))
        sql.execute("UPDATE tasks SET result = '7'")
        sql.execute("UPDATE tasks SET status = 'DONE'")
        assert sql.execute("SELECT result, encoding FROM tasks").fetchone() == ("7", "json")


class TestRefusing:
    @pytest.mark.parametrize(("before", "statement", "reason"), REFUSALS)
    def test_with_the_reason(self, sql: sqlite3.Connection, before: str, statement: str, reason: str) -> None:
        for part in before.split("; "):
            sql.execute(part)
        names = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
        tables = [row[0] for row in sql.execute(names)]
        rows = [sql.execute(f"SELECT * FROM {table}").fetchall() for table in tables]
        with pytest.raises(sqlite3.IntegrityError, match=re.escape(reason)) as caught:
            sql.execute(statement)
        assert caught.value.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_TRIGGER
        assert [sql.execute(f"SELECT * FROM {table}").fetchall() for table in tables] == rows
        if reason == ITSELF:
            return  # without that rule the triggers would walk the cycle for ever
        # A control arm: it is a trigger of that reason that refuses. Without it the change goes through, or another
        # rule stops it.
        for name, text in sql.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            if reason.replace("'", "''") in text:
                # A view can't be written to without its only trigger: what writes to it goes instead.
                sql.execute(f"DROP TRIGGER {'tasks_change_status' if name == 'status_change_made' else name}")
        try:
            sql.execute(statement)
        except sqlite3.IntegrityError as exc:
            other = str(exc)
        else:
            other = ""
        assert reason not in other

    def test_every_reason_is_tried(self, sql: sqlite3.Connection) -> None:
        reasons = re.findall(r"RAISE\(ABORT, '((?:[^']|'')*)'\)", TEXT)
        assert len(reasons) == TEXT.count("RAISE(")
        tried = {reason for _, _, reason in REFUSALS}
        assert [text for text in reasons if not any(reason in text.replace("''", "'") for reason in tried)] == []

    @pytest.mark.parametrize(
        ("statement", "reason"),
        [
            ("INSERT INTO tasks (id) VALUES ('')", "a task id is not empty"),
            ("INSERT INTO tasks (id) VALUES (NULL)", "NOT NULL"),
            ("INSERT INTO tasks (id, status) VALUES ('t', 'SUCCESS')", "success is called DONE"),
            ("INSERT INTO tasks (id, retries) VALUES ('t', -1)", "retries >= 0"),
            ("INSERT INTO tasks (id, retries) VALUES ('t', 'many')", "cannot store TEXT value in INTEGER column"),
            ("INSERT INTO groups (id) VALUES ('')", "a group id is not empty"),
            ("INSERT INTO groups (id, saved) VALUES ('G', 2)", "saved"),
            ("INSERT INTO group_members (group_id, position) VALUES ('G', 0)", "a member is either a task or a group"),
            ("INSERT INTO owners (id) VALUES ('')", "id <> ''"),
        ],
    )
    def test_what_fits_no_column(self, sql: sqlite3.Connection, statement: str, reason: str) -> None:
        with pytest.raises(sqlite3.IntegrityError, match=re.escape(reason)):
            sql.execute(statement)

    def test_a_member_that_is_both_is_refused(self, sql: sqlite3.Connection) -> None:
        sql.execute("INSERT INTO groups (id) VALUES ('H')")
        with pytest.raises(sqlite3.IntegrityError, match="either a task or a group"):
            sql.execute("INSERT INTO group_members VALUES ('G', 0, 't', 'H')")
        assert sql.execute("SELECT id, size FROM groups").fetchall() == [("H", 0)]


class TestViews:
    def test_task_overview(self, store: ResultStore) -> None:
        store.create_task("render", task_id="a", parent="root")
        with closing(connect(store.path)) as sql:
            sql.execute("UPDATE tasks SET created_at = 1700000000.25 WHERE id = 'a'")
            sql.execute("UPDATE tasks SET status = 'STARTED', started_at = 1700000001.5 WHERE id = 'a'")
            sql.execute(
                "UPDATE tasks SET status = 'DONE', result = '{\"rows\": 3}', done_at = 1700000004.0 WHERE id = 'a'"
            )
            cursor = sql.execute("SELECT * FROM task_overview")
            row = dict(zip([column[0] for column in cursor.description], cursor.fetchone(), strict=True))
        assert row == {
            "id": "a",
            "name": "render",
            "status": "DONE",
            "result": '{"rows": 3}',
            "retries": 0,
            "created_utc": "2023-11-14 22:13:20.250",
            "started_utc": "2023-11-14 22:13:21.500",
            "done_utc": "2023-11-14 22:13:24.000",
            "seconds": 2.5,
            "worker": None,
            "parent_id": "root",
        }

    def test_results_are_readable(self, store: ResultStore) -> None:
        store.mark_as_failure("exception", ValueError("no such frame"))
        store.mark_as_failure("text", "disk full")
        store.mark_as_retry("retry", OSError("again"))
        store.mark_as_revoked("revoked", "not needed")
        store.mark_as_revoked("no reason")
        store.update_state("progress", "PROGRESS", {"current": 3})
        store.mark_as_done("tuple", (1, 2))
        with closing(connect(store.path)) as sql:
            sql.execute("INSERT INTO tasks (id, status, result, encoding) VALUES ('pickle', 'DONE', x'8004', 'pickle')")
            sql.execute("INSERT INTO tasks (id, status, result) VALUES ('broken', 'FAILURE', '{')")
            sql.execute("INSERT INTO tasks (id, status, result) VALUES ('number', 'DONE', 42)")
            sql.execute("INSERT INTO tasks (id, status, result) VALUES ('blob', 'FAILURE', x'00ff')")
            seen = dict(sql.execute("SELECT id, result FROM task_overview"))
        assert seen["exception"] == "ValueError: no such frame"
        assert seen["retry"] == "OSError: again"
        assert seen["text"] == '"disk full"'
        assert seen["revoked"] == '"not needed"'
        assert seen["no reason"] is None
        assert json.loads(seen["progress"]) == {"current": 3}
        assert "1" in seen["tuple"]
        assert seen["pickle"] == "(pickle, 2 bytes)"
        assert (seen["broken"], seen["number"]) == ("{", 42)

    def test_the_worker_and_the_time_it_takes(self, store: ResultStore, clock: Any) -> None:
        store.create_task(task_id="never begun")
        clock.advance(3)
        store.mark_as_done("never begun")
        store.mark_as_started("running")
        with closing(connect(store.path)) as sql:
            seen = {row[0]: row[1:] for row in sql.execute("SELECT id, seconds, worker, done_utc FROM task_overview")}
        assert seen["never begun"][:2] == (3.0, None)
        seconds, worker, done = seen["running"]
        assert seconds is None
        assert done is None
        assert re.fullmatch(r"\d+@.+", worker)
        assert worker == liteerresult.AsyncResult("running", store).worker

    def test_group_overview(self, store: ResultStore) -> None:
        def status() -> tuple[Any, ...]:
            with closing(connect(store.path)) as sql:
                row: tuple[Any, ...] = sql.execute(
                    """SELECT status, size, done, failed, revoked, waiting, created_utc, parent_id
                    FROM group_overview WHERE id = 'G'"""
                ).fetchone()
            return row

        store.create_group(["a", "b", "c", "a"], "G", parent="root")
        tail = ("2023-11-14 22:13:20.000", "root")
        assert status() == ("WAITING", 4, 0, 0, 0, 4, *tail)
        store.mark_as_done("a")
        assert status() == ("WAITING", 4, 2, 0, 0, 2, *tail)
        store.mark_as_revoked("b")
        store.mark_as_done("c")
        assert status() == ("REVOKED", 4, 3, 0, 1, 0, *tail)
        store.resubmit("b")
        store.mark_as_failure("b", "no")
        assert status() == ("FAILURE", 4, 3, 1, 0, 0, *tail)
        store.resubmit("b")
        store.mark_as_done("b")
        assert status() == ("DONE", 4, 4, 0, 0, 0, *tail)

    def test_a_deleted_group_that_another_contains_is_not_shown(self, store: ResultStore) -> None:
        inner = store.create_group(["a"], "inner")
        store.create_group([inner], "outer")
        store.delete_group("inner")
        with closing(connect(store.path)) as sql:
            assert sql.execute("SELECT id, size FROM group_overview").fetchall() == [("outer", 1)]

    def test_an_empty_group_is_done(self, store: ResultStore) -> None:
        store.create_group([], "G")
        with closing(connect(store.path)) as sql:
            assert sql.execute("SELECT status, size FROM group_overview").fetchall() == [("DONE", 0)]


class TestMigrating:
    """There is no older format yet: the tests call the present one old, and add a step."""

    TARGET = schema.FORMAT + 1

    @pytest.fixture
    def path(self, store: ResultStore) -> str:
        store.mark_as_done("kept", [1, 2])
        store.create_group(["kept"], "G")
        store.close()
        return store.path

    @staticmethod
    def step(db: Any) -> None:
        db["tasks"].add_column("priority", int)
        db["labels"].create({"task_id": str, "label": str}, pk="task_id", strict=True)
        db["labels"].insert_all([{"task_id": "kept", "label": "old"}])

    def content(self, path: str) -> Any:
        with closing(connect(path)) as sql:
            return (
                objects(sql),
                sql.execute("SELECT * FROM tasks").fetchall(),
                sql.execute("PRAGMA user_version").fetchone(),
            )

    def test_a_step_is_kept(self, path: str) -> None:
        with closing(connect(path)) as raw:
            schema.prepare(raw, path, migrations={schema.FORMAT: self.step}, target=self.TARGET)
            assert not raw.in_transaction
        with closing(connect(path)) as sql:
            assert sql.execute("PRAGMA user_version").fetchone() == (self.TARGET,)
            assert sql.execute("PRAGMA application_id").fetchone() == (schema.APPLICATION_ID,)
            assert sql.execute("SELECT id, priority FROM tasks").fetchall() == [("kept", None)]
            assert sql.execute("SELECT * FROM labels").fetchall() == [("kept", "old")]
            sql.execute("INSERT INTO tasks (id, status) VALUES ('new', 'DONE')")  # the triggers still work
            assert sql.execute("SELECT done_number FROM tasks WHERE id = 'new'").fetchone() == (2,)

    def test_steps_run_in_order(self, path: str) -> None:
        ran: list[int] = []
        steps: dict[int, Callable[[Any], None]] = {
            schema.FORMAT + 1: lambda db: ran.append(2),
            schema.FORMAT: lambda db: ran.append(1),
        }
        with closing(connect(path)) as raw:
            schema.prepare(raw, path, migrations=steps, target=schema.FORMAT + 2)
            assert raw.execute("PRAGMA user_version").fetchone() == (schema.FORMAT + 2,)
        assert ran == [1, 2]

    @pytest.mark.parametrize("error", [RuntimeError("half way"), KeyboardInterrupt(), sqlite3.OperationalError("no")])
    def test_a_step_that_raises_is_rolled_back_whole(self, path: str, error: BaseException) -> None:
        def step(db: Any) -> None:
            self.step(db)
            raise error

        before = self.content(path)
        with closing(connect(path)) as raw:
            with pytest.raises(type(error)):
                schema.prepare(raw, path, migrations={schema.FORMAT: step}, target=self.TARGET)
            assert not raw.in_transaction
        assert self.content(path) == before

    def test_a_second_step_that_raises_takes_the_first_with_it(self, path: str) -> None:
        def fails(db: Any) -> None:
            db["labels"].insert_all([{"task_id": "more", "label": "x"}])
            db.execute("SELECT * FROM absent")

        before = self.content(path)
        with closing(connect(path)) as raw, pytest.raises(sqlite3.OperationalError):
            schema.prepare(
                raw, path, migrations={schema.FORMAT: self.step, schema.FORMAT + 1: fails}, target=schema.FORMAT + 2
            )
        assert self.content(path) == before

    @pytest.mark.parametrize("steps", [{}, {schema.FORMAT + 1: lambda db: None}])
    def test_an_unknown_step_is_refused(self, path: str, steps: Any) -> None:
        before = self.content(path)
        with closing(connect(path)) as raw, pytest.raises(SchemaMismatch) as caught:
            schema.prepare(raw, path, migrations=steps, target=schema.FORMAT + 2)
        assert (caught.value.found, caught.value.known) == (schema.FORMAT, schema.FORMAT + 2)
        assert str(schema.FORMAT) in str(caught.value)
        assert str(schema.FORMAT + 2) in str(caught.value)
        assert self.content(path) == before

    def test_a_failed_creation_leaves_no_half_store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = str(tmp_path / "new.db")
        statements = schema._statements()
        monkeypatch.setattr(schema, "_statements", lambda: [*statements, "SELECT * FROM absent"])
        with closing(connect(tmp_path / "new.db")) as raw, pytest.raises(sqlite3.OperationalError):
            schema.prepare(raw, path)
        monkeypatch.undo()
        with ResultStore(path) as store:
            store.mark_as_done("a", 1)

    def test_who_comes_second_finds_it_done(self, path: str) -> None:
        """The format is looked at again inside the transaction: another process may have been faster."""
        ran = []
        with closing(connect(path)) as first, closing(connect(path)) as second:
            steps = {schema.FORMAT: lambda db: ran.append(1)}
            schema.prepare(first, path, migrations=steps, target=schema.FORMAT + 1)
            first.execute(f"PRAGMA user_version = {schema.FORMAT}")
            schema.prepare(second, path, migrations=steps, target=schema.FORMAT)
        assert ran == [1]


class TestNewerFormat:
    def test_both_versions_are_named_and_the_file_is_untouched(self, tmp_path: Path) -> None:
        path = tmp_path / "newer.db"
        with ResultStore(path) as store:
            store.mark_as_done("a", 1)
        with closing(connect(path)) as sql:
            sql.execute("PRAGMA user_version = 71")
        shutil.rmtree(f"{path}-owners")
        before = path.read_bytes(), sorted(file.name for file in tmp_path.iterdir())
        with pytest.raises(SchemaMismatch, match=rf"format 71.*formats up to {schema.FORMAT}") as caught:
            ResultStore(path)
        assert (caught.value.found, caught.value.known, caught.value.path) == (71, schema.FORMAT, str(path))
        assert (path.read_bytes(), sorted(file.name for file in tmp_path.iterdir())) == before
