"""
Group commit: threads of one process whose statements have to wait stand in line, and one of them commits for all.

The thread that has the writers' turn leads: it runs its own statement and those that stand in line in one
transaction, syncs once, and wakes the others. Each statement succeeds or fails on its own. A leader that is
interrupted (Ctrl-C) gives the others back to the line; one that does not wake them is not waited for longer
than `LOOK_AGAIN`.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Sequence

__all__ = ["LOOK_AGAIN", "Batch", "Statement", "call_next", "leave", "those_waiting"]

LOOK_AGAIN = 0.05
"""A thread in line looks this often, in seconds, whether its leader got lost."""


class Statement:
    """
    One statement in line.

    Attributes:
        sql: The statement; it changes one task.
        parameters: Its parameters.
        task_id: The task.
        changed: How many rows it changed, once it ran.
        error: What it raised instead.
        batch: What it was last part of.
        gone: Nobody waits for it any more.
    """

    __slots__ = ("_gate", "batch", "changed", "error", "gone", "parameters", "sql", "task_id")

    def __init__(self, sql: str, parameters: Sequence[Any], task_id: str) -> None:
        self.sql = sql
        self.parameters = parameters
        self.task_id = task_id
        self.changed = 0
        self.error: Exception | None = None
        self.batch: Batch | None = None
        self.gone = False
        self._gate = threading.Lock()
        self._gate.acquire()

    @property
    def waits(self) -> bool:
        """True until some thread has committed it, or failed to."""
        return not self.gone and (self.batch is None or self.batch.is_void)

    def park(self) -> None:
        """Wait until there is something to look at."""
        self._gate.acquire(timeout=LOOK_AGAIN)

    def wake(self) -> None:
        """End `park`, or the next one."""
        with contextlib.suppress(RuntimeError):  # it is awake
            self._gate.release()


class Batch:
    """
    Statements that are committed together.

    Attributes:
        statements: The leader's own is the first.
        committing: COMMIT has begun.
        committed: It succeeded, and is counted.
        error: What failed for all of them.
        is_void: It was rolled back because its leader was interrupted; the statements wait again.
        ended: What was committed lasts, or `error` says why not.
    """

    __slots__ = ("committed", "committing", "ended", "error", "is_void", "statements")

    def __init__(self, statements: list[Statement]) -> None:
        self.statements = statements
        self.committing = False
        self.committed = False
        self.error: Exception | None = None
        self.is_void = False
        self.ended = False

    def commit(self, connection: sqlite3.Connection) -> None:
        """
        Run the statements in one transaction. What one of them raises is its own, unless it ends the transaction.

        Raises:
            sqlite3.Error: Nothing was written; the transaction may still be open.
        """
        # Nothing may be called between an error and its note in `error`: there Ctrl-C could come between.
        for statement in self.statements:
            statement.error = None
            statement.batch = self
        try:
            connection.execute("BEGIN IMMEDIATE")
            for statement in self.statements:
                try:
                    statement.changed = connection.execute(statement.sql, statement.parameters).rowcount
                except Exception as exc:
                    statement.error = exc
                    if not connection.in_transaction:
                        raise
            self.committing = True
            connection.execute("COMMIT")
        except sqlite3.Error as exc:
            self.error = exc
            raise

    def interrupted(self, *, in_transaction: bool) -> None:
        """Decide, from whether the transaction was still open, what became of a batch whose leader raised."""
        if self.error is None and not self.committed:
            self.committed = self.committing and not in_transaction
            self.is_void = not self.committed

    def end(self, error: Exception | None = None) -> None:
        """Let the threads go on."""
        if error is not None:
            self.error = error
        self.ended = True
        self.wake()

    def wake(self) -> None:
        """Let the threads look."""
        for statement in self.statements:
            statement.wake()


def those_waiting(line: deque[Statement], own: Statement) -> list[Statement]:
    """Return *own*, and then every other statement in line that waits. For the thread that has the turn."""
    return [own, *(statement for statement in list(line) if statement is not own and statement.waits)]


def leave(line: deque[Statement]) -> None:
    """Take out of the line what no longer waits. For the thread that has the turn."""
    while line and not line[0].waits:
        line.popleft()


def call_next(line: deque[Statement]) -> None:
    """Wake the first thread in line, so that it leads."""
    for statement in list(line):
        if statement.waits:
            statement.wake()
            return
