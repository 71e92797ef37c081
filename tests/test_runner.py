"""`Runner` in one process: what it calls, what it records, and what it does when things go wrong."""

from __future__ import annotations

import os
import threading
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from liteerresult import (
    AsyncResult,
    EncodeError,
    GroupResult,
    ResultStore,
    Runner,
    TaskRevokedError,
    TransitionError,
    batch,
    runner as runner_module,
)
from tests.support import DEADLINE, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support import ManualClock


@contextmanager
def threads(store: ResultStore, workers: int = 2, **options: Any) -> Iterator[Runner]:
    with Runner(store, ThreadPoolExecutor(workers), **options) as runner:
        yield runner


class Inline(Executor):
    """The least that an executor can be: it makes the call in `submit`."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as exc:  # noqa: BLE001 - as executors do
            future.set_exception(exc)
        return future


class Held(Executor):
    """Keeps what it is given until told; its `shutdown` cancels what it keeps if told to."""

    def __init__(self, workers: int = 2) -> None:
        self._max_workers = workers
        self.kept: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.came = threading.Semaphore(0)
        self.on_submit: Callable[[], object] = lambda: None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.on_submit()
        future: Future[Any] = Future()
        self.kept.append((future, lambda: fn(*args, **kwargs)))
        self.came.release()
        return future

    def run(self) -> None:
        """Make the oldest call that is kept."""
        assert self.came.acquire(timeout=DEADLINE)
        future, call = self.kept.pop(0)
        if future.set_running_or_notify_cancel():
            future.set_result(call())

    def break_all(self) -> None:
        """Tell everyone who waits that the pool broke, as a pool does whose worker died."""
        kept, self.kept = self.kept, []
        for future, _ in kept:
            future.set_exception(BrokenExecutor("a worker died"))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if cancel_futures:
            for future, _ in self.kept:
                if future.cancel():
                    future.set_running_or_notify_cancel()


def double(x: Any) -> Any:
    return x * 2


def add(a: int, b: int = 0, *, c: int = 0) -> int:
    return a + b + c


def fail(text: str) -> None:
    raise ValueError(text)


class Counting:
    """A function that knows how often it was called with what, and fails as often as told."""

    def __init__(self, failures: int = 0) -> None:
        self.calls: list[Any] = []
        self._failures = failures

    def __call__(self, value: Any) -> Any:
        self.calls.append(value)
        if self.calls.count(value) <= self._failures:
            raise ValueError(f"attempt {self.calls.count(value)}")
        return value * 10


# Values


def test_map_keeps_the_order(store: ResultStore) -> None:
    with threads(store) as runner:
        group = runner.map(double, range(50))
    assert isinstance(group, GroupResult)
    assert group.join(timeout=0) == [2 * x for x in range(50)]
    assert group.successful()
    assert group.completed_count() == 50
    assert GroupResult.restore(group.id, backend=store) == group


def test_map_takes_its_iterables_in_step(store: ResultStore) -> None:
    with threads(store) as runner:
        assert runner.map(add, [1, 2], (10, 20)).join(timeout=DEADLINE) == [11, 22]
        with pytest.raises(ValueError, match="zip"):
            runner.map(add, [1, 2], [10])
        assert runner.map(double, (x for x in "ab")).join(timeout=DEADLINE) == ["aa", "bb"]


def test_map_of_nothing(store: ResultStore) -> None:
    with threads(store) as runner:
        group = runner.map(double, [], group_id="nothing")
        assert group.join(timeout=0) == []
        assert runner.map(double, [], group_id="nothing").join(timeout=0) == []
    assert GroupResult.restore("nothing", backend=store) == group


def test_submit(store: ResultStore) -> None:
    with threads(store) as runner:
        result = runner.submit(add, 1, 2, c=3)
        assert isinstance(result, AsyncResult)
        assert result.get(timeout=DEADLINE) == 6
        assert result.name == f"{__name__}.add"
        assert (result.args, result.kwargs) == ((1, 2), {"c": 3})
        assert runner.submit(double, 4).id != result.id
    assert result.retries == 0


def test_run_calls_with_keywords(store: ResultStore) -> None:
    with threads(store) as runner:
        group = runner.run_calls(add, [((1,), {"c": 2}), ((3, 4), {})], name="sum")
        assert group.join(timeout=DEADLINE) == [3, 7]
    assert [(result.name, result.args, result.kwargs) for result in group] == [
        ("sum", (1,), {"c": 2}),
        ("sum", (3, 4), {}),
    ]


def test_ids_tell_group_and_position(store: ResultStore) -> None:
    with threads(store) as runner:
        assert [result.id for result in runner.map(double, "ab", group_id="g")] == ["g/0", "g/1"]


def test_an_exception_is_stored_and_raised(store: ResultStore) -> None:
    with threads(store) as runner:
        group = runner.map(fail, ["one", "two"])
        single = runner.submit(fail, "three")
    outcomes = group.join(timeout=0, propagate=False)
    assert [(type(outcome), outcome.args) for outcome in outcomes] == [(ValueError, ("one",)), (ValueError, ("two",))]
    with pytest.raises(ValueError, match="three"):
        single.get(timeout=0)
    assert "raise ValueError(text)" in (single.traceback or "")


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_is_no_exception_ends_the_call_and_not_the_worker(store: ResultStore, kind: type[BaseException]) -> None:
    calls = []

    def leave(value: int) -> int:
        calls.append(value)
        if value == 1:
            raise kind
        return value

    with threads(store, 1) as runner:
        group = runner.map(leave, range(4), retries=3)
    assert [result.status for result in group] == ["DONE", "FAILURE", "DONE", "DONE"]
    assert calls.count(1) == 1  # asked to stop, it is not tried again


def test_a_value_that_cannot_be_encoded(store: ResultStore) -> None:
    calls = []

    def answer(value: object) -> object:
        calls.append(value)
        return object() if value == 1 else value

    with threads(store, 1) as runner:
        group = runner.map(answer, range(3), retries=5)
    assert [result.status for result in group] == ["DONE", "FAILURE", "DONE"]
    with pytest.raises(EncodeError, match="register_type"):
        group[1].get(timeout=0)
    assert calls.count(1) == 1  # it would be the same again


def test_pickled_values(store: ResultStore, clock: ManualClock) -> None:
    with ResultStore(store.path, serializer="pickle", accept=("json", "pickle"), durability="process-crash") as other:
        with threads(other) as runner:
            group = runner.map(double, [[object], "ab"])
        assert group.join(timeout=0) == [[object, object], "abab"]
        assert group[1].args == ("ab",)  # for people: JSON all the same


@pytest.mark.parametrize("chunk_seconds", [0, 0.001, 100.0])
def test_calls_travel_together_or_alone(store: ResultStore, chunk_seconds: float) -> None:
    sizes = []

    class Measuring(Inline):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            sizes.append(len(args[-1]) if args else 0)
            return super().submit(fn, *args, **kwargs)

    with Runner(store, Measuring(), chunk_seconds=chunk_seconds) as runner:
        assert runner.map(double, range(2000)).join(timeout=DEADLINE) == [2 * x for x in range(2000)]
    assert sum(sizes) == 2000
    assert max(sizes) <= 256
    if chunk_seconds == 0:
        assert set(sizes) == {1}
    if chunk_seconds == 100:
        assert max(sizes) > 50


# Attempts


def test_a_call_is_tried_again(store: ResultStore) -> None:
    flaky = Counting(failures=2)
    with threads(store) as runner:
        group = runner.map(flaky, [1, 2], retries=2)
    assert group.join(timeout=0) == [10, 20]
    assert [flaky.calls.count(value) for value in (1, 2)] == [3, 3]
    for result in group:
        assert result.retries == 2
        earlier = store.attempts(result.id)
        assert [(meta.status, meta.retries) for meta in earlier] == [("RETRY", 0), ("RETRY", 1)]
        assert [str(meta.result) for meta in earlier] == ["attempt 1", "attempt 2"]
        assert all("ValueError: attempt" in (meta.traceback or "") for meta in earlier)
        assert all(meta.owner for meta in earlier)


def test_a_call_fails_for_good_after_its_retries(store: ResultStore) -> None:
    flaky = Counting(failures=9)
    with threads(store) as runner:
        group = runner.map(flaky, [1], retries=2)
    assert len(flaky.calls) == 3
    with pytest.raises(ValueError, match="attempt 3"):
        group.join(timeout=0)
    assert group[0].retries == 2
    assert [str(meta.result) for meta in store.attempts(group[0].id)] == ["attempt 1", "attempt 2"]


def test_a_waiter_sees_the_retry(store: ResultStore) -> None:
    """The failed attempt is recorded before the next begins, while the worker is at the next call of its chunk."""
    blocked, go = threading.Event(), threading.Event()

    def call(value: str) -> str:
        if value == "flaky" and not blocked.is_set():
            raise ValueError("first")
        if value == "blocks":
            blocked.set()
            assert go.wait(DEADLINE)
        return value

    with threads(store, 1) as runner:
        group = runner.map(call, ["flaky", "blocks"], retries=1)
        assert blocked.wait(DEADLINE)
        flaky = group[0]
        assert (flaky.status, flaky.state, flaky.ready(), flaky.retries) == ("RETRY", "RETRY", False, 1)
        assert (type(flaky.result), str(flaky.result)) == (ValueError, "first")
        go.set()
        assert group.join(timeout=DEADLINE) == ["flaky", "blocks"]


@pytest.mark.parametrize("retries", [-1, 1.0, True, "2", None])
def test_retries_is_a_number(store: ResultStore, retries: Any) -> None:
    with threads(store) as runner, pytest.raises(ValueError, match="retries"):
        runner.map(double, [1], retries=retries, group_id="g")
    assert GroupResult.restore("g", backend=store) is None


# Parents


def test_what_a_task_submits_has_it_for_a_parent(store: ResultStore) -> None:
    def parent(_: int) -> list[str]:
        loose, member = store.create_task("loose"), store.create_task("member")
        group = store.create_group([member], group_id="children")
        with Runner(store, ThreadPoolExecutor(1)) as nested:
            one = nested.submit(double, 1)
            many = nested.map(double, [1, 2], group_id="nested")
        assert many.join(timeout=DEADLINE) == [2, 4]
        return [loose.id, member.id, group.id, one.id, many.id]

    with threads(store) as runner:
        loose, member, own_group, one, many = runner.map(parent, [0], group_id="top")[0].get(timeout=DEADLINE)
    top = AsyncResult("top/0", store)
    for task_id in (loose, member, one, f"{many}/0"):
        assert AsyncResult(task_id, store).parent == top
    for group_id in (own_group, many):
        restored = GroupResult.restore(group_id, backend=store)
        assert restored is not None
        assert restored.parent == top
    children = top.children  # what is in one of the groups comes with it
    assert sorted(child.id for child in children if isinstance(child, AsyncResult)) == sorted([loose, one])
    assert [child.id for child in children if isinstance(child, GroupResult)] == [own_group, many]
    assert top.parent is None


def test_outside_of_a_task_there_is_no_parent(store: ResultStore) -> None:
    with threads(store, 1) as runner:
        first = runner.submit(double, 1)
        assert first.get(timeout=DEADLINE) == 2
        second = runner.submit(lambda: store.create_task("x").id)
        child = second.get(timeout=DEADLINE)
        third = runner.submit(double, 2)  # the same thread as before
    assert AsyncResult(child, store).parent == second
    assert (first.parent, third.parent, store.create_task("y").parent) == (None, None, None)


def test_another_store_is_no_parent(store: ResultStore, tmp_path: Any) -> None:
    with ResultStore(tmp_path / "other.db", durability="process-crash") as other:
        with threads(store) as runner:
            child = runner.submit(lambda: other.create_task("x").id).get(timeout=DEADLINE)
        assert AsyncResult(child, other).parent is None


# The same group again


def test_only_what_is_not_done_runs_again(store: ResultStore) -> None:
    calls: list[int] = []
    broken = True

    def work(value: int) -> int:
        calls.append(value)
        if broken and value % 3 == 0:
            raise ValueError(value)
        return value

    with threads(store) as runner:
        group = runner.map(work, range(9), group_id="g")
    assert group.completed_count() == 6
    broken = False
    calls.clear()
    with threads(store) as runner:
        again = runner.map(work, range(9), group_id="g")
    assert again == group
    assert sorted(calls) == [0, 3, 6]
    assert again.join(timeout=0) == list(range(9))
    assert [result.retries for result in again] == [1, 0, 0] * 3
    assert [meta.status for meta in store.attempts("g/3")] == ["FAILURE"]
    with threads(store) as runner:
        assert runner.map(work, range(9), group_id="g").join(timeout=0) == list(range(9))
    assert sorted(calls) == [0, 3, 6]


def test_revoked_ones_run_again(store: ResultStore) -> None:
    counting = Counting()
    with Runner(store, held := Held()) as runner:
        runner.map(counting, [1], group_id="g")
        assert store.revoke("g/0")
        held.run()
    assert counting.calls == []
    with threads(store) as runner:
        assert runner.map(counting, [1], group_id="g").join(timeout=DEADLINE) == [10]


@pytest.mark.parametrize(
    ("function", "values", "message"),
    [
        (double, [1, 5, 3], "number 1 "),
        (double, [1, 2, 3, 4], "3 calls and is now given 4"),
        (double, [1, 2], "3 calls and is now given 2"),
        (double, [], "3 calls and is now given 0"),
        (add, [1, 2, 3], "number 0 "),
        (double, [True, 2, 3], "number 0 "),
        (double, [1, 2.0, 3], "number 1 "),
    ],
)
def test_other_calls_under_the_same_id_are_refused(
    store: ResultStore, function: Any, values: list[Any], message: str
) -> None:
    with threads(store) as runner:
        runner.map(double, [1, 2, 3], group_id="g")
    with threads(store) as runner, pytest.raises(ValueError, match=message) as caught:
        runner.map(function, values, group_id="g")
    assert "'g'" in str(caught.value)
    assert "another group id" in str(caught.value)
    with threads(store) as runner:  # nothing was changed by the attempt
        assert runner.map(double, [1, 2, 3], group_id="g").join(timeout=0) == [2, 4, 6]
    assert [result.retries for result in store.restore_group("g")] == [0, 0, 0]


def test_the_group_was_deleted_and_its_tasks_were_not(store: ResultStore) -> None:
    counting = Counting()
    with threads(store) as runner:
        runner.map(counting, [1, 2, 3], group_id="g")
    store.delete_group("g")
    store.forget("g/1")
    with threads(store) as runner:
        with pytest.raises(ValueError, match="number 0"):
            runner.map(counting, [7, 2, 3], group_id="g")
        assert GroupResult.restore("g", backend=store) is None
        assert runner.map(counting, [1, 2, 3], group_id="g").join(timeout=DEADLINE) == [10, 20, 30]
    assert [counting.calls.count(value) for value in (1, 2, 3, 7)] == [1, 2, 1, 0]


def test_a_task_of_the_group_was_forgotten(store: ResultStore) -> None:
    """Its row is gone and with it what it was called with: that is no other call, it is one to make."""
    counting = Counting()
    with threads(store) as runner:
        runner.map(counting, [1, 2, 3], group_id="g")
    store.forget("g/1")
    with threads(store) as runner:
        assert runner.map(counting, [1, 2, 3], group_id="g").join(timeout=5) == [10, 20, 30]
    assert counting.calls.count(2) == 2
    assert counting.calls.count(1) == 1


def test_two_runners_make_each_call_once(store: ResultStore) -> None:
    counting = Counting()
    with threads(store) as one, threads(store) as two:
        first = one.map(counting, range(200), group_id="g")
        second = two.map(counting, range(200), group_id="g")
        assert first.join(timeout=DEADLINE) == second.join(timeout=DEADLINE) == [10 * x for x in range(200)]
    assert sorted(counting.calls) == list(range(200))


def test_one_runner_twice_makes_each_call_once(store: ResultStore) -> None:
    counting = Counting(failures=1)
    with threads(store) as runner:
        groups = [runner.map(counting, range(50), group_id="g", retries=1) for _ in range(3)]
    assert [group.join(timeout=0) for group in groups] == [[10 * x for x in range(50)]] * 3
    assert len(counting.calls) == 100


# Revoked


def test_a_custom_state_of_a_call_that_waits(store: ResultStore) -> None:
    """No worker begins with it as it is, and a join would wait for ever."""
    begun, go_on = threading.Event(), threading.Event()

    def call(x: int) -> int:
        begun.set()
        assert go_on.wait(DEADLINE)
        return x

    with threads(store) as runner:
        group = runner.map(call, range(40))
        assert begun.wait(DEADLINE)
        store.update_state(group[35].id, "QUEUED", {"place": 1})
        go_on.set()
        assert group.join(timeout=DEADLINE) == list(range(40))


def test_what_is_revoked_before_it_begins_is_not_run(store: ResultStore) -> None:
    counting = Counting()
    with Runner(store, held := Held()) as runner:
        group = runner.map(counting, [1, 2, 3], retries=2)
        group[1].revoke()
        for _ in range(3):
            held.run()
    assert sorted(counting.calls) == [1, 3]
    assert [result.status for result in group] == ["DONE", "REVOKED", "DONE"]


def test_what_is_revoked_while_it_runs_stays_revoked(store: ResultStore) -> None:
    def work(value: int) -> int:
        assert store.revoke(f"g/{value}")
        if value:
            raise ValueError
        return value

    with threads(store, 1) as runner:
        group = runner.map(work, [0, 1], group_id="g", retries=2)
    assert [result.status for result in group] == ["REVOKED", "REVOKED"]
    assert [result.retries for result in group] == [0, 0]
    with pytest.raises(TaskRevokedError):
        group.join(timeout=0)


def test_an_exception_revokes_what_has_not_begun(store: ResultStore) -> None:
    begun, go = threading.Event(), threading.Event()
    calls = []

    def work(value: int) -> int:
        calls.append(value)
        begun.set()
        assert go.wait(DEADLINE)
        return value

    def release(group: GroupResult) -> None:
        eventually(lambda: all(result.status == "REVOKED" for result in list(group)[1:]), DEADLINE / 2)
        go.set()

    runner = Runner(store, ThreadPoolExecutor(1))
    group = runner.map(work, range(20), retries=3)
    assert begun.wait(DEADLINE)
    releasing = threading.Thread(target=release, args=(group,))
    releasing.start()
    with pytest.raises(ZeroDivisionError), runner:
        raise ZeroDivisionError
    releasing.join(DEADLINE)
    assert calls == [0]
    assert [result.status for result in group] == ["DONE"] + ["REVOKED"] * 19


def test_a_failed_attempt_is_not_tried_again_once_the_block_was_left(store: ResultStore) -> None:
    begun, go = threading.Event(), threading.Event()

    def work(_: int) -> None:
        begun.set()
        assert go.wait(DEADLINE)
        raise ValueError("late")

    runner = Runner(store, ThreadPoolExecutor(1))
    group = runner.map(work, range(2), retries=3)
    assert begun.wait(DEADLINE)
    closing = threading.Thread(target=runner.close, kwargs={"cancel": True})
    closing.start()
    eventually(lambda: group[1].status == "REVOKED")
    go.set()
    closing.join(DEADLINE)
    assert not closing.is_alive()
    assert [result.status for result in group] == ["REVOKED", "REVOKED"]
    assert [str(meta.result) for meta in store.attempts(group[0].id)] == ["late"]


# Executors


@pytest.mark.parametrize("executor", [3, "threads", ThreadPoolExecutor(1).submit(int)])
def test_not_an_executor(store: ResultStore, executor: Any) -> None:
    with pytest.raises(TypeError, match="executor"):
        Runner(store, executor)


def test_the_least_executor(store: ResultStore) -> None:
    counting = Counting(failures=1)
    with Runner(store, Inline()) as runner:
        assert runner.map(counting, range(30), retries=1).join(timeout=DEADLINE) == [10 * x for x in range(30)]


def test_a_function_that_makes_one(store: ResultStore) -> None:
    made: list[Executor] = []

    def make() -> Executor:
        made.append(ThreadPoolExecutor(1))
        return made[-1]

    with Runner(store, make) as runner:
        assert runner.submit(double, 1).get(timeout=DEADLINE) == 2
    assert len(made) == 1
    with pytest.raises(RuntimeError):  # the runner shut it down
        made[0].submit(int)


def test_a_closed_runner(store: ResultStore) -> None:
    with threads(store) as runner:
        pass
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.submit(double, 1)
    with pytest.raises(RuntimeError, match="closed"):
        runner.map(double, [1], group_id="g")
    assert GroupResult.restore("g", backend=store) is None


def test_close_waits_for_all_calls(store: ResultStore) -> None:
    runner = Runner(store, ThreadPoolExecutor(2))
    group = runner.map(double, range(300))
    runner.close()
    assert group.join(timeout=0) == [2 * x for x in range(300)]


def test_the_executor_was_shut_down_by_another(store: ResultStore) -> None:
    executor = ThreadPoolExecutor(1)
    with Runner(store, executor) as runner:
        executor.shutdown()
        group = runner.map(double, [1, 2])
        outcomes = group.join(timeout=DEADLINE, propagate=False)
    assert [type(outcome) for outcome in outcomes] == [RuntimeError, RuntimeError]
    assert "shutdown" in str(outcomes[0])


def test_calls_cancelled_by_another_are_revoked(store: ResultStore) -> None:
    with Runner(store, held := Held(1)) as runner:
        group = runner.map(double, [1, 2], retries=1)
        for _ in range(2):
            assert held.came.acquire(timeout=DEADLINE)
        held.shutdown(cancel_futures=True)
        with pytest.raises(TaskRevokedError):
            group.join(timeout=DEADLINE)
    assert [result.status for result in group] == ["REVOKED", "REVOKED"]


# Pools that break


def test_a_broken_pool_is_replaced(store: ResultStore) -> None:
    pools = [Held(1), Inline()]
    made = iter(pools)
    with Runner(store, lambda: next(made)) as runner:
        group = runner.map(double, range(5))
        first = pools[0]
        assert isinstance(first, Held)
        for _ in range(2):
            assert first.came.acquire(timeout=DEADLINE)
        first.break_all()
        assert group.join(timeout=DEADLINE) == [0, 2, 4, 6, 8]
    assert [result.retries for result in group] == [0] * 5


def test_a_pool_that_is_found_broken_by_submitting_is_replaced_once(store: ResultStore) -> None:
    """
    The break is met by `submit` before the futures tell of it: those belong to the old pool, the new one is sound.

    Replacing it once more would cancel the calls that it was given, and they would be REVOKED.
    """
    old, new = Held(2), Held(2)
    made = iter([old, new, Held(2), Held(2)])
    count = 0

    def on_submit() -> None:
        nonlocal count
        count += 1
        if count == 3:
            old.break_all()
            raise BrokenExecutor("a worker died")

    old.on_submit = on_submit
    with Runner(store, lambda: next(made)) as runner:
        group = runner.map(double, range(4))
        try:
            for _ in range(4):
                new.run()
            assert group.join(timeout=DEADLINE) == [0, 2, 4, 6]
        finally:
            for result in group:
                result.revoke()
        assert runner._executor is new


def test_a_factory_that_fails_at_the_second_time(store: ResultStore) -> None:
    """Nobody is left waiting for calls that nobody will make."""
    first = Held(1)
    made = [first]
    runner = Runner(store, made.pop)
    group = runner.map(double, range(5))
    for _ in range(2):
        assert first.came.acquire(timeout=DEADLINE)
    first.break_all()
    outcomes = group.join(timeout=5, propagate=False)
    assert all(isinstance(outcome, Exception) for outcome in outcomes)
    assert all(result.status == "FAILURE" for result in group)
    with pytest.raises(IndexError):
        runner.close()
    assert isinstance(runner.error, IndexError)


def test_a_pool_that_breaks_at_once_every_time(store: ResultStore) -> None:
    class Broken(Executor):
        def submit(self, *_: Any, **__: Any) -> Future[Any]:
            raise BrokenExecutor("the initializer failed")

    with Runner(store, Broken) as runner:
        group = runner.map(double, range(10))
        outcomes = group.join(timeout=DEADLINE, propagate=False)
    assert {type(outcome) for outcome in outcomes} == {BrokenExecutor}


def test_a_broken_pool_that_can_not_be_made_anew(store: ResultStore) -> None:
    class Once(Held):
        def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
            if self.broken:
                raise BrokenExecutor("a worker died")
            return super().submit(*args, **kwargs)

        broken = False

    held = Once(1)
    with Runner(store, held) as runner:
        group = runner.map(double, range(5))
        for _ in range(2):
            assert held.came.acquire(timeout=DEADLINE)
        held.broken = True
        held.break_all()
        outcomes = group.join(timeout=DEADLINE, propagate=False)
    assert {type(outcome) for outcome in outcomes} == {BrokenExecutor}


def test_a_pool_whose_shutdown_takes_no_cancel_futures(store: ResultStore) -> None:
    """That argument came late: loky's and Dask's executors have none."""

    class Plain(Held):
        def shutdown(self, wait: bool = True) -> None:  # type: ignore[override]
            pass

    first = Plain(1)
    made = iter([first, Inline()])
    with Runner(store, lambda: next(made)) as runner:
        group = runner.map(double, range(5))
        for _ in range(2):
            assert first.came.acquire(timeout=DEADLINE)
        first.break_all()
        assert group.join(timeout=5) == [0, 2, 4, 6, 8]


# The dispatching thread's own errors


@pytest.mark.parametrize("good", [0, 1, 3])
def test_an_executor_that_refuses_a_call(store: ResultStore, good: int) -> None:
    """Whatever ended the dispatching thread: its calls don't stay pending, and who closes the runner hears of it."""

    class Refusing(Inline):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            nonlocal good
            if not good:
                raise OSError("no more processes")
            good -= 1
            return super().submit(fn, *args, **kwargs)

    expected = good
    runner = Runner(store, Refusing(), chunk_seconds=0)
    group = runner.map(double, range(6))
    outcomes = group.join(timeout=5, propagate=False)
    assert sum(isinstance(outcome, OSError) for outcome in outcomes) == 6 - expected
    with pytest.raises(OSError, match="no more processes"):
        runner.close()
    assert isinstance(runner.error, OSError)


