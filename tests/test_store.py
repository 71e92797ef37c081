"""`ResultStore`: its verbs, and that the table of documented members names tests that are there."""

from __future__ import annotations

import ast
import contextvars
import os
import pickle
import re
import signal
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

import liteerresult
from liteerresult import (
    AsyncResult,
    ContentDisallowed,
    EncodeError,
    GroupResult,
    RemoteError,
    ResultStore,
    StoreError,
    TaskRevokedError,
    TransitionError,
    WorkerLostError,
)
from liteerresult.backend import GroupCounts
from liteerresult.liveness import Owners
from tests.support import DEADLINE, ROOT, ManualClock, run_python

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def second(store: ResultStore, **options: Any) -> Iterator[ResultStore]:
    """Open the file once more, as another program would."""
    with ResultStore(store.path, durability="process-crash", clock=store.clock, **options) as other:
        yield other


class OwnerElsewhere:
    """The owner that another process would be: its rows are in the file, its lock is held until it dies."""

    def __init__(self, store: ResultStore, *task_ids: str) -> None:
        self._owners = Owners(f"{store.path}-owners")
        self.id = self._owners.acquire()
        with closing(sqlite3.connect(store.path)) as its:
            its.execute("INSERT INTO owners (id, pid, host) VALUES (?, ?, 'here')", (self.id, os.getpid()))
            its.executemany(
                "INSERT INTO tasks (id, status, owner, started_at) VALUES (?, 'STARTED', ?, 1.5)",
                [(task_id, self.id) for task_id in task_ids],
            )
            its.commit()

    def die(self) -> None:
        self._owners.release()


def status(store: ResultStore, task_id: str) -> str:
    return store.get_task_meta(task_id).status


# Creating


def test_create_task(store: ResultStore, clock: ManualClock) -> None:
    result = store.create_task("render")
    assert (type(result), result.id, result.status, result.exists()) == (AsyncResult, "id-1", "PENDING", True)
    meta = store.get_task_meta("id-1")
    assert (meta.name, meta.args, meta.kwargs, meta.created_at) == ("render", (), {}, clock.time())
    assert store.create_task("render", task_id="mine", args=(1,), kwargs={"x": 2}, parent=result).id == "mine"
    with pytest.raises(TransitionError) as caught:
        store.create_task("render", task_id="mine")
    assert (caught.value.task_id, caught.value.from_status, caught.value.to_status) == ("mine", "PENDING", "PENDING")
    with pytest.raises(EncodeError):
        store.create_task("render", task_id="unencodable", args=(object(),))
    assert not store.exists("unencodable")


def test_create_group(store: ResultStore) -> None:
    group = store.create_group([AsyncResult("a", store), "b"])
    assert (type(group), group.id, group.results) == (GroupResult, "id-1", ["a", "b"])
    assert store.restore_group("id-1") == group
    assert store.create_group([], group_id="film").id == "film"
    with pytest.raises(TypeError):
        store.create_group([5])  # type: ignore[list-item]


@pytest.mark.parametrize(("wrong", "error"), [(None, ValueError), ("", ValueError), (5, TypeError), (b"a", TypeError)])
def test_every_verb_refuses_what_is_no_id(store: ResultStore, wrong: Any, error: type[Exception]) -> None:
    for verb in (
        store.mark_as_started, store.mark_as_done, store.mark_as_retry, store.mark_as_revoked, store.resubmit,
        store.forget, store.get_task_meta, store.exists, store.run_task, store.revoke, store.attempts,
        store.restore_group, store.delete_group,
        lambda task_id: store.mark_as_failure(task_id, ValueError("no")),
        lambda task_id: store.update_state(task_id, "PROGRESS"),
        lambda task_id: store.mark_many_as_done({task_id: 1}),
    ):  # fmt: skip
        with pytest.raises(error):
            verb(wrong)


# Running


