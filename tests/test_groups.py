"""Results of many tasks: each member by its name, and each decision on what a group means."""

from __future__ import annotations

import asyncio
import json
import pickle
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import liteerresult
from liteerresult import (
    AsyncResult,
    EagerResult,
    GroupResult,
    LiteerresultError,
    ResultBase,
    ResultSet,
    ResultStore,
    TaskRevokedError,
    TaskSetResult,
    result_from_tuple,
    set_default_backend,
)
from tests.support import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.support import ManualClock

FORMS = pytest.mark.parametrize("form", [ResultSet, GroupResult, TaskSetResult, "saved"])
"""The same questions to a loose set, an unsaved group, its first form, and a group that the file answers for."""


def made(form: Any, store: ResultStore, members: Iterable[Any]) -> Any:
    """Return *members* as the form asked for."""
    results = [AsyncResult(member, store) if isinstance(member, str) else member for member in members]
    if form == "saved":
        return store.create_group(results)
    if form is ResultSet:
        return ResultSet(results)
    return form("group", results)


def nested(form: Any, store: ResultStore) -> Any:
    """Return [a, [b, [c]], d]."""
    inner = GroupResult("inner", [AsyncResult("c", store)])
    middle = GroupResult("middle", [AsyncResult("b", store), inner])
    return made(form, store, ["a", middle, "d"])


def ids_of(member: Any) -> Any:
    """Return the ids in a group, nested as it is."""
    return [ids_of(inner) for inner in member.results] if isinstance(member, ResultSet) else member.id


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
    backend = again.backend
    try:
        yield again
    finally:
        if backend is not None:
            backend.close()


# What sets are made of


def test_result_set_results(store: ResultStore) -> None:
    members = [AsyncResult("a", store), AsyncResult("b", store)]
    assert ResultSet(members).results is members  # Celery keeps the list, too
    assert ResultSet(iter(members)).results == members
    assert [type(member) for member in ResultSet(["a", "b"], backend=store).results] == [AsyncResult, AsyncResult]
    with default_backend(store):
        assert ResultSet(["a"])[0].backend is store
    for wrong in ("ab", [1], [None]):
        with pytest.raises(TypeError):
            ResultSet(wrong, backend=store)  # type: ignore[arg-type]


def test_result_set_add(store: ResultStore) -> None:
    results = ResultSet([AsyncResult("a", store)])
    results.add(AsyncResult("b", store))
    results.add(AsyncResult("a", store))
    assert results.results == ["a", "b"]


def test_result_set_remove(store: ResultStore) -> None:
    results = ResultSet(["a", "b", "c"], backend=store)
    results.remove("a")
    results.remove(AsyncResult("c", store))
    assert results.results == ["b"]
    with pytest.raises(KeyError):
        results.remove("a")


def test_result_set_discard(store: ResultStore) -> None:
    results = ResultSet(["a", "b"], backend=store)
    results.discard("a")
    results.discard("a")
    assert results.results == ["b"]


def test_result_set_update(store: ResultStore) -> None:
    results = ResultSet(["a"], backend=store)
    results.update([AsyncResult(name, store) for name in ("b", "a", "c", "b")])
    assert results.results == ["a", "b", "c"]


def test_result_set_clear(store: ResultStore) -> None:
    store.mark_as_done("a")
    results = ResultSet(["a"], backend=store)
    results.clear()
    assert (results.results, store.exists("a")) == ([], True)


def test_result_set_len_and_indexing(store: ResultStore) -> None:
    results = ResultSet(["a", "b", "c"], backend=store)
    assert (len(results), results[1], results[-1], results[1:]) == (3, "b", "c", ["b", "c"])
    assert "b" in results
    assert "x" not in results


def test_result_set_equality(store: ResultStore) -> None:
    assert ResultSet(["a", "b"], backend=store) == ResultSet(["a", "b"], backend=store)
    assert ResultSet(["a", "b"], backend=store) != ResultSet(["b", "a"], backend=store)
    with pytest.raises(TypeError):  # its members change
        hash(ResultSet([], backend=store))


@FORMS
def test_result_set_iteration_yields_results(store: ResultStore, form: Any) -> None:
    members = list(made(form, store, ["a", "b"]))
    assert [type(member) for member in members] == [AsyncResult, AsyncResult]
    assert members == ["a", "b"]


# Counting


@FORMS
@pytest.mark.parametrize(
    ("finished", "expected"),
    [  # ready, successful, failed, waiting, completed_count
        ({}, (False, False, False, True, 0)),
        ({"a": "DONE"}, (False, False, False, True, 1)),
        ({"a": "DONE", "b": "DONE"}, (True, True, False, False, 2)),
        ({"a": "DONE", "b": "FAILURE"}, (True, False, True, False, 1)),
        ({"b": "FAILURE"}, (False, False, True, True, 0)),
        ({"a": "DONE", "b": "REVOKED"}, (True, False, False, False, 1)),
        ({"a": "REVOKED", "b": "FAILURE"}, (True, False, True, False, 0)),
    ],
)
def test_counts(store: ResultStore, form: Any, finished: dict[str, str], expected: tuple[Any, ...]) -> None:
    group = made(form, store, ["a", "b"])
    store.mark_as_started("a")
    for task_id, status in finished.items():
        match status:
            case "DONE":
                store.mark_as_done(task_id, 1)
            case "FAILURE":
                store.mark_as_failure(task_id, ValueError("no"))
            case _:
                store.mark_as_revoked(task_id)
    assert counts(group) == expected


