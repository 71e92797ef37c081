"""The result of one task: each member that the two documents and Celery 5 give it, by its name."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import signal
import sqlite3
import threading
import time
import traceback
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import liteerresult
from liteerresult import (
    AsyncResult,
    BaseAsyncResult,
    DecodeError,
    EagerResult,
    GroupResult,
    IncompleteStream,
    ResultBase,
    ResultStore,
    TaskRevokedError,
    TaskSetResult,
    set_default_backend,
)
from tests.support import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support import ManualClock

EVERY = ("unknown", "pending", "started", "retry", "progress", "done", "failure", "revoked")
"""One task in each status; its id is the status in lower case."""

kinds = pytest.mark.parametrize("kind", [BaseAsyncResult, AsyncResult])


def fill(store: ResultStore) -> ResultStore:
    store.create_task("work", task_id="pending")
    store.mark_as_started("started")
    store.mark_as_retry("retry", ValueError("again"))
    store.update_state("progress", "PROGRESS", {"current": 3})
    store.mark_as_done("done", {"rows": [1, 2]})
    store.mark_as_failure("failure", ValueError("no"))
    store.mark_as_revoked("revoked", "not needed")
    return store


@pytest.fixture
def every(store: ResultStore) -> ResultStore:
    return fill(store)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ResultStore]:
    """Yield the same for tests that only read."""
    path = tmp_path_factory.mktemp("still") / "results.db"
    with ResultStore(path, durability="process-crash") as store:
        yield fill(store)


@contextmanager
def default_backend(store: ResultStore) -> Iterator[None]:
    set_default_backend(store)
    try:
        yield
    finally:
        set_default_backend(None)


@contextmanager
def unpickled(value: Any) -> Iterator[Any]:
    """Send *value* as to another process: the copy opens the store by its path."""
    again = pickle.loads(pickle.dumps(value))
    try:
        yield again
    finally:
        again.backend.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def fail(store: ResultStore, task_id: str, exc: BaseException) -> None:
    def work_that_breaks() -> None:
        raise exc

    with pytest.raises(type(exc)), store.run_task(task_id):
        work_that_breaks()


# What it is made of


def test_result_base_parent() -> None:
    assert ResultBase().parent is None
    assert all(issubclass(kind, ResultBase) for kind in (BaseAsyncResult, AsyncResult, EagerResult, GroupResult))


def test_base_async_result_task_id(store: ResultStore) -> None:
    result = BaseAsyncResult("a", store)
    assert result.task_id == result.id == "a"


def test_base_async_result_task_id_can_be_set(every: ResultStore) -> None:
    result = BaseAsyncResult("done", every)
    assert result.get() == {"rows": [1, 2]}
    result.task_id = "failure"
    assert (result.id, result.status) == ("failure", "FAILURE")


def test_base_async_result_backend(store: ResultStore) -> None:
    assert BaseAsyncResult("a", store).backend is store
    with pytest.raises(TypeError):
        BaseAsyncResult("a")  # type: ignore[call-arg]


def test_async_result_task_id(store: ResultStore) -> None:
    with default_backend(store):
        result = AsyncResult("a")
    assert result.task_id == result.id == "a"


def test_async_result_backend(store: ResultStore) -> None:
    with default_backend(store):
        assert AsyncResult("a").backend is store
    assert AsyncResult("a", store).backend is store
    assert AsyncResult("a", backend=store, parent=None).backend is store


@kinds
@pytest.mark.parametrize(
    ("task_id", "error"), [(None, ValueError), ("", ValueError), (5, TypeError), (b"a", TypeError)]
)
def test_an_id_that_can_be_none_is_refused(
    store: ResultStore, kind: type[BaseAsyncResult], task_id: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        kind(task_id, store)


# What became of it


@kinds
def test_base_async_result_is_done(still: ResultStore, kind: type[BaseAsyncResult]) -> None:
    assert [name for name in EVERY if kind(name, still).is_done()] == ["done"]


@kinds
def test_base_async_result_successful(still: ResultStore, kind: type[BaseAsyncResult]) -> None:
    assert [name for name in EVERY if kind(name, still).successful()] == ["done"]


@kinds
def test_base_async_result_ready(still: ResultStore, kind: type[BaseAsyncResult]) -> None:
    assert [name for name in EVERY if kind(name, still).ready()] == ["done", "failure", "revoked"]


@kinds
def test_base_async_result_failed(still: ResultStore, kind: type[BaseAsyncResult]) -> None:
    assert [name for name in EVERY if kind(name, still).failed()] == ["failure"]


@kinds
def test_base_async_result_exists(still: ResultStore, kind: type[BaseAsyncResult]) -> None:
    assert [name for name in EVERY if not kind(name, still).exists()] == ["unknown"]


@kinds
def test_base_async_result_status(still: ResultStore, kind: type[BaseAsyncResult]) -> None:
    assert [kind(name, still).status for name in EVERY] == ["PENDING", *(name.upper() for name in EVERY[1:])]


@kinds
def test_base_async_result_state(still: ResultStore, kind: type[BaseAsyncResult]) -> None:
    for name in EVERY:
        result = kind(name, still)
        assert result.state == ("SUCCESS" if name == "done" else result.status)


@kinds
@pytest.mark.parametrize("member", ["result", "info"])
def test_base_async_result_result(still: ResultStore, kind: type[BaseAsyncResult], member: str) -> None:
    found = {name: getattr(kind(name, still), member) for name in EVERY}
    assert found["unknown"] is found["pending"] is found["started"] is None
    assert found["done"] == {"rows": [1, 2]}
    assert found["progress"] == {"current": 3}
    assert (type(found["failure"]), found["failure"].args) == (ValueError, ("no",))
    assert (type(found["retry"]), found["retry"].args) == (ValueError, ("again",))
    assert type(found["revoked"]) is TaskRevokedError
    assert "not needed" in str(found["revoked"])


@kinds
def test_base_async_result_info(still: ResultStore, kind: type[BaseAsyncResult]) -> None:
    assert kind("progress", still).info == {"current": 3}


@kinds
def test_base_async_result_traceback(every: ResultStore, kind: type[BaseAsyncResult]) -> None:
    fail(every, "broken", ZeroDivisionError("by zero"))
    text = kind("broken", every).traceback
    assert text is not None
    assert "work_that_breaks" in text
    assert text.rstrip().endswith("ZeroDivisionError: by zero")
    assert [kind(name, every).traceback for name in ("unknown", "pending", "started", "done")] == [None] * 4
    every.mark_as_failure("told", ValueError("no"), traceback="as it was told")
    assert kind("told", every).traceback == "as it was told"


def test_the_status_is_read_without_the_value(store: ResultStore) -> None:
    """Other programs write rows too: a value nobody can read spoils no status and no other row."""
    store.mark_as_done("good", 1)
    store.create_task(task_id="bad")
    with closing(sqlite3.connect(store.path)) as other:
        other.execute("UPDATE tasks SET status = 'DONE', result = '{not json' WHERE id = 'bad'")
        other.commit()
    bad = AsyncResult("bad", store)
    assert (bad.status, bad.state, bad.ready(), bad.failed(), bad.retries) == ("DONE", "SUCCESS", True, False, 0)
    assert bad.date_done is not None
    with pytest.raises(DecodeError, match="bad") as caught:
        bad.get()
    assert (caught.value.task_id, caught.value.column) == ("bad", "result")
    assert AsyncResult("good", store).get() == 1


def test_a_failure_that_was_resubmitted_is_seen_as_pending(store: ResultStore) -> None:
    result = AsyncResult("a", store)
    store.mark_as_failure("a", ValueError("no"))
    assert result.failed()
    store.resubmit("a")
    assert (result.status, result.ready(), result.result, result.retries) == ("PENDING", False, None, 1)
    store.mark_as_done("a", 2)
    assert result.get(timeout=0) == 2


# Waiting for it


@kinds
def test_base_async_result_wait(still: ResultStore, kind: type[BaseAsyncResult]) -> None:
    for value in (kind("done", still).wait(), kind("done", still).wait(timeout=1), kind("done", still).wait(0)):
        assert value == {"rows": [1, 2]}
    with pytest.raises(ValueError, match="no"):
        kind("failure", still).wait()
    with pytest.raises(TaskRevokedError) as caught:
        kind("revoked", still).wait()
    assert caught.value.task_id == "revoked"


@kinds
@pytest.mark.parametrize("name", ["unknown", "pending", "started", "retry", "progress"])
def test_base_async_result_wait_times_out(every: ResultStore, kind: type[BaseAsyncResult], name: str) -> None:
    result = kind(name, every)
    began = time.monotonic()
    with pytest.raises(liteerresult.TimeoutError) as caught:
        result.wait(timeout=0.02)
    assert 0.02 <= time.monotonic() - began < 2
    assert isinstance(caught.value, TimeoutError)  # the builtin one
    assert (caught.value.timeout, caught.value.waiting_for) == (0.02, (name,))
    every.mark_as_done(name, "nothing was lost")
    assert result.wait(timeout=0) == "nothing was lost"


@kinds
def test_base_async_result_wait_is_woken(store: ResultStore, kind: type[BaseAsyncResult]) -> None:
    with ThreadPoolExecutor() as pool:
        waiter = pool.submit(kind("a", store).wait, timeout=DEADLINE)
        store.mark_as_done("a", (1, "x"))
        assert waiter.result() == (1, "x")


@kinds
def test_base_async_result_get(still: ResultStore, kind: type[BaseAsyncResult]) -> None:
    assert kind("done", still).get() == {"rows": [1, 2]}
    with pytest.raises(ValueError, match="no"):
        kind("failure", still).get(timeout=0)
    with pytest.raises(TaskRevokedError, match="not needed"):
        kind("revoked", still).get(timeout=0)


def test_base_async_result_get_without_propagate(still: ResultStore) -> None:
    error = AsyncResult("failure", still).get(propagate=False)
    assert (type(error), error.args) == (ValueError, ("no",))
    assert isinstance(AsyncResult("revoked", still).get(propagate=False), TaskRevokedError)
    assert AsyncResult("done", still).get(propagate=False) == {"rows": [1, 2]}


def test_base_async_result_get_calls_back(still: ResultStore) -> None:
    calls: list[Any] = []
    result = AsyncResult("done", still)
    for _ in range(2):  # also when the value is known already
        result.get(callback=lambda task_id, value: calls.append((task_id, value)))
    assert calls == [("done", {"rows": [1, 2]})] * 2
    with pytest.raises(ValueError, match="no"):
        AsyncResult("failure", still).get(callback=lambda *call: calls.append(call))
    assert len(calls) == 2


def test_base_async_result_get_calls_on_interval(store: ResultStore) -> None:
    def finish() -> None:
        if not store.exists("a"):
            store.mark_as_done("a", 1)

    assert AsyncResult("a", store).get(timeout=DEADLINE, on_interval=finish) == 1


def test_base_async_result_get_takes_celerys_options(still: ResultStore) -> None:
    value = AsyncResult("done", still).get(
        1, propagate=True, interval=0.5, no_ack=True, follow_parents=True, on_message=print, disable_sync_subtasks=False
    )
    assert value == {"rows": [1, 2]}


def test_base_async_result_get_follows_parents(still: ResultStore) -> None:
    failed = AsyncResult("failure", still)
    child = AsyncResult("pending", still, parent=AsyncResult("done", still, parent=failed))
    with pytest.raises(ValueError, match="no"):
        child.get(timeout=0)
    with pytest.raises(liteerresult.TimeoutError):
        child.get(timeout=0, follow_parents=False)
    with pytest.raises(liteerresult.TimeoutError):  # an unready parent is no error
        AsyncResult("pending", still, parent=AsyncResult("started", still)).get(timeout=0)


@kinds
def test_get_with_timeout_0_looks_once(still: ResultStore, kind: type[BaseAsyncResult]) -> None:
    assert kind("done", still).get(timeout=0) == {"rows": [1, 2]}
    looks: list[int] = []
    with pytest.raises(liteerresult.TimeoutError):
        kind("pending", still).get(timeout=0, on_interval=lambda: looks.append(1))
    assert looks == []
    with pytest.raises(liteerresult.TimeoutError):
        kind("pending", still).get(timeout=-1)


def test_the_remote_traceback_shows_under_the_raised_error(store: ResultStore) -> None:
    fail(store, "a", KeyError("lost"))
    with pytest.raises(KeyError) as caught:
        AsyncResult("a", store).get()
    assert "work_that_breaks" in "".join(traceback.format_exception(caught.value))


def test_each_get_raises_an_exception_of_its_own(still: ResultStore) -> None:
    """Two waiters that raised the same instance would write into each other's traceback."""
    result = AsyncResult("failure", still)
    assert result.get(propagate=False) is not result.get(propagate=False)


