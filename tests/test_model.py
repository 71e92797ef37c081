"""The store and the file's triggers against a plain dict, driven by two stores and a plain SQL writer in any order."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sqlite3
import tempfile
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from liteerresult import (
    AsyncResult,
    EncodeError,
    LiteerresultError,
    ResultSet,
    ResultStore,
    TaskRevokedError,
    TransitionError,
    WorkerLostError,
)
from liteerresult.backend import GroupCounts
from liteerresult.schema import _statements
from tests.support import ManualClock

FINAL = {"DONE", "FAILURE", "REVOKED"}
AFTER_EVERYTHING = 4_000_000_000.0  # so that rows of SQL writers, who use the machine's time, are old

task_ids = st.sampled_from(["a", "b", "c", "d"])
group_ids = st.sampled_from(["G", "H", "I", "J"])
member_ids = task_ids.map(lambda task_id: (task_id, False)) | group_ids.map(lambda group_id: (group_id, True))
workers = st.sampled_from(["first", "second"])
values = st.sampled_from([None, 7, "text", [1, 2], {"rows": 3}])
written = st.sampled_from(["DONE", "FAILURE", "REVOKED", "STARTED", "RETRY", "PROGRESS", "PENDING"])
positions = st.integers(0, 4)


@dataclass
class Task:
    status: str = "PENDING"
    retries: int = 0
    owner: str | None = None
    value: Any = None
    attempts: dict[int, str] = field(default_factory=dict)
    number: int | None = None


@dataclass
class Group:
    saved: bool = True
    members: dict[int, tuple[str, bool]] = field(default_factory=dict)  # position: id, is it a group


class Arithmetic:
    """What groups must count, from members and statuses alone."""

    def __init__(self, statuses: dict[str, str], groups: dict[str, list[tuple[str, bool]]]) -> None:
        self.statuses = statuses
        self.groups = groups

    def leaves(self, group_id: str) -> list[str]:
        found = []
        for member, is_group in self.groups.get(group_id, []):
            found += self.leaves(member) if is_group else [member]
        return found

    def is_done(self, member: str, is_group: bool) -> bool:
        return all(self.statuses.get(leaf) == "DONE" for leaf in (self.leaves(member) if is_group else [member]))

    def row(self, group_id: str) -> tuple[int, ...]:
        count = Counter(self.statuses.get(leaf) for leaf in self.leaves(group_id))
        members = self.groups.get(group_id, [])
        return (
            count.total(),
            count["DONE"],
            count["FAILURE"],
            count["REVOKED"],
            len(members),
            sum(self.is_done(member, False) for member, is_group in members if not is_group),
            sum(self.is_done(member, True) for member, is_group in members if is_group),
        )

    def reaches(self, start: str, target: str) -> bool:
        """Tell whether *target* is *start* or nested in it."""
        return start == target or any(
            is_group and self.reaches(member, target) for member, is_group in self.groups.get(start, [])
        )


GROUP_COLUMNS = "size, done, failed, revoked, members, tasks_done, groups_done"


class Machine(RuleBasedStateMachine):
    """Every verb in every order; after each step the file says what the dict says."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = ManualClock(unix=AFTER_EVERYTHING)
        self.stores: dict[str, ResultStore] = {}
        self.open("first")
        self.open("second")
        self.sql = sqlite3.connect(self.folder / "results.db", isolation_level=None)
        self.tasks: dict[str, Task] = {}
        self.groups: dict[str, Group] = {}
        self.last_number = 0

    def open(self, worker: str) -> None:
        self.stores[worker] = ResultStore(self.folder / "results.db", durability="process-crash", clock=self.clock)

    def teardown(self) -> None:
        self.sql.close()
        for store in self.stores.values():
            store.close()
        shutil.rmtree(self.folder)

    # The model

    def arithmetic(self) -> Arithmetic:
        return Arithmetic(
            {task_id: task.status for task_id, task in self.tasks.items()},
            {key: [group.members[at] for at in sorted(group.members)] for key, group in self.groups.items()},
        )

    def fence(self, worker: str, task_id: str) -> int | None:
        # A refused finish makes the store forget its attempt: see TestFence below for what that must not mean.
        return self.stores[worker]._attempts.get(task_id)

    def is_fenced(self, worker: str, task_id: str) -> bool:
        held = self.fence(worker, task_id)
        return held is not None and task_id in self.tasks and self.tasks[task_id].retries != held

    def is_final(self, task_id: str) -> bool:
        return task_id in self.tasks and self.tasks[task_id].status in FINAL

    def to(self, task_id: str, status: str, value: Any = None) -> None:
        task = self.tasks.setdefault(task_id, Task())
        if status == "RETRY":
            task.attempts[task.retries] = "RETRY"
            task.retries += 1
        task.status, task.value = status, value

    def back(self, task_id: str) -> None:
        task = self.tasks[task_id]
        task.attempts[task.retries] = task.status
        task.retries += 1
        task.status, task.value, task.owner, task.number = "PENDING", None, None, None

    def dump(self) -> list[Any]:
        tables = ["tasks", "attempts", "groups", "group_members", "group_tasks", "completion_floor"]
        return [self.sql.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in tables]

    def refused(self, operation: Any, *errors: type[Exception]) -> Any:
        """Run what must be refused, and see that it left everything as it was."""
        before = self.dump()
        with pytest.raises(errors) as caught:
            operation()
        assert self.dump() == before
        return caught.value

    def refused_transition(self, operation: Any, task_id: str, to_status: str) -> None:
        error = self.refused(operation, TransitionError)
        stored = self.tasks.get(task_id)
        assert (error.task_id, error.from_status, error.to_status) == (task_id, stored and stored.status, to_status)
        assert error.reason

    def by_sql(self, legal: bool, sql: str, *parameters: Any) -> bool:
        if legal:
            self.sql.execute(sql, parameters)
        else:
            self.refused(lambda: self.sql.execute(sql, parameters), sqlite3.IntegrityError)
        return legal

    @initialize(tasks=st.sets(task_ids), group=st.lists(task_ids, max_size=4))
    def begin(self, tasks: set[str], group: list[str]) -> None:
        for task_id in sorted(tasks):
            self.create(task_id)
        self.create_group("G", [(member, False) for member in group], "first")

    # Tasks, by the store

    @rule(task_id=task_ids)
    def create(self, task_id: str) -> None:
        self.clock.advance(1)
        create = lambda: self.stores["first"].create_task("work", task_id=task_id, args=(1,), kwargs={"k": 2})  # noqa: E731
        if task_id in self.tasks:
            self.refused_transition(create, task_id, "PENDING")
        else:
            assert create() == task_id
            self.tasks[task_id] = Task()

    def may_start(self, task_id: str) -> bool:
        task = self.tasks.get(task_id)
        if task is None:
            return True
        if task.status in FINAL or task.status == "STARTED":
            return False
        return task.owner is None or task.status in ("PENDING", "RETRY")

    def started(self, worker: str, task_id: str) -> None:
        self.to(task_id, "STARTED")
        self.tasks[task_id].owner = self.stores[worker]._owners.own

    @rule(worker=workers, task_id=task_ids)
    def start(self, worker: str, task_id: str) -> None:
        self.clock.advance(1)
        start = lambda: self.stores[worker].mark_as_started(task_id)  # noqa: E731
        if self.may_start(task_id):
            attempt = start()
            self.started(worker, task_id)
            assert attempt == self.tasks[task_id].retries
        else:
            self.refused_transition(start, task_id, "STARTED")

    @rule(worker=workers, task_id=task_ids, status=st.sampled_from(sorted(FINAL)), value=values)
    def finish(self, worker: str, task_id: str, status: str, value: Any) -> None:
        self.clock.advance(1)
        store = self.stores[worker]
        verb = {
            "DONE": lambda: store.mark_as_done(task_id, value),
            "FAILURE": lambda: store.mark_as_failure(task_id, ValueError("no")),
            "REVOKED": lambda: store.mark_as_revoked(task_id, "not needed"),
        }[status]
        if self.is_final(task_id) or (status != "REVOKED" and self.is_fenced(worker, task_id)):
            self.refused_transition(verb, task_id, status)
        else:
            verb()
            self.to(task_id, status, value if status == "DONE" else None)

    @rule(worker=workers, task_id=task_ids)
    def finish_with_what_can_not_be_stored(self, worker: str, task_id: str) -> None:
        self.clock.advance(1)
        verb = lambda: self.stores[worker].mark_as_done(task_id, [object()])  # noqa: E731
        if self.is_final(task_id) or self.is_fenced(worker, task_id):
            self.refused_transition(verb, task_id, "FAILURE")
        else:
            with pytest.raises(EncodeError):
                verb()
            self.to(task_id, "FAILURE")

    @rule(worker=workers, chosen=st.dictionaries(task_ids, values, max_size=4))
    def finish_many(self, worker: str, chosen: dict[str, Any]) -> None:
        self.clock.advance(1)
        verb = lambda: self.stores[worker].mark_many_as_done(chosen)  # noqa: E731
        illegal = {task_id for task_id in chosen if self.is_final(task_id) or self.is_fenced(worker, task_id)}
        if illegal:
            assert self.refused(verb, TransitionError).task_id in illegal
        else:
            verb()
            for task_id, value in chosen.items():
                self.to(task_id, "DONE", value)

    @rule(worker=workers, task_id=task_ids, meta=values)
    def update_state(self, worker: str, task_id: str, meta: Any) -> None:
        self.clock.advance(1)
        verb = lambda: self.stores[worker].update_state(task_id, "PROGRESS", meta)  # noqa: E731
        if self.is_final(task_id) or self.is_fenced(worker, task_id):
            self.refused_transition(verb, task_id, "PROGRESS")
        else:
            verb()
            self.to(task_id, "PROGRESS", meta)

    @rule(worker=workers, task_id=task_ids)
    def retry(self, worker: str, task_id: str) -> None:
        self.clock.advance(1)
        verb = lambda: self.stores[worker].mark_as_retry(task_id, OSError("again"))  # noqa: E731
        if self.is_final(task_id) or self.is_fenced(worker, task_id):
            self.refused_transition(verb, task_id, "RETRY")
        elif task_id in self.tasks:
            verb()
            self.to(task_id, "RETRY")
        else:  # the first that is heard of the task
            verb()
            (retries,) = self.sql.execute("SELECT retries FROM tasks WHERE id = ?", (task_id,)).fetchone()
            attempts = dict(self.sql.execute("SELECT attempt, status FROM attempts WHERE task_id = ?", (task_id,)))
            self.tasks[task_id] = Task("RETRY", retries, attempts=attempts)

    @rule(worker=workers, task_id=task_ids)
    def resubmit(self, worker: str, task_id: str) -> None:
        verb = lambda: self.stores[worker].resubmit(task_id)  # noqa: E731
        if task_id in self.tasks and self.tasks[task_id].status in ("FAILURE", "REVOKED"):
            assert verb() == task_id
            self.back(task_id)
        else:
            self.refused_transition(verb, task_id, "PENDING")

    @rule(worker=workers, task_id=task_ids)
    def forget(self, worker: str, task_id: str) -> None:
        self.stores[worker].forget(task_id)
        self.tasks.pop(task_id, None)

    @rule(worker=workers, task_id=task_ids)
    def revoke(self, worker: str, task_id: str) -> None:
        cancelled = self.stores[worker].revoke(task_id)
        assert cancelled is not self.is_final(task_id)
        if cancelled:
            self.to(task_id, "REVOKED")

    @rule(
        worker=workers,
        task_id=task_ids,
        raises=st.booleans(),
        meta=st.none() | st.just({"current": 3}),
        interference=st.sampled_from([None, None, "done", "lost"]),
    )
    def run(self, worker: str, task_id: str, raises: bool, meta: Any, interference: str | None) -> None:
        """Run a task in a block; *interference* is what another program does to it meanwhile."""
        self.clock.advance(1)
        store = self.stores[worker]
        if not self.may_start(task_id):
            self.refused_transition(lambda: store.run_task(task_id).__enter__(), task_id, "STARTED")
            return
        end = KeyError("gone") if raises else None
        refusal = None
        try:
            with store.run_task(task_id) as task:
                self.started(worker, task_id)
                assert task.retries == self.tasks[task_id].retries
                if meta:
                    task.update_state("PROGRESS", meta)
                    self.to(task_id, "PROGRESS", meta)
                if interference == "done":
                    self.sql.execute("UPDATE tasks SET status = 'DONE', result = 'true' WHERE id = ?", (task_id,))
                    self.to(task_id, "DONE", True)
                elif interference == "lost":
                    self.sql.execute("UPDATE tasks SET status = 'FAILURE' WHERE id = ?", (task_id,))
                    self.to(task_id, "FAILURE")
                    self.sql.execute(
                        "UPDATE tasks SET status = 'PENDING', retries = retries + 1 WHERE id = ?", (task_id,)
                    )
                    self.back(task_id)
                before = self.dump()
                task.result = 42
                if end is not None:
                    raise end
        except KeyError:
            assert raises
            self.end_by_raising(task_id, interference)
        except TransitionError as exc:
            refusal = exc
        else:
            assert not raises
            assert interference is None
            self.to(task_id, "DONE", 42)
        if refusal is not None:
            assert interference is not None
            assert (refusal.task_id, refusal.from_status) == (task_id, self.tasks[task_id].status)
            assert refusal.__context__ is end
            assert self.dump() == before

    def end_by_raising(self, task_id: str, interference: str | None) -> None:
        """What the block raised goes on, whatever became of the task meanwhile."""
        if interference is None:
            self.to(task_id, "FAILURE")

    @rule(worker=workers)
    def reopen(self, worker: str) -> None:
        """One object of the process less, and another: the process lives on with its tasks."""
        self.stores[worker].close()
        self.open(worker)

    @rule()
    def die(self) -> None:
        """Close all that the process has open: what it leaves is lost, and who opens the store next says so."""
        own = self.stores["first"]._owners.own
        left = {key for key, task in self.tasks.items() if own and task.owner == own and task.status not in FINAL}
        for store in self.stores.values():
            store.close()
        self.open("first")
        self.open("second")
        for task_id in left:
            self.to(task_id, "FAILURE")
            assert isinstance(self.stores["first"].get_task_meta(task_id).result, WorkerLostError)
        assert self.stores["second"].reap() == []

    @rule()
    def cleanup(self) -> None:
        self.clock.advance(10)
        gone = True
        while gone:
            counts = self.arithmetic()
            nested = {
                member for group in self.groups.values() for member, is_group in group.members.values() if is_group
            }
            gone = {
                key for key in self.groups if key not in nested and counts.row(key)[0] == sum(counts.row(key)[1:4])
            }  # fmt: skip
            for key in gone:
                del self.groups[key]
        grouped = {
            member for group in self.groups.values() for member, is_group in group.members.values() if not is_group
        }
        old = [task_id for task_id in self.tasks if self.is_final(task_id) and task_id not in grouped]
        assert self.stores["first"].cleanup(0) == len(old)
        for task_id in old:
            del self.tasks[task_id]

    # Tasks, by SQL

    @rule(task_id=task_ids, status=written, gives=st.booleans())
    def sql_update(self, task_id: str, status: str, gives: bool) -> None:
        task = self.tasks.get(task_id)
        legal = task is None or (
            task.status not in FINAL
            and not (status == "PENDING" and task.status != "PENDING")
            and not (status == "STARTED" and task.status == "STARTED")
        )
        # A value that equals what the state before left is test_schema.py's.
        sets, parameters = ("status = ?, result = ?", [status, f'["{status}"]']) if gives else ("status = ?", [status])
        if self.by_sql(legal, f"UPDATE tasks SET {sets} WHERE id = ?", *parameters, task_id) and task is not None:
            self.to(task_id, status, [status] if gives and status not in ("PENDING", "STARTED") else None)

    @rule(status=written)
    def sql_update_all(self, status: str) -> None:
        """One statement changes all rows, or none."""
        illegal = [
            task
            for task in self.tasks.values()
            if task.status in FINAL
            or (status == "PENDING" and task.status != "PENDING")
            or (status == "STARTED" and task.status == "STARTED")
        ]
        if self.by_sql(not illegal, "UPDATE tasks SET status = ?", status):
            for task_id in self.tasks:
                self.to(task_id, status)

    @rule(task_id=task_ids)
    def sql_again(self, task_id: str) -> None:
        task = self.tasks.get(task_id)
        if task is not None and task.status == "PENDING":
            return  # test_states.py looks at that
        legal = task is None or task.status in ("FAILURE", "REVOKED")
        if (
            self.by_sql(legal, "UPDATE tasks SET status = 'PENDING', retries = retries + 1 WHERE id = ?", task_id)
            and task
        ):
            self.back(task_id)

    @rule(
        task_id=task_ids,
        verb=st.sampled_from(["INSERT", "INSERT OR ABORT", "INSERT OR REPLACE", "INSERT OR IGNORE"]),
        status=st.sampled_from(["PENDING", "DONE", "FAILURE", "REVOKED", "STARTED", "PROGRESS"]),
        value=st.none() | st.just("[1]"),
    )
    def sql_insert(self, task_id: str, verb: str, status: str, value: str | None) -> None:
        sql = f"{verb} INTO tasks (id, status, result) VALUES (?, ?, ?)"
        if status in ("PENDING", "STARTED"):
            value = None  # as in sql_upsert
        if verb == "INSERT OR IGNORE" and task_id in self.tasks:
            # Where the triggers note a task's groups may change; what they count does not: group_tasks_are_exact.
            columns = "id, status, result, encoding, traceback, retries, owner, started_at, done_at, done_number"
            look = f"SELECT {columns} FROM tasks ORDER BY id"
            before = self.sql.execute(look).fetchall()
            try:
                self.sql.execute(sql, (task_id, status, value))
            except sqlite3.IntegrityError:
                assert self.is_final(task_id)  # refused where ignoring would do: harmless
            assert self.sql.execute(look).fetchall() == before
            return
        replaces = verb == "INSERT OR REPLACE"
        legal = task_id not in self.tasks or (replaces and not self.is_final(task_id))
        if self.by_sql(legal, sql, task_id, status, value):
            old = self.tasks.pop(task_id, Task())
            self.tasks[task_id] = Task(
                status,
                value=[1] if value and status in ("DONE", "PROGRESS") else None,
                # REPLACE runs no DELETE trigger: earlier attempts may stay.
                attempts=old.attempts,
            )

    @rule(task_id=task_ids, status=written)
    def sql_upsert(self, task_id: str, status: str) -> None:
        task = self.tasks.get(task_id)
        if task is None and status == "RETRY":
            return  # TestUnknownRetry below
        legal = task is None or (
            task.status not in FINAL
            and not (status == "PENDING" and task.status != "PENDING")
            and not (status == "STARTED" and task.status == "STARTED")
        )
        sql = """INSERT INTO tasks (id, status, result) VALUES (?, ?, ?)
            ON CONFLICT (id) DO UPDATE SET status = excluded.status, result = excluded.result"""
        # Written while PENDING or STARTED it would be the value: test_schema.py looks at that.
        text = None if status in ("PENDING", "STARTED") else f'["{status}"]'
        if self.by_sql(legal, sql, task_id, status, text):
            self.to(task_id, status, [status] if text else None)

    @rule(
        task_id=task_ids,
        column=st.sampled_from(["result = '0'", "retries = 9", "done_at = 0", "owner = 'me'", "done_number = 1"]),
    )
    def sql_touch_final(self, task_id: str, column: str) -> None:
        if self.is_final(task_id):
            unchanged = column == "done_number = 1" and self.tasks[task_id].number == 1
            if not unchanged:
                sql = (
                    f"UPDATE OR IGNORE tasks SET {column} WHERE id = ?"
                    if task_id == "a"
                    else f"UPDATE tasks SET {column} WHERE id = ?"
                )
                before = self.dump()
                try:
                    self.sql.execute(sql, (task_id,))
                except sqlite3.IntegrityError:
                    pass
                else:
                    assert sql.startswith("UPDATE OR IGNORE")
                assert self.dump() == before

    @rule(task_id=task_ids)
    def sql_rename(self, task_id: str) -> None:
        self.by_sql(task_id not in self.tasks, "UPDATE OR REPLACE tasks SET id = id || 'x' WHERE id = ?", task_id)

    @rule(task_id=st.none() | task_ids)
    def sql_delete(self, task_id: str | None) -> None:
        if task_id is None:
            self.sql.execute("DELETE FROM tasks")
            self.tasks.clear()
        else:
            self.sql.execute("DELETE FROM tasks WHERE id = ?", (task_id,))
            self.tasks.pop(task_id, None)

    @rule(task_id=task_ids)
    def sql_rolled_back(self, task_id: str) -> None:
        """What is rolled back leaves no trace, in numbers neither."""
        before = self.dump()
        self.sql.execute("BEGIN IMMEDIATE")
        self.sql.execute("DELETE FROM tasks WHERE id = ?", (task_id,))
        self.sql.execute("INSERT INTO tasks (id, status) VALUES (?, 'DONE')", (task_id,))
        self.sql.execute("ROLLBACK")
        assert self.dump() == before

    # Groups, by the store

    @rule(key=group_ids, members=st.lists(member_ids, max_size=4), worker=workers)
    def create_group(self, key: str, members: list[tuple[str, bool]], worker: str) -> None:
        """Save a group, new or again, by a list of ids and of restored groups."""
        store = self.stores[worker]
        members = [(member, is_group) for member, is_group in members if not is_group or self.is_saved(member)]
        given = [store.restore_group(member) if is_group else member for member, is_group in members]
        counts = self.arithmetic()
        create = lambda: store.create_group(given, key)  # noqa: E731
        if any(is_group and counts.reaches(member, key) for member, is_group in members):
            # TestCycles below says which error
            self.refused(create, Exception)
            return
        group = create()
        assert group.id == key
        assert group.results == [member for member, _ in members]
        self.saved(key, members)

    def is_saved(self, key: str) -> bool:
        return key in self.groups and self.groups[key].saved

    def saved(self, key: str, members: list[tuple[str, bool]]) -> None:
        group = self.groups.setdefault(key, Group())
        group.saved = True
        if [group.members[at] for at in sorted(group.members)] != members:
            group.members = dict(enumerate(members))

    @rule(key=group_ids, change=st.sampled_from(["add", "remove", "swap", "none", "clear"]), task_id=task_ids)
    def save_again(self, key: str, change: str, task_id: str) -> None:
        group = self.stores["first"].restore_group(key)
        if not self.is_saved(key):
            assert group is None
            return
        assert group is not None
        before = [self.groups[key].members[at] for at in sorted(self.groups[key].members)]
        assert [(member.id, not isinstance(member, AsyncResult)) for member in group.results] == before
        if change == "add":
            group.add(task_id)
        elif change == "remove":
            group.discard(task_id)
        elif change == "clear":
            group.clear()
        elif change == "swap":
            group.results.reverse()
        wanted = [(member.id, not isinstance(member, AsyncResult)) for member in group.results]
        group.save()
        # Nested groups are saved with it, as they are.
        self.saved(key, wanted)
        self.name_nested(key)

    def name_nested(self, key: str) -> None:
        for member, is_group in self.groups[key].members.values():
            if is_group:
                self.groups[member].saved = True
                self.name_nested(member)

    @rule(key=group_ids)
    def delete_group(self, key: str) -> None:
        self.stores["second"].delete_group(key)
        if key in self.groups:
            self.groups[key].saved = False
        gone = True
        while gone:
            nested = {
                member for group in self.groups.values() for member, is_group in group.members.values() if is_group
            }
            gone = {name for name, group in self.groups.items() if not group.saved and name not in nested}
            for name in gone:
                del self.groups[name]

    # Groups, by SQL

    @rule(key=group_ids, verb=st.sampled_from(["INSERT", "INSERT OR REPLACE"]))
    def sql_insert_group(self, key: str, verb: str) -> None:
        if self.by_sql(key not in self.groups, f"{verb} INTO groups (id) VALUES (?)", key):
            self.groups[key] = Group()

    @rule(key=group_ids, at=positions, task_id=task_ids, verb=st.sampled_from(["INSERT", "INSERT OR REPLACE"]))
    def sql_add_task(self, key: str, at: int, task_id: str, verb: str) -> None:
        free = key not in self.groups or at not in self.groups[key].members
        if self.by_sql(
            free, f"{verb} INTO group_members (group_id, position, task_id) VALUES (?, ?, ?)", key, at, task_id
        ):
            self.groups.setdefault(key, Group()).members[at] = (task_id, False)

    @rule(key=group_ids, at=positions, child=group_ids, verb=st.sampled_from(["INSERT", "INSERT OR REPLACE"]))
    def sql_add_group(self, key: str, at: int, child: str, verb: str) -> None:
        free = key not in self.groups or at not in self.groups[key].members
        legal = free and child in self.groups and not self.arithmetic().reaches(child, key)
        if self.by_sql(
            legal, f"{verb} INTO group_members (group_id, position, child_id) VALUES (?, ?, ?)", key, at, child
        ):
            self.groups.setdefault(key, Group()).members[at] = (child, True)

    @rule(key=group_ids, at=st.none() | positions)
    def sql_remove_member(self, key: str, at: int | None) -> None:
        if at is None:
            self.sql.execute("DELETE FROM group_members WHERE group_id = ?", (key,))
        else:
            self.sql.execute("DELETE FROM group_members WHERE group_id = ? AND position = ?", (key, at))
        if key in self.groups:
            members = self.groups[key].members
            members.clear() if at is None else members.pop(at, None)

    @precondition(lambda self: any(group.members for group in self.groups.values()))
    @rule(data=st.data())
    def sql_move_member(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(key for key, group in self.groups.items() if group.members)))
        self.by_sql(False, "UPDATE OR REPLACE group_members SET position = position + 1 WHERE group_id = ?", key)

    @rule(key=group_ids)
    def sql_delete_group(self, key: str) -> None:
        contained = any((key, True) in group.members.values() for group in self.groups.values())
        if self.by_sql(not contained, "DELETE FROM groups WHERE id = ?", key):
            self.groups.pop(key, None)

    # What must hold after every step

    @invariant()
    def tasks_are_as_the_model_says(self) -> None:
        stored = {
            row[0]: row[1:]
            for row in self.sql.execute(
                "SELECT id, status, retries, owner, done_at IS NOT NULL, created_at IS NOT NULL FROM tasks"
            )
        }
        assert stored.keys() == self.tasks.keys()
        store = self.stores["first"]
        for task_id, task in self.tasks.items():
            status, retries, owner, finished, created = stored[task_id]
            assert (status, retries, owner) == (task.status, task.retries, task.owner)
            assert bool(finished) == (status in FINAL)
            assert created
            meta = store.get_task_meta(task_id)
            assert (meta.status, meta.retries, meta.ready) == (status, retries, status in FINAL)
            if status == "DONE":
                assert meta.result == task.value
                assert AsyncResult(task_id, store).get(timeout=0) == task.value
            elif status == "REVOKED":
                assert isinstance(meta.result, TaskRevokedError)
            elif status in ("PENDING", "STARTED"):
                assert meta.result is None
            assert store.exists(task_id)
        assert [meta.status for meta in store.get_many(["a", "b", "none"])] == [
            self.tasks[task_id].status if task_id in self.tasks else "PENDING" for task_id in ("a", "b", "none")
        ]
        for task_id in {"a", "b", "c", "d"} - self.tasks.keys():
            assert not store.exists(task_id)
        attempts: dict[str, dict[int, str]] = {}
        for task_id, attempt, status in self.sql.execute("SELECT task_id, attempt, status FROM attempts"):
            attempts.setdefault(task_id, {})[attempt] = status
        assert {key: attempts.pop(key, {}) for key in self.tasks} == {
            key: task.attempts for key, task in self.tasks.items()
        }
        assert not attempts

    @invariant()
    def completion_numbers_only_grow(self) -> None:
        stored = dict(self.sql.execute("SELECT id, done_number FROM tasks WHERE done_number IS NOT NULL"))
        assert stored.keys() == {task_id for task_id in self.tasks if self.is_final(task_id)}
        assert len(set(stored.values())) == len(stored)
        new = []
        for task_id, number in stored.items():
            if self.tasks[task_id].number is None:
                self.tasks[task_id].number = number
                new.append(number)
            assert self.tasks[task_id].number == number
        # Some rows may have come and gone within one step; those that stay follow all that went before.
        assert all(number > self.last_number for number in new)
        self.last_number = max([self.last_number, *new])
        store = self.stores["second"]
        assert store.completion_number() >= self.last_number
        assert store.completed_since(0)[1] == sorted(stored, key=stored.__getitem__)

    @invariant()
    def groups_count(self) -> None:
        counts = self.arithmetic()
        rows = {row[0]: row[1:] for row in self.sql.execute(f"SELECT id, {GROUP_COLUMNS} FROM groups")}
        assert rows == {key: counts.row(key) for key in self.groups}
        seen = {
            row[0]: row[1:]
            for row in self.sql.execute("SELECT id, status, size, done, failed, revoked, waiting FROM group_overview")
        }
        assert seen.keys() == {key for key in self.groups if self.is_saved(key)}
        store = self.stores["first"]
        for key in self.groups:
            size, done, failed, revoked, members, tasks_done, groups_done = counts.row(key)
            waiting = size - done - failed - revoked
            answer = store.group_counts(key)
            assert answer == GroupCounts(size, done, failed, revoked, members, tasks_done + groups_done)
            group = store.restore_group(key)
            if not self.is_saved(key):
                assert group is None
                continue
            assert group is not None
            status = "WAITING" if waiting else "FAILURE" if failed else "REVOKED" if revoked else "DONE"
            assert seen[key] == (status, size, done, failed, revoked, waiting)
            expected = (waiting == 0, done == size, failed > 0, waiting > 0, tasks_done + groups_done)
            assert self.answers(group) == expected
            assert [(member.id, not isinstance(member, AsyncResult)) for member in group] == counts.groups[key]
            # The same from the members' own rows, by another way.
            assert self.answers(ResultSet(list(group.results), backend=store)) == expected

    @staticmethod
    def answers(results: ResultSet) -> tuple[Any, ...]:
        return results.ready(), results.successful(), results.failed(), results.waiting(), results.completed_count()

    @invariant()
    def group_tasks_are_exact(self) -> None:
        counts = self.arithmetic()
        expected = {(leaf, key): times for key in self.groups for leaf, times in Counter(counts.leaves(key)).items()}
        rows = self.sql.execute(
            """SELECT task_id, g.id, times FROM group_tasks JOIN groups AS g ON g.number = group_number
            UNION ALL SELECT tasks.id, g.id, 1 FROM tasks JOIN groups AS g ON g.number = tasks.group_number"""
        ).fetchall()
        assert len(rows) == len(expected)
        assert {(task_id, key): times for task_id, key, times in rows} == expected