def test_run_task(store: ResultStore, clock: ManualClock) -> None:
    store.create_task(task_id="a")
    clock.advance(1)
    started = clock.time()
    with store.run_task("a") as task:
        meta = store.get_task_meta("a")
        assert (meta.status, meta.started_at) == ("STARTED", started)
        assert meta.owner is not None
        assert (task.task_id, task.retries) == ("a", 0)
        clock.advance(1)
        task.update_state("PROGRESS", {"current": 3, "total": 10})
        meta = store.get_task_meta("a")
        assert (meta.status, meta.result) == ("PROGRESS", {"current": 3, "total": 10})
        task.result = (1, "x")
    meta = store.get_task_meta("a")
    assert (meta.status, meta.result, meta.done_at) == ("DONE", (1, "x"), clock.time())


def test_run_task_without_a_row_or_a_value(store: ResultStore) -> None:
    with store.run_task("a"):
        pass
    assert (status(store, "a"), AsyncResult("a", store).get()) == ("DONE", None)


def test_run_task_stores_what_is_raised_and_lets_it_go_on(store: ResultStore) -> None:
    error = ValueError("no")
    with pytest.raises(ValueError, match="no") as caught, store.run_task("a") as task:  # noqa: PT012 - the block is what is tested
        task.result = "not the value"
        raise error
    assert caught.value is error
    with pytest.raises(ValueError, match="no"):
        AsyncResult("a", store).get()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_run_task_stores_base_exceptions(store: ResultStore, kind: type[BaseException]) -> None:
    with pytest.raises(kind), store.run_task("a"):
        raise kind(3)
    meta = store.get_task_meta("a")
    assert meta.status == "FAILURE"
    text = repr(meta.result)
    assert kind.__name__ in text or isinstance(meta.result, RemoteError)


def test_run_task_refuses_a_task_that_runs_or_is_final(store: ResultStore) -> None:
    store.mark_as_done("a", 1)
    with pytest.raises(TransitionError), store.run_task("a"):
        pytest.fail("it ran")
    with store.run_task("b"), pytest.raises(TransitionError) as caught, store.run_task("b"):
        pytest.fail("it ran twice")
    assert (caught.value.from_status, caught.value.to_status) == ("STARTED", "STARTED")
    with second(store) as other, store.run_task("c"), pytest.raises(TransitionError), other.run_task("c"):
        pytest.fail("it ran twice")
    assert [status(store, task_id) for task_id in "abc"] == ["DONE", "DONE", "DONE"]


def test_run_task_that_reported_its_end_itself(store: ResultStore) -> None:
    with store.run_task("done"):
        store.mark_as_done("done", 5)
    with store.run_task("failed"):
        store.mark_as_failure("failed", ValueError("no"))
    with store.run_task("revoked"):
        store.mark_as_revoked("revoked")
    with store.run_task("retried"):
        store.mark_as_retry("retried", ValueError("again"))
    assert AsyncResult("done", store).get() == 5
    assert [status(store, name) for name in ("failed", "revoked", "retried")] == ["FAILURE", "REVOKED", "RETRY"]


def test_run_task_tells_that_somebody_else_ended_it(store: ResultStore) -> None:
    with second(store) as other, pytest.raises(TransitionError) as caught, store.run_task("a") as task:  # noqa: PT012 - the block is what is tested
        other.mark_as_revoked("a")
        task.result = 1
    assert (caught.value.from_status, caught.value.to_status) == ("REVOKED", "DONE")


def test_run_task_with_a_value_that_can_not_be_stored(store: ResultStore) -> None:
    with pytest.raises(EncodeError) as caught, store.run_task("a") as task:
        task.result = {"rows": [1, {"blob": object()}]}
    assert caught.value.path == "$.rows[1].blob"
    assert caught.value.remedy
    with pytest.raises(EncodeError):
        AsyncResult("a", store).get()


def test_run_task_links_what_it_submits(store: ResultStore) -> None:
    with store.run_task("top"):
        child = store.create_task(task_id="child")
        group = store.create_group(["x"], group_id="group")
        adopted = store.create_task(task_id="adopted", parent="somebody else")
        with store.run_task("child"):
            store.create_task(task_id="grandchild")
        store.create_task(task_id="second child")
    after = store.create_task(task_id="after")
    restored = store.restore_group("group")
    assert restored is not None
    assert (child.parent, restored.parent, group.parent) == ("top", "top", "top")
    assert (AsyncResult("grandchild", store).parent, AsyncResult("second child", store).parent) == ("child", "top")
    assert (adopted.parent, after.parent) == ("somebody else", None)
    assert {str(member) for member in AsyncResult("top", store).children} == {"child", "group", "second child"}


