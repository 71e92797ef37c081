"""`Runner` over pools of real processes that are really killed: what it costs, and what it does not."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

import pytest

from liteerresult import AsyncResult, GroupResult, ResultStore, Runner, TaskRevokedError, WorkerLostError
from liteerresult.liveness import parse_owner
from tests.process import jobs
from tests.support import DEADLINE, Child, eventually, run_python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

METHODS = ["fork", "forkserver", "spawn"]

JOIN = 10
"""Seconds for a join that should not hang: less than a test has."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.db"


@pytest.fixture
def store(path: Path) -> Iterator[ResultStore]:
    with ResultStore(path, durability="process-crash") as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Where calls leave what they did."""
    return str(tmp_path)


def log(folder: str) -> list[int]:
    return [int(line) for line in jobs.lines(f"{folder}/log")]


def pool(workers: int = 2, method: str = "fork", **options: Any) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context(method), **options)


def statuses(group: Any) -> list[str]:
    return [result.status for result in group]


# All is well


@pytest.mark.parametrize("method", METHODS)
def test_workers_record_what_they_did(store: ResultStore, method: str) -> None:
    with Runner(store, pool(method=method)) as runner:
        group = runner.map(jobs.double, range(100))
        pids = runner.map(jobs.own_pid, range(10))
        assert group.join(timeout=DEADLINE) == [2 * x for x in range(100)]
        found = set(pids.join(timeout=DEADLINE))
    assert os.getpid() not in found
    assert {parse_owner(store.get_task_meta(result.id).owner or "")[0] for result in pids} == found
    assert store.reap() == []  # the workers ended and left nothing


def test_what_worker_processes_submit_has_the_task_for_a_parent(store: ResultStore, path: Path) -> None:
    code = """
        import sys
        from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
        from liteerresult import ResultStore, Runner
        from liteerresult.store import open_store
        from tests.process.jobs import double

        def parent(path):
            store = open_store(path, "process-crash")
            store.create_task("child", task_id="child")
            with Runner(store, ThreadPoolExecutor(1)) as nested:
                return nested.map(double, [1, 2], group_id="nested").join(timeout=10)

        with ResultStore(sys.argv[1], durability="process-crash") as store:
            with Runner(store, ProcessPoolExecutor(1)) as runner:
                assert runner.map(parent, [sys.argv[1]], group_id="top").join(timeout=20) == [[2, 4]]
        """
    run_python(code, path)
    top = AsyncResult("top/0", store)
    assert AsyncResult("child", store).parent == top
    nested = GroupResult.restore("nested", backend=store)
    assert nested is not None
    assert nested.parent == top
    assert {child.id for child in top.children} >= {"child", "nested"}


@pytest.mark.parametrize("durability", ["power-loss", "process-crash"])
def test_both_durabilities(tmp_path: Path, durability: Any) -> None:
    with ResultStore(tmp_path / "r.db", durability=durability) as store, Runner(store, pool()) as runner:
        assert runner.map(jobs.double, range(50)).join(timeout=DEADLINE) == [2 * x for x in range(50)]


@pytest.mark.parametrize("retries", [0, 2])
def test_a_function_that_cannot_be_sent(store: ResultStore, retries: int) -> None:
    with Runner(store, pool()) as runner:
        group = runner.map(lambda x: x, range(5), retries=retries)
        outcomes = group.join(timeout=DEADLINE, propagate=False)
        assert runner.map(jobs.double, [1]).join(timeout=DEADLINE) == [2]  # the pool goes on
    assert statuses(group) == ["FAILURE"] * 5
    assert all("<lambda>" in str(outcome) for outcome in outcomes)


def test_a_custom_factory(store: ResultStore, folder: str) -> None:
    made: list[Executor] = []

    class Pool(ProcessPoolExecutor):
        """Another class: what only a factory can make anew."""

    def make() -> Executor:
        made.append(Pool(2))
        return made[-1]

    with Runner(store, make) as runner:
        group = runner.map(jobs.die_once, [folder] * 10, range(10), [4] * 10, retries=1)
        assert group.join(timeout=JOIN) == [2 * x for x in range(10)]
    assert len(made) == 2


def test_an_executor_of_another_class_can_not_be_made_anew(store: ResultStore, folder: str) -> None:
    class Pool(ProcessPoolExecutor):
        pass

    with Runner(store, Pool(1)) as runner:
        group = runner.map(jobs.poison, [folder] * 10, range(10), [4] * 10)
        outcomes = group.join(timeout=JOIN, propagate=False)
    assert isinstance(outcomes[4], WorkerLostError)
    assert all(isinstance(outcome, int | RuntimeError) for outcome in outcomes[:4] + outcomes[5:])


# A worker dies


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_worker_costs_its_call_alone(store: ResultStore, folder: str, method: str) -> None:
    """The pool ends the other worker too, in the middle of a call: that one is made again."""
    with Runner(store, pool(method=method)) as runner:
        before = runner._executor
        group = runner.map(jobs.die_or_wait, [folder] * 6, range(6))
        outcomes = group.join(timeout=JOIN, propagate=False)
        assert runner._executor is not before
    error = outcomes[0]
    assert isinstance(error, WorkerLostError)
    assert (error.task_id, error.started) == (group[0].id, True)
    assert error.pid is not None
    assert error.pid != os.getpid()
    assert outcomes[1:] == [2, 4, 6, 8, 10]
    assert statuses(group) == ["FAILURE"] + ["DONE"] * 5
    assert log(folder).count(0) == 1
    assert log(folder).count(1) == 2
    assert group[1].retries == 1
    assert [meta.status for meta in store.attempts(group[1].id)] == ["RETRY"]
    assert isinstance(store.attempts(group[1].id)[0].result, WorkerLostError)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_worker_and_retries(store: ResultStore, folder: str, method: str) -> None:
    with Runner(store, pool(method=method)) as runner:
        group = runner.map(jobs.die_once, [folder] * 10, range(10), [4] * 10, retries=1)
        assert group.join(timeout=JOIN) == [2 * x for x in range(10)]
    assert group[4].retries == 1
    (attempt,) = store.attempts(group[4].id)
    assert attempt.status == "RETRY"
    assert isinstance(attempt.result, WorkerLostError)
    assert log(folder).count(4) == 2


def test_a_worker_that_leaves(store: ResultStore, folder: str) -> None:
    with Runner(store, pool()) as runner:
        group = runner.map(jobs.leave, [folder] * 10, range(10), [4] * 10)
        outcomes = group.join(timeout=JOIN, propagate=False)
    assert isinstance(outcomes.pop(4), WorkerLostError)
    assert outcomes == [2 * x for x in range(10) if x != 4]


@pytest.mark.parametrize("retries", [2, 6])
def test_a_call_that_always_kills_its_worker(store: ResultStore, folder: str, retries: int) -> None:
    """It fails after its retries; the calls that were waiting in the same pools all along are made."""
    with Runner(store, pool(), chunk_seconds=0) as runner:
        group = runner.map(jobs.poison, [folder] * 6, range(6), [2] * 6, retries=retries)
        outcomes = group.join(timeout=JOIN, propagate=False)
    assert isinstance(outcomes.pop(2), WorkerLostError)
    assert outcomes == [0, 2, 6, 8, 10]
    assert log(folder).count(2) == retries + 1
    assert group[2].retries == retries


def test_calls_that_wait_while_pools_break_are_made(store: ResultStore, folder: str) -> None:
    """The poison is first in line each time; what waits behind it in the pool is never to blame."""
    with Runner(store, pool(1), chunk_seconds=0) as runner:
        poison = runner.run_calls(jobs.poison, [((folder, 9, 9), {})], retries=8)
        others = [runner.submit(jobs.double, x) for x in range(2)]
        with pytest.raises(WorkerLostError):
            poison.join(timeout=JOIN)
        assert [other.get(timeout=JOIN, propagate=False) for other in others] == [0, 2]
    assert log(folder) == [9] * 9


def test_a_long_call_beside_one_that_kills_its_workers(store: ResultStore, folder: str) -> None:
    """It is ended by the pool each time, and begun again, however often: another is proven to be the culprit."""
    with Runner(store, pool(), chunk_seconds=0) as runner:
        group = runner.map(jobs.poison_beside, [folder] * 2, range(2), retries=6)
        with pytest.raises(WorkerLostError):
            group[0].get(timeout=JOIN)
        open(f"{folder}/go", "w").close()
        assert group[1].get(timeout=JOIN) == 2
    assert log(folder).count(0) == 7


@pytest.mark.parametrize("retries", [0, 6])
def test_a_long_call_without_retries_beside_it(store: ResultStore, folder: str, retries: int) -> None:
    with Runner(store, pool(), chunk_seconds=0) as runner:
        poison = runner.map(jobs.poison_beside, [folder], [0], retries=retries)
        long = runner.map(jobs.poison_beside, [folder], [1])
        with pytest.raises(WorkerLostError):
            poison.join(timeout=JOIN)
        open(f"{folder}/go", "w").close()
        assert long.join(timeout=JOIN) == [2]


def test_a_chunk_whose_worker_dies_after_calls_of_it_failed(store: ResultStore, folder: str) -> None:
    """Those that had been given back for their next attempt are not forgotten with the chunk's report."""
    count, deadly = 200, 120
    with Runner(store, pool(1), chunk_seconds=1) as runner:
        group = runner.map(jobs.fail_then_die, [folder] * count, range(count), [deadly] * count, retries=1)
        try:
            assert group.join(timeout=JOIN) == [2 * x for x in range(count)]
        finally:
            counts = {status: statuses(group).count(status) for status in set(statuses(group))}
            group.revoke()
            assert counts == {"DONE": count}
    assert {log(folder).count(x) for x in range(deadly - 20, count)} == {2}


