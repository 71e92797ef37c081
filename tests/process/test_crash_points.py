"""
A kill at every named step of the write path.

Each leaves the old state or the new one, whoever waits gets an end, and the next writer gets through. No hook
is in the product for that: the child wraps the system calls that the step stands between, or lets SQLite's
own trace tell which statement comes next, and kills itself there.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from liteerresult import AsyncResult, ResultStore, WorkerLostError
from tests.process.puppet import Puppet
from tests.support import Child

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What the child does before the write: `die` is SIGKILL to itself, at the moment that the name of the step says.
PREPARE = """
    import functools, os, signal, sys
    from liteerresult import ResultStore, bell, connection

    path, durability, step, verb = sys.argv[1:]

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    class Traced:
        '''A module with one function that dies before or after its work; the rest is the module's own.'''

        def __init__(self, module, name, when, condition):
            self._module, self._name, self._when, self._condition = module, name, when, condition

        def __getattr__(self, name):
            found = getattr(self._module, name)
            return functools.partial(self._call, found) if name == self._name else found

        def _call(self, function, *args):
            meant = self._condition(args)
            if meant and self._when == "before":
                die()
            value = function(*args)
            if meant:
                die()
            return value

    def at_statement(beginning):
        def trace(statement):
            if statement.lstrip().startswith(beginning):
                die()

        store._db.connection().set_trace_callback(trace)

    def inside_statement(operations):
        store._db.connection().set_progress_handler(die, operations)

    def arm():
        when, _, place = step.partition(" ")
        if place in ("queueing", "release"):
            import fcntl
            flag = fcntl.LOCK_EX if place == "queueing" else fcntl.LOCK_UN
            connection.fcntl = Traced(fcntl, "flock", when, lambda args: args[1] == flag)
        elif place == "sync":
            connection.os = Traced(os, "fdatasync", when, lambda args: True)
        elif place == "bell":
            bell.os = Traced(os, "pwrite", when, lambda args: True)
        elif when == "inside":
            inside_statement(int(place.split()[0]))
        else:
            at_statement(place)

    store = ResultStore(path, durability=durability)
    """

RUN = """
    arm()
    exec(verb)
    """

FINISH = """
    store.mark_as_started("task")
    arm()
    exec(verb)
    """

# Steps in order, and whether the new state is there after a kill at it.
STEPS = {
    "before queueing": False,
    "after queueing": False,
    "before BEGIN IMMEDIATE": False,
    "before UPDATE": False,
    "inside 20 operations of SQLite's machine": False,
    "inside 60 operations of SQLite's machine": False,
    "before COMMIT": False,
    "before release": True,
    "after release": True,
    "before sync": True,
    "after sync": True,
    "before bell": True,
    "after bell": True,
}
# A single statement is a transaction of its own: BEGIN and COMMIT are not on its way.
STEPS_OF_ONE = {step: new for step, new in STEPS.items() if step not in ("before BEGIN IMMEDIATE", "before COMMIT")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.db"


@pytest.fixture
def store(path: Path) -> Iterator[ResultStore]:
    """Yield the test's own store: the process that looks at what is left."""
    with ResultStore(path, durability="process-crash") as opened:
        yield opened


def kill_at(step: str, path: Path, program: str, verb: str) -> None:
    durability = "power-loss" if step.endswith("sync") else "process-crash"
    with Child("-c", PREPARE + program, path, durability, step, verb) as child:
        assert child.wait() == -signal.SIGKILL, child.report()
        assert child.read_rest() == ""


@pytest.mark.parametrize(("step", "new"), STEPS_OF_ONE.items())
def test_kill_while_finishing(path: Path, store: ResultStore, step: str, new: bool) -> None:
    store.create_group([store.create_task("work", task_id="task")], group_id="group")
    with Puppet(path, tick=None) as waiter:
        # Even with no fallback tick: the death of the owner is an event too.
        waiter.tell("timed(lambda: AsyncResult('task', store).get(timeout=15))[1]")
        kill_at(step, path, FINISH, "store.mark_as_done('task', 'value')")
        outcome = waiter.answer(10)
    if new:
        assert outcome == "value"
        assert store.get_task_meta("task").status == "DONE"
    else:
        assert isinstance(outcome, WorkerLostError)
        assert store.get_task_meta("task").status == "FAILURE"
    counts = store.group_counts("group")
    assert counts is not None
    assert (counts.done, counts.failed, counts.waiting) == (int(new), int(not new), 0)
    assert store.completion_number() == 1
    check_it_goes_on(store)


@pytest.mark.parametrize(("step", "new"), STEPS_OF_ONE.items())
def test_kill_while_failing(path: Path, store: ResultStore, step: str, new: bool) -> None:
    kill_at(step, path, FINISH, "store.mark_as_failure('task', KeyError('own'))")
    error = AsyncResult("task", store).get(timeout=5, propagate=False)
    assert isinstance(error, KeyError if new else WorkerLostError)
    check_it_goes_on(store)