def counts(group: Any) -> tuple[Any, ...]:
    return group.ready(), group.successful(), group.failed(), group.waiting(), group.completed_count()


@FORMS
def test_result_set_ready(store: ResultStore, form: Any) -> None:
    group = made(form, store, ["a", "b"])
    assert not group.ready()
    store.mark_as_done("a")
    assert not group.ready()
    store.mark_as_failure("b", ValueError("no"))
    assert group.ready()


@FORMS
def test_result_set_successful(store: ResultStore, form: Any) -> None:
    group = made(form, store, ["a", "b"])
    store.mark_as_done("a")
    assert not group.successful()
    store.mark_as_done("b")
    assert group.successful()


@FORMS
def test_result_set_failed(store: ResultStore, form: Any) -> None:
    group = made(form, store, ["a", "b"])
    assert not group.failed()  # merely pending
    store.mark_as_failure("b", ValueError("no"))
    assert group.failed()


@FORMS
def test_result_set_waiting(store: ResultStore, form: Any) -> None:
    group = made(form, store, ["a", "b"])
    store.mark_as_done("a")
    assert group.waiting()
    store.mark_as_revoked("b")
    assert not group.waiting()


@FORMS
def test_result_set_completed_count(store: ResultStore, form: Any) -> None:
    group = made(form, store, ["a", "b", "c"])
    store.mark_as_done("a")
    store.mark_as_failure("b", ValueError("no"))
    assert group.completed_count() == 1


@FORMS
def test_counts_of_an_empty_set(store: ResultStore, form: Any) -> None:
    group = made(form, store, [])
    assert counts(group) == (True, True, False, False, 0)
    assert group.join() == group.get() == group.join_native() == list(group.iterate()) == []
    assert len(group) == 0


@FORMS
def test_counts_of_duplicates(store: ResultStore, form: Any) -> None:
    group = made(form, store, ["a", "b", "a"])
    store.mark_as_done("a", 1)
    assert counts(group) == (False, False, False, True, 2)
    store.mark_as_done("b", 2)
    assert counts(group) == (True, True, False, False, 3)


@FORMS
def test_counts_of_nested_groups(store: ResultStore, form: Any) -> None:
    """As in Celery, a nested group counts as one, once all of it succeeded."""
    group = nested(form, store)
    store.mark_many_as_done({"a": 1, "b": 2, "d": 4})
    assert counts(group) == (False, False, False, True, 2)
    store.mark_as_done("c", 3)
    assert counts(group) == (True, True, False, False, 3)


@FORMS
def test_counts_of_nested_failures(store: ResultStore, form: Any) -> None:
    group = nested(form, store)
    store.mark_as_failure("c", ValueError("no"))
    assert counts(group) == (False, False, True, True, 0)


def test_counts_follow_a_change_that_was_not_saved(store: ResultStore) -> None:
    group = store.create_group(["a"])
    store.mark_as_done("a")
    group.add("b")
    assert (group.ready(), len(group)) == (False, 2)
    assert GroupResult.restore(group.id, store).ready()  # type: ignore[union-attr]
    group.results.append(AsyncResult("c", store))
    store.mark_as_done("b")
    assert not group.ready()
    group.discard("c")
    assert group.ready()


def test_counts_follow_forgetting_and_resubmitting(store: ResultStore) -> None:
    group = store.create_group(["a", "b"])
    store.mark_as_done("a")
    store.mark_as_failure("b", ValueError("no"))
    store.resubmit("b")
    assert counts(group) == (False, False, False, True, 1)
    store.forget("a")
    assert counts(group) == (False, False, False, True, 0)


def test_counts_of_a_stored_group_are_one_read(store: ResultStore) -> None:
    group = store.create_group([f"t{number}" for number in range(50)])
    restored = GroupResult.restore(group.id, store)
    assert restored is not None
    statements: list[str] = []
    store._db.connection().set_trace_callback(statements.append)
    try:
        for ask in ("ready", "successful", "failed", "waiting", "completed_count"):
            getattr(restored, ask)()
            assert len(statements) == 1, (ask, statements)
            statements.clear()
            getattr(group, ask)()
            assert len(statements) == 1, (ask, statements)
            statements.clear()
    finally:
        store._db.connection().set_trace_callback(None)


# Joining


@FORMS
def test_result_set_join(store: ResultStore, form: Any) -> None:
    group = made(form, store, ["a", "b", "c"])
    for task_id in ("c", "a", "b"):
        store.mark_as_done(task_id, task_id * 2)
    assert group.join() == group.join(timeout=0) == ["aa", "bb", "cc"]


@FORMS
@pytest.mark.parametrize("member", ["get", "join_native"])
def test_result_set_get(store: ResultStore, form: Any, member: str) -> None:
    group = made(form, store, ["a", "b"])
    store.mark_many_as_done({"b": 2, "a": 1})
    assert getattr(group, member)(timeout=0) == [1, 2]
    assert getattr(group, member)(timeout=0, propagate=False) == [1, 2]