def test_a_pool_that_is_found_broken_by_submitting(store: ResultStore, folder: str) -> None:
    """
    The dispatcher may hear of a death from `submit` before it hears of it from the futures of the old pool.

    They tell of the same death: the new pool is not to be replaced on their account, nor the old one's other
    worker, ended by the pool, to be blamed.
    """

    class Pool(ProcessPoolExecutor):
        armed = True
        submitted = 0

        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if fn is os.getpid or not Pool.armed:
                return super().submit(fn, *args, **kwargs)
            self.submitted += 1
            if self.submitted == 3:
                Pool.armed = False
                eventually(lambda: len(set(log(folder))) == 2)
                victim = next(iter(self._processes))
                os.kill(victim, signal.SIGKILL)
                eventually(lambda: self._broken)
                jobs.appear(folder)
                open(f"{folder}/go", "w").close()
            return super().submit(fn, *args, **kwargs)

    made: list[Pool] = []

    def make() -> Executor:
        made.append(Pool(2))
        return made[-1]

    with Runner(store, make, chunk_seconds=0) as runner:
        group = runner.map(jobs.hold, [folder] * 8, range(8))
        outcomes = group.join(timeout=JOIN, propagate=False)
    assert statuses(group).count("DONE") == 7
    assert sum(isinstance(outcome, WorkerLostError) for outcome in outcomes) == 1
    assert len(made) == 2


