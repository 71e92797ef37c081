"""What a batch is in the file: how calls are told apart, and what a resumed run takes over."""

from __future__ import annotations

import functools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import pytest

from liteerresult import AsyncResult, ResultStore, Runner, WorkerLostError, batch
from liteerresult.backend import GroupCounts
from liteerresult.batch import decide_lost, let_go, plan_group, plan_task, revoke_all
from liteerresult.fingerprints import call_name, fingerprint
from liteerresult.serialization import Serializer

if TYPE_CHECKING:
    from collections.abc import Callable

encode: Callable[[Any], Any] = Serializer().encode


def mark(*args: Any, name: str = "f", **kwargs: Any) -> str:
    return fingerprint(name, args, kwargs, encode)[0]


def calls(*values: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    return [((value,), {}) for value in values]


def double(x: int) -> int:
    return 2 * x


def scale(factor: int, x: int) -> int:
    return factor * x


class Opaque:
    def __init__(self, inside: Any) -> None:
        self.inside = inside

    def method(self) -> None: ...

    def __call__(self) -> None: ...

    def __repr__(self) -> str:
        return f"<{self.inside}>"


# Fingerprints


@pytest.mark.parametrize("args", [(), (1,), (1.5, "a", None), ([1, [2]], True), ("{",), ({"b": 1, "a": 2},), ((1,),)])
def test_a_plain_call_is_told_by_its_json(args: tuple[Any, ...]) -> None:
    """Also the calls that take the short way there."""
    mark, encoded, kwargs = fingerprint("f", args, {}, encode)
    assert (encoded, kwargs) == (encode(args), "{}")
    identity = json.dumps([json.loads(encoded), {}], sort_keys=True)
    assert mark == blake2b(b"f\0" + identity.encode(), digest_size=16).hexdigest()


def test_equal_calls_have_one_fingerprint() -> None:
    assert mark(1, "a", x=[1]) == mark(1, "a", x=[1])
    assert mark({"a": 1, "b": 2}) == mark({"b": 2, "a": 1})
    assert mark(x=1, y=2) == mark(y=2, x=1)
    assert mark({1: "a", 2: "b"}) == mark({2: "b", 1: "a"})
    assert mark({"x", "y"}) == mark({"y", "x"})
    assert mark([{frozenset("abc"), frozenset("d")}]) == mark([{frozenset("d"), frozenset("cba")}])
    assert mark(Opaque(3)) == mark(Opaque(3))
    assert mark(float("nan")) == mark(float("nan"))


@pytest.mark.parametrize(
    "others",
    [
        (1, 1.0, True, "1", None, [1], (1,), {1}, frozenset({1}), b"1"),
        ([], (), {}, set(), "", 0),
        ([1, 2], [2, 1], [[1], 2], {1, 2}),
        ({"a": 1}, {"a": 2}, {"b": 1}, [["a", 1]]),
        ({"$set": [1, 2]}, {"$set": [2, 1]}, {1, 2}),
        (Opaque(1), Opaque(2), "<1>", "<2>"),
    ],
)
def test_other_calls_have_other_fingerprints(others: tuple[Any, ...]) -> None:
    assert len({mark(value) for value in others}) == len(others)
    assert len({mark(x=value) for value in others}) == len(others)


def test_names_and_places_count() -> None:
    assert len({mark(), mark(name="g"), mark(1), mark(1, 1), mark(x=1), mark(y=1), mark([1]), mark((1,))}) == 8


def test_the_argument_order_in_equal_strings_does_not_matter() -> None:
    """Which of two equal strings are one object is the interpreter's affair: pickle tells them apart."""
    text = "a longer text"
    same = " ".join(text.split())
    assert same is not text
    assert mark(Opaque(1), text, text) == mark(Opaque(1), text, same)


def test_what_json_cannot_keep_is_shown() -> None:
    _, args, kwargs = fingerprint("f", (1, Opaque("in")), {"x": Opaque("kw"), "y": {2}}, encode)
    decode = Serializer().decode
    assert decode(args, "json") == (1, "<in>")
    assert decode(kwargs, "json") == {"x": "<kw>", "y": {2}}


def test_what_cannot_be_pickled_either_is_told_by_its_look() -> None:
    class Local(Opaque):
        pass

    lock = threading.Lock()
    assert mark(Local(1)) == mark(Local(1))
    assert mark(Local(1)) != mark(Local(2))
    assert mark(lock) == mark(lock)


def test_a_call_is_named_after_its_function() -> None:
    assert call_name(double) == f"{__name__}.double"
    assert call_name(functools.partial(functools.partial(double), 1)) == f"{__name__}.double"
    assert call_name(Opaque(1).method) == f"{__name__}.Opaque.method"
    assert call_name(Opaque(1)) == f"{__name__}.Opaque"
    assert call_name(len) == "builtins.len"
    assert call_name(lambda: None).endswith(".<lambda>")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (functools.partial(scale, 2), functools.partial(scale, 3)),
        (functools.partial(scale, x=2), functools.partial(scale, x=3)),
        (functools.partial(scale, 2), functools.partial(scale, 2.0)),
    ],
)
def test_what_a_partial_function_brings_is_part_of_the_call(store: ResultStore, before: Any, after: Any) -> None:
    """Otherwise a batch is resumed with another constant, and its results are of two kinds."""
    with Runner(store, ThreadPoolExecutor(1)) as runner:
        runner.map(before, [1], group_id="g")
        with pytest.raises(ValueError, match="number 0"):
            runner.map(after, [1], group_id="g")