TestMachine = pytest.mark.timeout(120)(Machine.TestCase)
Machine.TestCase.settings = settings(
    max_examples=45,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


class SqlMachine(RuleBasedStateMachine):
    """Group arithmetic under plain SQL alone, in memory: many more steps for the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.sql = sqlite3.connect(":memory:", isolation_level=None)
        for statement in _statements():
            self.sql.execute(statement)

    def teardown(self) -> None:
        self.sql.close()

    def attempt(self, sql: str, *parameters: Any) -> None:
        with contextlib.suppress(sqlite3.IntegrityError):
            self.sql.execute(sql, parameters)

    @rule(key=group_ids, at=positions, task_id=task_ids)
    def add_task(self, key: str, at: int, task_id: str) -> None:
        self.attempt("INSERT INTO group_members VALUES (?, ?, ?, NULL)", key, at, task_id)

    @rule(key=group_ids, at=positions, child=group_ids)
    def add_group(self, key: str, at: int, child: str) -> None:
        self.attempt("INSERT INTO group_members VALUES (?, ?, NULL, ?)", key, at, child)

    @rule(key=group_ids, chosen=st.lists(task_ids, min_size=2, max_size=4))
    def add_tasks(self, key: str, chosen: list[str]) -> None:
        """Many rows in one statement; a task may be among them twice, and have no row."""
        rows = ", ".join(f"('{key}', {20 + at}, '{task_id}', NULL)" for at, task_id in enumerate(chosen))
        self.attempt(f"INSERT INTO group_members VALUES {rows}")

    @rule(source=group_ids, key=group_ids)
    def add_all_of_another(self, source: str, key: str) -> None:
        """Many rows in one statement, tasks and groups mixed."""
        self.attempt(
            """INSERT INTO group_members SELECT ?, position + 10, task_id, child_id
            FROM group_members WHERE group_id = ?""",
            key,
            source,
        )

    @rule(key=group_ids, at=st.none() | positions)
    def remove(self, key: str, at: int | None) -> None:
        self.attempt("DELETE FROM group_members WHERE group_id = ? AND position = coalesce(?, position)", key, at)

    @rule(key=st.none() | group_ids)
    def delete_group(self, key: str | None) -> None:
        self.attempt("DELETE FROM groups WHERE id = coalesce(?, id)", key)

    @rule(verb=st.sampled_from(["INSERT", "INSERT OR REPLACE", "INSERT OR IGNORE"]), task_id=task_ids, status=written)
    def insert_task(self, verb: str, task_id: str, status: str) -> None:
        self.attempt(f"{verb} INTO tasks (id, status) VALUES (?, ?)", task_id, status)

    @rule(
        verb=st.sampled_from(["UPDATE", "UPDATE OR IGNORE", "UPDATE OR REPLACE"]),
        task_id=st.none() | task_ids,
        status=written,
    )
    def update_task(self, verb: str, task_id: str | None, status: str) -> None:
        self.attempt(f"{verb} tasks SET status = ? WHERE id = coalesce(?, id)", status, task_id)

    @rule(task_id=st.none() | task_ids)
    def again(self, task_id: str | None) -> None:
        self.attempt("UPDATE tasks SET status = 'PENDING', retries = retries + 1 WHERE id = coalesce(?, id)", task_id)

    @rule(task_id=st.none() | task_ids)
    def delete_task(self, task_id: str | None) -> None:
        self.attempt("DELETE FROM tasks WHERE id = coalesce(?, id)", task_id)

    @invariant()
    def counts_are_right(self) -> None:
        groups: dict[str, list[tuple[str, bool]]] = {key: [] for (key,) in self.sql.execute("SELECT id FROM groups")}
        for key, task_id, child in self.sql.execute(
            "SELECT group_id, task_id, child_id FROM group_members ORDER BY group_id, position"
        ):
            groups[key].append((task_id or child, child is not None))
        counts = Arithmetic(dict(self.sql.execute("SELECT id, status FROM tasks")), groups)
        rows = {row[0]: row[1:] for row in self.sql.execute(f"SELECT id, {GROUP_COLUMNS} FROM groups")}
        assert rows == {key: counts.row(key) for key in groups}
        assert not self.sql.execute(
            "SELECT 1 FROM group_tasks WHERE times <= 0 OR direct < 0 OR direct > times"
        ).fetchall()

    @invariant()
    def final_rows_are_whole(self) -> None:
        assert not self.sql.execute(
            """SELECT id FROM tasks WHERE (status IN ('DONE', 'FAILURE', 'REVOKED')) <> (done_number IS NOT NULL)
            OR (done_number IS NULL) <> (done_at IS NULL) OR (done_number IS NOT NULL AND encoding IS NOT 'json')"""
        ).fetchall()


TestSqlMachine = pytest.mark.timeout(120)(SqlMachine.TestCase)
SqlMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class TestMachineCanFail:
    """The machines see what the triggers do: without one of them they fail."""

    @pytest.mark.parametrize(
        "trigger",
        [
            "groups_count_changed_task",
            "groups_count_nested_group",
            "group_members_remove_group",
            "tasks_final_is_final",
            "group_members_add",
            "member_added_task",
        ],
    )
    def test_without_a_trigger_the_dict_disagrees(self, trigger: str) -> None:
        machine = SqlMachine()
        try:
            machine.sql.execute("INSERT INTO groups (id) VALUES ('G')")
            machine.sql.execute(f"DROP TRIGGER {trigger}")
            if trigger == "member_added_task":  # it sees to tasks without a row, say
                machine.add_task("G", 1, "b")
            machine.insert_task("INSERT", "a", "PENDING")
            machine.add_task("G", 0, "a")
            if trigger != "groups_count_changed_task":  # it counts tasks that are in one group only
                machine.add_group("H", 0, "G")
            machine.update_task("UPDATE", "a", "DONE")
            if trigger == "tasks_final_is_final":
                machine.update_task("UPDATE", "a", "PROGRESS")
            machine.remove("H", 0)
            with pytest.raises(AssertionError):  # noqa: PT012 - whichever of the two sees it
                machine.counts_are_right()
                machine.final_rows_are_whole()
        finally:
            machine.teardown()


class TestPlainAndRare:
    """A new member is counted in a short way if that is possible, and in a long one else: the counts are the same."""

    STEPS: ClassVar[dict[str, list[str]]] = {
        "rows": ["INSERT INTO tasks (id) VALUES ('a'), ('b'), ('c')"],
        "members": ["INSERT INTO group_members VALUES ('G', 0, 'a', NULL), ('G', 1, 'b', NULL), ('G', 2, 'a', NULL)"],
        "others": ["INSERT INTO group_members VALUES ('H', 0, 'b', NULL), ('H', 1, 'c', NULL), ('H', 2, 'none', NULL)"],
        "nest": [
            "INSERT INTO groups (id) SELECT 'G' WHERE NOT EXISTS (SELECT 1 FROM groups WHERE id = 'G')",
            "INSERT INTO group_members VALUES ('I', 0, NULL, 'G'), ('I', 1, 'c', NULL)",
        ],
        "finish": [
            "INSERT OR IGNORE INTO tasks (id) VALUES ('a'), ('b')",
            "UPDATE tasks SET status = 'DONE' WHERE id = 'a'",
            "UPDATE tasks SET status = 'FAILURE' WHERE id = 'b'",
        ],
        "forget": ["DELETE FROM tasks WHERE id = 'c'"],
        "remove": ["DELETE FROM group_members WHERE group_id = 'H' AND position = 1"],
    }

    @pytest.mark.parametrize("first", sorted(STEPS))
    def test_in_any_order(self, first: str) -> None:
        machine = SqlMachine()
        try:
            for rest in itertools.permutations(sorted(self.STEPS.keys() - {first, "forget", "remove"})):
                machine.sql.execute("BEGIN")
                for step in dict.fromkeys((first, *rest, "forget", "remove")):
                    for statement in self.STEPS[step]:
                        with contextlib.suppress(sqlite3.IntegrityError):  # "rows" after "finish"
                            machine.sql.execute(statement)
                    machine.counts_are_right()
                machine.sql.execute("ROLLBACK")
        finally:
            machine.teardown()

    @pytest.mark.parametrize("count", [3, 120])
    def test_the_short_way_is_taken(self, store: ResultStore, count: int) -> None:
        """Else it would do no good: the task's own row keeps where it counts."""
        ids = [f"t{number}" for number in range(count)]
        for task_id in ids:
            store.create_task(task_id=task_id)
        store.create_group(ids, "G")
        with closing(sqlite3.connect(store.path, isolation_level=None)) as sql:
            assert sql.execute("SELECT count(*) FROM group_tasks").fetchone() == (0,)
            assert sql.execute("SELECT count(*), min(group_number), max(group_number) FROM tasks").fetchone() == (
                count, 1, 1,
            )  # fmt: skip
        assert store.group_counts("G") == GroupCounts(count, 0, 0, 0, count, 0)

    def test_both_in_one_statement(self, store: ResultStore) -> None:
        ids = [f"t{number}" for number in range(120)]
        for task_id in ids[::2]:
            store.create_task(task_id=task_id)
        store.mark_as_done("t4")
        store.create_group(["t6", "t7"], "other")
        store.create_group([*ids, *ids[:30]], "G")
        assert store.group_counts("G") == GroupCounts(150, 2, 0, 0, 150, 2)
        store.mark_many_as_done(dict.fromkeys(task_id for task_id in ids if task_id != "t4"))
        assert store.group_counts("G") == GroupCounts(150, 150, 0, 0, 150, 150)
        assert store.group_counts("other") == GroupCounts(2, 2, 0, 0, 2, 2)

    def test_for_programs_that_do_not_trust_the_schema(self, store: ResultStore) -> None:
        """PRAGMA trusted_schema = OFF, which some programs are built with, forbids some functions in triggers."""
        with closing(sqlite3.connect(store.path, isolation_level=None)) as sql:
            sql.execute("PRAGMA trusted_schema = OFF")
            sql.execute("INSERT INTO tasks (id) VALUES ('a')")
            sql.execute(
                "INSERT INTO group_members VALUES ('G', 0, 'a', NULL), ('G', 1, 'b', NULL), ('H', 0, NULL, 'G')"
            )
            sql.execute("UPDATE tasks SET status = 'DONE'")
        assert store.group_counts("H") == GroupCounts(2, 1, 0, 0, 1, 0)


class TestFence:
    """A worker that lost its attempt can't write any more."""

    @pytest.fixture
    def lost(self, store: ResultStore) -> str:
        """Return a task that this store began, and that others declared lost and resubmitted."""
        store.create_task(task_id="t")
        assert store.mark_as_started("t") == 0
        with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
            other.execute("UPDATE tasks SET status = 'FAILURE', result = '\"lost\"' WHERE id = 't'")
            other.execute("UPDATE tasks SET status = 'PENDING', retries = retries + 1 WHERE id = 't'")
        return "t"

    def verbs(self, store: ResultStore) -> dict[str, Any]:
        return {
            "done": lambda: store.mark_as_done("t", 1),
            "failure": lambda: store.mark_as_failure("t", ValueError("x")),
            "many": lambda: store.mark_many_as_done({"t": 1}),
            "state": lambda: store.update_state("t", "PROGRESS", 1),
            "retry": lambda: store.mark_as_retry("t", ValueError("x")),
        }

    @pytest.mark.parametrize("verb", ["done", "failure", "many", "state", "retry"])
    def test_a_lost_attempt_is_refused(self, store: ResultStore, lost: str, verb: str) -> None:
        with pytest.raises(TransitionError, match="attempt 0 was declared lost") as caught:
            self.verbs(store)[verb]()
        assert (caught.value.task_id, caught.value.from_status) == (lost, "PENDING")
        meta = store.get_task_meta(lost)
        assert (meta.status, meta.retries) == ("PENDING", 1)

    @pytest.mark.parametrize("first", ["done", "failure", "many", "state", "retry"])
    @pytest.mark.parametrize("second", ["done", "failure"])
    def test_asking_twice_does_not_help(self, store: ResultStore, lost: str, first: str, second: str) -> None:
        """``except Exception as e: store.mark_as_failure(id, e)`` after a refused mark_as_done must be refused too."""
        with pytest.raises(TransitionError):
            self.verbs(store)[first]()
        with pytest.raises(TransitionError):
            self.verbs(store)[second]()
        assert store.get_task_meta(lost).status == "PENDING"

    def test_starting_again_takes_the_new_attempt(self, store: ResultStore, lost: str) -> None:
        assert store.mark_as_started(lost) == 1
        store.mark_as_done(lost, "second")
        assert store.get_task_meta(lost).result == "second"

    def test_a_lost_block_neither_writes_nor_hides_its_refusal(self, store: ResultStore) -> None:
        with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
            with pytest.raises(TransitionError), store.run_task("t") as task:  # noqa: PT012 - the end of the block raises
                other.execute("UPDATE tasks SET status = 'FAILURE' WHERE id = 't'")
                other.execute("UPDATE tasks SET status = 'PENDING', retries = retries + 1 WHERE id = 't'")
                task.result = 1
            assert other.execute("SELECT status, retries FROM tasks").fetchall() == [("PENDING", 1)]

    def test_the_attempt_that_follows_can_finish_elsewhere(self, store: ResultStore, lost: str) -> None:
        with ResultStore(store.path, durability="process-crash") as second:
            assert second.mark_as_started(lost) == 1
            with pytest.raises(TransitionError):
                store.mark_as_done(lost, "first")
            second.mark_as_done(lost, "second")
        assert store.get_task_meta(lost).result == "second"


class TestFrozenClock:
    def test_many_at_the_same_moment_still_refuse_what_is_final(self, store: ResultStore) -> None:
        """The store's clock may stand still, or be set back: times don't tell who finished a task."""
        store.mark_as_done("a", "first")
        with pytest.raises(TransitionError):
            store.mark_many_as_done({"a": "second", "b": 2})
        assert store.get_task_meta("a").result == "first"
        assert not store.exists("b")


class TestUnknownRetry:
    def test_by_the_store(self, store: ResultStore) -> None:
        """The first that is heard of a task is that an attempt failed: there was one before the next."""
        store.mark_as_retry("a", ValueError("x"))
        assert store.get_task_meta("a").retries == 1
        assert [attempt.status for attempt in store.attempts("a")] == ["RETRY"]

    def test_by_sql(self, store: ResultStore) -> None:
        with closing(sqlite3.connect(store.path, isolation_level=None)) as sql:
            sql.execute("INSERT INTO tasks (id, status, result) VALUES ('a', 'RETRY', '\"x\"')")
        assert store.get_task_meta("a").retries == 1
        assert [attempt.status for attempt in store.attempts("a")] == ["RETRY"]


class TestCycles:
    @pytest.mark.parametrize("members", [["G"], ["H"], ["a", "G"]])
    def test_a_group_in_itself_is_refused_in_the_words_of_this_package(
        self, store: ResultStore, members: list[str]
    ) -> None:
        group = store.create_group(["a"], "G")
        store.create_group([group], "H")
        nested = [store.restore_group(member) or member for member in members]
        with pytest.raises((LiteerresultError, ValueError), match="contain itself"):
            store.create_group(nested, "G")
        restored = store.restore_group("G")
        assert restored is not None
        assert restored.results == ["a"]


class TestReplace:
    """REPLACE deletes whatever row stands in its way, by any unique column, and runs no DELETE trigger."""

    @pytest.fixture
    def sql(self, store: ResultStore) -> Any:
        store.mark_as_done("final", "kept")
        store.create_group(["final"], "G")
        store.create_task(task_id="other")
        with closing(sqlite3.connect(store.path, isolation_level=None)) as sql:
            yield sql

    @pytest.mark.parametrize(
        "statement",
        [
            "INSERT OR REPLACE INTO tasks (id) VALUES ('final')",
            "INSERT OR REPLACE INTO tasks (number, id) SELECT number, 'new' FROM tasks WHERE id = 'final'",
            "INSERT OR REPLACE INTO tasks (id, status, done_number) VALUES ('new', 'DONE', 1)",
            "UPDATE OR REPLACE tasks SET status = 'DONE', done_number = 1 WHERE id = 'other'",
            "UPDATE OR REPLACE tasks SET id = 'final' WHERE id = 'other'",
            "UPDATE OR REPLACE tasks SET number = (SELECT number FROM tasks WHERE id = 'final') WHERE id = 'other'",
            "INSERT OR REPLACE INTO groups (id) VALUES ('G')",
            "INSERT OR REPLACE INTO groups (number, id) SELECT number, 'new' FROM groups WHERE id = 'G'",
        ],
    )
    def test_it_does_not_get_a_final_task_or_a_group_out_of_the_way(
        self, store: ResultStore, sql: Any, statement: str
    ) -> None:
        with pytest.raises(sqlite3.IntegrityError):
            sql.execute(statement)
        assert store.get_task_meta("final").result == "kept"
        assert store.group_counts("G") == GroupCounts(1, 1, 0, 0, 1, 1)

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE tasks SET done_number = 5 WHERE id = 'other'",
            "UPDATE tasks SET status = 'PROGRESS', done_number = 5 WHERE id = 'other'",
            "INSERT INTO tasks (id, done_number) VALUES ('new', 5)",
            "UPDATE tasks SET status = 'DONE', done_number = -1 WHERE id = 'other'",
        ],
    )
    def test_a_completion_number_is_given_to_final_tasks_in_order(
        self, store: ResultStore, sql: Any, statement: str
    ) -> None:
        """A row with a number and no final status would never end a wait; one out of order would be missed by it."""
        with pytest.raises(sqlite3.IntegrityError):
            sql.execute(statement)
        assert store.completed_since(0) == (1, ["final"])
