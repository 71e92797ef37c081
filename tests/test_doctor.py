"""What the doctor finds, and that it changes nothing."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from liteerresult import NotAResultStore, ResultStore
from liteerresult.cli import main
from liteerresult.doctor import examine, has_wal_reset_bug
from tests.support import run_python

if TYPE_CHECKING:
    from pathlib import Path

    from liteerresult.doctor import Finding


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "results.db"
    with ResultStore(path, durability="process-crash") as store:
        store.mark_as_done("a", 1)
        store.mark_as_failure("b", "broken")
        store.create_task("c", task_id="c")
        inner = store.create_group(["a", "b"], "inner")
        store.create_group(["a", inner, "a", "unknown"], "outer")
        store.create_group([], "empty")
    return path


def sql(path: Path, *statements: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return [connection.execute(statement).fetchall() for statement in statements][-1]


def problems(path: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(str(path)) if finding.level == "problem"}


def without_triggers(path: Path, statement: str) -> None:
    """Do what only a damaged file, or another program's mistake, can do."""
    triggers = sql(path, "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'")
    sql(path, *(f"DROP TRIGGER {name}" for name, _ in triggers), statement, *(text for _, text in triggers))


def test_a_sound_store_has_no_problem(path: Path) -> None:
    found = {finding.check: finding for finding in examine(str(path))}
    assert problems(path) == {}
    names = {
        "integrity",
        "schema",
        "tasks",
        "groups",
        "orphans",
        "owners",
        "wal",
        "sqlite",
        "file system",
        "notification",
    }
    assert set(found) == names
    assert found["tasks"].data["counts"] == {"DONE": 1, "FAILURE": 1, "PENDING": 1}
    assert examine(str(path), quick=True)[0].text == "quick_check: ok"


@pytest.mark.parametrize("column", ["size", "done", "failed", "revoked", "members", "tasks_done", "groups_done"])
def test_wrong_counts_are_found(path: Path, column: str) -> None:
    without_triggers(path, f"UPDATE groups SET {column} = {column} + 1 WHERE id = 'outer'")
    assert problems(path)["groups"].data == {"groups": ["outer"]}


def test_a_group_in_itself_does_not_hang(path: Path) -> None:
    without_triggers(path, "INSERT INTO group_members (group_id, position, child_id) VALUES ('inner', 9, 'outer')")
    assert "groups" in problems(path)


def test_a_missing_completion_number_is_found(path: Path) -> None:
    without_triggers(path, "UPDATE tasks SET done_number = NULL WHERE id = 'a'")
    assert problems(path)["tasks"].data == {"tasks": ["a"]}


def test_a_changed_schema_is_found(path: Path) -> None:
    sql(path, "DROP TRIGGER tasks_final_is_final", "CREATE INDEX mine ON tasks (name)")
    found = [finding for finding in examine(str(path)) if finding.check == "schema"]
    assert [(finding.level, finding.data) for finding in found] == [
        ("problem", {"missing": ["trigger tasks_final_is_final"]}),
        ("warning", {"added": ["index mine"]}),
    ]


def test_orphans_are_found_and_left_alone(path: Path) -> None:
    run_python(
        "import sys, os, liteerresult as l; l.ResultStore(sys.argv[1]).mark_as_started('c'); os._exit(0)",
        path,
    )
    for _ in range(2):
        assert problems(path)["orphans"].data == {"tasks": ["c"]}
    assert sql(path, "SELECT status FROM tasks WHERE id = 'c'") == [("STARTED",)]
    assert len(next(f for f in examine(str(path)) if f.check == "owners").data["dead"]) == 1


def test_a_live_owner_is_told(path: Path) -> None:
    with ResultStore(path) as store:
        store.mark_as_started("c")
        found = {finding.check: finding for finding in examine(str(path))}
        assert list(found["owners"].data["alive"].values()) == [1]
        assert found["orphans"].level == "ok"


def test_a_reader_that_pins_the_wal_is_told(path: Path) -> None:
    with (
        ResultStore(path, durability="process-crash") as store,
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader,
    ):
        cursor = reader.execute("SELECT id FROM tasks")
        cursor.fetchone()
        store.mark_as_done("c", 1)
        wal = next(finding for finding in examine(str(path)) if finding.check == "wal")
        assert wal.level == "warning"
        assert wal.data["checkpointed"] < wal.data["frames"]
        cursor.close()
        assert next(finding for finding in examine(str(path)) if finding.check == "wal").level == "ok"


def test_damage_is_a_problem_and_not_a_crash(path: Path) -> None:
    sql(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray(path.read_bytes())
    for start in range(4 * 2048, len(data), 2048):
        data[start : start + 100] = b"\xaa" * 100
    path.write_bytes(data)
    assert problems(path)
    result = CliRunner().invoke(main, ["doctor", str(path)])
    assert result.exit_code == 1
    assert "PROBLEM" in result.stdout


def test_another_file_is_not_examined(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    sql(other, "CREATE TABLE mine (x)")
    with pytest.raises(NotAResultStore):
        examine(str(other))


@pytest.mark.parametrize(
    ("version", "affected"),
    [
        ((3, 6, 23), False), ((3, 7, 0), True), ((3, 40, 1), True), ((3, 44, 5), True), ((3, 44, 6), False),
        ((3, 45, 0), True), ((3, 50, 6), True), ((3, 50, 7), False), ((3, 51, 0), True), ((3, 51, 2), True),
        ((3, 51, 3), False), ((3, 52, 0), False), ((4, 0, 0), False),
    ],
)  # fmt: skip
def test_versions_with_the_wal_bug(version: tuple[int, int, int], affected: bool) -> None:
    assert has_wal_reset_bug(version) is affected


def test_the_command_line(path: Path) -> None:
    result = CliRunner().invoke(main, ["doctor", str(path)])
    assert result.exit_code == 0, result.output
    assert "ok       integrity     integrity_check: ok" in result.stdout
    result = CliRunner().invoke(main, ["doctor", "--json", str(path)])
    answer = json.loads(result.stdout)
    assert answer["ok"] is True
    assert {finding["level"] for finding in answer["findings"]} <= {"ok", "warning"}
    without_triggers(path, "UPDATE groups SET done = 7 WHERE id = 'inner'")
    result = CliRunner().invoke(main, ["doctor", "--json", str(path)])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