def test_run_task_forgets_the_context_after_an_error(store: ResultStore) -> None:
    with pytest.raises(ValueError, match="no"), store.run_task("top"):
        raise ValueError("no")
    assert store.create_task().parent is None


def test_run_task_links_only_in_its_own_context_and_file(store: ResultStore, tmp_path: Path) -> None:
    elsewhere = contextvars.Context()
    with ResultStore(tmp_path / "other.db", durability="process-crash") as other, store.run_task("top"):
        assert elsewhere.run(store.create_task).parent is None
        assert other.create_task().parent is None
        with second(store) as same:
            assert same.create_task().parent == "top"
        with ThreadPoolExecutor() as pool:
            assert pool.submit(store.create_task).result().parent is None


# Reporting


def test_mark_as_started(store: ResultStore) -> None:
    assert store.mark_as_started("a") == 0
    with pytest.raises(TransitionError):
        store.mark_as_started("a")
    store.mark_as_retry("a")
    assert store.mark_as_started("a") == 1


def test_mark_as_done_makes_the_row(store: ResultStore, clock: ManualClock) -> None:
    store.mark_as_done("a", {"x": 1})
    meta = store.get_task_meta("a")
    assert (meta.status, meta.result, meta.created_at, meta.done_at) == ("DONE", {"x": 1}, clock.time(), clock.time())


def test_mark_as_failure_of_a_text(store: ResultStore) -> None:
    store.mark_as_failure("a", "disk full")
    with pytest.raises(RemoteError, match="disk full"):
        AsyncResult("a", store).get()
    with pytest.raises(TypeError):
        store.mark_as_failure("b", 5)  # type: ignore[arg-type]


def test_mark_as_retry_and_revoked(store: ResultStore) -> None:
    store.mark_as_retry("a")
    assert status(store, "a") == "RETRY"
    store.mark_as_retry("b", ValueError("again"))
    assert isinstance(AsyncResult("b", store).result, ValueError)
    store.mark_as_revoked("c", "no longer needed")
    with pytest.raises(TaskRevokedError, match="no longer needed"):
        AsyncResult("c", store).get()


def test_the_first_final_report_wins(store: ResultStore) -> None:
    finals = {
        "DONE": lambda task_id: store.mark_as_done(task_id, 1),
        "FAILURE": lambda task_id: store.mark_as_failure(task_id, ValueError("no")),
        "REVOKED": store.mark_as_revoked,
    }
    others = {
        "STARTED": store.mark_as_started,
        "RETRY": store.mark_as_retry,
        "PROGRESS": lambda task_id: store.update_state(task_id, "PROGRESS", 1),
    }
    for first, report in finals.items():
        report(first)
        for later, other in {**finals, **others}.items():
            with pytest.raises(TransitionError) as caught:
                other(first)
            assert (caught.value.task_id, caught.value.from_status, caught.value.to_status) == (first, first, later)
        assert status(store, first) == first


def test_update_state(store: ResultStore) -> None:
    store.update_state("a", "PROGRESS", {"current": 3})
    assert (status(store, "a"), AsyncResult("a", store).info) == ("PROGRESS", {"current": 3})
    for wrong in ("DONE", "SUCCESS", "PENDING", "progress", "", "A B"):
        with pytest.raises(ValueError, match=r".+"):
            store.update_state("a", wrong, None)
    assert status(store, "a") == "PROGRESS"


def test_mark_many_as_done(store: ResultStore, clock: ManualClock) -> None:
    store.create_task(task_id="known")
    store.mark_as_started("running")
    before = store.completion_number()
    store.mark_many_as_done({"known": 1, "unknown": (2,), "running": None})
    assert [AsyncResult(name, store).get(timeout=0) for name in ("known", "unknown", "running")] == [1, (2,), None]
    assert store.completion_number() == before + 3
    assert {store.get_task_meta(name).done_at for name in ("known", "unknown", "running")} == {clock.time()}
    store.mark_many_as_done({})


