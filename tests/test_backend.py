"""The `Backend` protocol, kept by a dict, and the backend that results get when none is given."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import pytest

import liteerresult
from liteerresult import (
    AsyncResult,
    Backend,
    BaseAsyncResult,
    GroupResult,
    ImproperlyConfigured,
    ResultSet,
    ResultStore,
    TaskRevokedError,
    TaskSetResult,
    result_from_tuple,
    set_default_backend,
)
from liteerresult.backend import GroupCounts, TaskMeta
from liteerresult.serialization import Serializer, encode_exception
from tests.support import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from pathlib import Path


class DictWatch:
    """Hears whatever `DictBackend` announces after it was made."""

    def __init__(self, backend: DictBackend) -> None:
        self._backend = backend
        self._event = threading.Event()
        backend.watches.add(self)

    def wait(self, timeout: float | None, owners: Collection[str] | None = None) -> None:
        self._event.wait(timeout)
        self._event.clear()

    async def wait_async(  # one thread for each wait: this backend knows no better
        self,
        timeout: float | None,
        owners: Collection[str] | None = None,
    ) -> None:
        await asyncio.to_thread(self.wait, timeout, owners)

    def fire(self) -> None:
        self._event.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._backend.watches.discard(self)


class DictBackend:
    """The least that the result classes need."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.completed: list[str] = []
        self.groups: dict[str, list[tuple[str, bool]]] = {}
        self.parents: dict[str, tuple[str, bool]] = {}
        self.submitted: dict[str, list[tuple[str, bool]]] = defaultdict(list)
        self.watches: set[DictWatch] = set()
        self._json = Serializer()

    # What a worker would call

    def finish(self, task_id: str, value: Any) -> None:
        self._put(task_id, "DONE", self._json.encode(value))

    def fail(self, task_id: str, exc: BaseException) -> None:
        self._put(task_id, "FAILURE", encode_exception(exc))

    def _put(self, task_id: str, status: str, payload: object) -> None:
        self.completed.append(task_id)
        self.rows[task_id] = {
            "status": status,
            "payload": payload,
            "encoding": "json",
            "created_at": 0.0,
            "done_number": len(self.completed),
        }
        for watch in list(self.watches):
            watch.fire()

    # The protocol

    def get_task_meta(self, task_id: str) -> TaskMeta:
        return TaskMeta(self._json, task_id, **self.rows.get(task_id, {}))

    def get_many(self, task_ids: Sequence[str]) -> list[TaskMeta]:
        return [self.get_task_meta(task_id) for task_id in task_ids]

    def exists(self, task_id: str) -> bool:
        return task_id in self.rows

    def completion_number(self) -> int:
        return len(self.completed)

    def completed_since(self, number: int) -> tuple[int, list[str]]:
        completed = self.completed[number:]
        return number + len(completed), completed

    def watch(self, task_id: str | None = None) -> DictWatch:
        return DictWatch(self)

    def forget(self, task_id: str) -> None:
        self.rows.pop(task_id, None)

    def revoke(self, task_id: str, *, terminate: bool = False, signal: int | str = "SIGTERM") -> bool:
        if self.get_task_meta(task_id).ready:
            return False
        self._put(task_id, "REVOKED", None)
        return True

    def parent_of(self, task_id: str) -> tuple[str, bool] | None:
        return self.parents.get(task_id)

    def children_of(self, task_id: str) -> list[tuple[str, bool]]:
        return self.submitted[task_id]

    def save_group(self, group: GroupResult) -> GroupResult:
        self.groups[group.id] = [(member.id, isinstance(member, GroupResult)) for member in group]
        group.mark_as_stored()
        return group

    def restore_group(self, group_id: str) -> GroupResult | None:
        return GroupResult.stored(group_id, self) if group_id in self.groups else None

    def delete_group(self, group_id: str) -> None:
        self.groups.pop(group_id, None)

    def group_members(self, group_id: str) -> Iterable[tuple[str, bool]]:
        return self.groups[group_id]

    def group_values(self, group_id: str) -> list[Any] | None:
        return None

    def group_counts(self, group_id: str) -> GroupCounts | None:
        if group_id not in self.groups:
            return None
        statuses = [self.get_task_meta(member).status for member, _ in self.groups[group_id]]
        done = statuses.count("DONE")
        return GroupCounts(
            len(statuses), done, statuses.count("FAILURE"), statuses.count("REVOKED"), len(statuses), done
        )


@pytest.fixture
def backend() -> DictBackend:
    return DictBackend()


