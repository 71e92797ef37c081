"""What a batch is in the file: its tasks, its group, and what a resumed run takes over."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from .fingerprints import fingerprint
from .groups import GroupResult
from .manyrows import execute_for_rows
from .results import AsyncResult
from .states import DONE, FAILURE, PENDING, RETRY, REVOKED

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

    from .store import ResultStore

__all__ = [
    "Plan",
    "decide_lost",
    "let_go",
    "plan_group",
    "plan_task",
    "put_back",
    "revoke_all",
    "revoke_waiting",
    "take",
]

_KNOWN = """
    SELECT m.task_id, m.child_id, t.status, t.retries, t.owner, t.fingerprint
    FROM group_members AS m LEFT JOIN tasks AS t ON t.id = m.task_id
    WHERE m.group_id = ? ORDER BY m.position"""

_CREATE = """
    INSERT INTO tasks (id, name, parent_id, args, kwargs, fingerprint, owner, submitter, created_at)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"""

_CREATE_GROUP = "INSERT INTO groups (id, parent_id, created_at) VALUES (?, ?, ?)"

# Ids are the group's, "/" and a number; "0" follows "/". Nearly always there is none: one look instead of thousands.
_MAY_BE_THERE = "SELECT 1 FROM tasks WHERE id > ? || '/' AND id < ? || '0' LIMIT 1"

_THERE = "SELECT id FROM tasks WHERE id IN (SELECT value FROM json_each(?))"

_ADD_MEMBER = "INSERT INTO group_members (group_id, position, task_id) VALUES (?, ?, ?)"

_SAVE_GROUP = "UPDATE groups SET saved = 1 WHERE id = ?"

_RESUBMIT = "UPDATE tasks SET status = 'PENDING', retries = retries + 1, owner = ?, submitter = ? WHERE id = ?"

_TAKE_OVER = "UPDATE tasks SET owner = ?, submitter = ? WHERE id = ?"

_REVOKE = """
    UPDATE tasks SET status = 'REVOKED', result = NULL, encoding = NULL, traceback = NULL, done_at = ?,
        done_number = (SELECT done_number FROM next_completion)
    WHERE id = ? AND done_number IS NULL"""

# To PENDING nothing goes back that has had a state.
_PUT_BACK = """
    UPDATE tasks SET status = 'RETRY', result = NULL, encoding = NULL
    WHERE id = ? AND retries = ? AND owner = ? AND done_number IS NULL
      AND status NOT IN ('PENDING', 'RETRY') AND status NOT IN ('STARTED', 'LOST')"""

_TRY_AGAIN = "UPDATE tasks SET status = 'RETRY', owner = submitter WHERE id = ? AND status = 'LOST' AND retries = ?"

_GIVE_UP = """
    UPDATE tasks SET status = 'FAILURE', done_at = ?, done_number = (SELECT done_number FROM next_completion)
    WHERE id = ? AND status = 'LOST' AND retries = ?"""


_in_hand: Counter[tuple[str, str]] = Counter()
"""Path of the store and id of calls that a Runner of this process has: another one leaves them alone."""

_guard = threading.Lock()


class Plan(NamedTuple):
    """
    What is to be done for a batch.

    Attributes:
        group: The group, stored; None for a single task.
        todo: (position, task id, attempt) of each call to make.
    """

    group: GroupResult | None
    todo: list[tuple[int, str, int]]


def take(store: ResultStore, task_ids: Iterable[str]) -> None:
    """Say of calls that a Runner of this process has them; `let_go` has to follow."""
    with _guard:
        _in_hand.update((store.path, task_id) for task_id in task_ids)


def let_go(store: ResultStore, task_ids: Iterable[str]) -> None:
    """Say of calls that they are over, as far as that Runner can tell."""
    with _guard:
        for key in ((store.path, task_id) for task_id in task_ids):
            _in_hand[key] -= 1
            if _in_hand[key] <= 0:
                del _in_hand[key]


def _after_fork_in_child() -> None:
    global _guard  # noqa: PLW0603 - another thread of the parent may have held it
    _guard = threading.Lock()
    _in_hand.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def plan_task(
    store: ResultStore, task_id: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], parent_id: str | None
) -> Plan:
    """Record one call of its own."""
    encode = store.encode_readably
    owner, now = store.own_owner(), store.clock.time()
    mark, *encoded = fingerprint(name, args, kwargs, encode)

    def operation(connection: sqlite3.Connection) -> None:
        store.register_owner(connection)
        connection.execute(_CREATE, (task_id, name, parent_id, *encoded, mark, owner, owner, now))

    store.transact_quietly(operation, flush=True)
    take(store, [task_id])
    return Plan(None, [(0, task_id, 0)])


def plan_group(
    store: ResultStore,
    group_id: str,
    name: str,
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    parent_id: str | None,
) -> Plan:
    """
    Record a batch, or take over what an earlier run of it left undone.

    Raises:
        ValueError: The group exists and is of other calls.
    """
    encode = store.encode_readably
    prints = [fingerprint(name, args, kwargs, encode) for args, kwargs in calls]
    store.reap()  # what a dead run left is FAILURE now, and ours to take
    owner, now = store.own_owner(), store.clock.time()

    taken: list[str] = []

    def operation(connection: sqlite3.Connection) -> list[tuple[int, str, int]]:
        todo = plan(connection)
        taken.extend(task_id for _, task_id, _ in todo)
        take(store, taken)  # here, where no other Runner can plan
        return todo

    def plan(connection: sqlite3.Connection) -> list[tuple[int, str, int]]:
        store.register_owner(connection)
        if connection.execute("SELECT 1 FROM groups WHERE id = ?", (group_id,)).fetchone() is not None:
            return _take_over(connection, store, group_id, name, prints, owner, parent_id, now)
        ids = [f"{group_id}/{position}" for position in range(len(prints))]
        there: set[str] = set()
        if connection.execute(_MAY_BE_THERE, (group_id, group_id)).fetchone() is not None:
            there = {row[0] for row in connection.execute(_THERE, (json.dumps(ids),))}
        rows = [
            (task_id, name, parent_id, args, kwargs, mark, owner, owner, now)
            for task_id, (mark, args, kwargs) in zip(ids, prints, strict=True)
            if task_id not in there
        ]
        connection.execute(_CREATE_GROUP, (group_id, parent_id, now))
        execute_for_rows(connection, _CREATE, rows)
        execute_for_rows(
            connection, _ADD_MEMBER, [(group_id, position, task_id) for position, task_id in enumerate(ids)]
        )
        if there:  # the group was deleted, its tasks were not
            return _take_over(connection, store, group_id, name, prints, owner, parent_id, now)
        return [(position, task_id, 0) for position, task_id in enumerate(ids)]

    try:
        todo = store.transact_quietly(operation, flush=True)
        group = GroupResult(
            group_id, [AsyncResult(f"{group_id}/{position}", store) for position in range(len(prints))], backend=store
        )
        group.mark_as_stored()
    except BaseException:
        let_go(store, taken)
        raise
    return Plan(group, todo)


def _take_over(
    connection: sqlite3.Connection,
    store: ResultStore,
    group_id: str,
    name: str,
    prints: list[tuple[str, Any, Any]],
    owner: str,
    parent_id: str | None,
    now: float,
) -> list[tuple[int, str, int]]:
    rows = connection.execute(_KNOWN, (group_id,)).fetchall()
    _check_same(group_id, name, rows, prints)
    todo = []
    for position, (task_id, _, status, retries, held_by, _) in enumerate(rows):
        if status == DONE:
            continue
        if status is None:  # forgotten
            mark, args, kwargs = prints[position]
            connection.execute(_CREATE, (task_id, name, parent_id, args, kwargs, mark, owner, owner, now))
            todo.append((position, task_id, 0))
            continue
        if status in (FAILURE, REVOKED):
            connection.execute(_RESUBMIT, (owner, owner, task_id))
            # The trigger can't tell the same owner from one that was left in place.
            connection.execute(_TAKE_OVER, (owner, owner, task_id))
            todo.append((position, task_id, retries + 1))
        elif status in (PENDING, RETRY) and (
            held_by is None or (held_by == owner and (store.path, task_id) not in _in_hand)
        ):
            connection.execute(_TAKE_OVER, (owner, owner, task_id))
            todo.append((position, task_id, retries))
        # Anything else is in the hands of a process that lives, or of another Runner here: waited for, not run twice.
    connection.execute(_SAVE_GROUP, (group_id,))
    return todo


def _check_same(group_id: str, name: str, rows: list[Any], prints: list[tuple[str, Any, Any]]) -> None:
    advice = "use another group id, or delete the group and its tasks to start anew"
    if len(rows) != len(prints):
        msg = f"group {group_id!r} was stored with {len(rows)} calls and is now given {len(prints)}; {advice}"
        raise ValueError(msg)
    for position, (row, (mark, args, _)) in enumerate(zip(rows, prints, strict=True)):
        forgotten = row[1] is None and row[2] is None
        if row[5] != mark and not forgotten:
            msg = (
                f"group {group_id!r} was stored with other calls: number {position} is now {name} with arguments "
                f"{args}, which is not what task {row[0] or row[1]!r} was; {advice}"
            )
            raise ValueError(msg)


def put_back(store: ResultStore, calls: list[tuple[str, int]]) -> set[str]:
    """Let calls of this process that have a custom state wait for their next attempt; return their ids."""
    owner = store.own_owner()

    def operation(connection: sqlite3.Connection) -> set[str]:
        return {call[0] for call in calls if connection.execute(_PUT_BACK, (*call, owner)).rowcount}

    return store.transact_quietly(operation, flush=True)


def decide_lost(store: ResultStore, again: list[tuple[str, int]], given_up: list[tuple[str, int]]) -> None:
    """Record, for LOST tasks that this process submitted, which are tried again and which have failed."""
    now = store.clock.time()

    def operation(connection: sqlite3.Connection) -> None:
        connection.executemany(_TRY_AGAIN, again)
        connection.executemany(_GIVE_UP, [(now, *row) for row in given_up])

    store.transact_quietly(operation, flush=True)


def revoke_waiting(store: ResultStore, task_ids: list[str]) -> None:
    """Cancel tasks that have not begun, in one transaction."""
    rows = [(store.clock.time(), task_id) for task_id in task_ids]
    sql = f"{_REVOKE} AND status IN ('PENDING', 'RETRY')"
    store.transact_quietly(lambda connection: connection.executemany(sql, rows), flush=True)


def revoke_all(store: ResultStore, task_ids: list[str]) -> None:
    """Cancel tasks that are not final, in one transaction."""
    rows = [(store.clock.time(), task_id) for task_id in task_ids]
    store.transact_quietly(lambda connection: connection.executemany(_REVOKE, rows), flush=True)