def test_calls_that_were_not_taken_are_let_go_of_once(store: ResultStore) -> None:
    """Letting go twice would take them out of the hands of another Runner."""
    plan = batch.plan_group(store, "g", "f", [((1,), {}), ((2,), {})], None)
    batch.take(store, ["g/0"])
    with threads(store) as runner:
        runner.error = ValueError("of its thread, since it was asked")
        with pytest.raises(RuntimeError, match="can't go on"):
            runner._hand_in_or_drop(abs, plan, [((1,), {}), ((2,), {})], 0)
        in_hand = {task_id: times for (path, task_id), times in batch._in_hand.items() if path == store.path}
        assert in_hand == {"g/0": 1}
        runner.error = None
    batch.let_go(store, ["g/0"])


def test_a_runner_whose_thread_ended_takes_no_calls(store: ResultStore) -> None:
    class Refusing(Executor):
        def submit(self, *_: Any, **__: Any) -> Future[Any]:
            raise OSError("no more processes")

    runner = Runner(store, Refusing())
    with pytest.raises(OSError, match="no more processes"):
        runner.submit(double, 1).get(timeout=5)
    eventually(lambda: runner.error)
    with pytest.raises(RuntimeError, match="can't go on") as caught:
        runner.map(double, [1], group_id="late")
    assert caught.value.__cause__ is runner.error
    assert GroupResult.restore("late", backend=store) is None
    with pytest.raises(OSError, match="no more processes"):
        runner.close()