@pytest.fixture(autouse=True)
def _no_default(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LITEERRESULT_DB", raising=False)
    yield
    set_default_backend(None)


# One's own


def test_a_dict_can_be_a_backend(backend: DictBackend, store: ResultStore) -> None:
    typed: Backend = backend
    assert isinstance(typed, Backend)
    assert isinstance(store, Backend)
    assert not isinstance(object(), Backend)


def test_get_from_a_backend_of_ones_own(backend: DictBackend) -> None:
    result = AsyncResult("a", backend)
    assert (result.status, result.ready(), result.exists(), result.result) == ("PENDING", False, False, None)
    with pytest.raises(liteerresult.TimeoutError):
        result.get(timeout=0)
    with pytest.raises(liteerresult.TimeoutError):
        result.get(timeout=0.01)
    with ThreadPoolExecutor() as pool:
        waiter = pool.submit(result.get, timeout=DEADLINE)
        backend.finish("a", (1, "x"))
        assert waiter.result() == (1, "x")
    assert (result.status, result.state, result.successful()) == ("DONE", "SUCCESS", True)
    assert backend.watches == set()


def test_failures_from_a_backend_of_ones_own(backend: DictBackend) -> None:
    backend.fail("a", ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        AsyncResult("a", backend).get()
    assert AsyncResult("b", backend).revoke()
    with pytest.raises(TaskRevokedError):
        BaseAsyncResult("b", backend).get()
    AsyncResult("a", backend).forget()
    assert not AsyncResult("a", backend).exists()


def test_join_and_iterate_with_a_backend_of_ones_own(backend: DictBackend) -> None:
    group = GroupResult("film", ["a", GroupResult("inner", ["b"], backend=backend), "a"], backend=backend)
    assert (group.ready(), group.waiting()) == (False, True)
    with ThreadPoolExecutor() as pool:
        joined = pool.submit(group.join, timeout=DEADLINE)
        values = pool.submit(list, group.iterate(timeout=DEADLINE))
        backend.finish("b", 2)
        backend.finish("a", 1)
        assert joined.result() == [1, [2], 1]
        assert values.result() == [[2], 1, 1]
    assert (group.ready(), group.successful(), group.completed_count()) == (True, True, 3)
    assert backend.watches == set()


@pytest.mark.asyncio
async def test_await_with_a_backend_of_ones_own(backend: DictBackend) -> None:
    async def collect() -> list[Any]:
        return [value async for value in ResultSet(["a", "b"], backend=backend).iterate()]

    collected = asyncio.create_task(collect())
    await asyncio.sleep(0)
    backend.finish("b", 2)
    backend.finish("a", 1)
    assert await asyncio.wait_for(collected, DEADLINE) == [2, 1]
    assert await AsyncResult("a", backend) == 1


def test_futures_with_a_backend_of_ones_own(backend: DictBackend) -> None:
    future = AsyncResult("a", backend).future()
    backend.finish("a", 1)
    assert future.result(DEADLINE) == 1


def test_groups_in_a_backend_of_ones_own(backend: DictBackend) -> None:
    group = GroupResult("film", ["b", "a"], backend=backend).save()
    restored = GroupResult.restore("film", backend)
    assert restored is not None
    assert [member.id for member in restored] == ["b", "a"]
    backend.finish("a", 1)
    assert (restored.completed_count(), restored.ready(), group.completed_count()) == (1, False, 1)
    assert type(TaskSetResult.restore("film", backend)) is TaskSetResult
    group.delete()
    assert GroupResult.restore("film", backend) is None


def test_families_in_a_backend_of_ones_own(backend: DictBackend) -> None:
    backend.parents["child"] = ("top", False)
    backend.submitted["top"].append(("child", False))
    child = AsyncResult("child", backend)
    assert child.parent == "top"
    assert AsyncResult("top", backend).children == ["child"]
    assert result_from_tuple(child.as_tuple(), backend).parent == "top"


# The default one


def test_set_default_backend(backend: DictBackend, store: ResultStore) -> None:
    set_default_backend(store)
    assert AsyncResult("a").backend is store
    set_default_backend(backend)
    assert AsyncResult("a").backend is backend
    assert ResultSet(["a"])[0].backend is backend
    assert TaskSetResult("set", ["a"]).subtasks[0].backend is backend
    assert result_from_tuple((("a", None), None)).backend is backend
    assert GroupResult("film", []).save() == "film"
    assert GroupResult.restore("film") == "film"
    assert AsyncResult("a", store).backend is store


def test_set_default_backend_refuses_what_is_none(tmp_path: Path) -> None:
    for wrong in (object(), str(tmp_path), tmp_path, ResultStore):
        if wrong is not ResultStore:
            with pytest.raises(TypeError):
                set_default_backend(wrong)  # type: ignore[arg-type]
    with pytest.raises(ImproperlyConfigured):
        AsyncResult("a")


def test_without_a_backend_the_error_names_both_ways() -> None:
    for call in (
        lambda: AsyncResult("a"),
        lambda: TaskSetResult("set", ["a"]),
        lambda: GroupResult("film", []).save(),
        lambda: GroupResult.restore("film"),
        lambda: result_from_tuple((("a", None), None)),
    ):
        with pytest.raises(ImproperlyConfigured) as caught:
            call()
        assert "set_default_backend" in str(caught.value)
        assert "LITEERRESULT_DB" in str(caught.value)


def test_an_unset_default_is_gone(store: ResultStore) -> None:
    set_default_backend(store)
    set_default_backend(None)
    with pytest.raises(ImproperlyConfigured):
        AsyncResult("a")


def test_liteerresult_db(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITEERRESULT_DB", store.path)
    store.mark_as_done("a", 1)
    result = AsyncResult("a")
    backend = result.backend
    assert isinstance(backend, ResultStore)
    with backend:
        assert backend.path == store.path
        assert result.get() == 1
        assert AsyncResult("b").backend is backend  # opened once
        store.mark_as_done("b", 2)
        assert AsyncResult("b").get(timeout=DEADLINE) == 2
    assert GroupResult.restore("unknown") is None  # a closed one is not handed out again
    again = AsyncResult("a").backend
    assert isinstance(again, ResultStore)
    with again:
        assert again is not backend


def test_set_default_backend_comes_before_liteerresult_db(
    store: ResultStore, backend: DictBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITEERRESULT_DB", store.path)
    set_default_backend(backend)
    assert AsyncResult("a").backend is backend


def test_an_empty_liteerresult_db_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITEERRESULT_DB", "")
    with pytest.raises(ImproperlyConfigured):
        AsyncResult("a")
