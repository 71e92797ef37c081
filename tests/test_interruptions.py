"""What comes between two steps: Ctrl-C, the garbage collector, a fork, a disk that fails, a second worker."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from liteerresult import AsyncResult, ResultStore, StoreError, TransitionError, connection, forking, tasks
from tests.support import DEADLINE

if TYPE_CHECKING:
    from pathlib import Path


def lock_is_free(store: ResultStore) -> bool:
    """Tell whether another process could write now."""
    fd = os.open(store.path + "-lock", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class TestCtrlC:
    def test_inside_a_transaction(self, store: ResultStore) -> None:
        with pytest.raises(KeyboardInterrupt):
            store._db.transact(lambda raw: [raw.execute("INSERT INTO tasks (id) VALUES ('a')"), interrupt()])
        assert lock_is_free(store)
        assert not store.exists("a")
        store.create_task(task_id="b")

    def test_after_the_commit(self, store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
        store.create_task(task_id="a")
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the interruption is one of the steps
            context.setattr(store._db, "ring", interrupt)
            store.mark_as_done("a", 1)
        assert lock_is_free(store)
        assert store.get_task_meta("a").status == "DONE"
        store.create_task(task_id="b")

    def test_while_it_waits_in_the_queue(self, store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the interruption is one of the steps
            context.setattr(connection.fcntl, "flock", interrupt)
            store.create_task(task_id="a")
        assert lock_is_free(store)
        store.create_task(task_id="a")

    def test_what_a_second_one_left_is_cleared_up_by_the_next_write(self, store: ResultStore) -> None:
        raw = store._db.connection()
        store._db._turn.acquire()
        fcntl.flock(store._db._lock_fd, fcntl.LOCK_EX)
        raw.execute("BEGIN IMMEDIATE")
        raw.execute("INSERT INTO tasks (id) VALUES ('half')")
        assert not lock_is_free(store)
        store.create_task(task_id="a")
        assert lock_is_free(store)
        assert not store._db._turn._is_owned()  # type: ignore[attr-defined]
        assert not store.exists("half")

    def test_while_the_gate_is_shut(self, store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = connection._gate
        gate.inside.add(-1)  # a thread that does not leave
        try:
            with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the interruption is one of the steps
                context.setattr(forking.time, "sleep", interrupt)
                gate.shut()
        finally:
            gate.inside.discard(-1)
        assert not gate.is_shut
        store.create_task(task_id="a")


@pytest.mark.parametrize("outer", ["transact", "execute"])
def test_a_write_inside_a_write_is_refused_and_harms_nobody(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch, outer: str
) -> None:
    """A signal handler that writes, say: taking it for what an interruption left, it would undo the outer one."""
    refused = []

    def write(*_: object) -> None:
        try:
            store.mark_as_done("inner", 1)
        except StoreError as exc:
            refused.append(str(exc))

    store.create_task(task_id="a")
    if outer == "transact":
        store._db.transact(lambda raw: [raw.execute("INSERT INTO tasks (id) VALUES ('b')"), write()])
    else:
        with monkeypatch.context() as context:
            flock = fcntl.flock
            context.setattr(connection.fcntl, "flock", lambda *args: [flock(*args), write()])
            store.mark_as_done("a", 2)
    assert refused
    assert "in a write already" in refused[0]
    assert lock_is_free(store)
    assert store.exists("a" if outer == "execute" else "b")
    assert not store.exists("inner")
    write()
    assert store.exists("inner")


def test_a_fork_that_could_not_be_prepared_is_known_in_the_child(store: ResultStore) -> None:
    database = store._db
    try:
        database._unclean_fork = True
        database.before_fork()
        with pytest.raises(StoreError, match="spawn or forkserver"):
            database.read("SELECT 1")
    finally:
        database._unclean_fork = False


def test_a_watch_that_is_dropped_while_its_thread_holds_the_hub(store: ResultStore) -> None:
    """The garbage collector may run at any allocation, also inside the hub."""
    watch = store.watch()
    hub = watch._watch._hub
    wds = watch._watch._wds
    ended = threading.Event()

    def drop_inside() -> None:
        with hub._mutex:
            watch.close()
        ended.set()

    thread = threading.Thread(target=drop_inside, daemon=True)
    thread.start()
    assert ended.wait(DEADLINE)
    store.watch().close()  # the next one clears up
    assert all(watch._watch not in hub._listeners.get(wd, ()) for wd in wds)


def test_a_read_inside_a_transaction_leaves_the_thread_inside(store: ResultStore) -> None:
    """Else a fork or a close would not wait for the transaction."""
    seen = []

    def operation(_: sqlite3.Connection) -> None:
        store._db.read("SELECT 1")
        seen.append(threading.get_ident() in connection._gate.inside)

    store._db.transact(operation)
    assert seen == [True]
    assert threading.get_ident() not in connection._gate.inside


def test_a_disk_that_did_not_confirm_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    with ResultStore(tmp_path / "results.db") as store:
        store.mark_as_done("a", 1)
        with monkeypatch.context() as context, pytest.raises(StoreError, match="did not confirm it"):  # noqa: PT012 - the interruption is one of the steps
            context.setattr(connection.os, "fdatasync", fail)
            store.mark_as_done("b", 1)
        with pytest.raises(StoreError, match="earlier commit"):
            store.mark_as_done("c", 1)
        assert AsyncResult("a", store).get() == 1
    with ResultStore(tmp_path / "results.db") as store:
        store.mark_as_done("c", 1)


class TestSecondWorker:
    def test_the_cancelled_attempt_can_not_finish_the_next_one(self, store: ResultStore) -> None:
        with pytest.raises(TransitionError, match="attempt 0"), store.run_task("a") as task:  # noqa: PT012 - the interruption is one of the steps
            store_of_another = store
            store_of_another.revoke("b")  # something else
            with closing(sqlite3.connect(store.path, isolation_level=None)) as sql:
                sql.execute("UPDATE tasks SET status = 'REVOKED' WHERE id = 'a'")
            store.resubmit("a")
            assert store.start("a") == 1
            task.result = "from the cancelled attempt"
        assert store.get_task_meta("a").status == "STARTED"

    def test_a_task_in_a_custom_state_is_not_started_again(self, store: ResultStore) -> None:
        store.mark_as_started("a")
        store.update_state("a", "PROGRESS", 1)
        with pytest.raises(TransitionError):
            store.mark_as_started("a")

    def test_a_resubmitted_task_has_no_submitter(self, store: ResultStore) -> None:
        with closing(sqlite3.connect(store.path, isolation_level=None)) as sql:
            for task_id in ("by the store", "by sql"):
                sql.execute("INSERT INTO tasks (id, status, submitter) VALUES (?, 'FAILURE', 'somebody')", (task_id,))
            store.resubmit("by the store")
            sql.execute("UPDATE tasks SET status = 'PENDING', retries = retries + 1 WHERE id = 'by sql'")
            assert sql.execute("SELECT submitter FROM tasks").fetchall() == [(None,), (None,)]

    @pytest.mark.parametrize(
        ("status", "signalled"), [("PENDING", False), ("RETRY", False), ("LOST", False), ("STARTED", True)]
    )
    def test_only_who_runs_a_task_is_signalled(
        self, store: ResultStore, monkeypatch: pytest.MonkeyPatch, status: str, signalled: bool
    ) -> None:
        """Until it is begun a task's owner is who submitted it: ending that would end the whole batch."""
        sent: list[Any] = []
        monkeypatch.setattr(tasks, "send_to_owner", lambda owner, *_: sent.append(owner))
        with closing(sqlite3.connect(store.path, isolation_level=None)) as sql:
            sql.execute("INSERT INTO tasks (id, status, owner) VALUES ('a', ?, 'somebody')", (status,))
        assert store.revoke("a", terminate=True)
        assert sent == (["somebody"] if signalled else [])


def test_a_future_reads_all_pages_of_what_was_completed(store: ResultStore) -> None:
    store.fallback_tick = None
    future = AsyncResult("last", store).future()
    store.mark_many_as_done({**{f"t{number}": None for number in range(6_000)}, "last": 1})
    assert future.result(DEADLINE) == 1


def test_an_owner_that_nobody_recorded_is_noticed(store: ResultStore) -> None:
    """A task can be given back to a submitter whose record is gone already."""
    with closing(sqlite3.connect(store.path, isolation_level=None)) as sql:
        sql.execute("INSERT INTO tasks (id, status, owner) VALUES ('a', 'RETRY', 'nobody')")
    assert store.reap() == ["a"]
    assert store.get_task_meta("a").status == "FAILURE"