def test_batches_that_wait_behind_the_error_do_not_stay_pending(store: ResultStore) -> None:
    entered, go = threading.Event(), threading.Event()

    class Refusing(Executor):
        def submit(self, *_: Any, **__: Any) -> Future[Any]:
            entered.set()
            assert go.wait(DEADLINE)
            raise OSError("no more processes")

    runner = Runner(store, Refusing())
    groups = [runner.map(double, range(3))]
    assert entered.wait(DEADLINE)
    groups += [runner.map(double, range(3)) for _ in range(2)]
    go.set()
    for group in groups:
        outcomes = group.join(timeout=5, propagate=False)
        assert all(isinstance(outcome, OSError) for outcome in outcomes)
    with pytest.raises(OSError, match="no more processes"):
        runner.close()


# Workers on another host


@contextmanager
def elsewhere(store: ResultStore, executor: Executor | None = None) -> Iterator[Runner]:
    """A runner whose workers take themselves for another host's."""
    with Runner(store, executor or ThreadPoolExecutor(2)) as runner:
        runner._home = runner._home._replace(host="another host")
        yield runner


def test_workers_elsewhere_report_through_the_submitter(store: ResultStore) -> None:
    def work(value: int) -> int:
        if value == 2:
            raise ValueError("from afar")
        return value * 2

    with elsewhere(store) as runner:
        group = runner.map(work, range(4))
        outcomes = group.join(timeout=DEADLINE, propagate=False)
    assert outcomes[:2] + outcomes[3:] == [0, 2, 6]
    assert (type(outcomes[2]), str(outcomes[2])) == (ValueError, "from afar")
    assert [result.status for result in group] == ["DONE", "DONE", "FAILURE", "DONE"]
    assert [result.retries for result in group] == [0] * 4


