"""Workers die, by real SIGKILL: whoever waits is told at once, by the kernel, and nobody else is."""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from liteerresult import (
    AsyncResult,
    GroupResult,
    ResultStore,
    TaskRevokedError,
    TimeoutError as StoreTimeout,
    TransitionError,
    WorkerLostError,
)
from tests.process.puppet import Puppet, monotonic, spread
from tests.support import DEADLINE, Child, eventually, run_python

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KILLS = int(os.environ.get("LITEERRESULT_TEST_KILLS", "30"))
"""Rounds of SIGKILL. Raise it by hand: LITEERRESULT_TEST_KILLS=200."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.db"


@pytest.fixture
def store(path: Path) -> Iterator[ResultStore]:
    """Yield the test's own store: the process that waits."""
    with ResultStore(path, durability="process-crash") as opened:
        yield opened


RUN = """
    import sys
    from liteerresult import ResultStore

    store = ResultStore(sys.argv[1], durability="process-crash")
    print("open")
    with store.run_task(sys.argv[2]) as task:
        while True:  # busy, also with the store: the kill meets it anywhere
            task.update_state("PROGRESS", {"current": 1})
    """


@pytest.mark.timeout(60 + KILLS)
@pytest.mark.parametrize("tick", ["fallback tick", "no tick"])
def test_kill_of_a_running_task_ends_the_wait(path: Path, store: ResultStore, tick: str) -> None:
    if tick == "no tick":
        store.fallback_tick = None
    chance = random.Random(4)
    waits = []
    for number in range(KILLS):
        task_id = f"task-{number}"
        with Child("-c", RUN, path, task_id) as worker:
            assert worker.read_line() == "open"
            eventually(lambda task_id=task_id: store.get_task_meta(task_id).status == "PROGRESS")
            started = store.get_task_meta(task_id).started_at
            killed: list[float] = []

            def kill(worker: Child = worker, killed: list[float] = killed) -> None:
                time.sleep(chance.random() * 0.02)
                killed.append(monotonic())
                os.kill(worker.pid, signal.SIGKILL)

            killer = threading.Thread(target=kill)
            killer.start()
            with pytest.raises(WorkerLostError) as caught:
                AsyncResult(task_id, store).get(timeout=5)
            waits.append(monotonic() - killed[0])
            killer.join(DEADLINE)
            error = caught.value
            assert (error.task_id, error.pid, error.host) == (task_id, worker.pid, os.uname().nodename)
            assert error.since == pytest.approx(started, abs=1e-4)  # SQLite's JSON has 15 digits
            assert error.started
            assert str(worker.pid) in str(error)
    spread(f"SIGKILL to WorkerLostError, {tick}", waits)
    assert statistics.median(waits) < 0.02  # 5 ms where nothing else runs
    assert max(waits) < 0.5
    assert store.owners() == []
    assert list(store._owners.names()) == []


def test_resubmitted_after_a_kill_runs_again(path: Path, store: ResultStore) -> None:
    store.create_task("work", task_id="task")
    with Puppet(path) as worker:
        assert worker.ask("store.mark_as_started('task')") == 0
        worker.kill()
    with pytest.raises(WorkerLostError):
        AsyncResult("task", store).get(timeout=5)
    store.resubmit("task")
    with store.run_task("task") as task:
        assert task.retries == 1
        task.result = "second"
    assert AsyncResult("task", store).get(timeout=0) == "second"
    assert [attempt.status for attempt in store.attempts("task")] == ["FAILURE"]


HERD = """
    import filelock, inotify_simple, os, sys  # once for all
    from liteerresult import AsyncResult, ResultStore, WorkerLostError
    from tests.process.puppet import monotonic

    path, count = sys.argv[1], int(sys.argv[2])
    pids = []
    for number in range(count):
        pid = os.fork()
        if not pid:
            store = ResultStore(path, durability="process-crash")
            sys.stdout.write("ready\\n")  # at once: print would write the line's end on its own
            try:
                AsyncResult("task", store).get(timeout=20)
                ended = "value"
            except BaseException as exc:
                ended = type(exc).__name__
            sys.stdout.write(f"{ended} {monotonic()} {store.wakes.events} {store.wakes.ticks}\\n")
            sys.stdout.flush()
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    """


