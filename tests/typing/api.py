"""The public surface as a type checker sees it. Read by mypy, never run."""

from __future__ import annotations

import asyncio
import concurrent.futures
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, assert_type

from liteerresult import (
    AsyncResult,
    Backend,
    BaseAsyncResult,
    ContentDisallowed,
    DecodeError,
    EagerResult,
    EncodeError,
    GroupResult,
    ImproperlyConfigured,
    LiteerresultError,
    NotAResultStore,
    RemoteError,
    ResultBase,
    ResultSet,
    ResultStore,
    Runner,
    SchemaMismatch,
    StoreBusy,
    StoreCorrupt,
    StoreError,
    TaskRevokedError,
    TaskSetResult,
    TimeoutError as ResultTimeoutError,
    TransitionError,
    WorkerLostError,
    register_type,
    result_from_tuple,
    set_default_backend,
    states,
)


class FixedClock:
    """Anything of this shape is a clock."""

    def time(self) -> float:
        return 0.0

    def monotonic(self) -> float:
        return 0.0


# A store.
store = ResultStore("results.db")
ResultStore(Path("results.db"), durability="process-crash", clock=FixedClock(), new_id=lambda: "id")
ResultStore("results.db", durability="power-loss", serializer="pickle", accept=("json", "pickle"))
ResultStore("results.db", durability="perhaps")  # type: ignore[arg-type]
ResultStore(1)  # type: ignore[arg-type]
with ResultStore("results.db") as opened:
    assert_type(opened, ResultStore)

# Any store is a backend, and can be the default one.
backend: Backend = store
set_default_backend(store)

# Its verbs.
task = assert_type(store.create_task("render"), AsyncResult)
store.create_task("render", task_id="a", args=(1, "x"), kwargs={"size": 3}, parent=task)
group = assert_type(store.create_group([task, "b"], group_id="film-7", parent=task), GroupResult)
with store.run_task("a") as running:
    running.update_state("PROGRESS", {"current": 3, "total": 10})
    running.result = {"rows": 3}
store.mark_as_started("a")
store.mark_as_done("a", 42)
store.mark_as_failure("a", ValueError("no"))
store.mark_as_retry("a", ValueError("again"))
store.mark_as_revoked("a")
store.mark_many_as_done({"a": 1, "b": [2]})
store.update_state("a", "PROGRESS", {"current": 3})
store.update_state("a", "PROGRESS", None)
store.resubmit("a")
store.forget("a")
assert_type(store.exists("a"), bool)
store.get_task_meta("a")
assert_type(store.save_group(group), GroupResult)
assert_type(store.restore_group("film-7"), GroupResult | None)
store.delete_group("film-7")
assert_type(store.reap(), list[str])
assert_type(store.cleanup(timedelta(days=1)), int)
assert_type(store.cleanup(86_400.0), int)

# One result. Values are Any: the file does not know their types.
result = AsyncResult("a")
AsyncResult("a", store, parent=task)
BaseAsyncResult("a", store)
base: ResultBase = result
assert_type(result.id, str)
assert_type(result.task_id, str)
assert_type(result.is_done(), bool)
assert_type(result.ready(), bool)
assert_type(result.successful(), bool)
assert_type(result.failed(), bool)
assert_type(result.exists(), bool)
assert_type(result.status, str)
assert_type(result.state, str)
assert_type(result.traceback, str | None)
assert_type(result.result, Any)
assert_type(result.info, Any)
assert_type(result.wait(), Any)
assert_type(result.get(timeout=1.5, propagate=False), Any)
assert_type(result.name, str | None)
assert_type(result.retries, int)
assert_type(result.date_done, datetime | None)
assert_type(result.as_list(), list[str])
result.as_tuple()
result.maybe_throw()
result.revoke(terminate=True, signal="SIGTERM")
result.forget()
result.get("soon")  # type: ignore[arg-type]

# Several.
results = ResultSet([result, task])
results.add(result)
results.update([result])
results.discard(result)
results.remove(result)
assert_type(len(results), int)
assert_type(results.ready(), bool)
assert_type(results.successful(), bool)
assert_type(results.failed(), bool)
assert_type(results.waiting(), bool)
assert_type(results.completed_count(), int)
assert_type(results.join(timeout=1.5, propagate=False), list[Any])
assert_type(results.get(), list[Any])
for value in results.iterate(timeout=1.5):
    assert_type(value, Any)
for member in results:  # results of tasks, or groups
    assert_type(member, Any)
    member.ready()
results.clear()

made = GroupResult("film-7", [result, group])
made.save()
made.save(backend=store)
made.delete()
assert_type(GroupResult.restore("film-7", backend=store), GroupResult | None)
nested: ResultSet = made

task_set = TaskSetResult("set-1", ["a", "b"])
assert_type(task_set.taskset_id, str)
assert_type(task_set.total, int)
for value in task_set.iterate():
    assert_type(value, Any)

eager: ResultBase = EagerResult("a", 42, states.SUCCESS)
rebuilt: ResultBase | None = result_from_tuple((("a", None), None), backend=store)


# Waiting without blocking.
async def wait_for_all() -> None:
    """Await one result, a group, and each value as it comes."""
    assert_type(await result, Any)
    assert_type(await group, list[Any])
    async for value in group.iterate():
        assert_type(value, Any)
    await asyncio.wrap_future(result.future())


assert_type(result.future(), concurrent.futures.Future[Any])


# A batch.
def render(frame: int) -> str:
    """Stand for the work."""
    return f"{frame}.png"


with Runner(store, ProcessPoolExecutor(4)) as runner:
    assert_type(runner, Runner)
    assert_type(runner.map(render, range(10), group_id="film-7", retries=2), GroupResult)


# Values of one's own.
@dataclass(frozen=True)
class Point:
    """Stand for a user's type."""

    x: int
    y: int


register_type(Point)

# One tree of errors, with fields.
errors: tuple[type[LiteerresultError], ...] = (
    ContentDisallowed,
    DecodeError,
    EncodeError,
    ImproperlyConfigured,
    NotAResultStore,
    RemoteError,
    ResultTimeoutError,
    SchemaMismatch,
    StoreBusy,
    StoreCorrupt,
    StoreError,
    TaskRevokedError,
    TransitionError,
    WorkerLostError,
)
try:
    result.get(timeout=0)
except WorkerLostError as lost:
    assert_type(lost.pid, int | None)
except TimeoutError as late:  # the builtin one catches ours
    assert_type(late, TimeoutError)
except TransitionError as refused:
    assert_type((refused.task_id, refused.from_status, refused.to_status), tuple[str, str | None, str])