def test_workers_elsewhere_are_tried_again(store: ResultStore) -> None:
    counting = Counting(failures=1)
    with elsewhere(store) as runner:
        group = runner.map(counting, range(4), retries=1)
        assert group.join(timeout=DEADLINE) == [0, 10, 20, 30]
    assert [result.retries for result in group] == [1] * 4
    assert [[str(meta.result) for meta in store.attempts(result.id)] for result in group] == [["attempt 1"]] * 4


def test_a_value_from_elsewhere_that_cannot_be_encoded(store: ResultStore) -> None:
    with elsewhere(store) as runner:
        group = runner.map(lambda value: object() if value == 1 else value, range(4))
        outcomes = group.join(timeout=5, propagate=False)
    assert isinstance(outcomes[1], EncodeError)
    assert outcomes[:1] + outcomes[2:] == [0, 2, 3]


def test_a_report_from_elsewhere_comes_too_late(store: ResultStore) -> None:
    with elsewhere(store, held := Held(1)) as runner:
        group = runner.map(double, [1, 2])
        store.mark_as_done(group[0].id, "by hand")
        store.revoke(group[1].id)
        held.run()
        held.run()
    assert group.join(timeout=0, propagate=False)[0] == "by hand"
    assert group[1].status == "REVOKED"


# Left behind


