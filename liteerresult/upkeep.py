"""A store's verbs on what nobody will finish, and on what nobody needs any more."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from .grouprows import GroupVerbs
from .liveness import parse_owner
from .marks import Mark

if TYPE_CHECKING:
    import sqlite3

__all__ = ["Upkeep"]

_TEXT = ":worker || iif(started_at IS NULL, ' died before a worker began task ', ' died while it ran task ') || id"

_ERROR = f"""json_object(
        'type', 'WorkerLostError', 'module', 'liteerresult.errors', 'text', {_TEXT}, 'args', json_array({_TEXT}),
        'attributes', json_object(
            'task_id', id, 'pid', :pid, 'host', :host, 'since', coalesce(started_at, created_at),
            'started', json(iif(started_at IS NULL, 'false', 'true'))))"""

_ID_OF = "SELECT id FROM tasks WHERE number = ?"

# A call that is noted, and not yet on record as begun.
_NOTED = """
    UPDATE tasks SET status = 'STARTED', owner = ?
    WHERE number = ? AND retries = ? AND status IN ('PENDING', 'RETRY') AND submitter IS NOT NULL"""

_NOTED_FOR_IT = f"{_NOTED} AND owner = ?"

# The same if somebody else has given it a state meanwhile.
_NOTED_AND_REPORTED = f"""
    UPDATE tasks SET status = 'LOST', encoding = 'json', traceback = NULL, result = {_ERROR}
    WHERE number = :number AND retries = :attempt AND done_number IS NULL AND owner = submitter AND owner <> :owner
      AND status NOT IN ('PENDING', 'RETRY') AND status NOT IN ('STARTED', 'LOST')
      AND submitter IN (SELECT id FROM owners)
    RETURNING id"""  # noqa: S608 - constants

# What the dead owner ran for another process, which may want to try again.
_GIVE_BACK = f"""
    UPDATE tasks SET status = 'LOST', encoding = 'json', traceback = NULL, owner = submitter, result = {_ERROR}
    WHERE owner = :owner AND done_number IS NULL AND submitter <> :owner
      AND submitter IN (SELECT id FROM owners)
    RETURNING id"""  # noqa: S608 - constants

# The rest. The triggers number the rows and count them.
_FAIL = f"""
    UPDATE tasks SET status = 'FAILURE', encoding = 'json', traceback = NULL, done_at = :now,
        result = iif(status = 'LOST', result, {_ERROR})
    WHERE owner = :owner AND done_number IS NULL
    RETURNING id"""  # noqa: S608

_OWES = "SELECT 1 FROM tasks WHERE owner = ? AND done_number IS NULL LIMIT 1"

_FORGET_OWNER = "DELETE FROM owners WHERE id = ?"

# A group goes when all of it is old; until then its tasks stay, so that nobody joins in vain.
_OLD_GROUPS = """
    DELETE FROM groups WHERE done + failed + revoked = size AND created_at < :limit
    AND id NOT IN (SELECT child_id FROM group_members WHERE child_id IS NOT NULL)
    AND NOT EXISTS (
        WITH RECURSIVE below (id) AS (
            SELECT groups.id
            UNION SELECT m.child_id FROM below
            JOIN group_members AS m ON m.group_id = below.id WHERE m.child_id IS NOT NULL
        )
        SELECT 1 FROM below JOIN group_members AS m ON m.group_id = below.id JOIN tasks ON tasks.id = m.task_id
        WHERE tasks.done_at >= :limit)"""

_OLD_TASKS = """
    DELETE FROM tasks WHERE done_number IS NOT NULL AND done_at < ? AND group_number IS NULL"""

_ORPHAN_FILE_AGE = 3600.0


class Upkeep(GroupVerbs):
    """Verbs that keep a store in order."""

    def settle(self, owner: str) -> list[str]:
        """
        Fail what an owner that is known to be dead left, and forget it. Two who do it at once agree.

        Returns:
            The ids of the tasks that this call failed, or gave back to their submitter as LOST.
        """
        if not self._db.read(_OWES, (owner,)) and not self._db.read("SELECT 1 FROM owners WHERE id = ?", (owner,)):
            return []  # someone else was faster: no need to queue for the write lock
        pid, host = parse_owner(owner)
        fields = {
            "owner": owner, "pid": pid, "host": host, "now": self.clock.time(),
            "worker": f"process {pid} on {host}",
        }  # fmt: skip

        noted = self._owners.marks_of(owner)

        def operation(connection: sqlite3.Connection) -> list[str]:
            # What others are making is not to be taken for never begun if it is their submitter that died.
            for other, mark in self._owners.marks_of_the_living():
                if other != owner and _is_of(connection, mark):
                    connection.execute(_NOTED_FOR_IT, (other, mark.number, mark.attempt, owner))
            lost: list[str] = []
            if connection.execute("SELECT 1 FROM owners WHERE id = ?", (owner,)).fetchone():  # not settled yet
                for mark in noted:
                    if _is_of(connection, mark):
                        connection.execute(_NOTED, (owner, mark.number, mark.attempt))
                        lost += _ids(connection.execute(_NOTED_AND_REPORTED, {**fields, **mark._asdict()}))
            lost += _ids(connection.execute(_GIVE_BACK, fields))
            lost += _ids(connection.execute(_FAIL, fields))
            connection.execute(_FORGET_OWNER, (owner,))
            return lost

        lost = self.transact_quietly(operation, flush=False)
        if lost:
            self.flush(lost)
        self._owners.discard(owner)
        return lost

    def reap(self) -> list[str]:
        """
        Fail what dead owners left: FAILURE with WorkerLostError.

        Waiting and opening the store do the same; this is for those who do neither.

        Returns:
            The ids of the tasks that this call failed, or gave back to their submitter as LOST.
        """
        lost: list[str] = []
        recorded = self.owners()
        for owner in recorded:
            if not self.owner_is_alive(owner):
                lost += self.settle(owner)
        self._remove_orphan_files(set(recorded))
        return lost

    def _remove_orphan_files(self, recorded: set[str]) -> None:
        # A lock file without a record belongs to a process that just starts, or died before its first
        # task; only age tells, and nothing but tidiness depends on it.
        for owner in list(self._owners.names()):
            if owner in recorded or owner == self._owners.own:
                continue
            with suppress(OSError):
                age = time.time() - os.stat(os.path.join(self._owners.folder, f"{owner}.lock")).st_mtime
                if age > _ORPHAN_FILE_AGE and not self._owners.is_alive(owner):
                    self._owners.discard(owner)

    def cleanup(self, older_than: timedelta | float) -> int:
        """
        Delete groups all of whose tasks became final that long ago, and such tasks that are in no group.

        Args:
            older_than: Age as timedelta or in seconds.

        Returns:
            How many tasks were deleted.

        Raises:
            ValueError: The age is negative.
        """
        seconds = older_than.total_seconds() if isinstance(older_than, timedelta) else float(older_than)
        if not seconds >= 0:
            msg = f"an age is not negative: {older_than!r}"
            raise ValueError(msg)
        limit = self.clock.time() - seconds

        def operation(connection: sqlite3.Connection) -> int:
            while connection.execute(_OLD_GROUPS, {"limit": limit}).rowcount > 0:
                pass  # what only they contained
            return connection.execute(_OLD_TASKS, (limit,)).rowcount

        return self._write(operation)


def _is_of(connection: sqlite3.Connection, mark: Mark) -> bool:
    """Tell whether the row is the one that was noted, or another task has got its number."""
    found = connection.execute(_ID_OF, (mark.number,)).fetchone()
    return found is not None and Mark.of(found[0], mark.number, mark.attempt) == mark


def _ids(cursor: sqlite3.Cursor) -> list[str]:
    return [row[0] for row in cursor.fetchall()]