def test_herd_of_waiters(path: Path, store: ResultStore) -> None:
    """64 processes wait for one task: its worker's death ends them all, and their probing wakes nobody."""
    count = 64
    with Puppet(path) as worker, Child("-c", HERD, path, str(count)) as herd:
        worker.ask("store.mark_as_started('task')")
        for _ in range(count):
            assert herd.read_line() == "ready"
        time.sleep(random.random() * 0.3)  # a random gap: some wait, some may be on their way
        killed = monotonic()
        worker.kill()
        lines = [herd.read_line().split() for _ in range(count)]
        assert herd.wait() == 0, herd.report()
    assert {kind for kind, *_ in lines} == {"WorkerLostError"}
    waits = [float(ended) - killed for _, ended, _, _ in lines]
    events = [int(events) for _, _, events, _ in lines]
    spread(f"{count} waiters, SIGKILL to WorkerLostError", waits)
    print(f"events: sum {sum(events)}, most {max(events)}; ticks: {sum(int(line[3]) for line in lines)}")  # noqa: T201
    assert max(waits) < 0.5
    # Each hears of the death, and of the bell rung by whoever settled it.
    assert sum(events) <= 4 * count
    assert store.completion_number() == 1


def test_join_in_a_third_process_ends(path: Path, store: ResultStore) -> None:
    tasks = [store.create_task("work", task_id=f"task-{number}") for number in range(3)]
    store.create_group(tasks, group_id="group")
    with Puppet(path) as worker, Puppet(path) as joiner:
        worker.ask("store.mark_as_done('task-0', 0)")
        worker.ask("store.mark_as_started('task-1')")
        joiner.tell("timed(lambda: GroupResult.restore('group', backend=store).join(timeout=20))")
        time.sleep(random.random() * 0.1)  # a random gap: it waits, or is on its way
        killed = monotonic()
        worker.kill()
        ended, outcome = joiner.answer()
        assert isinstance(outcome, WorkerLostError)
        assert outcome.task_id == "task-1"
        assert ended - killed < 0.5
    group = GroupResult.restore("group", backend=store)
    assert group is not None
    assert group.failed()
    store.mark_as_done("task-2", 2)
    values = group.join(timeout=0, propagate=False)
    assert [values[0], type(values[1]), values[2]] == [0, WorkerLostError, 2]


def test_iterate_and_await_end_too(path: Path, store: ResultStore) -> None:
    code = """
        import asyncio, sys
        from liteerresult import AsyncResult, GroupResult, ResultStore, WorkerLostError

        store = ResultStore(sys.argv[1])
        store.fallback_tick = None

        async def main():
            group = GroupResult("group", [AsyncResult("a", store), AsyncResult("b", store)])

            async def iterate():
                async for value in group.iterate():
                    pass

            result = AsyncResult("b", store)
            future = asyncio.wrap_future(result.future())
            waits = asyncio.gather(result, group, iterate(), future, return_exceptions=True)
            await asyncio.sleep(0)
            print("waiting")
            return await waits

        outcomes = asyncio.run(main())
        assert [type(outcome) for outcome in outcomes] == [WorkerLostError] * 4, outcomes
        """
    with Puppet(path) as worker:
        worker.ask("store.mark_as_done('a', 1)")
        worker.ask("store.mark_as_started('b')")
        with Child("-c", code, path) as waiter:
            assert waiter.read_line() == "waiting"
            worker.kill()
            assert waiter.wait(10) == 0, waiter.report()


def test_stopped_worker_is_not_lost(path: Path, store: ResultStore) -> None:
    with Puppet(path) as worker, Puppet(path) as other:
        worker.ask("store.mark_as_started('task')")
        worker.stop()
        with pytest.raises(StoreTimeout):
            AsyncResult("task", store).get(timeout=0.6)  # more than two ticks
        assert other.ask("store.reap()") == []
        assert store.get_task_meta("task").status == "STARTED"
        worker.tell("store.mark_as_done('task', 1)")
        worker.cont()
        assert AsyncResult("task", store).get(timeout=5) == 1


def test_two_who_notice_at_once_agree(path: Path, store: ResultStore) -> None:
    with Puppet(path) as one, Puppet(path) as two:
        for number in range(10):
            ids = [f"{number}-{task}" for task in range(5)]
            with Puppet(path) as worker:
                for task_id in ids:
                    worker.ask(f"store.mark_as_started({task_id!r})")
                worker.kill()
            for puppet in (one, two):
                puppet.tell("store.reap()")
            reaped = [*one.answer(), *two.answer()]
            assert sorted(reaped) == ids
            for task_id in ids:
                errors = []
                for puppet in (one, two):
                    _, error = puppet.ask(f"timed(lambda: AsyncResult({task_id!r}, store).get(timeout=0))")
                    assert isinstance(error, WorkerLostError)
                    errors.append((str(error), error.task_id, error.pid, error.host, error.since))
                assert errors[0] == errors[1]
        assert store.completion_number() == 50
        assert [meta.retries for meta in store.get_many(ids)] == [0] * 5