@kinds
def test_base_async_result_maybe_throw(still: ResultStore, kind: type[BaseAsyncResult]) -> None:
    calls: list[Any] = []
    with pytest.raises(ValueError, match="no"):
        kind("failure", still).maybe_throw(callback=lambda *call: calls.append(call))
    with pytest.raises(TaskRevokedError):
        kind("revoked", still).maybe_throw()
    assert calls == []
    assert kind("done", still).maybe_throw(callback=lambda *call: calls.append(call)) == {"rows": [1, 2]}
    assert kind("pending", still).maybe_throw(callback=lambda *call: calls.append(call)) is None
    assert calls == [("done", {"rows": [1, 2]}), ("pending", None)]
    assert isinstance(kind("failure", still).maybe_throw(propagate=False), ValueError)
    assert isinstance(kind("retry", still).maybe_throw(), ValueError)  # to be tried again: nothing to raise yet
    with pytest.raises(ValueError, match="no"):
        kind("failure", still).maybe_reraise()


# Waiting in asyncio


@pytest.mark.asyncio
async def test_await_result(store: ResultStore) -> None:
    store.fallback_tick = None  # a lost wake would not be made up for
    threads = threading.active_count()

    async def waiter(task_id: str) -> Any:
        return await AsyncResult(task_id, store)

    waiters = [asyncio.create_task(waiter(f"t{number}")) for number in range(50)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert threading.active_count() == threads
    for number in range(50):
        store.mark_as_done(f"t{number}", number)
    assert await asyncio.wait_for(asyncio.gather(*waiters), DEADLINE) == list(range(50))
    assert threading.active_count() == threads


@pytest.mark.asyncio
async def test_await_result_raises_and_can_be_given_up(every: ResultStore) -> None:
    assert await AsyncResult("done", every) == {"rows": [1, 2]}
    with pytest.raises(ValueError, match="no"):
        await AsyncResult("failure", every)
    with pytest.raises(TaskRevokedError):
        await BaseAsyncResult("revoked", every)
    pending = AsyncResult("pending", every)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(pending, 0.01)
    every.mark_as_done("pending", 7)
    assert await asyncio.wait_for(pending, DEADLINE) == 7


# Changing it


@kinds
def test_base_async_result_forget(every: ResultStore, kind: type[BaseAsyncResult]) -> None:
    result = kind("done", every)
    assert result.get() == {"rows": [1, 2]}
    result.forget()
    result.forget()  # unknown by now
    assert (result.exists(), result.status, result.result) == (False, "PENDING", None)


def test_base_async_result_forget_takes_the_parents_along(every: ResultStore) -> None:
    AsyncResult("done", every, parent=AsyncResult("failure", every, parent=AsyncResult("revoked", every))).forget()
    assert [name for name in EVERY if not every.exists(name)] == ["unknown", "done", "failure", "revoked"]


@kinds
@pytest.mark.parametrize("name", ["unknown", "pending", "started", "retry", "progress"])
def test_base_async_result_revoke(every: ResultStore, kind: type[BaseAsyncResult], name: str) -> None:
    result = kind(name, every)
    assert result.revoke()
    assert not result.revoke()
    assert (result.status, result.ready(), result.failed(), result.successful()) == ("REVOKED", True, False, False)
    with pytest.raises(TaskRevokedError) as caught:
        result.get(timeout=0)
    assert caught.value.task_id == name


def test_base_async_result_revoke_leaves_a_final_task(every: ResultStore) -> None:
    assert [name for name in ("done", "failure", "revoked") if AsyncResult(name, every).revoke()] == []
    assert AsyncResult("done", every).get() == {"rows": [1, 2]}


@pytest.mark.parametrize("number", ["SIGTERM", signal.SIGTERM, 15])
def test_base_async_result_revoke_takes_a_signal(store: ResultStore, number: Any) -> None:
    assert AsyncResult("a", store).revoke(terminate=True, signal=number, wait=False)


# Its family


@kinds
def test_base_async_result_parent(store: ResultStore, kind: type[BaseAsyncResult]) -> None:
    store.create_task(task_id="top")
    store.create_task(task_id="child", parent=kind("top", store))
    store.create_task(task_id="grandchild", parent="child")
    found = kind("grandchild", store).parent
    assert isinstance(found, AsyncResult)
    assert (found, found.parent, kind("top", store).parent) == ("child", "top", None)
    assert kind("unknown", store).parent is None
    given = kind("elsewhere", store)
    assert kind("grandchild", store, parent=given).parent is given


def test_base_async_result_parent_may_be_a_group(store: ResultStore) -> None:
    group = store.create_group(["a", "b"])
    store.create_task(task_id="sum", parent=group)
    parent = AsyncResult("sum", store).parent
    assert isinstance(parent, GroupResult)
    assert parent == group
    assert [member.id for member in parent] == ["a", "b"]


@kinds
def test_base_async_result_children(store: ResultStore, clock: ManualClock, kind: type[BaseAsyncResult]) -> None:
    store.create_task(task_id="top")
    assert kind("top", store).children == []
    for name in ("first", "second"):
        store.create_task(task_id=name, parent="top")
        clock.advance(1)
    members = [store.create_task(task_id=name, parent="top") for name in ("x", "y")]
    store.create_group(members, group_id="both", parent="top")
    clock.advance(1)
    store.create_task(task_id="last", parent="top")
    children = kind("top", store).children
    assert [str(child) for child in children] == ["first", "second", "both", "last"]
    assert [type(child) for child in children] == [AsyncResult, AsyncResult, GroupResult, AsyncResult]


def tree(store: ResultStore) -> AsyncResult:
    """Record top -> (left -> leaf, right), none of them run."""
    store.create_task(task_id="top")
    for name, parent in (("left", "top"), ("right", "top"), ("leaf", "left")):
        store.create_task(task_id=name, parent=parent)
    return AsyncResult("top", store)


def test_base_async_result_iterdeps(store: ResultStore) -> None:
    top = tree(store)
    with pytest.raises(IncompleteStream):
        list(top.iterdeps())
    everything = [(None, "top"), ("top", "left"), ("top", "right"), ("left", "leaf")]
    store.mark_many_as_done({"top": 1, "left": 2, "right": 3})
    seen = []
    with pytest.raises(IncompleteStream):
        seen.extend(top.iterdeps())
    assert list(top.iterdeps(intermediate=True)) == everything
    store.mark_as_done("leaf", 4)
    assert list(top.iterdeps()) == everything


def test_base_async_result_collect(store: ResultStore) -> None:
    top = tree(store)
    store.mark_many_as_done({"top": 1, "left": 2, "right": 3, "leaf": 4})
    assert list(top.collect()) == [("top", 1), ("left", 2), ("right", 3), ("leaf", 4)]


def test_base_async_result_collect_with_intermediate(store: ResultStore) -> None:
    top = tree(store)
    store.mark_many_as_done({"top": 1, "left": 2})
    walk = top.collect(intermediate=True, timeout=0)
    assert [next(walk), next(walk)] == [("top", 1), ("left", 2)]
    with pytest.raises(liteerresult.TimeoutError):
        next(walk)


def test_base_async_result_collect_meets_groups(store: ResultStore) -> None:
    store.create_task(task_id="top")
    store.create_group(["a", "b"], group_id="both", parent="top")
    store.mark_many_as_done({"top": 1, "a": 2, "b": 3})
    collected = [(str(node), value) for node, value in AsyncResult("top", store).collect()]
    assert collected == [("top", 1), ("both", [2, 3]), ("a", 2), ("b", 3)]


def test_base_async_result_get_leaf(store: ResultStore) -> None:
    top = tree(store)
    store.mark_many_as_done({"top": 1, "left": 2, "right": 3, "leaf": 4})
    assert top.get_leaf() == 4
    assert AsyncResult("right", store).get_leaf() == 3


def test_base_async_result_graph(store: ResultStore) -> None:
    top = tree(store)
    with pytest.raises(IncompleteStream):
        _ = top.graph
    store.mark_many_as_done({"top": 1, "left": 2, "right": 3, "leaf": 4})
    assert top.graph == {"top": ["left", "right"], "left": ["leaf"], "right": [], "leaf": []}


def test_base_async_result_as_tuple(store: ResultStore) -> None:
    tree(store)
    assert AsyncResult("top", store).as_tuple() == (("top", None), None)
    assert AsyncResult("left", store).as_tuple() == (("left", (("top", None), None)), None)


def test_base_async_result_as_list(store: ResultStore) -> None:
    tree(store)
    assert AsyncResult("leaf", store).as_list() == ["leaf", "left", "top"]
    assert AsyncResult("top", store).as_list() == ["top"]


# How it was submitted and run


def test_base_async_result_name(store: ResultStore) -> None:
    assert store.create_task("render").name == "render"
    assert AsyncResult("unknown", store).name is None


def test_base_async_result_args(store: ResultStore) -> None:
    assert store.create_task("render", args=[1, ("x", 2.5)]).args == (1, ("x", 2.5))
    assert store.create_task("render").args == ()
    assert AsyncResult("unknown", store).args is None


def test_base_async_result_kwargs(store: ResultStore) -> None:
    assert store.create_task("render", kwargs={"size": (3, 4)}).kwargs == {"size": (3, 4)}
    assert store.create_task("render").kwargs == {}
    assert AsyncResult("unknown", store).kwargs is None


def test_base_async_result_retries(store: ResultStore) -> None:
    result = store.create_task("render")
    assert result.retries == 0
    store.mark_as_started(result.id)
    store.mark_as_retry(result.id, ValueError("again"))
    assert result.retries == 1
    store.mark_as_started(result.id)
    store.mark_as_failure(result.id, ValueError("no"))
    store.resubmit(result.id)
    assert result.retries == 2


def test_base_async_result_worker(store: ResultStore) -> None:
    result = store.create_task("render")
    assert result.worker is None
    store.mark_as_started(result.id)
    worker = result.worker
    assert worker is not None
    assert worker.startswith(f"{os.getpid()}@")
    store.mark_as_done(result.id)
    assert result.worker == worker


def test_base_async_result_date_done(store: ResultStore, clock: ManualClock) -> None:
    result = store.create_task("render")
    assert result.date_done is None
    clock.advance(5)
    store.mark_as_done(result.id)
    done = result.date_done
    assert done == datetime.fromtimestamp(clock.time(), UTC)
    assert done.utcoffset() == timedelta(0)


# What it is as an object


def test_results_are_equal_by_id(store: ResultStore) -> None:
    assert AsyncResult("a", store) == AsyncResult("a", store) == "a"
    assert AsyncResult("a", store) == BaseAsyncResult("a", store)
    assert AsyncResult("a", store) != AsyncResult("b", store)
    assert AsyncResult("a", store) != "b"
    assert AsyncResult("a", store) != 1
    assert hash(AsyncResult("a", store)) == hash("a")
    assert "a" in {AsyncResult("a", store): None}
    assert AsyncResult("a", store) in {"a": None}


def test_a_result_shows_its_id(store: ResultStore) -> None:
    assert (str(AsyncResult("a", store)), repr(AsyncResult("a", store))) == ("a", "<AsyncResult: a>")
    assert repr(BaseAsyncResult("a", store)) == "<BaseAsyncResult: a>"


@kinds
def test_a_result_copies(still: ResultStore, kind: type[BaseAsyncResult]) -> None:
    parent = AsyncResult("failure", still)
    again = copy.copy(kind("done", still, parent))
    assert (type(again), again.id, again.backend, again.parent) == (kind, "done", still, parent)


@kinds
def test_a_result_pickles(every: ResultStore, kind: type[BaseAsyncResult]) -> None:
    every.create_task(task_id="child", parent="done")
    with unpickled(kind("child", every)) as again:
        assert (type(again), again.id, again.backend.path) == (kind, "child", every.path)
        assert again.parent == "done"
        assert again.parent.get() == {"rows": [1, 2]}
        every.mark_as_done("child", "seen there too")
        assert again.get(timeout=DEADLINE) == "seen there too"


def test_a_result_pickles_to_id_and_path_only(store: ResultStore) -> None:
    store.mark_as_done("a", "x" * 100_000)
    result = AsyncResult("a", store)
    result.get()
    assert len(pickle.dumps(result)) < 500 + len(store.path)


def test_results_that_are_unpickled_and_dropped_leave_nothing_open(store: ResultStore) -> None:
    """A worker that is sent thousands of results opens its store anew whenever it holds none."""
    store.mark_as_done("a", 1)
    data = pickle.dumps(AsyncResult("a", store))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # descriptors are counted below
        assert pickle.loads(data).get() == 1
        gc.collect()
        before = open_files()
        for _ in range(5):
            assert pickle.loads(data).get() == 1
        gc.collect()
    assert open_files() <= before


# Eager results


def test_eager_result_of_a_success() -> None:
    result = EagerResult("a", 42, "SUCCESS", name="render")
    assert isinstance(result, AsyncResult)
    assert (result.id, result.status, result.state, result.name) == ("a", "DONE", "SUCCESS", "render")
    assert (result.ready(), result.successful(), result.is_done(), result.failed()) == (True, True, True, False)
    assert result.get() == result.get(timeout=0) == result.wait() == result.result == result.info == 42
    assert result.maybe_throw() == 42
    assert result.traceback is None
    assert result.exists()
    assert (result.parent, result.children) == (None, [])
    assert (result.args, result.kwargs, result.date_done) == (None, None, None)


def test_eager_result_of_a_failure() -> None:
    error = ValueError("no")
    result = EagerResult("a", error, "FAILURE", traceback="text")
    assert (result.status, result.ready(), result.failed(), result.successful()) == ("FAILURE", True, True, False)
    assert (result.traceback, result.result) == ("text", error)
    for call in (result.get, result.wait, result.maybe_throw):
        with pytest.raises(ValueError, match="no"):
            call()
    assert result.get(propagate=False) is error
    with pytest.raises(Exception, match="only text"):
        EagerResult("a", "only text", "FAILURE").get()


def test_eager_result_of_another_state() -> None:
    result = EagerResult("a", ValueError("again"), "RETRY")
    assert (result.ready(), result.get()) == (True, None)


def test_eager_result_revoke() -> None:
    result = EagerResult("a", 42, "SUCCESS")
    result.revoke()
    assert (result.state, result.ready(), result.successful()) == ("REVOKED", True, False)
    with pytest.raises(TaskRevokedError):
        result.get()


def test_eager_result_forget() -> None:
    result = EagerResult("a", 42, "SUCCESS")
    result.forget()
    assert result.get() == 42


def test_eager_result_pickles_and_copies() -> None:
    result = EagerResult("a", 42, "SUCCESS", "text", name="render")
    for again in (pickle.loads(pickle.dumps(result)), copy.copy(result)):
        assert (again.id, again.get(), again.state) == ("a", 42, "SUCCESS")
        assert (again.traceback, again.name) == ("text", "render")


def test_eager_result_needs_no_store() -> None:
    result = EagerResult("a", 42, "SUCCESS")
    assert result.as_tuple() == (("a", None), None)
    assert result.as_list() == ["a"]
    assert list(result.collect()) == [("a", 42)]
    assert result.graph == {"a": []}
    assert result.get_leaf() == 42
    assert result.future().result() == 42
    assert repr(result) == "<EagerResult: a>"
    assert (result.retries, result.worker) == (0, None)


@pytest.mark.asyncio
async def test_eager_result_await() -> None:
    assert await EagerResult("a", 42, "SUCCESS") == 42
    with pytest.raises(ValueError, match="no"):
        await EagerResult("a", ValueError("no"), "FAILURE")


def test_task_set_results_are_results_too(store: ResultStore) -> None:
    by_parent = defaultdict(list)
    task_set = TaskSetResult("set", ["a"], store)
    by_parent[task_set].append("hashable")
    assert by_parent["set"] == ["hashable"]  # type: ignore[index]