def test_result_set_join_native(store: ResultStore) -> None:
    store.mark_many_as_done({"a": 1, "b": 2})
    assert made(ResultSet, store, ["b", "a", "b"]).join_native() == [2, 1, 2]


@FORMS
def test_join_waits(store: ResultStore, form: Any) -> None:
    store.fallback_tick = None
    group = nested(form, store)
    with ThreadPoolExecutor() as pool:
        joined = pool.submit(group.join, timeout=DEADLINE)
        for task_id in "dcba":
            store.mark_as_done(task_id, task_id)
        assert joined.result() == ["a", ["b", ["c"]], "d"]


@FORMS
def test_join_times_out_once_for_all(store: ResultStore, form: Any) -> None:
    """Each member must not get the whole time again, nor a nested group."""
    group = nested(form, store)
    began = time.monotonic()
    with pytest.raises(liteerresult.TimeoutError) as caught:
        group.join(timeout=0.1)
    assert 0.1 <= time.monotonic() - began < 0.2 + 1
    assert isinstance(caught.value, TimeoutError)  # the builtin one
    assert set(caught.value.waiting_for) == set("abcd")
    store.mark_many_as_done({"a": 1, "b": 2, "c": 3, "d": 4})
    assert group.join(timeout=0) == [1, [2, [3]], 4]


def test_one_deadline_holds_while_others_finish(store: ResultStore) -> None:
    """Tasks of other groups that finish all the time must not prolong the wait."""

    class BusyStore(ResultStore):
        calls = 0

        def completed_since(self, number: int) -> tuple[int, list[str]]:
            self.calls += 1
            if self.calls < 5_000:  # or a wait that never asks for the time would not end
                self.mark_as_done(f"other {self.calls}")
            return super().completed_since(number)

    with BusyStore(store.path, durability="process-crash") as busy:
        with pytest.raises(liteerresult.TimeoutError):
            ResultSet(["a", "b"], backend=busy).join(timeout=0.02)
        assert busy.calls < 5_000


@FORMS
def test_join_with_timeout_0_looks_once(store: ResultStore, form: Any) -> None:
    group = made(form, store, ["a", "b"])
    store.mark_as_done("a")
    looks: list[int] = []
    for timeout in (0, -1):
        with pytest.raises(liteerresult.TimeoutError):
            group.join(timeout=timeout, on_interval=lambda: looks.append(1))
    assert looks == []


