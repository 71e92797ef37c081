"""The worker's half of a batch: which calls it makes, and what it records when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from liteerresult.batch import plan_group
from liteerresult.tasks import current_task
from liteerresult.worker import Call, Home, run_chunk, this_host

if TYPE_CHECKING:
    from pathlib import Path

    from liteerresult import ResultStore


@pytest.fixture
def home(store: ResultStore) -> Home:
    return Home(store.path, store.options, this_host())


def chunk(store: ResultStore, *values: Any, attempt: int = 0, last: bool = True) -> list[Call]:
    """Record a batch, and return its calls."""
    plan = plan_group(store, "g", "f", [((value,), {}) for value in values], None)
    return [Call(task_id, attempt, last, (values[position],), {}) for position, task_id, _ in plan.todo]


def test_each_call_is_recorded(store: ResultStore, home: Home) -> None:
    report = run_chunk(home, lambda x: x + 1, chunk(store, 1, 2, 3))
    assert (report.again, report.outcomes) == ([], None)
    assert report.seconds > 0
    metas = store.get_many(["g/0", "g/1", "g/2"])
    assert [(meta.status, meta.value(), meta.retries) for meta in metas] == [
        ("DONE", 2, 0),
        ("DONE", 3, 0),
        ("DONE", 4, 0),
    ]
    assert all(meta.started_at <= meta.done_at for meta in metas)  # type: ignore[operator]
    assert [meta.done_number for meta in metas] == [1, 2, 3]


def test_an_empty_chunk(store: ResultStore, home: Home) -> None:
    assert run_chunk(home, len, [])[0] == []


def test_the_end_of_a_call_is_recorded_with_the_beginning_of_the_next(store: ResultStore, home: Home) -> None:
    """So a worker that is killed is known to have been at exactly one call."""
    seen = []

    def look(_: int) -> None:
        seen.append([meta.status for meta in store.get_many(["g/0", "g/1", "g/2"])])

    run_chunk(home, look, chunk(store, 1, 2, 3))
    assert seen == [["STARTED", "PENDING", "PENDING"], ["DONE", "STARTED", "PENDING"], ["DONE", "DONE", "STARTED"]]


def test_the_running_task_is_known(store: ResultStore, home: Home) -> None:
    seen = []

    def look(x: int) -> None:
        running = current_task.get()
        assert running is not None
        seen.append(running[:2])
        if x == 2:
            raise ValueError

    run_chunk(home, look, chunk(store, 1, 2, 3))
    assert seen == [(store.path, "g/0"), (store.path, "g/1"), (store.path, "g/2")]
    assert current_task.get() is None


@pytest.mark.parametrize("status", ["REVOKED", "DONE", "FAILURE", "STARTED", "LOST"])
def test_what_is_not_to_be_run_is_not_run(store: ResultStore, home: Home, status: str) -> None:
    work = chunk(store, 1, 2, 3)
    store._db.transact(lambda c: c.execute("UPDATE tasks SET status = ? WHERE id = 'g/1'", (status,)))
    before = store.get_task_meta("g/1").done_number
    made = []
    report = run_chunk(home, made.append, work)
    assert made == [1, 3]
    assert report.again == []
    assert store.get_task_meta("g/1").status == status
    assert store.get_task_meta("g/1").done_number == before


@pytest.mark.parametrize("attempt", [0, 1, 3])
def test_another_attempt_is_not_made(store: ResultStore, home: Home, attempt: int) -> None:
    (call,) = chunk(store, 1)
    for _ in range(2):
        store.mark_as_failure("g/0", "why")
        store.resubmit("g/0")
    made: list[int] = []
    run_chunk(home, made.append, [call._replace(attempt=attempt)])
    assert made == []
    assert store.get_task_meta("g/0").status == "PENDING"
    run_chunk(home, made.append, [call._replace(attempt=2)])
    assert made == [1]
    assert store.get_task_meta("g/0").status == "DONE"


def test_what_fails_is_given_back(store: ResultStore, home: Home) -> None:
    def fail(x: int) -> int:
        if x != 2:
            raise ValueError(x)
        return x

    report = run_chunk(home, fail, chunk(store, 1, 2, 3, last=False))
    assert report.again == [0, 2]
    metas = store.get_many(["g/0", "g/1", "g/2"])
    assert [(meta.status, meta.retries) for meta in metas] == [("RETRY", 1), ("DONE", 0), ("RETRY", 1)]
    assert [meta.owner for meta in metas if meta.status == "RETRY"] == [store.own_owner()] * 2
    assert [str(attempt.result) for attempt in store.attempts("g/2")] == ["3"]


def test_the_last_attempt_is_not_given_back(store: ResultStore, home: Home) -> None:
    def fail(x: int) -> None:
        raise ValueError(x)

    assert run_chunk(home, fail, chunk(store, 1, 2)).again == []
    assert [meta.status for meta in store.get_many(["g/0", "g/1"])] == ["FAILURE", "FAILURE"]
    assert "raise ValueError(x)" in (store.get_task_meta("g/0").traceback or "")


def test_a_final_report_by_another_stands(store: ResultStore, home: Home) -> None:
    def work(x: int) -> int:
        store.mark_as_done(f"g/{x}", "by hand")
        if x:
            raise ValueError
        return x

    run_chunk(home, work, chunk(store, 0, 1, last=False))
    assert [meta.value() for meta in store.get_many(["g/0", "g/1"])] == ["by hand"] * 2


def test_a_call_may_report_its_own_end(store: ResultStore, home: Home) -> None:
    def work(x: int) -> int:
        store.update_state(f"g/{x}", "PROGRESS", {"current": x})
        return x

    run_chunk(home, work, chunk(store, 0, 1))
    assert [meta.value() for meta in store.get_many(["g/0", "g/1"])] == [0, 1]


def test_the_waiters_are_woken(store: ResultStore, home: Home) -> None:
    store.fallback_tick = None
    work = chunk(store, 1)
    with store.watch() as watch:
        run_chunk(home, abs, work)
        watch.wait(5)
    assert store.wakes.events == 1


@pytest.mark.parametrize("why", ["host", "path"])
def test_where_the_file_is_not_outcomes_are_reported(store: ResultStore, home: Home, tmp_path: Path, why: str) -> None:
    away = home._replace(host="another") if why == "host" else home._replace(path=str(tmp_path / "nowhere.db"))

    def work(x: int) -> int:
        if x == 2:
            raise SystemExit(x)
        return x

    report = run_chunk(away, work, chunk(store, 1, 2, 3))
    assert report.outcomes is not None
    assert [succeeded for succeeded, _ in report.outcomes] == [True, False, True]
    assert isinstance(report.outcomes[1][1], SystemExit)
    assert not (tmp_path / "nowhere.db").exists()
    assert [meta.status for meta in store.get_many(["g/0", "g/1", "g/2"])] == ["PENDING"] * 3


def test_this_host_has_a_name_that_stays() -> None:
    assert this_host() == this_host() != ""
