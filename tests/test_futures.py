"""`result.future()`: stored results where `concurrent.futures` is expected."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from concurrent import futures
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from liteerresult import AsyncResult, DecodeError, ResultStore, StoreError, TaskRevokedError
from tests.support import DEADLINE, eventually

if TYPE_CHECKING:
    from collections.abc import Callable


def completers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "liteerresult-futures"]


@pytest.fixture(autouse=True)
def _no_thread_stays(store: ResultStore) -> Any:
    """Yield, then see that no thread waits for nobody."""
    store.fallback_tick = None
    yield
    store.fallback_tick = 0.05
    with store.watch():
        store._bell.ring()
    eventually(lambda: not completers(), 3, what="the end of the thread")


def finish(store: ResultStore, *names: str) -> None:
    for name in names:
        store.mark_as_done(name, name.upper())


def test_base_async_result_future(store: ResultStore) -> None:
    future = AsyncResult("a", store).future()
    assert isinstance(future, futures.Future)
    assert not future.done()
    finish(store, "a")
    assert future.result(DEADLINE) == "A"
    assert future.exception() is None


def test_future_of_a_finished_task(store: ResultStore) -> None:
    finish(store, "a")
    assert AsyncResult("a", store).future().result(DEADLINE) == "A"


def test_future_of_a_failed_task(store: ResultStore) -> None:
    before = AsyncResult("a", store).future()
    store.mark_as_failure("a", ValueError("no"))
    for future in (before, AsyncResult("a", store).future()):
        with pytest.raises(ValueError, match="no"):
            future.result(DEADLINE)
        assert isinstance(future.exception(), ValueError)


def test_future_of_a_revoked_task(store: ResultStore) -> None:
    future = AsyncResult("a", store).future()
    store.revoke("a")
    assert isinstance(future.exception(DEADLINE), TaskRevokedError)


def test_future_of_a_value_that_can_not_be_read(store: ResultStore) -> None:
    store.create_task(task_id="bad")
    with closing(sqlite3.connect(store.path)) as other:
        other.execute("UPDATE tasks SET status = 'DONE', result = '{not json' WHERE id = 'bad'")
        other.commit()
    bad, good = AsyncResult("bad", store).future(), AsyncResult("good", store).future()
    assert isinstance(bad.exception(DEADLINE), DecodeError)
    finish(store, "good")
    assert good.result(DEADLINE) == "GOOD"


def test_a_future_does_not_wait_longer_than_asked(store: ResultStore) -> None:
    future = AsyncResult("a", store).future()
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)
    finish(store, "a")
    assert future.result(DEADLINE) == "A"


def test_as_completed(store: ResultStore) -> None:
    waited = {AsyncResult(name, store).future(): name for name in "abc"}
    completed = futures.as_completed(waited, timeout=DEADLINE)
    for name in "cab":
        finish(store, name)
        future = next(completed)
        assert (waited[future], future.result()) == (name, name.upper())


def test_wait(store: ResultStore) -> None:
    first, second = AsyncResult("a", store).future(), AsyncResult("b", store).future()
    finish(store, "b")
    assert futures.wait([first, second], DEADLINE, futures.FIRST_COMPLETED) == ({second}, {first})
    finish(store, "a")
    assert futures.wait([first, second], DEADLINE).not_done == set()


def test_callbacks(store: ResultStore) -> None:
    called = threading.Event()
    seen: list[Any] = []

    def callback(future: futures.Future[Any]) -> None:
        seen.append(future.result())
        called.set()

    AsyncResult("a", store).future().add_done_callback(callback)
    finish(store, "a")
    assert called.wait(DEADLINE)
    assert seen == ["A"]


def test_a_callback_may_ask_for_more(store: ResultStore) -> None:
    finish(store, "a", "b")
    box: list[futures.Future[Any]] = []
    asked = threading.Event()

    def callback(_: object) -> None:
        box.append(AsyncResult("b", store).future())
        asked.set()

    AsyncResult("a", store).future().add_done_callback(callback)
    assert asked.wait(DEADLINE)
    assert box[0].result(DEADLINE) == "B"


def test_several_futures_of_one_task(store: ResultStore) -> None:
    result = AsyncResult("a", store)
    several = [result.future() for _ in range(3)]
    several[1].cancel()
    finish(store, "a")
    assert [future.result(DEADLINE) for future in (several[0], several[2])] == ["A", "A"]
    assert several[1].cancelled()


def test_cancelling_a_future_leaves_the_task(store: ResultStore) -> None:
    result = store.create_task(task_id="a")
    future = result.future()
    assert future.cancel()
    assert future.cancelled()
    assert result.status == "PENDING"
    finish(store, "a")
    assert result.get() == "A"
    with pytest.raises(futures.CancelledError):
        future.result(0)


def test_cancelling_a_future_twice(store: ResultStore) -> None:
    future = AsyncResult("a", store).future()
    assert (future.cancel(), future.cancel()) == (True, True)
    finish(store, "a")
    done = AsyncResult("a", store).future()
    assert done.result(DEADLINE) == "A"
    assert not done.cancel()


def test_when_all_futures_are_cancelled_the_thread_ends(store: ResultStore) -> None:
    waited = [AsyncResult(name, store).future() for name in "aab"]
    eventually(completers)
    for future in waited:
        future.cancel()
    eventually(lambda: not completers(), 3, what="the end of the thread")


def test_a_cancelled_future_is_done_for_those_who_wait(store: ResultStore) -> None:
    cancelled, other = AsyncResult("a", store).future(), AsyncResult("b", store).future()
    cancelled.cancel()
    done, not_done = futures.wait([cancelled, other], timeout=0.5, return_when=futures.FIRST_COMPLETED)
    finish(store, "b")
    assert (done, not_done) == ({cancelled}, {other})
    assert set(futures.as_completed([cancelled, other], timeout=DEADLINE)) == {cancelled, other}


@pytest.mark.asyncio
async def test_asyncio_wrap_future(store: ResultStore) -> None:
    wrapped = [asyncio.wrap_future(AsyncResult(name, store).future()) for name in "abc"]
    wrapped[2].cancel()
    finish(store, "b", "a")
    assert await asyncio.wait_for(asyncio.gather(*wrapped[:2]), DEADLINE) == ["A", "B"]
    with pytest.raises(asyncio.CancelledError):
        await wrapped[2]


def test_thousands_of_futures_take_one_thread(store: ResultStore) -> None:
    names = [f"t{number}" for number in range(3_000)]
    before = threading.active_count()
    waited = [AsyncResult(name, store).future() for name in names]
    assert threading.active_count() == before + 1
    store.mark_many_as_done({name: name for name in names[:2_000]})
    assert [future.result(DEADLINE) for future in waited[:2_000]] == names[:2_000]
    store.mark_many_as_done({name: name for name in names[2_000:]})
    assert [future.result(DEADLINE) for future in waited[2_000:]] == names[2_000:]
    eventually(lambda: threading.active_count() == before, what="the end of the thread")


def test_the_cost_of_a_completion_does_not_grow_with_the_futures(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wake looks at what was completed, not at everything that somebody waits for."""
    looks = 0
    real = futures.Future.cancelled

    def counted(future: futures.Future[Any]) -> bool:
        nonlocal looks
        looks += 1
        return real(future)

    waited = [AsyncResult(f"t{number}", store).future() for number in range(200)]
    monkeypatch.setattr(futures.Future, "cancelled", counted)
    for number, future in enumerate(waited):
        store.mark_as_done(f"t{number}")
        future.result(DEADLINE)
    assert looks <= 10 * len(waited)


def test_futures_from_many_threads(store: ResultStore) -> None:
    def take(number: int) -> Any:
        future = AsyncResult(f"t{number}", store).future()
        store.mark_as_done(f"t{number}", number)
        return future.result(DEADLINE)

    with futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(take, range(200))) == list(range(200))


def test_the_thread_comes_back_when_it_is_needed_again(store: ResultStore) -> None:
    for name in "abc":
        future = AsyncResult(name, store).future()
        finish(store, name)
        assert future.result(DEADLINE) == name.upper()
        eventually(lambda: not completers(), 3, what="the end of the thread")


def test_closing_the_store_ends_its_futures(store: ResultStore) -> None:
    other = ResultStore(store.path, durability="process-crash")
    future = AsyncResult("a", other).future()
    eventually(completers)
    other.close()
    assert isinstance(future.exception(DEADLINE), StoreError)


@pytest.mark.parametrize("ask", [lambda future: future.running(), lambda future: future.done()])
def test_a_pending_future_is_neither_running_nor_done(
    store: ResultStore, ask: Callable[[futures.Future[Any]], bool]
) -> None:
    future = AsyncResult("a", store).future()
    assert not ask(future)
    finish(store, "a")
    future.result(DEADLINE)