# Fencing


@pytest.mark.parametrize("how", ["lock file deleted", "plain SQL"])
@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("again", ["pending", "started", "done"])
def test_worker_that_was_declared_lost_cannot_finish(
    path: Path, store: ResultStore, how: str, stopped: bool, again: str
) -> None:
    """The worker is alive and wrong: its attempt was taken from it, so nothing that it does may count."""
    with Puppet(path) as worker:
        worker.ask("store.mark_as_started('task')")
        owner = store.get_task_meta("task").owner
        if stopped:
            worker.stop()
        if how == "lock file deleted":
            os.unlink(f"{path}-owners/{owner}.lock")
            assert store.reap() == ["task"]
        else:
            code = """
                import sqlite3, sys
                connection = sqlite3.connect(sys.argv[1])
                connection.execute("UPDATE tasks SET status = 'FAILURE', result = '\\"lost\\"' WHERE id = 'task'")
                connection.commit()
                """
            run_python(code, path)
        store.resubmit("task")
        if again != "pending":
            store.mark_as_started("task")
        if again == "done":
            store.mark_as_done("task", "winner")
        before = store.get_task_meta("task").status
        for verb in (
            "mark_as_done('task', 'loser')",
            "mark_as_failure('task', 'loser')",
            "update_state('task', 'LATE')",
        ):
            worker.tell(f"timed(lambda: store.{verb})[1]")
        if stopped:
            worker.cont()
        refusals = [worker.answer() for _ in range(3)]
        assert [type(refusal) for refusal in refusals] == [TransitionError] * 3
        assert store.get_task_meta("task").status == before
        if again == "started":
            store.mark_as_done("task", "winner")
        if again != "pending":
            assert AsyncResult("task", store).get(timeout=0) == "winner"


def test_block_of_a_worker_that_was_declared_lost_is_told(path: Path, store: ResultStore) -> None:
    code = """
        import sys
        from liteerresult import ResultStore, TransitionError

        store = ResultStore(sys.argv[1])
        try:
            with store.run_task("task") as task:
                print("running")
                sys.stdin.readline()
                task.result = "loser"
        except TransitionError as exc:
            print(exc.reason)
        """
    with Child("-c", code, path) as worker:
        assert worker.read_line() == "running"
        os.unlink(f"{path}-owners/{store.get_task_meta('task').owner}.lock")
        assert store.reap() == ["task"]
        store.resubmit("task")
        worker.write_line()
        assert "attempt 0 was declared lost" in worker.read_line()
        assert worker.wait() == 0, worker.report()
    assert store.get_task_meta("task").status == "PENDING"


# Other ends