# Planning


def test_a_new_batch(store: ResultStore, clock: Any) -> None:
    plan = plan_group(store, "g", "name", calls(1, Opaque(2)), "parent")
    assert plan.todo == [(0, "g/0", 0), (1, "g/1", 0)]
    assert plan.group is not None
    metas = store.get_many(["g/0", "g/1"])
    assert [(meta.status, meta.name, meta.retries) for meta in metas] == [("PENDING", "name", 0)] * 2
    assert [(meta.parent_id, meta.owner, meta.created_at) for meta in metas] == [
        ("parent", store.own_owner(), clock.time())
    ] * 2
    assert [meta.args for meta in metas] == [(1,), ("<2>",)]
    counts = store.group_counts("g")
    assert counts is not None
    assert (counts.size, counts.done, counts.members) == (2, 0, 2)
    assert store.owners() == [store.own_owner()]


def test_a_task_of_its_own(store: ResultStore) -> None:
    plan = plan_task(store, "t", "name", (1,), {"x": 2}, None)
    assert (plan.group, plan.todo) == (None, [(0, "t", 0)])
    meta = store.get_task_meta("t")
    assert (meta.status, meta.args, meta.kwargs, meta.owner) == ("PENDING", (1,), {"x": 2}, store.own_owner())


def test_what_another_runner_of_this_process_has_is_left_to_it(store: ResultStore) -> None:
    """Its owner is the same, so the file alone does not tell."""
    first = plan_group(store, "g", "f", calls(1, 2), None)
    assert plan_group(store, "g", "f", calls(1, 2), None).todo == []
    let_go(store, ["g/1"])
    assert plan_group(store, "g", "f", calls(1, 2), None).todo == first.todo[1:]


def test_a_batch_that_could_not_be_recorded_is_in_nobodys_hands(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):  # noqa: PT012 - made, then interrupted
        context.setattr(batch, "GroupResult", interrupt)
        plan_group(store, "g", "f", calls(1, 2), None)
    assert [task_id for _, task_id, _ in plan_group(store, "g", "f", calls(1, 2), None).todo] == ["g/0", "g/1"]


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("status", ["REVOKED", "FAILURE"])
def test_what_another_runner_has_and_somebody_resubmitted(store: ResultStore, status: str) -> None:
    """It has no owner then: that Runner's attempt is over, and nobody else would make the next."""
    plan_group(store, "g", "f", calls(1, 2), None)
    if status == "REVOKED":
        store.revoke("g/1")
    else:
        store.mark_as_failure("g/1", "why")
    store.resubmit("g/1")
    assert plan_group(store, "g", "f", calls(1, 2), None).todo == [(1, "g/1", 1)]


def test_what_a_resumed_run_takes_over(store: ResultStore) -> None:
    words = ["done", "failed", "revoked", "waiting", "retry", "running", "custom"]
    plan_group(store, "g", "f", calls(*words), None)
    store.mark_as_done("g/0", 1)
    store.mark_as_failure("g/1", "why")
    store.mark_as_revoked("g/2")
    store.mark_as_retry("g/4", "once")
    store.mark_as_started("g/5")
    store.update_state("g/6", "PROGRESS", 1)
    let_go(store, [f"g/{number}" for number in range(7)])
    plan = plan_group(store, "g", "f", calls(*words), None)
    assert plan.todo == [(1, "g/1", 1), (2, "g/2", 1), (3, "g/3", 0), (4, "g/4", 1)]
    assert [meta.status for meta in store.get_many([f"g/{number}" for number in range(7)])] == [
        "DONE", "PENDING", "PENDING", "PENDING", "RETRY", "STARTED", "PROGRESS",
    ]  # fmt: skip
    assert {store.get_task_meta(f"g/{number}").owner for number in (1, 2, 3, 4)} == {store.own_owner()}