def test_a_pool_whose_workers_cannot_start(store: ResultStore) -> None:
    with Runner(store, pool(initializer=jobs.break_at_start)) as runner:
        group = runner.map(jobs.double, range(10))
        outcomes = group.join(timeout=JOIN, propagate=False)
    assert {type(outcome) for outcome in outcomes} <= {BrokenProcessPool, RuntimeError}
    assert statuses(group) == ["FAILURE"] * 10


def test_an_executor_that_reruns_calls_of_dead_workers_itself(store: ResultStore, folder: str) -> None:
    """The second worker finds the attempt lost and leaves it alone; somebody has to decide on it all the same."""
    with Runner(store, executor := jobs.Rerunning()) as runner:
        group = runner.map(jobs.die_once, [folder] * 5, range(5), [2] * 5, retries=1)
        try:
            assert group.join(timeout=5) == [0, 2, 4, 6, 8]
        finally:
            group.revoke()
    assert executor.deaths == 1


# loky


def test_loky(store: ResultStore) -> None:
    loky = pytest.importorskip("loky")
    with Runner(store, lambda: loky.ProcessPoolExecutor(2)) as runner:
        assert runner.map(jobs.double, range(50)).join(timeout=DEADLINE) == [2 * x for x in range(50)]


@pytest.mark.parametrize("retries", [0, 1])
def test_loky_and_a_killed_worker(store: ResultStore, folder: str, retries: int) -> None:
    loky = pytest.importorskip("loky")
    with Runner(store, lambda: loky.ProcessPoolExecutor(1)) as runner:
        group = runner.map(jobs.die_once, [folder] * 6, range(6), [2] * 6, retries=retries)
        outcomes = group.join(timeout=JOIN, propagate=False)
    if retries == 0:
        assert isinstance(outcomes[2], WorkerLostError)
        outcomes[2] = 4
    assert outcomes == [0, 2, 4, 6, 8, 10]