@pytest.mark.parametrize("end", ["exit", "close", "exception", "os._exit", "SIGTERM"])
def test_whoever_ends_with_an_unfinished_task_has_lost_it(path: Path, store: ResultStore, end: str) -> None:
    endings = {
        "exit": "",
        "close": "store.close(); print('closed'); sys.stdin.readline()",
        "exception": "raise RuntimeError",
        "os._exit": "os._exit(3)",
        "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    }
    code = f"""
        import os, signal, sys
        from liteerresult import ResultStore

        store = ResultStore(sys.argv[1])
        store.mark_as_started("task")
        print("started")
        sys.stdin.readline()
        {endings[end]}
        """
    store.fallback_tick = None
    with Child("-c", code, path) as worker:
        assert worker.read_line() == "started"
        worker.write_line()
        before = monotonic()
        with pytest.raises(WorkerLostError):
            AsyncResult("task", store).get(timeout=10)
        assert monotonic() - before < 5, "found by the look at the deadline only"
        if end == "close":
            assert worker.read_line() == "closed"
            os.kill(worker.pid, 0)


def test_opening_the_store_settles_the_dead(path: Path) -> None:
    with Puppet(path) as worker:
        worker.ask("store.mark_as_started('task')")
        worker.kill()
    with ResultStore(path) as store:
        assert store.get_task_meta("task").status == "FAILURE"
        assert store.owners() == []
        assert os.listdir(f"{path}-owners") == []


def test_lock_file_goes_with_the_last_task(path: Path, store: ResultStore) -> None:
    with Puppet(path) as worker, Puppet(path) as live:
        worker.ask("store.mark_as_started('task')")
        live.ask("store.mark_as_started('other')")
        assert len(list(store._owners.names())) == 2
        worker.kill()
        with pytest.raises(WorkerLostError):
            AsyncResult("task", store).get(timeout=5)
        assert list(store._owners.names()) == [store.get_task_meta("other").owner]


def test_final_tasks_of_a_dead_worker_stay_as_they_are(path: Path, store: ResultStore) -> None:
    with Puppet(path) as worker:
        worker.ask("store.mark_as_started('done') or store.mark_as_done('done', 1)")
        worker.ask("store.mark_as_started('failed') or store.mark_as_failure('failed', 'no')")
        worker.ask("store.mark_as_started('lost')")
        worker.kill()
    assert store.reap() == ["lost"]
    assert [meta.status for meta in store.get_many(["done", "failed", "lost"])] == ["DONE", "FAILURE", "FAILURE"]


def test_custom_state_of_a_dead_worker_is_lost_too(path: Path, store: ResultStore) -> None:
    with Puppet(path) as worker:
        worker.ask("store.mark_as_started('task') or store.update_state('task', 'PROGRESS', 1)")
        worker.kill()
    with pytest.raises(WorkerLostError):
        AsyncResult("task", store).get(timeout=5)


@pytest.mark.parametrize("owner", ["somebody", "x" * 300])
def test_owner_that_plain_sql_made_up(path: Path, store: ResultStore, owner: str) -> None:
    """It never held a lock, so it is dead; whoever waits is told so, and does not stumble over the name."""
    code = """
        import sqlite3, sys
        connection = sqlite3.connect(sys.argv[1])
        connection.execute("INSERT INTO tasks (id, status, owner) VALUES ('task', 'STARTED', ?)", (sys.argv[2],))
        connection.commit()
        """
    run_python(code, path, owner)
    with pytest.raises(WorkerLostError) as caught:
        AsyncResult("task", store).get(timeout=5)
    assert caught.value.pid is None


# Signals


def test_revoke_terminates_the_running_owner(path: Path, store: ResultStore) -> None:
    with Puppet(path) as worker:
        worker.ask("store.mark_as_started('task')")
        assert AsyncResult("task", store).revoke(terminate=True)
        assert worker.wait() == -signal.SIGTERM
        with pytest.raises(TaskRevokedError):
            AsyncResult("task", store).get(timeout=0)
        assert store.reap() == []


def test_revoke_sends_the_signal_that_was_asked_for(path: Path, store: ResultStore) -> None:
    with Puppet(path) as worker:
        worker.ask("store.mark_as_started('task')")
        assert store.revoke("task", terminate=True, signal="SIGUSR1")
        assert worker.wait() == -signal.SIGUSR1


def test_revoke_ends_a_stopped_owner(path: Path, store: ResultStore) -> None:
    with Puppet(path) as worker:
        worker.ask("store.mark_as_started('task')")
        worker.stop()
        assert store.revoke("task", terminate=True, signal="SIGKILL")
        assert worker.wait() == -signal.SIGKILL


def test_revoke_without_terminate_signals_nobody(path: Path, store: ResultStore) -> None:
    with Puppet(path) as worker:
        worker.ask("store.mark_as_started('task')")
        assert store.revoke("task")
        _, outcome = worker.ask("timed(lambda: store.mark_as_done('task', 1))")
        assert isinstance(outcome, TransitionError)


def test_revoke_does_not_signal_an_unrelated_process_with_that_pid(path: Path, store: ResultStore) -> None:
    """The owner died, and its pid went to someone who has nothing to do with it."""
    with ExitStack() as stack:
        stranger = stack.enter_context(Child("-c", "print('up'); input(); print('unharmed')"))
        assert stranger.read_line() == "up"
        with Puppet(path) as worker:
            worker.ask("store.mark_as_started('task')")
            dead = store.get_task_meta("task").owner or ""
            worker.kill()
        owner = f"{stranger.pid}@{dead.partition('@')[2]}"
        os.rename(f"{path}-owners/{dead}.lock", f"{path}-owners/{owner}.lock")
        store._db.transact(
            lambda connection: (
                connection.execute("INSERT INTO tasks (id, status, owner) VALUES ('reused', 'STARTED', ?)", (owner,))
                and None
            )
        )
        assert store.revoke("reused", terminate=True)
        stranger.write_line()
        assert stranger.read_line() == "unharmed"
        assert stranger.wait() == 0
