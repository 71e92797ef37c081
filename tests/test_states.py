"""Statuses: the words, and that Python and the file's triggers know the same rules."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

import liteerresult
from liteerresult import states
from liteerresult.schema import _statements

if TYPE_CHECKING:
    from collections.abc import Iterator

STATUSES = ["PENDING", "STARTED", "RETRY", "LOST", "PROGRESS", "CUSTOM_2", "DONE", "FAILURE", "REVOKED"]


@pytest.fixture
def sql() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for statement in _statements():
            connection.execute(statement)
        yield connection


def put(sql: sqlite3.Connection, status: str | None) -> None:
    if status is not None:
        sql.execute("INSERT INTO tasks (id, status) VALUES ('t', ?)", (status,))


def accepts(sql: sqlite3.Connection, statement: str, *parameters: Any) -> bool:
    before = sql.execute("SELECT * FROM tasks").fetchall()
    refusal = None
    try:
        sql.execute(statement, parameters)
    except sqlite3.IntegrityError as exc:
        refusal = exc
    if refusal is not None:
        assert refusal.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_TRIGGER
        assert sql.execute("SELECT * FROM tasks").fetchall() == before
        return False
    return True


class TestLegality:
    @pytest.mark.parametrize("new", STATUSES)
    @pytest.mark.parametrize("old", STATUSES)
    def test_agrees_with_the_triggers(self, sql: sqlite3.Connection, old: str, new: str) -> None:
        put(sql, old)
        assert accepts(sql, "UPDATE tasks SET status = ? WHERE id = 't'", new) == states.is_legal(old, new)

    @pytest.mark.parametrize("new", STATUSES)
    def test_a_new_row_may_have_any_status(self, sql: sqlite3.Connection, new: str) -> None:
        assert states.is_legal(None, new)
        assert accepts(sql, "INSERT INTO tasks (id, status) VALUES ('t', ?)", new)

    @pytest.mark.parametrize("old", STATUSES)
    def test_the_way_back_agrees_with_the_triggers(self, sql: sqlite3.Connection, old: str) -> None:
        put(sql, old)
        legal = states.is_legal(old, "PENDING", resubmit=True)
        assert accepts(sql, "UPDATE tasks SET status = 'PENDING', retries = retries + 1 WHERE id = 't'") == legal
        assert legal == (old in {"FAILURE", "REVOKED"})

    @pytest.mark.parametrize("new", [status for status in STATUSES if status != "PENDING"])
    @pytest.mark.parametrize("old", [None, *STATUSES])
    def test_resubmit_goes_to_pending_only(self, old: str | None, new: str) -> None:
        assert not states.is_legal(old, new, resubmit=True)

    def test_what_is_unknown_can_not_be_resubmitted(self) -> None:
        assert not states.is_legal(None, "PENDING", resubmit=True)

    @pytest.mark.parametrize("step", [-1, 0, 2])
    def test_the_way_back_is_one_attempt_further(self, sql: sqlite3.Connection, step: int) -> None:
        sql.execute("INSERT INTO tasks (id, status, retries) VALUES ('t', 'FAILURE', 5)")
        assert not accepts(sql, "UPDATE tasks SET status = 'PENDING', retries = retries + ? WHERE id = 't'", step)

    @pytest.mark.parametrize("old", STATUSES)
    def test_both_agree_with_the_store(self, store: liteerresult.ResultStore, old: str) -> None:
        with closing(sqlite3.connect(store.path, isolation_level=None)) as sql:
            put(sql, old)
        verbs: dict[str, Any] = {
            "STARTED": lambda: store.mark_as_started("t"),
            "DONE": lambda: store.mark_as_done("t"),
            "FAILURE": lambda: store.mark_as_failure("t", "no"),
            "REVOKED": lambda: store.mark_as_revoked("t"),
            "RETRY": lambda: store.mark_as_retry("t"),
            "PROGRESS": lambda: store.update_state("t", "PROGRESS"),
        }
        for new, verb in verbs.items():
            with closing(sqlite3.connect(store.path, isolation_level=None)) as sql:
                sql.execute("DELETE FROM tasks")
                put(sql, old)
            if old == "CUSTOM_2" and new == "STARTED":
                continue  # whether an unowned custom state has begun is not said
            if states.is_legal(old, new):
                verb()
                assert store.get_task_meta("t").status == new
            else:
                with pytest.raises(liteerresult.TransitionError) as caught:
                    verb()
                error = caught.value
                assert (error.task_id, error.from_status, error.to_status) == ("t", old, new)

    @pytest.mark.parametrize("old", ["STARTED", "PROGRESS"])
    def test_another_owner_is_refused(self, sql: sqlite3.Connection, old: str) -> None:
        put(sql, old)
        sql.execute("UPDATE tasks SET owner = 'one'")
        assert not accepts(sql, "UPDATE tasks SET owner = 'two'")
        assert not accepts(sql, "UPDATE tasks SET owner = 'two', status = 'PROGRESS'")
        assert accepts(sql, "UPDATE tasks SET owner = 'one', status = 'PROGRESS'")
        assert accepts(sql, "UPDATE tasks SET owner = 'two', status = 'RETRY'")


class TestWords:
    def test_the_two_vocabularies(self) -> None:
        assert states.DONE == "DONE"
        assert states.SUCCESS == "SUCCESS"
        for status in STATUSES:
            assert states.status_of(states.state_of(status)) == status
            assert states.state_of(status) == ("SUCCESS" if status == "DONE" else status)
        assert states.status_of("SUCCESS") == "DONE"

    def test_sets(self) -> None:
        assert {"DONE", "FAILURE", "REVOKED"} == states.READY_STATES
        assert {"PENDING", "STARTED", "RETRY"} == states.UNREADY_STATES
        assert {"RETRY", "FAILURE", "REVOKED"} == states.EXCEPTION_STATES
        assert {"FAILURE", "REVOKED"} == states.PROPAGATE_STATES
        assert not states.READY_STATES & states.UNREADY_STATES

    def test_all_names_are_there(self) -> None:
        assert all(hasattr(states, name) for name in states.__all__)
        assert len(set(states.__all__)) == len(states.__all__)

    @pytest.mark.parametrize(
        "status", ["done", "", "Done", "success", "SUCCESS", "1A", "_A", "A B", "A-B", "DONE ", "É", "AÉ", "A\n"]
    )
    def test_the_file_refuses_other_words(self, sql: sqlite3.Connection, status: str) -> None:
        for statement in (
            "INSERT INTO tasks (id, status) VALUES ('new', ?)",
            "UPDATE tasks SET status = ? WHERE id = 't'",
        ):
            sql.execute("INSERT OR REPLACE INTO tasks (id) VALUES ('t')")
            with pytest.raises(sqlite3.IntegrityError, match="upper-case name"):
                sql.execute(statement, (status,))


class TestCheckCustom:
    @pytest.mark.parametrize("state", ["PROGRESS", "A", "STEP_2", "X9", "STARTING"])
    def test_takes_what_the_file_takes(self, sql: sqlite3.Connection, state: str) -> None:
        assert states.check_custom(state) == state
        assert accepts(sql, "INSERT INTO tasks (id, status) VALUES ('t', ?)", state)

    @pytest.mark.parametrize("state", ["PENDING", "STARTED", "RETRY", "DONE", "SUCCESS", "FAILURE", "REVOKED"])
    def test_refuses_words_with_a_meaning(self, state: str) -> None:
        with pytest.raises(ValueError, match=f"{state} is not a custom state: use mark_as_"):
            states.check_custom(state)

    @pytest.mark.parametrize("state", ["progress", "", "1A", "_A", "A B", "A\n", "ÄB", "A٣", "A\0"])
    def test_refuses_other_forms(self, state: str) -> None:
        with pytest.raises(ValueError, match="upper-case name"):
            states.check_custom(state)

    @pytest.mark.parametrize("state", [None, 1, b"PROGRESS", ["PROGRESS"]])
    def test_refuses_what_is_no_text(self, state: Any) -> None:
        with pytest.raises(TypeError, match=type(state).__name__):
            states.check_custom(state)