# Revoked


def test_a_running_task_is_terminated(store: ResultStore, folder: str) -> None:
    with Runner(store, pool()) as runner:
        group = runner.map(jobs.hold, [folder] * 8, range(8), retries=2)
        eventually(lambda: len(log(folder)) == 2)
        assert group[0].status == "STARTED"
        assert store.revoke(group[0].id, terminate=True)
        open(f"{folder}/go", "w").close()
        outcomes = group.join(timeout=JOIN, propagate=False)
    assert isinstance(outcomes[0], TaskRevokedError)
    assert outcomes[1:] == [2 * x for x in range(1, 8)]
    assert log(folder).count(0) == 1


def test_an_exception_revokes_what_waits_in_the_pool(store: ResultStore, folder: str) -> None:
    """A pool's queue can't be called back, but what stands in it has not begun."""

    def release() -> None:
        with contextlib.suppress(AssertionError):
            eventually(lambda: statuses(group)[1:] == ["REVOKED"] * 9, 3)
        open(f"{folder}/go", "w").close()

    runner = Runner(store, pool(1), chunk_seconds=0)
    group = runner.map(jobs.hold, [folder] * 10, range(10))
    releasing = threading.Thread(target=release)
    with pytest.raises(ZeroDivisionError), runner:  # noqa: PT012 - the block is what it is about
        eventually(lambda: log(folder) == [0])
        eventually(lambda: len(runner._in_flight) == 2)
        releasing.start()
        raise ZeroDivisionError
    releasing.join(DEADLINE)
    assert statuses(group) == ["DONE"] + ["REVOKED"] * 9
    assert log(folder) == [0]


# Fencing


def test_a_stopped_worker_that_was_declared_lost(store: ResultStore, path: Path, folder: str) -> None:
    """
    It is alive and holds its lock, so the store would never say so; somebody else did, in plain SQL.

    What it reports then is refused, whether the call reports or the worker does.
    """
    with Runner(store, pool(2), chunk_seconds=0) as runner:
        group = runner.map(jobs.report_late, [folder], [str(path)], ["g/0"], group_id="g")
        (pid,) = eventually(lambda: log(folder))
        os.kill(pid, signal.SIGSTOP)
        code = """
            import sqlite3, sys
            connection = sqlite3.connect(sys.argv[1])
            connection.execute("UPDATE tasks SET status = 'FAILURE', result = '\\"lost\\"' WHERE id = 'g/0'")
            connection.commit()
            """
        try:
            run_python(code, path)
            store.resubmit("g/0")
            open(f"{folder}/go", "w").close()
            before = store.get_task_meta("g/0")
            assert (before.status, before.retries) == ("PENDING", 1)
        finally:
            os.kill(pid, signal.SIGCONT)
        (told,) = eventually(lambda: jobs.lines(f"{folder}/told"))
    # The block has ended: the loser's worker has reported all that it ever will.
    assert group[0].status == "PENDING"
    with Runner(store, pool(1)) as runner:
        assert runner.map(jobs.report_late, [folder], [str(path)], ["g/0"], group_id="g").join(timeout=JOIN) == [
            "winner"
        ]
    assert (group[0].status, group[0].retries) == ("DONE", 1)
    assert told == "TransitionError"


# The submitter dies