def test_mark_many_as_done_is_all_or_nothing(store: ResultStore, clock: ManualClock) -> None:
    store.mark_as_failure("failed", ValueError("no"))
    clock.advance(1)
    with pytest.raises(TransitionError) as caught:
        store.mark_many_as_done({"a": 1, "failed": 2, "b": 3})
    assert (caught.value.task_id, caught.value.from_status) == ("failed", "FAILURE")
    with pytest.raises(EncodeError):
        store.mark_many_as_done({"a": 1, "b": object()})
    assert [name for name in "ab" if store.exists(name)] == []


@pytest.mark.parametrize("kind", ["in order", "backwards", "with unknown ones", "an own attempt", "another state"])
def test_mark_many_as_done_by_few_statements_or_one_by_one(store: ResultStore, clock: ManualClock, kind: str) -> None:
    """By few statements if all are recorded, unfinished and in the order of their rows; the outcome is alike."""
    ids = [f"t{number}" for number in range(120)]
    for task_id in ids if kind != "with unknown ones" else ids[::2]:
        store.create_task(task_id=task_id)
    store.create_group(ids, "all")
    nested = store.create_group([*ids[10:60], ids[10]], "some")
    store.create_group([nested, ids[0]], "outer")
    store.mark_as_failure("earlier", "no")
    if kind == "an own attempt":
        store.mark_as_started(ids[3])
        store.mark_as_retry(ids[3], ValueError("again"))
        assert store.mark_as_started(ids[3]) == 1
    elif kind == "another state":
        store.update_state(ids[3], "PROGRESS", ["3"])
        store.mark_as_retry(ids[4], ValueError("again"))
        store.mark_as_started(ids[5])
    given = list(reversed(ids)) if kind == "backwards" else ids
    clock.advance(1)
    store.mark_many_as_done({task_id: [task_id[1:]] for task_id in given})
    assert store.completed_since(0) == (121, ["earlier", *given])
    for meta in store.get_many(ids):
        assert (meta.status, meta.result, meta.traceback, meta.done_at) == (
            "DONE", [meta.task_id[1:]], None, clock.time(),
        )  # fmt: skip
    assert store.group_counts("all") == GroupCounts(120, 120, 0, 0, 120, 120)
    assert store.group_counts("some") == GroupCounts(51, 51, 0, 0, 51, 51)
    assert store.group_counts("outer") == GroupCounts(52, 52, 0, 0, 2, 2)
    with pytest.raises(TransitionError) as caught:
        store.mark_many_as_done(dict.fromkeys(given))
    assert caught.value.task_id == given[0]


def test_mark_many_as_done_tells_of_a_task_done_at_the_same_moment(store: ResultStore) -> None:
    """The clock may stand still between two reports; the first still wins, and the loser is told."""
    store.mark_as_done("a", "first")
    with pytest.raises(TransitionError) as caught:
        store.mark_many_as_done({"a": "second", "b": 1})
    assert (caught.value.task_id, caught.value.from_status) == ("a", "DONE")
    assert AsyncResult("a", store).get() == "first"
    assert not store.exists("b")


# Back


def test_resubmit_and_attempts(store: ResultStore) -> None:
    assert store.attempts("a") == []
    store.mark_as_started("a")
    store.mark_as_retry("a", ValueError("first"))
    store.mark_as_started("a")
    store.mark_as_failure("a", KeyError("second"))
    result = store.resubmit("a")
    assert (type(result), result.status, result.retries, result.result) == (AsyncResult, "PENDING", 2, None)
    store.revoke("a")
    store.resubmit("a")
    with store.run_task("a") as task:
        assert task.retries == 3
        task.result = "fourth"
    attempts = store.attempts("a")
    assert [(attempt.retries, attempt.status) for attempt in attempts] == [(0, "RETRY"), (1, "FAILURE"), (2, "REVOKED")]
    assert [type(attempt.result) for attempt in attempts] == [ValueError, KeyError, TaskRevokedError]
    assert result.get() == "fourth"


def test_resubmit_refuses_what_did_not_fail(store: ResultStore) -> None:
    store.mark_as_done("done", 1)
    store.create_task(task_id="pending")
    store.mark_as_started("started")
    for name, found in (("done", "DONE"), ("pending", "PENDING"), ("started", "STARTED"), ("unknown", None)):
        with pytest.raises(TransitionError) as caught:
            store.resubmit(name)
        assert (caught.value.from_status, caught.value.to_status) == (found, "PENDING")