@pytest.mark.parametrize(("step", "new"), STEPS.items())
def test_kill_while_finishing_many(path: Path, store: ResultStore, step: str, new: bool) -> None:
    """All of them, or none."""
    ids = [f"task-{number}" for number in range(50)]
    for task_id in ids:
        store.create_task("work", task_id=task_id)
    kill_at(step, path, FINISH, "store.mark_many_as_done({f'task-{n}': n for n in range(50)})")
    assert {meta.status for meta in store.get_many(ids)} == {"DONE" if new else "PENDING"}
    assert store.reap() in (["task"], [])
    check_it_goes_on(store)


@pytest.mark.parametrize(("step", "new"), STEPS.items())
def test_kill_while_starting(path: Path, store: ResultStore, step: str, new: bool) -> None:
    """Nobody had begun it, so it waits for the next worker; or it had been begun, so it is lost."""
    store.create_task("work", task_id="task")
    kill_at(step, path, RUN, "store.mark_as_started('task')")
    assert store.reap() == (["task"] if new else [])
    if new:
        with pytest.raises(WorkerLostError):
            AsyncResult("task", store).get(timeout=0)
        store.resubmit("task")
    with store.run_task("task") as task:
        assert task.retries == int(new)
        task.result = "second"
    assert AsyncResult("task", store).get(timeout=0) == "second"
    assert store.reap() == []
    check_it_goes_on(store)


@pytest.mark.parametrize(("step", "new"), STEPS.items())
def test_kill_of_whoever_settles_a_death(path: Path, store: ResultStore, step: str, new: bool) -> None:
    """The one who noticed dies as well: another notices, and there is one verdict."""
    with Puppet(path) as worker:
        worker.ask("store.mark_as_started('task')")
        program = """
    print("watching")
    sys.stdin.readline()
    arm()
    exec(verb)
    """
        durability = "power-loss" if step.endswith("sync") else "process-crash"
        with Child("-c", PREPARE + program, path, durability, step, "store.reap()") as reaper:
            assert reaper.read_line() == "watching"
            worker.kill()
            reaper.write_line()
            assert reaper.wait() == -signal.SIGKILL, reaper.report()
        assert store.get_task_meta("task").status == ("FAILURE" if new else "STARTED")
        with pytest.raises(WorkerLostError) as caught:
            AsyncResult("task", store).get(timeout=5)
        assert caught.value.pid == worker.pid
    store.reap()
    assert store.completion_number() == 1
    assert store.owners() == []
    check_it_goes_on(store)


@pytest.mark.parametrize("step", ["before sync", "after release", "before bell"])
def test_wake_is_not_lost_with_a_writer_that_owned_nothing(path: Path, store: ResultStore, step: str) -> None:
    """Dead between commit and bell, and no lock of its own to close: this is what the fallback tick is for."""
    store.create_task("work", task_id="task")
    with Puppet(path) as waiter:
        waiter.tell("timed(lambda: AsyncResult('task', store).get(timeout=15))")
        kill_at(step, path, RUN, "store.mark_as_done('task', 'value')")
        _, value = waiter.answer(10)
        assert value == "value"


def test_kill_while_the_file_is_made(path: Path) -> None:
    """Anywhere in the making of the tables: the next one finds no store, and makes it, or a whole one."""
    program = """
        import os, signal, sqlite3, sys
        from liteerresult import ResultStore

        path, number = sys.argv[1], int(sys.argv[2])
        connect = sqlite3.connect

        def traced(*args, **kwargs):
            raw = connect(*args, **kwargs)
            seen = [0]

            def trace(statement):
                seen[0] += 1
                if seen[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            raw.set_trace_callback(trace)
            return raw

        sqlite3.connect = traced
        ResultStore(path)
        """
    codes = []
    for number in [*range(1, 12), 20, 30, 40, 45, 50]:
        database = path.with_name(f"{number}.db")
        with Child("-c", program, database, str(number)) as child:
            codes.append(child.wait())
        with ResultStore(database) as store:
            store.mark_as_done("task", number)
            assert AsyncResult("task", store).get(timeout=0) == number
            assert store._db.read("PRAGMA integrity_check") == [("ok",)]
    assert codes.count(-signal.SIGKILL) >= 12
    assert set(codes) <= {0, -signal.SIGKILL}


def check_it_goes_on(store: ResultStore) -> None:
    """Assert that the dead writer left neither a lock nor a half-written page."""
    store.mark_as_done("next", 1)
    assert AsyncResult("next", store).get(timeout=0) == 1
    assert store._db.read("PRAGMA integrity_check") == [("ok",)]