@pytest.mark.parametrize("method", METHODS)
def test_the_submitter_dies(path: Path, store: ResultStore, folder: str, method: str) -> None:
    """A third process waits: for those that no worker will ever get, it waits no longer than for the kernel."""
    code = f"""
        import multiprocessing, sys
        from concurrent.futures import ProcessPoolExecutor
        from liteerresult import ResultStore, Runner
        from tests.process.jobs import hold

        if __name__ == "__main__":
            store = ResultStore(sys.argv[1], durability="process-crash")
            pool = ProcessPoolExecutor(1, multiprocessing.get_context({method!r}))
            with Runner(store, pool, chunk_seconds=0) as runner:
                runner.map(hold, [sys.argv[2]] * 20, range(20), group_id="g")
                print("submitted", flush=True)
        """
    with Child("-c", code, path, folder) as submitter:
        assert submitter.read_line() == "submitted"
        eventually(lambda: log(folder) == [0])
        group = store.restore_group("g")
        assert isinstance(group, GroupResult)
        assert group[0].status == "STARTED"
        submitter.kill()
        with pytest.raises(WorkerLostError):
            group.join(timeout=5)
        outcomes = [result.get(timeout=5, propagate=False) for result in list(group)[1:]]
        assert all(isinstance(outcome, WorkerLostError) for outcome in outcomes)
        assert {(outcome.started, outcome.pid) for outcome in outcomes} == {(False, submitter.pid)}
        # The worker lives and goes on with its call, and with no other.
        assert group[0].status == "STARTED"
        open(f"{folder}/go", "w").close()
        assert group[0].get(timeout=5) == 0
    with Runner(store, pool(method=method)) as runner:
        again = runner.map(jobs.hold, [folder] * 20, range(20), group_id="g")
        assert again.join(timeout=JOIN) == [2 * x for x in range(20)]
    assert sorted(log(folder)) == list(range(20))


def test_tasks_in_the_hands_of_another_live_process_are_left_alone(path: Path, store: ResultStore, folder: str) -> None:
    code = """
        import sys
        from concurrent.futures import ProcessPoolExecutor
        from liteerresult import ResultStore, Runner
        from tests.process.jobs import hold

        with ResultStore(sys.argv[1], durability="process-crash") as store:
            with Runner(store, ProcessPoolExecutor(2)) as runner:
                group = runner.map(hold, [sys.argv[2]] * 6, range(6), group_id="g")
                print("submitted")
                print(sum(group.join(timeout=20)))
        """
    with Child("-c", code, path, folder) as other:
        assert other.read_line() == "submitted"
        eventually(lambda: log(folder))
        with Runner(store, pool(1)) as runner:
            group = runner.map(jobs.hold, [folder] * 6, range(6), group_id="g")
            assert len(log(folder)) <= 2
            open(f"{folder}/go", "w").close()
            assert group.join(timeout=JOIN) == [2 * x for x in range(6)]
        assert other.read_line() == "30"
        assert other.wait() == 0, other.report()
    assert sorted(log(folder)) == list(range(6))
    assert {parse_owner(store.get_task_meta(result.id).owner or "")[0] for result in group}.isdisjoint({os.getpid()})


def test_fingerprints_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Hash seeds differ, sets and the dicts made from them are iterated in other orders: the call is the same."""
    code = """
        import sys
        from concurrent.futures import ThreadPoolExecutor
        from liteerresult import ResultStore, Runner
        from tests.process.jobs import Opaque

        def work(*args, **kwargs):
            return len(args)

        names = {f"name {number}" for number in range(30)}
        calls = [
            ((names, frozenset(names), {"a": {name: {name} for name in names}}), {}),
            ((), {name.replace(" ", "_"): 1 for name in names}),
            (({(name, 1): name for name in names},), {}),
            ((Opaque(1),), {}),
            ((Opaque(1), names), {}),
            ((Opaque(sorted(names)),), {"names": names}),
            ((Opaque(names),), {}),
        ]
        store = ResultStore(sys.argv[1], durability="process-crash")
        bad = []
        with Runner(store, ThreadPoolExecutor(1)) as runner:
            for number, call in enumerate(calls):
                try:
                    runner.run_calls(work, [call], group_id=f"g{number}")
                except ValueError:
                    bad.append(number)
        print(bad)
        """
    outputs = [run_python(code, tmp_path / "r.db", env={"PYTHONHASHSEED": seed}) for seed in ("1", "2", "3")]
    assert outputs == ["[]\n"] * 3