@pytest.mark.parametrize("count", [1, 120])
def test_a_batch_whose_group_was_deleted(store: ResultStore, count: int) -> None:
    """Its tasks are still there: what is done stays done."""
    store.mark_as_done("g0/0", "of another group")
    plan_group(store, "g", "f", calls(*range(count)), None)
    store.mark_as_done("g/0", 7)
    store.delete_group("g")
    for gone in range(1, count, 2):
        store.forget(f"g/{gone}")
    let_go(store, [f"g/{number}" for number in range(count)])
    plan = plan_group(store, "g", "f", calls(*range(count)), None)
    assert plan.todo == [(position, f"g/{position}", 0) for position in range(1, count)]
    assert store.group_counts("g") == GroupCounts(count, 1, 0, 0, count, 1)
    assert AsyncResult("g/0", store).get(timeout=0) == 7


def test_a_refused_batch_leaves_no_trace(store: ResultStore) -> None:
    plan_group(store, "g", "f", calls(1, 2), None)
    store.mark_as_failure("g/0", "why")
    for other in (calls(1, 3), calls(1), calls(1, 2, 3)):
        with pytest.raises(ValueError, match="'g'"):
            plan_group(store, "g", "f", other, None)
    assert [meta.status for meta in store.get_many(["g/0", "g/1"])] == ["FAILURE", "PENDING"]
    assert not store.exists("g/2")


def test_a_group_made_by_hand_is_not_mistaken_for_a_batch(store: ResultStore) -> None:
    store.create_group([store.create_task("x", task_id="t")], group_id="g")
    with pytest.raises(ValueError, match="other calls"):
        plan_group(store, "g", "x", calls(1), None)
    store.create_group([store.restore_group("g")], group_id="outer")
    with pytest.raises(ValueError, match="other calls"):
        plan_group(store, "outer", "x", calls(1), None)


@pytest.mark.parametrize(("submitter", "worker"), [("1", "2"), ("2", "1")])
@pytest.mark.parametrize("status", ["STARTED", "PROGRESS", "LOST"])
@pytest.mark.parametrize("first", ["settled together", "submitter settled first"])
def test_a_run_whose_submitter_and_workers_died_is_taken_over_whole(
    store: ResultStore, submitter: str, worker: str, status: str, first: str
) -> None:
    """In whichever order the dead are found: what the worker ran goes back to nobody who is dead."""
    plan_group(store, "g", "f", calls(*range(3)), None)
    dead = {name: f"{name}@host-{name * 32}" for name in (submitter, worker)}

    def kill_all(connection: Any) -> None:
        for owner in dead.values():
            connection.execute("INSERT INTO owners (id, pid, host) VALUES (?, 1, 'host')", (owner,))
        connection.execute("UPDATE tasks SET owner = ?, submitter = ?", (dead[submitter], dead[submitter]))
        connection.execute(
            "UPDATE tasks SET status = 'STARTED', owner = ?, started_at = 5 WHERE id = 'g/1'", (dead[worker],)
        )
        if status != "STARTED":
            held_by = dead[submitter if status == "LOST" else worker]
            connection.execute("UPDATE tasks SET status = ?, owner = ? WHERE id = 'g/1'", (status, held_by))

    store._db.transact(kill_all)
    if first == "submitter settled first":
        store.settle(dead[submitter])
    plan = plan_group(store, "g", "f", calls(*range(3)), None)
    assert plan.todo == [(0, "g/0", 1), (1, "g/1", 1), (2, "g/2", 1)]
    assert store.owners() == [store.own_owner()]


# What becomes of lost ones


def test_the_lost_are_decided_on(store: ResultStore) -> None:
    plan_group(store, "g", "f", calls(*range(3)), None)
    error = '{"type": "WorkerLostError", "module": "liteerresult.errors", "text": "died", "args": ["died"]}'

    def lose(connection: Any) -> None:
        connection.execute("UPDATE tasks SET status = 'STARTED', owner = 'worker', started_at = 5")
        connection.execute(
            "UPDATE tasks SET status = 'LOST', owner = submitter, result = ?, encoding = 'json'", (error,)
        )

    store._db.transact(lose)
    store.mark_as_revoked("g/2")
    decide_lost(store, [("g/0", 0), ("g/2", 0)], [("g/1", 0), ("g/2", 0)])
    again, failed, revoked = store.get_many(["g/0", "g/1", "g/2"])
    assert (again.status, again.retries, again.owner) == ("RETRY", 1, store.own_owner())
    assert isinstance(store.attempts("g/0")[0].result, WorkerLostError)
    assert (failed.status, type(failed.result), failed.done_at) == ("FAILURE", WorkerLostError, store.clock.time())
    assert revoked.status == "REVOKED"


def test_revoking_spares_what_is_final(store: ResultStore) -> None:
    plan_group(store, "g", "f", calls(*range(3)), None)
    store.mark_as_done("g/1", 1)
    revoke_all(store, ["g/0", "g/1", "g/2", "nobody"])
    assert [meta.status for meta in store.get_many(["g/0", "g/1", "g/2"])] == ["REVOKED", "DONE", "REVOKED"]
    assert not store.exists("nobody")
    counts = store.group_counts("g")
    assert counts is not None
    assert (counts.revoked, counts.done) == (2, 1)