def test_a_closed_store_lets_go_of_its_files(tmp_path: Any) -> None:
    """Also when threads of this process made calls: what they opened is closed with the store."""

    def open_files() -> list[str]:
        links = [os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if os.path.islink(link) and str(tmp_path) in os.readlink(link)]

    with ResultStore(tmp_path / "results.db", durability="process-crash") as store, threads(store) as runner:
        runner.map(double, range(10))
    assert open_files() == []


def test_threads_use_the_clock_of_the_store(store: ResultStore, clock: ManualClock) -> None:
    with threads(store) as runner:
        result = runner.submit(double, 1)
    meta = store.get_task_meta(result.id)
    assert (meta.created_at, meta.started_at, meta.done_at) == (clock.time(),) * 3


def test_the_default_is_a_process_pool(store: ResultStore) -> None:
    runner = Runner(store)
    assert isinstance(runner._executor, ProcessPoolExecutor)
    runner.close()


def test_a_worker_that_lost_its_attempt_is_told(store: ResultStore) -> None:
    """What a call reports on its own task goes by the attempt that runs it, as everywhere else."""
    refused: list[type[BaseException] | None] = []

    def work(_: int) -> str:
        from liteerresult.store import open_store

        inside = open_store(store.path, *store.options)
        inside.update_state("g/0", "PROGRESS", 1)
        store._db.transact(lambda c: c.execute("UPDATE tasks SET status = 'FAILURE' WHERE id = 'g/0'"))
        store.resubmit("g/0")
        with pytest.raises(TransitionError):
            inside.update_state("g/0", "PROGRESS", 2)
        refused.append(TransitionError)
        return "loser"

    with threads(store, 1) as runner:
        group = runner.map(work, [0], group_id="g")
    assert group[0].status == "PENDING", group[0].result
    assert refused == [TransitionError]


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["_Batch", "_Job"])
def test_a_map_that_was_interrupted_and_another_of_the_same_group(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Ctrl-C after the batch is recorded and before it is handed in; there are milliseconds for that in a large one."""
    with threads(store) as runner:
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):  # noqa: PT012 - made, then interrupted
            context.setattr(runner_module, where, interrupt)
            runner.map(abs, [-1, -2], group_id="g")
        try:
            assert runner.map(abs, [-1, -2], group_id="g").join(timeout=3) == [1, 2]
        finally:
            batch._in_hand.clear()


class Interrupted:
    """A queue that Ctrl-C comes before."""

    put = staticmethod(interrupt)

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


def test_a_map_that_was_interrupted_while_it_was_handed_in(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the block does not wait for calls that nobody will make."""
    runner = Runner(store, ThreadPoolExecutor(1))
    assert runner.map(abs, [-3]).join(timeout=DEADLINE) == [3]
    eventually(lambda: not runner._open)  # nothing else is put any more
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):  # noqa: PT012 - made, then interrupted
        context.setattr(runner, "_inbox", Interrupted(runner._inbox))
        runner.map(abs, [-1, -2])
    closing = threading.Thread(target=runner.close, kwargs={"cancel": True}, daemon=True)
    closing.start()
    closing.join(3)
    try:
        assert not closing.is_alive()
    finally:
        with runner._mutex:
            runner._open.clear()
            runner._all_ended.notify_all()
        closing.join(DEADLINE)
        batch._in_hand.clear()