@FORMS
def test_join_raises_as_soon_as_any_failed(store: ResultStore, form: Any) -> None:
    group = made(form, store, ["never", "also never", "c"])
    store.mark_as_failure("c", ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        group.join()
    with pytest.raises(ValueError, match="no"):
        group.get(timeout=0)


@FORMS
def test_join_raises_when_a_member_fails_meanwhile(store: ResultStore, form: Any) -> None:
    store.fallback_tick = None
    group = nested(form, store)
    with ThreadPoolExecutor() as pool:
        joined = pool.submit(group.join, timeout=DEADLINE)
        store.mark_as_done("d")
        store.mark_as_failure("c", ValueError("no"))
        with pytest.raises(ValueError, match="no"):
            joined.result()


def test_join_raises_the_failure_that_came_first(store: ResultStore) -> None:
    group = made(ResultSet, store, ["a", "b"])
    store.mark_as_failure("b", ValueError("first"))
    store.mark_as_failure("a", ValueError("second"))
    with pytest.raises(ValueError, match="first"):
        group.join()


def test_join_raises_for_a_revoked_member(store: ResultStore) -> None:
    group = made(ResultSet, store, ["never", "b"])
    store.mark_as_revoked("b")
    with pytest.raises(TaskRevokedError):
        group.join(timeout=0)


@FORMS
def test_join_without_propagate(store: ResultStore, form: Any) -> None:
    group = nested(form, store)
    store.mark_many_as_done({"a": 1, "b": 2})
    store.mark_as_failure("c", ValueError("no"))
    with pytest.raises(liteerresult.TimeoutError):  # d is not there yet
        group.join(timeout=0, propagate=False)
    store.mark_as_revoked("d")
    first, (second, (third,)), fourth = group.join(propagate=False)
    assert (first, second, type(third), third.args) == (1, 2, ValueError, ("no",))
    assert type(fourth) is TaskRevokedError


@FORMS
def test_join_calls_back_in_order(store: ResultStore, form: Any) -> None:
    group = made(form, store, ["a", "b"])
    store.mark_as_done("b", 2)
    store.mark_as_done("a", 1)
    calls: list[Any] = []
    assert not group.join(callback=lambda task_id, value: calls.append((task_id, value)))
    assert calls == [("a", 1), ("b", 2)]


def test_join_takes_celerys_options(store: ResultStore) -> None:
    group = made(ResultSet, store, ["a"])
    store.mark_as_done("a", 1)
    assert group.join(1, True, interval=0.5, no_ack=True, on_message=print, disable_sync_subtasks=False) == [1]
    assert group.get(1, True, interval=0.5, no_ack=True, on_message=print, disable_sync_subtasks=False) == [1]


@FORMS
def test_join_of_duplicates(store: ResultStore, form: Any) -> None:
    store.mark_many_as_done({"a": 1, "b": 2})
    assert made(form, store, ["a", "b", "a"]).join() == [1, 2, 1]


def test_join_of_eager_results(store: ResultStore) -> None:
    eager = EagerResult("e", 5, "SUCCESS")
    assert ResultSet([eager]).join() == list(ResultSet([eager]).iterate()) == [5]
    assert ResultSet([eager]).ready()
    mixed = ResultSet([eager, AsyncResult("a", store)])
    assert (mixed.ready(), mixed.completed_count()) == (False, 1)
    store.mark_as_done("a", 1)
    assert (mixed.join(), mixed.ready(), mixed.completed_count()) == ([5, 1], True, 2)
    with pytest.raises(ValueError, match="no"):
        ResultSet([AsyncResult("never", store), EagerResult("e", ValueError("no"), "FAILURE")]).join(timeout=0)


def test_join_of_more_tasks_than_one_query_reads(store: ResultStore) -> None:
    names = [f"t{number}" for number in range(2_500)]
    store.mark_many_as_done({name: name for name in reversed(names)})
    assert made(ResultSet, store, names).join() == names


@FORMS
def test_result_set_maybe_throw(store: ResultStore, form: Any) -> None:
    group = made(form, store, ["a", "b", "c"])
    store.mark_as_done("a", 1)
    group.maybe_throw()
    store.mark_as_failure("c", ValueError("third"))
    with pytest.raises(ValueError, match="third"):
        group.maybe_throw()
    store.mark_as_failure("b", ValueError("second"))
    with pytest.raises(ValueError, match="second"):
        group.maybe_reraise()
    group.maybe_throw(propagate=False)


@FORMS
def test_result_set_forget(store: ResultStore, form: Any) -> None:
    group = nested(form, store)
    store.mark_many_as_done({"a": 1, "b": 2, "c": 3, "d": 4})
    group.forget()
    assert [task_id for task_id in "abcd" if store.exists(task_id)] == []
    assert not group.ready()
    if form == "saved":
        assert ids_of(GroupResult.restore(group.id, store)) == ["a", ["b", ["c"]], "d"]


@FORMS
def test_result_set_revoke(store: ResultStore, form: Any) -> None:
    group = nested(form, store)
    store.mark_as_done("a", 1)
    assert group.revoke()
    assert not group.revoke()
    assert [AsyncResult(task_id, store).status for task_id in "abcd"] == ["DONE", "REVOKED", "REVOKED", "REVOKED"]


# Iterating


@FORMS
def test_result_set_iterate(store: ResultStore, form: Any) -> None:
    """Values come in the order of completion, also those that were there before."""
    group = made(form, store, ["a", "b", "c", "d"])
    store.mark_as_done("c", 3)
    store.mark_as_done("a", 1)
    values = group.iterate(timeout=DEADLINE)
    assert [next(values), next(values)] == [3, 1]
    store.mark_as_done("d", 4)
    assert next(values) == 4
    store.mark_as_done("b", 2)
    assert next(values) == 2
    with pytest.raises(StopIteration):
        next(values)


@FORMS
def test_iterate_waits(store: ResultStore, form: Any) -> None:
    store.fallback_tick = None
    group = made(form, store, [f"t{number}" for number in range(20)])
    with ThreadPoolExecutor() as pool:
        values = pool.submit(list, group.iterate(timeout=DEADLINE))
        for number in reversed(range(20)):
            store.mark_as_done(f"t{number}", number)
        assert values.result() == list(reversed(range(20)))


@FORMS
def test_iterate_yields_duplicates_as_often_as_they_stand_there(store: ResultStore, form: Any) -> None:
    group = made(form, store, ["a", "b", "a"])
    store.mark_as_done("b", 2)
    store.mark_as_done("a", 1)
    assert list(group.iterate()) == [2, 1, 1]


@FORMS
def test_iterate_yields_nested_groups_once_they_are_complete(store: ResultStore, form: Any) -> None:
    group = nested(form, store)
    values = group.iterate(timeout=DEADLINE)
    store.mark_many_as_done({"b": 2, "d": 4})
    assert next(values) == 4
    store.mark_as_done("c", 3)
    assert next(values) == [2, [3]]
    store.mark_as_done("a", 1)
    assert list(values) == [1]


@FORMS
def test_iterate_raises_what_a_task_raised(store: ResultStore, form: Any) -> None:
    group = made(form, store, ["a", "b", "never"])
    store.mark_as_done("b", 2)
    store.mark_as_failure("a", ValueError("no"))
    values = group.iterate()
    assert next(values) == 2
    with pytest.raises(ValueError, match="no"):
        next(values)


@FORMS
def test_iterate_without_propagate(store: ResultStore, form: Any) -> None:
    """One failure among twenty: nineteen values still come."""
    group = nested(form, store)
    store.mark_as_failure("a", ValueError("no"))
    store.mark_as_failure("c", KeyError("c"))
    store.mark_many_as_done({"b": 2, "d": 4})
    first, (second, (third,)), fourth = group.iterate(propagate=False)
    assert (type(first), second, type(third), fourth) == (ValueError, 2, KeyError, 4)


@FORMS
def test_iterate_times_out_and_loses_nothing(store: ResultStore, form: Any) -> None:
    group = made(form, store, ["a", "b"])
    store.mark_as_done("b", 2)
    values = group.iterate(timeout=0)
    assert next(values) == 2
    with pytest.raises(liteerresult.TimeoutError):
        next(values)
    store.mark_as_done("a", 1)
    assert list(group.iterate(timeout=0)) == [2, 1]


def test_iterate_can_be_left_early(store: ResultStore) -> None:
    group = made(ResultSet, store, ["a", "b"])
    store.mark_as_done("a", 1)
    for value in group.iterate():
        assert value == 1
        break


def test_the_cost_of_iterate_does_not_grow_with_the_group(store: ResultStore) -> None:
    """Each look asks for what was completed since the last one, not for every member again."""
    names = [f"t{number}" for number in range(400)]
    values = made(ResultSet, store, names).iterate(timeout=DEADLINE)
    store.mark_as_done("t0")
    next(values)
    statements: list[str] = []
    store._db.connection().set_trace_callback(statements.append)
    try:
        store.mark_as_done("t1")
        next(values)
        first = sum(map(len, statements))
        statements.clear()
        store.mark_as_done("t2")
        next(values)
    finally:
        store._db.connection().set_trace_callback(None)
    assert sum(map(len, statements)) <= first + 100
    assert not any("t300" in statement for statement in statements)


@FORMS
def test_result_set_iter_native(store: ResultStore, form: Any) -> None:
    group = made(form, store, ["a", "b", GroupResult("inner", [AsyncResult("c", store)])])
    store.mark_as_done("c", 3)
    store.mark_as_failure("b", ValueError("no"))
    store.mark_as_done("a", 1)
    (first, members), (second, row), (third, _) = group.iter_native()
    assert (first, members) == ("inner", ["c"])
    assert (second, row.status, type(row.result)) == ("b", "FAILURE", ValueError)
    assert third == "a"


# In asyncio


@FORMS
@pytest.mark.asyncio
async def test_await_group(store: ResultStore, form: Any) -> None:
    store.fallback_tick = None
    group = nested(form, store)
    threads = threading.active_count()

    async def waiter() -> Any:
        return await group

    waiters = [asyncio.create_task(waiter()) for _ in range(10)]
    await asyncio.sleep(0)
    for task_id in "abcd":
        store.mark_as_done(task_id, task_id)
    joined = await asyncio.wait_for(asyncio.gather(*waiters), DEADLINE)
    assert joined == [["a", ["b", ["c"]], "d"]] * 10
    assert threading.active_count() == threads


@FORMS
@pytest.mark.asyncio
async def test_async_for_over_iterate(store: ResultStore, form: Any) -> None:
    store.fallback_tick = None
    group = made(form, store, ["a", "b", "a"])
    threads = threading.active_count()

    async def collect() -> list[Any]:
        return [value async for value in group.iterate()]

    collected = asyncio.create_task(collect())
    for _ in range(3):
        await asyncio.sleep(0)
    store.mark_as_done("b", 2)
    await asyncio.sleep(0)
    store.mark_as_done("a", 1)
    assert await asyncio.wait_for(collected, DEADLINE) == [2, 1, 1]
    assert threading.active_count() == threads


@pytest.mark.asyncio
async def test_await_group_raises(store: ResultStore) -> None:
    group = made(ResultSet, store, ["never", "b"])
    store.mark_as_failure("b", ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        await group
    with pytest.raises(ValueError, match="no"):
        await anext(group.iterate())
    with pytest.raises(liteerresult.TimeoutError):
        await anext(ResultSet(["never"], backend=store).iterate(timeout=0.01))
    assert await ResultSet([]) == []


# Groups


def test_group_result_id(store: ResultStore) -> None:
    assert GroupResult("film", []).id == "film"
    first, second = GroupResult(results=[]), GroupResult(results=[])
    assert first.id
    assert first.id != second.id
    with pytest.raises(ValueError, match="id"):
        GroupResult("", [])
    with pytest.raises(TypeError):
        GroupResult(5, [])  # type: ignore[arg-type]


def test_group_result_results(store: ResultStore) -> None:
    members = [AsyncResult("a", store)]
    assert GroupResult("film", members).results is members
    assert GroupResult("film").results == []
    assert isinstance(GroupResult("film", members), ResultSet)
    assert issubclass(GroupResult, ResultBase)


def test_group_result_constructor_passes_keywords_on(store: ResultStore) -> None:
    assert GroupResult("film", ["a"], backend=store)[0].backend is store
    assert GroupResult("film", ["a"], app=SimpleNamespace(backend=store)).results == ["a"]
    assert GroupResult("film", [AsyncResult("a", store)], ready_barrier=None).results == ["a"]
    with pytest.raises(TypeError):
        GroupResult("film", [], colour="red")


def test_group_result_parent(store: ResultStore) -> None:
    top = store.create_task(task_id="top")
    assert GroupResult("film", [], top).parent is top
    assert GroupResult("film", []).parent is None
    assert store.create_group(["a"], parent=top).parent == "top"
    assert store.create_group(["a"], parent="top").parent == "top"
    outer = store.create_group(["a"])
    made_in_group = store.create_group(["b"], parent=outer).parent
    assert isinstance(made_in_group, GroupResult)
    assert made_in_group == outer


def test_group_result_children(store: ResultStore) -> None:
    group = nested(GroupResult, store)
    assert group.children == group.results
    assert [type(child) for child in group.children] == [AsyncResult, GroupResult, AsyncResult]


def test_group_result_save(store: ResultStore) -> None:
    group = nested(GroupResult, store)
    assert group.save() is group  # with the members' own store
    restored = GroupResult.restore("group", store)
    assert restored is not None
    assert ids_of(restored) == ["a", ["b", ["c"]], "d"]
    assert [member.id for member in (restored[1], restored[1][1])] == ["middle", "inner"]
    assert GroupResult("empty", []).save(backend=store) == "empty"
    assert GroupResult.restore("empty", store).results == []  # type: ignore[union-attr]
    with default_backend(store):
        GroupResult("by default", []).save()
    assert GroupResult.restore("by default", store) == "by default"


def test_group_result_save_keeps_the_parent(store: ResultStore) -> None:
    GroupResult("film", [AsyncResult("a", store)], store.create_task(task_id="top")).save()
    restored = GroupResult.restore("film", store)
    assert restored is not None
    assert isinstance(restored.parent, AsyncResult)
    assert restored.parent == "top"
    restored.save()
    assert GroupResult.restore("film", store).parent == "top"  # type: ignore[union-attr]


def test_group_result_save_is_idempotent(store: ResultStore) -> None:
    group = nested(GroupResult, store)
    store.mark_as_done("b", 2)
    before = None
    for _ in range(3):
        group.save()
        rows = dump(store)
        assert before in (None, rows)
        before = rows
    assert ids_of(GroupResult.restore("group", store)) == ["a", ["b", ["c"]], "d"]


def dump(store: ResultStore) -> list[Any]:
    with closing(sqlite3.connect(store.path)) as other:
        return [
            other.execute(f"SELECT * FROM {table}").fetchall() for table in ("groups", "group_members", "group_tasks")
        ]


def test_group_result_save_stores_what_changed(store: ResultStore) -> None:
    group = nested(GroupResult, store).save()
    group.remove("a")
    group.add(AsyncResult("e", store))
    group.save()
    assert ids_of(GroupResult.restore("group", store)) == [["b", ["c"]], "d", "e"]
    store.mark_many_as_done({"b": 2, "c": 3, "d": 4, "e": 5})
    assert counts(group) == counts(GroupResult.restore("group", store)) == (True, True, False, False, 3)


def test_group_result_save_refuses_what_no_store_can_restore(store: ResultStore, tmp_path: Any) -> None:
    with ResultStore(tmp_path / "other.db", durability="process-crash") as other:
        for member in (EagerResult("e", 1, "SUCCESS"), AsyncResult("a", other)):
            with pytest.raises(ValueError, match="store"):
                GroupResult("film", [member]).save(backend=store)
    assert GroupResult.restore("film", store) is None


def test_group_result_save_refuses_a_group_that_contains_itself(store: ResultStore) -> None:
    inner = GroupResult("inner", [AsyncResult("a", store)])
    GroupResult("outer", [inner]).save()
    before = dump(store)
    restored = GroupResult.restore("inner", store)
    assert restored is not None
    restored.add(GroupResult.restore("outer", store))  # type: ignore[arg-type]
    with pytest.raises((LiteerresultError, ValueError)):
        restored.save()
    assert dump(store) == before


def test_group_result_restore(store: ResultStore) -> None:
    store.create_group(["b", "a", "b"], group_id="film")
    for restored in (
        GroupResult.restore("film", store),
        GroupResult.restore(id="film", backend=store, app=None),
        GroupResult.restore("film", app=SimpleNamespace(backend=store)),
        store.restore_group("film"),
    ):
        assert type(restored) is GroupResult
        assert (restored.id, ids_of(restored)) == ("film", ["b", "a", "b"])
        assert restored.parent is None
    with default_backend(store):
        assert GroupResult.restore("film") == "film"


def test_group_result_restore_of_an_unknown_id(store: ResultStore) -> None:
    assert GroupResult.restore("unknown", store) is None
    assert store.restore_group("unknown") is None
    store.create_task(task_id="a task")
    assert GroupResult.restore("a task", store) is None
    for wrong, error in (("", ValueError), (None, ValueError), (5, TypeError)):
        with pytest.raises(error):
            GroupResult.restore(wrong, store)  # type: ignore[arg-type]


def test_group_result_restore_by_another_store(store: ResultStore) -> None:
    nested(GroupResult, store).save()
    with ResultStore(store.path, durability="process-crash") as other:
        restored = GroupResult.restore("group", other)
        assert restored is not None
        store.mark_many_as_done({"a": 1, "b": 2, "c": 3, "d": 4})
        assert restored.join(timeout=DEADLINE) == [1, [2, [3]], 4]
        assert {member.backend.path for member in restored} == {store.path}


def test_group_result_delete(store: ResultStore) -> None:
    store.mark_as_done("a", 1)
    group = store.create_group(["a", "b"], group_id="film")
    assert group.delete() is None  # type: ignore[func-returns-value]
    assert GroupResult.restore("film", store) is None
    group.delete()  # unknown by now
    assert store.exists("a")
    assert AsyncResult("a", store).get() == 1
    assert (len(group), group.ready()) == (2, False)
    group.save(store)
    assert ids_of(GroupResult.restore("film", store)) == ["a", "b"]
    GroupResult("film", []).delete(backend=store)
    assert GroupResult.restore("film", store) is None


def test_group_result_delete_leaves_the_members_in_the_object(store: ResultStore) -> None:
    """To drop a group and its tasks, people delete and then forget."""
    nested(GroupResult, store).save()
    store.mark_many_as_done({"a": 1, "b": 2, "c": 3, "d": 4})
    restored = GroupResult.restore("group", store)
    assert restored is not None
    restored.delete()
    assert ids_of(restored) == ["a", ["b", ["c"]], "d"]
    restored.forget()
    assert [task_id for task_id in "abcd" if store.exists(task_id)] == []


def test_a_nested_group_deleted_by_name_stays_in_its_parent(store: ResultStore) -> None:
    nested(GroupResult, store).save()
    GroupResult.restore("middle", store).delete()  # type: ignore[union-attr]
    assert GroupResult.restore("middle", store) is None
    outer = GroupResult.restore("group", store)
    assert outer is not None
    assert ids_of(outer) == ["a", ["b", ["c"]], "d"]
    store.mark_many_as_done({"a": 1, "b": 2, "c": 3, "d": 4})
    assert counts(outer) == (True, True, False, False, 3)
    assert outer.join(timeout=0) == [1, [2, [3]], 4]
    assert GroupResult.restore("inner", store) == "inner"
    outer.delete()
    assert [rows for rows in dump(store)[0] if rows[1] in ("group", "middle")] == []
    assert GroupResult.restore("inner", store) == "inner"


def test_deleting_a_group_leaves_the_groups_in_it(store: ResultStore) -> None:
    nested(GroupResult, store).save()
    store.delete_group("group")
    assert ids_of(GroupResult.restore("middle", store)) == ["b", ["c"]]


def test_group_result_as_tuple(store: ResultStore) -> None:
    store.create_task(task_id="top")
    group = GroupResult(
        "film", ["a", GroupResult("inner", ["b"], backend=store)], AsyncResult("top", store), backend=store
    )
    expected = (
        ("film", (("top", None), None)),
        [(("a", None), None), (("inner", None), [(("b", None), None)])],
    )
    assert group.as_tuple() == expected
    group.save()
    assert GroupResult.restore("film", store).as_tuple() == expected  # type: ignore[union-attr]


def test_groups_are_equal_by_id(store: ResultStore) -> None:
    group = GroupResult("film", ["a"], backend=store)
    assert group == GroupResult("film", ["a"], backend=store) == "film"
    assert group != GroupResult("series", ["a"], backend=store)
    assert group != "series"
    assert hash(group) == hash("film")
    assert {"film": 1}[group] == 1  # type: ignore[index]
    assert group == ResultSet(["a"], backend=store)
    assert group != 1
    assert bool(GroupResult("empty", []))


def test_a_group_shows_its_id(store: ResultStore) -> None:
    group = GroupResult("film", ["a", "b"], backend=store)
    assert (str(group), repr(group)) == ("film", "<GroupResult: film [a, b]>")
    assert repr(ResultSet(["a", "b"], backend=store)) == "<ResultSet: [a, b]>"


@FORMS
def test_groups_pickle(store: ResultStore, form: Any) -> None:
    group = nested(form, store)
    with unpickled(group) as again:
        assert type(again) is type(group)
        assert ids_of(again) == ["a", ["b", ["c"]], "d"]
        assert again.backend.path == store.path
        assert getattr(again, "id", None) == getattr(group, "id", None)
        store.mark_many_as_done({"a": 1, "b": 2, "c": 3, "d": 4})
        assert again.join(timeout=DEADLINE) == [1, [2, [3]], 4]


def test_groups_pickle_with_their_parent(store: ResultStore) -> None:
    top = store.create_task(task_id="top")
    with unpickled(GroupResult("film", ["a"], top, backend=store)) as again:
        assert again.parent == "top"
    with unpickled(store.create_group(["a"], parent=top)) as again:
        assert again.parent == "top"


def test_a_stored_group_pickles_to_id_and_path_only(store: ResultStore) -> None:
    group = store.create_group([f"t{number}" for number in range(1_000)])
    assert len(pickle.dumps(group)) < 500 + len(store.path)


# The first document's form


def test_task_set_result_taskset_id(store: ResultStore) -> None:
    task_set = TaskSetResult("set", ["a"], store)
    assert task_set.taskset_id == task_set.id == "set"
    assert isinstance(task_set, GroupResult)
    for wrong, error in (("", ValueError), (None, ValueError), (5, TypeError)):
        with pytest.raises(error):
            TaskSetResult(wrong, ["a"], store)  # type: ignore[arg-type]


def test_task_set_result_subtask_ids(store: ResultStore) -> None:
    assert TaskSetResult("set", ["b", "a"], store).subtask_ids == ["b", "a"]
    assert TaskSetResult("set", [AsyncResult("b", store), AsyncResult("a", store)]).subtask_ids == ["b", "a"]


def test_task_set_result_subtasks(store: ResultStore) -> None:
    subtasks = TaskSetResult("set", ["b", "a"], store).subtasks
    assert [(type(subtask), subtask.id, subtask.backend) for subtask in subtasks] == [
        (AsyncResult, "b", store),
        (AsyncResult, "a", store),
    ]
    with default_backend(store):
        assert TaskSetResult("set", ["a"]).subtasks[0].backend is store


def test_task_set_result_itersubtasks(store: ResultStore) -> None:
    subtasks = TaskSetResult("set", ["b", "a"], store).itersubtasks()
    assert (next(subtasks), next(subtasks)) == ("b", "a")
    with pytest.raises(StopIteration):
        next(subtasks)


def test_task_set_result_total(store: ResultStore) -> None:
    assert TaskSetResult("set", ["b", "a", "b"], store).total == 3
    assert TaskSetResult("set", [], store).total == 0


def test_task_set_result_iterate(store: ResultStore) -> None:
    task_set = TaskSetResult("set", ["a", "b", "c"], store)
    store.mark_as_done("b", 2)
    store.mark_as_done("a", 1)
    store.mark_as_failure("c", ValueError("no"))
    values = task_set.iterate()
    assert [next(values), next(values)] == [2, 1]
    with pytest.raises(ValueError, match="no"):
        next(values)


def test_task_set_result_join(store: ResultStore) -> None:
    task_set = TaskSetResult("set", ["a", "b"], store)
    store.mark_as_done("b", 2)
    with pytest.raises(TimeoutError):
        task_set.join(timeout=0.01)
    store.mark_as_done("a", 1)
    assert task_set.join() == task_set.join(timeout=1) == [1, 2]


def test_task_set_result_join_reraises(store: ResultStore) -> None:
    store.mark_as_failure("b", ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        TaskSetResult("set", ["a", "b"], store).join()


def test_task_set_result_completed_count(store: ResultStore) -> None:
    task_set = TaskSetResult("set", ["a", "b"], store)
    assert task_set.completed_count() == 0
    store.mark_as_done("a")
    assert task_set.completed_count() == 1


def test_task_set_result_ready_waiting_successful_failed(store: ResultStore) -> None:
    task_set = TaskSetResult("set", ["a", "b"], store)
    assert (task_set.ready(), task_set.waiting(), task_set.successful(), task_set.failed()) == (
        False,
        True,
        False,
        False,
    )
    store.mark_many_as_done({"a": 1, "b": 2})
    assert (task_set.ready(), task_set.waiting(), task_set.successful(), task_set.failed()) == (
        True,
        False,
        True,
        False,
    )


def test_task_set_result_saves_and_restores(store: ResultStore) -> None:
    TaskSetResult("set", ["b", "a"], store).save()
    restored = TaskSetResult.restore("set", store)
    assert type(restored) is TaskSetResult
    assert (restored.taskset_id, restored.subtask_ids, restored.total) == ("set", ["b", "a"], 2)
    assert type(GroupResult.restore("set", store)) is GroupResult
    assert TaskSetResult.restore("unknown", store) is None


# Tuples


def test_result_from_tuple_of_a_task(store: ResultStore) -> None:
    result = result_from_tuple((("a", None), None), backend=store)
    assert type(result) is AsyncResult
    assert (result.id, result.backend, result.parent) == ("a", store, None)
    assert result_from_tuple(("a", None), store) == "a"  # as Celery 3 wrote it
    with default_backend(store):
        assert result_from_tuple((("a", None), None)).backend is store
    assert result_from_tuple((("a", None), None), app=SimpleNamespace(backend=store)).backend is store


def test_result_from_tuple_of_a_group(store: ResultStore) -> None:
    group = GroupResult(
        "film", ["a", GroupResult("inner", ["b"], backend=store)], AsyncResult("top", store), backend=store
    )
    for shape in (group.as_tuple(), json.loads(json.dumps(group.as_tuple()))):
        again = result_from_tuple(shape, store)
        assert type(again) is GroupResult
        assert again.as_tuple() == group.as_tuple()
        assert (ids_of(again), again.parent) == (["a", ["b"]], "top")
    empty = result_from_tuple((("film", None), []), store)
    assert (type(empty), empty.results) == (GroupResult, [])


def test_result_from_tuple_keeps_the_parents(store: ResultStore, clock: ManualClock) -> None:
    top = AsyncResult("top", store)
    child = AsyncResult("child", store, parent=AsyncResult("middle", store, parent=top))
    again = result_from_tuple(child.as_tuple(), store)
    assert (again, again.parent, again.parent.parent) == ("child", "middle", "top")


def test_result_from_tuple_passes_results_through(store: ResultStore) -> None:
    for result in (AsyncResult("a", store), GroupResult("film", []), EagerResult("a", 1, "SUCCESS")):
        assert result_from_tuple(result) is result


@pytest.mark.parametrize("wrong", ["abc", "ab", 5, None, (), ("a",), ("a", None, None)])
def test_result_from_tuple_refuses_other_things(store: ResultStore, wrong: Any) -> None:
    with pytest.raises(ValueError, match="tuple"):
        result_from_tuple(wrong, store)
