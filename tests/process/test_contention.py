"""Many processes at one file, at once: nobody is refused, nothing is lost, and the counts are right."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from liteerresult import AsyncResult, GroupResult, ResultStore
from tests.process.puppet import Puppet
from tests.support import DEADLINE, Child

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROCESSES = 8

BARRIER = """
    import os, sys, threading
    from liteerresult import AsyncResult, ResultStore

    def together():
        print("here")
        sys.stdin.readline()
    """


def race(code: str, *args: object, processes: int = PROCESSES, rounds: int = 1) -> None:
    """Run *code* in processes that start each round together; ``sys.argv[1]`` is each one's number."""
    with ExitStack() as stack:
        children = [
            stack.enter_context(Child("-c", BARRIER + code, str(number), *map(str, args)))
            for number in range(processes)
        ]
        for _ in range(rounds):
            for child in children:
                assert child.read_line() == "here", child.report()
            for child in children:
                child.write_line()
        for child in children:
            assert child.wait() == 0, child.report()


WRITE = """
    number, path, durability, tasks = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    store = ResultStore(path, durability=durability)
    together()
    for task in range(tasks):
        store.mark_as_done(f"{number}-{task}", [number, task])
    """


@pytest.mark.parametrize(("durability", "tasks"), [("process-crash", 1000), ("power-loss", 100)])
def test_processes_write_at_once(tmp_path: Path, durability: str, tasks: int) -> None:
    path = tmp_path / "results.db"
    total = PROCESSES * tasks
    ids = [f"{number}-{task}" for number in range(PROCESSES) for task in range(tasks)]
    with ResultStore(path, durability="process-crash") as store:
        group = store.create_group(ids, group_id="all")
        race(WRITE, path, durability, tasks)
        counts = store.group_counts("all")
        assert counts is not None
        assert (counts.size, counts.done, counts.waiting, counts.completed) == (total, total, 0, total)
        restored = GroupResult.restore("all", backend=store)
        assert restored is not None
        assert restored.join(timeout=5) == [[number, task] for number in range(PROCESSES) for task in range(tasks)]
        numbers = sorted(meta.done_number or 0 for meta in store.get_many(ids))
        assert numbers == list(range(1, total + 1))
        assert store.completion_number() == total
        assert group.completed_count() == total


CREATE = """
    number, folder, rounds = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    for attempt in range(rounds):
        together()
        store = ResultStore(f"{folder}/{attempt}.db", durability="process-crash")
        store.mark_as_done(f"task-{number}", number)
        store.close()
    """


def test_creation_is_raced(tmp_path: Path) -> None:
    rounds = 15
    race(CREATE, tmp_path, rounds, rounds=rounds)
    for attempt in range(rounds):
        with ResultStore(tmp_path / f"{attempt}.db") as store:
            found = [AsyncResult(f"task-{number}", store).get(timeout=0) for number in range(PROCESSES)]
            assert found == list(range(PROCESSES))
            assert store._db.read("PRAGMA integrity_check") == [("ok",)]


STORM = """
    number, path, times = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    together()
    for time in range(times):
        with ResultStore(path, durability="process-crash") as store:
            store.mark_as_done(f"{number}-{time}", time)
    """


def test_storm_of_opening_and_closing(tmp_path: Path) -> None:
    """The last one to close removes the WAL; whoever opens meanwhile must not write into a removed one."""
    path = tmp_path / "results.db"
    times = 60
    race(STORM, path, times)
    with ResultStore(path) as store:
        ids = [f"{number}-{time}" for number in range(PROCESSES) for time in range(times)]
        assert [meta.status for meta in store.get_many(ids)] == ["DONE"] * len(ids)
        assert store._db.read("PRAGMA integrity_check") == [("ok",)]


THREADS = """
    number, path, tasks = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    store = ResultStore(path, durability="process-crash")
    failures = []

    def work(thread):
        try:
            for task in range(tasks):
                task_id = f"{number}-{thread}-{task}"
                with store.run_task(task_id) as running:
                    running.update_state("PROGRESS", {"current": task})
                    running.result = task
                # What another thread of another process writes; nobody waits in a circle.
                if number:
                    AsyncResult(f"{number - 1}-{thread}-{task}", store).get(timeout=20)
        except BaseException as exc:
            failures.append(exc)
            raise

    together()
    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.exit(bool(failures))
    """


def test_threads_of_processes(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    tasks = 50
    race(THREADS, path, tasks, processes=4)
    with ResultStore(path) as store:
        ids = [f"{number}-{thread}-{task}" for number in range(4) for thread in range(4) for task in range(tasks)]
        assert [meta.status for meta in store.get_many(ids)] == ["DONE"] * len(ids)
        assert store.owners() == []


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[list[Puppet]]:
    """Yield processes that have the same store open."""
    with ExitStack() as stack:
        yield [stack.enter_context(Puppet(tmp_path / "results.db")) for _ in range(4)]


def test_one_of_many_starts_a_task(crowd: list[Puppet]) -> None:
    for number in range(30):
        for puppet in crowd:
            puppet.tell(f"timed(lambda: store.mark_as_started('task-{number}'))[1]")
        outcomes = [puppet.answer() for puppet in crowd]
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["TransitionError"] * 3 + ["int"]


def test_one_of_many_finishes_a_task_and_the_others_are_told(crowd: list[Puppet]) -> None:
    for number in range(30):
        for position, puppet in enumerate(crowd):
            puppet.tell(f"timed(lambda: store.mark_as_done('task-{number}', {position}))[1]")
        outcomes = [puppet.answer() for puppet in crowd]
        assert outcomes.count(None) == 1
        winner = outcomes.index(None)
        assert crowd[0].ask(f"AsyncResult('task-{number}', store).get(timeout=0)") == winner
        assert {type(outcome).__name__ for outcome in outcomes if outcome is not None} == {"TransitionError"}


def test_writer_that_is_killed_in_its_transaction_frees_the_queue(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    code = """
        import sys
        from liteerresult import ResultStore

        store = ResultStore(sys.argv[1], durability="process-crash")
        store._db.transact(lambda connection: print("inside") or sys.stdin.readline())
        """
    with ResultStore(path) as store, Puppet(path) as writer, Child("-c", code, path) as holder:
        assert holder.read_line() == "inside"
        writer.tell("store.mark_as_done('task', 1)")
        holder.kill()
        writer.answer(DEADLINE)
        assert AsyncResult("task", store).get(timeout=0) == 1