def test_a_worker_that_lost_its_attempt_can_not_write(store: ResultStore) -> None:
    with second(store) as other:
        with pytest.raises(TransitionError, match="lost"), store.run_task("a") as task:  # noqa: PT012 - the block is what is tested
            other.mark_as_revoked("a")
            other.resubmit("a")
            with pytest.raises(TransitionError):
                task.update_state("PROGRESS", 1)
            task.result = "too late"
        assert status(store, "a") == "PENDING"
        with other.run_task("a") as task:
            task.result = "in time"
    assert AsyncResult("a", store).get() == "in time"


# Cancelling


def test_revoke(store: ResultStore) -> None:
    store.create_task(task_id="pending")
    assert store.revoke("pending")
    assert not store.revoke("pending")
    assert store.revoke("unknown")  # so that nobody starts it
    with pytest.raises(TransitionError):
        store.mark_as_started("unknown")
    store.mark_as_done("done", 1)
    assert not store.revoke("done")
    for wrong in ("SIGNOTHING", "", 9_999):
        with pytest.raises(ValueError, match=r"signal|Signals"):
            store.revoke("another", signal=wrong)
    assert not store.exists("another")


@pytest.fixture
def _signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yield the signals that came to this process."""
    came: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    yield came
    signal.signal(signal.SIGUSR1, old)


def test_revoke_with_terminate_does_not_signal_its_own_process(store: ResultStore, _signals: list[int]) -> None:  # noqa: PT019
    store.mark_as_started("a")
    assert store.revoke("a", terminate=True, signal="SIGUSR1")
    assert (_signals, status(store, "a")) == ([], "REVOKED")


def test_revoke_by_another_store_object_does_not_either(store: ResultStore, _signals: list[int]) -> None:  # noqa: PT019
    """An unpickled result has a store object of its own."""
    store.mark_as_started("a")
    with second(store) as other:
        assert other.revoke("a", terminate=True, signal="SIGUSR1")
    assert (_signals, status(store, "a")) == ([], "REVOKED")


def test_revoke_with_terminate_signals_nobody_by_a_dead_owners_number(store: ResultStore, _signals: list[int]) -> None:  # noqa: PT019
    """The owner is dead and its process id belongs to somebody else by now: to this process."""
    with closing(sqlite3.connect(store.path)) as other:
        other.execute(
            "INSERT INTO tasks (id, status, owner) VALUES ('a', 'STARTED', ?)", (f"{os.getpid()}@host-{'0' * 32}",)
        )
        other.commit()
    assert store.revoke("a", terminate=True, signal="SIGUSR1")
    assert _signals == []


def test_forget(store: ResultStore) -> None:
    store.mark_as_started("a")
    store.mark_as_retry("a", ValueError("no"))
    store.forget("a")
    store.forget("a")
    assert (store.exists("a"), store.attempts("a"), store.get_task_meta("a").created_at) == (False, [], None)
    store.mark_as_done("a", "anew")
    assert AsyncResult("a", store).get() == "anew"


def test_completion_numbers_only_grow(store: ResultStore) -> None:
    store.mark_many_as_done({"a": 1, "b": 2})
    number = store.completion_number()
    store.forget("b")
    assert store.completion_number() == number
    store.mark_as_done("c", 3)
    assert store.completed_since(number) == (number + 1, ["c"])
    assert store.completed_since(0) == (number + 1, ["a", "c"])


# Upkeep


def test_reap(store: ResultStore) -> None:
    elsewhere = OwnerElsewhere(store, "a", "progressing", "finished")
    store.mark_as_done("finished", 1)
    store.update_state("progressing", "PROGRESS", 1)
    store.mark_as_started("mine")
    assert store.reap() == []
    elsewhere.die()
    assert sorted(store.reap()) == ["a", "progressing"]
    assert store.reap() == []
    error = AsyncResult("a", store).result
    assert isinstance(error, WorkerLostError)
    assert (error.task_id, error.pid, error.since, error.started) == ("a", os.getpid(), 1.5, True)
    names = ("a", "progressing", "finished", "mine")
    assert [status(store, name) for name in names] == ["FAILURE", "FAILURE", "DONE", "STARTED"]


def test_opening_a_store_reaps(store: ResultStore) -> None:
    OwnerElsewhere(store, "a").die()
    with second(store):
        assert status(store, "a") == "FAILURE"


def test_waiting_reaps(store: ResultStore) -> None:
    OwnerElsewhere(store, "a").die()
    with pytest.raises(WorkerLostError):
        AsyncResult("a", store).get(timeout=DEADLINE)


def test_cleanup(store: ResultStore, clock: ManualClock) -> None:
    store.mark_as_done("old", 1)
    store.mark_as_failure("old failure", ValueError("no"))
    store.create_task(task_id="pending")
    store.mark_as_started("started")
    clock.advance(100)
    store.mark_as_done("new", 1)
    assert store.cleanup(101) == 0
    assert store.cleanup(timedelta(seconds=50)) == 2
    assert [name for name in ("old", "old failure", "pending", "started", "new") if store.exists(name)] == [
        "pending",
        "started",
        "new",
    ]
    clock.advance(1)
    assert store.cleanup(0.5) == 1
    assert not store.exists("new")
    for wrong in (-1, timedelta(seconds=-1), float("nan")):
        with pytest.raises(ValueError, match="age"):
            store.cleanup(wrong)


def test_cleanup_keeps_the_tasks_of_groups_that_are_not_wholly_old(store: ResultStore, clock: ManualClock) -> None:
    store.create_group(["a", "b"], group_id="unfinished")
    store.create_group(["c", "d"], group_id="young")
    store.create_group(["e", store.create_group(["f"], group_id="inner")], group_id="old")
    store.mark_many_as_done(dict.fromkeys("acef"))
    clock.advance(100)
    store.mark_as_done("d")
    assert store.cleanup(50) == 2
    assert [name for name in "abcdef" if store.exists(name)] == ["a", "c", "d"]
    assert [name for name in ("unfinished", "young", "old", "inner") if store.restore_group(name)] == [
        "unfinished",
        "young",
    ]
    assert store.restore_group("young").join(timeout=0) == [None, None]  # type: ignore[union-attr]
    store.mark_as_done("b")
    clock.advance(100)
    assert store.cleanup(50) == 4


# The object


def test_times_come_from_the_clock(store: ResultStore, clock: ManualClock) -> None:
    times = [clock.time()]
    store.create_task(task_id="a")
    for step in (store.mark_as_started, store.mark_as_done):
        clock.advance(10)
        times.append(clock.time())
        step("a")
    meta = store.get_task_meta("a")
    assert [meta.created_at, meta.started_at, meta.done_at] == times
    clock.advance(10)
    store.mark_as_failure("b", ValueError("no"))
    failed_at = clock.time()
    clock.advance(10)
    store.resubmit("b")
    assert store.attempts("b")[0].done_at == failed_at


def test_the_time_of_a_retried_attempt_comes_from_the_clock(store: ResultStore, clock: ManualClock) -> None:
    store.mark_as_started("a")
    clock.advance(10)
    store.mark_as_retry("a", ValueError("again"))
    (attempt,) = store.attempts("a")
    assert (attempt.started_at, attempt.done_at) == (clock.time() - 10, clock.time())


def test_close(store: ResultStore) -> None:
    other = ResultStore(store.path, durability="process-crash")
    other.mark_as_done("a", 1)
    assert not other.closed
    other.close()
    other.close()
    assert other.closed
    for call in (lambda: other.get_task_meta("a"), lambda: other.mark_as_done("b"), lambda: other.create_group(["a"])):
        with pytest.raises(StoreError, match="closed"):
            call()
    assert AsyncResult("a", store).get() == 1


def test_close_lets_go_of_unfinished_tasks(tmp_path: Path) -> None:
    with ResultStore(tmp_path / "results.db", durability="process-crash") as store:
        store.mark_as_started("a")
    with ResultStore(tmp_path / "results.db", durability="process-crash") as again, pytest.raises(WorkerLostError):
        AsyncResult("a", again).get(timeout=0)


def test_close_from_another_thread(store: ResultStore) -> None:
    other = ResultStore(store.path, durability="process-crash")
    with ThreadPoolExecutor() as pool:
        pool.submit(other.mark_as_done, "a", 1).result()
        other.close()
        with pytest.raises(StoreError, match="closed"):
            pool.submit(other.mark_as_done, "b", 1).result()


def test_close_while_other_threads_read_and_write(tmp_path: Path) -> None:
    """In a child, since closing a connection that runs a statement was a segmentation fault."""
    said = run_python(
        """
        import sys, threading
        from liteerresult import LiteerresultError, ResultStore

        def work(store, number, wrong):
            begun.wait()
            try:
                while True:
                    store.completed_since(0)
                    store.get_many(["a", "b"])
                    store.update_state(f"t{number}", "PROGRESS", 1)
            except LiteerresultError:
                pass
            except BaseException as exc:
                wrong.append(exc)

        for turn in range(20):
            store, begun, wrong = ResultStore(sys.argv[1], durability="process-crash"), threading.Barrier(4), []
            threads = [threading.Thread(target=work, args=(store, n, wrong), daemon=True) for n in range(3)]
            for thread in threads:
                thread.start()
            begun.wait()
            store.mark_as_done(f"x{turn}")
            store.close()
            for thread in threads:
                thread.join(3)
            assert not wrong, wrong
            assert not any(thread.is_alive() for thread in threads), "a thread goes on with a closed store"
        print("fine")
        """,
        tmp_path / "results.db",
    )
    assert said == "fine\n"


def test_a_store_is_a_context_manager(tmp_path: Path) -> None:
    with ResultStore(tmp_path / "results.db") as store:
        assert isinstance(store, ResultStore)
        store.mark_as_done("a", 1)
    assert store.closed
    with pytest.raises(ZeroDivisionError), ResultStore(tmp_path / "results.db") as store:  # noqa: PT012 - the block is what is tested
        assert AsyncResult("a", store).get() == 1
        _ = 1 / 0
    assert store.closed


def test_a_store_shows_its_path(store: ResultStore) -> None:
    assert repr(store) == f"<ResultStore: {store.path}>"


@pytest.mark.parametrize("option", [{"durability": "perhaps"}, {"serializer": "yaml"}, {"serializer": "pickle"}])
def test_options_that_do_not_exist_are_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        ResultStore(tmp_path / "results.db", **option)
    assert not (tmp_path / "results.db").exists()


@pytest.mark.parametrize("durability", ["power-loss", "process-crash"])
def test_a_store_pickles_with_its_options(tmp_path: Path, durability: Any) -> None:
    options: dict[str, Any] = {"durability": durability, "serializer": "pickle", "accept": ("json", "pickle")}
    with ResultStore(tmp_path / "results.db", **options) as store:
        store.mark_as_done("a", {1, 2})
        again = pickle.loads(pickle.dumps(store))
        with again:
            assert isinstance(again, ResultStore)
            assert again.path == store.path
            assert pickle.loads(pickle.dumps(store)) is again  # one for each path and options in a process
            assert AsyncResult("a", again).get() == {1, 2}
            again.mark_as_done("b", {3})
            assert store.get_task_meta("b").encoding == "pickle"
            assert again.__reduce__() == store.__reduce__()
    with ResultStore(tmp_path / "results.db") as strict:
        result = AsyncResult("a", strict)
        assert (result.status, result.ready()) == ("DONE", True)
        with pytest.raises(ContentDisallowed):
            result.get()


def test_two_stores_on_a_file_in_one_process(store: ResultStore) -> None:
    with second(store) as other:
        threads = [
            threading.Thread(target=writer.mark_as_done, args=(f"{name}-{number}", number))
            for name, writer in (("one", store), ("two", other))
            for number in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        for name, reader in (("one", other), ("two", store)):
            assert [AsyncResult(f"{name}-{number}", reader).get(timeout=0) for number in range(20)] == list(range(20))
        assert store.completion_number() == other.completion_number() == 40
        with pytest.raises(TransitionError):
            other.mark_as_done("one-1", "again")
    store.mark_as_done("after the other was closed", 1)
    with second(store) as third:
        assert third.exists("after the other was closed")


def test_ids_come_from_the_constructor(tmp_path: Path) -> None:
    with ResultStore(tmp_path / "results.db", new_id=iter("xyz").__next__) as store:
        assert [store.create_task().id, store.create_group([]).id, store.create_task().id] == ["x", "y", "z"]


def test_ids_are_unique_without_further_ado(tmp_path: Path) -> None:
    with ResultStore(tmp_path / "results.db", durability="process-crash") as store:
        assert len({store.create_task().id for _ in range(100)}) == 100


# The table of documented members

MEMBERS = {
    "celery.result": """
        AsyncResult.task_id AsyncResult.backend
        BaseAsyncResult.task_id BaseAsyncResult.backend BaseAsyncResult.is_done BaseAsyncResult.ready
        BaseAsyncResult.result BaseAsyncResult.status BaseAsyncResult.wait
        TaskSetResult.taskset_id TaskSetResult.subtask_ids TaskSetResult.subtasks TaskSetResult.completed_count
        TaskSetResult.failed TaskSetResult.iterate TaskSetResult.itersubtasks TaskSetResult.join TaskSetResult.ready
        TaskSetResult.successful TaskSetResult.total TaskSetResult.waiting
    """,
    "GroupResult": """
        GroupResult.id GroupResult.results GroupResult.parent GroupResult.**kwargs GroupResult.save GroupResult.delete
        GroupResult.as_tuple GroupResult.children GroupResult.restore
    """,
    "Celery 5": """
        ResultBase.parent
        BaseAsyncResult.id BaseAsyncResult.successful BaseAsyncResult.failed BaseAsyncResult.exists BaseAsyncResult.info
        BaseAsyncResult.state BaseAsyncResult.traceback BaseAsyncResult.get BaseAsyncResult.maybe_throw
        BaseAsyncResult.forget BaseAsyncResult.revoke BaseAsyncResult.children BaseAsyncResult.parent
        BaseAsyncResult.graph BaseAsyncResult.collect BaseAsyncResult.iterdeps BaseAsyncResult.get_leaf
        BaseAsyncResult.as_tuple BaseAsyncResult.as_list BaseAsyncResult.name BaseAsyncResult.args
        BaseAsyncResult.kwargs BaseAsyncResult.retries BaseAsyncResult.worker BaseAsyncResult.date_done
        BaseAsyncResult.future BaseAsyncResult.__await__
        ResultSet.results ResultSet.add ResultSet.remove ResultSet.discard ResultSet.update ResultSet.clear
        ResultSet.ready ResultSet.successful ResultSet.failed ResultSet.waiting ResultSet.completed_count
        ResultSet.iterate ResultSet.join ResultSet.get ResultSet.join_native ResultSet.iter_native
        ResultSet.maybe_throw ResultSet.forget ResultSet.revoke ResultSet.__len__ ResultSet.__iter__
        ResultSet.__getitem__ ResultSet.__eq__ ResultSet.__await__
        EagerResult.get EagerResult.revoke EagerResult.forget result_from_tuple
    """,
}
"""Every member of the two documents, and what Celery 5 users expect besides."""

TABLE = ROOT / "docs" / "members.md"


def table_rows() -> list[tuple[str, str, str, list[tuple[str, str]]]]:
    """Return document, member, promise and tests of each row."""
    rows = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and cells[0] in MEMBERS:
            document, member, promise, tests = cells
            rows.append((document, member.strip("`"), promise, re.findall(r"(test_\w+\.py)::(\w+)", tests)))
    return rows


def functions_in(name: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / name).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("document", MEMBERS)
def test_every_documented_member_is_in_the_table(document: str) -> None:
    listed = [member for found, member, _, _ in table_rows() if found == document]
    assert sorted(listed) == sorted(MEMBERS[document].split())


def test_every_test_in_the_table_exists() -> None:
    rows = table_rows()
    known = {name: functions_in(name) for name in {file for *_, tests in rows for file, _ in tests}}
    for _, member, promise, tests in rows:
        assert promise, member
        assert tests, f"{member} has no test"
        missing = [f"{file}::{test}" for file, test in tests if test not in known[file]]
        assert not missing, f"{member}: no such test: {missing}"


def test_every_member_in_the_table_is_there() -> None:
    for _, member, *_ in table_rows():
        kind, _, attribute = member.partition(".")
        found = getattr(liteerresult, kind)
        if attribute and attribute not in ("id", "backend", "**kwargs"):  # set by the constructor
            assert hasattr(found, attribute), member
