"""A store's verbs on groups and family links, each beside its SQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .backend import GroupCounts, check_id
from .connection import Refused
from .groups import GroupResult, ResultSet
from .manyrows import execute_for_rows
from .results import EagerResult
from .states import DONE
from .tasks import TaskVerbs

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator

    from .results import ResultBase

__all__ = ["GroupVerbs"]

_INSERT_GROUP = "INSERT INTO groups (id, parent_id, created_at) VALUES (?, ?, ?)"

_SAVED_AGAIN = "UPDATE groups SET saved = 1, parent_id = coalesce(?, parent_id) WHERE id = ?"

_MEMBERS = (
    "SELECT coalesce(task_id, child_id), child_id IS NOT NULL FROM group_members WHERE group_id = ? ORDER BY position"
)

_REMOVE_MEMBERS = "DELETE FROM group_members WHERE group_id = ?"

_ADD_MEMBER = "INSERT INTO group_members (group_id, position, task_id, child_id) VALUES (?, ?, ?, ?)"

_IS_SAVED = "SELECT 1 FROM groups WHERE id = ? AND saved"

# A group that others contain stays for their sake, under no name of its own.
_UNSAVE = "UPDATE groups SET saved = 0 WHERE id = ?"

_DELETE_UNSAVED = (
    "DELETE FROM groups WHERE saved = 0 AND id NOT IN (SELECT child_id FROM group_members WHERE child_id IS NOT NULL)"
)

_COUNTS = "SELECT size, done, failed, revoked, members, tasks_done + groups_done FROM groups WHERE id = ?"

_VALUES = """
    SELECT t.result, t.encoding, t.id, t.status FROM group_members AS m CROSS JOIN tasks AS t ON t.id = m.task_id
    WHERE m.group_id = ? ORDER BY m.position"""

_PARENT = """
    SELECT up.id,
        EXISTS (SELECT 1 FROM groups AS g WHERE g.id = up.id)
            AND NOT EXISTS (SELECT 1 FROM tasks AS t WHERE t.id = up.id)
    FROM (SELECT parent_id AS id FROM tasks WHERE id = :id UNION ALL SELECT parent_id FROM groups WHERE id = :id) AS up
    WHERE up.id IS NOT NULL LIMIT 1"""

# A group stands for its members, and a nested group for nothing of its own.
_CHILDREN = """
    SELECT id, 1, created_at, number FROM groups
    WHERE parent_id = :id AND saved AND NOT EXISTS (
        SELECT 1 FROM group_members AS m JOIN groups AS outer_group ON outer_group.id = m.group_id
        WHERE m.child_id = groups.id AND outer_group.parent_id = :id)
    UNION ALL
    SELECT id, 0, created_at, number FROM tasks
    WHERE parent_id = :id
    AND NOT EXISTS (SELECT 1 FROM groups WHERE groups.number = tasks.group_number AND groups.parent_id = :id)
    AND NOT EXISTS (
        SELECT 1 FROM group_tasks AS t JOIN groups ON groups.number = t.group_number
        WHERE t.task_id = tasks.id AND groups.parent_id = :id)
    ORDER BY 3, 4"""


class GroupVerbs(TaskVerbs):
    """Verbs on groups."""

    def create_group(
        self,
        results_or_ids: Iterable[ResultBase | str],
        group_id: str | None = None,
        parent: ResultBase | str | None = None,
    ) -> GroupResult:
        """
        Record a group of tasks, and return it saved.

        Args:
            results_or_ids: Results of tasks or groups, or ids of tasks (recorded or not), in order.
            group_id: Its id; a new one if None.
            parent: What submits it; the task that is running in this context if None.

        Raises:
            ValueError: A member is in no store, or in another one, or the group contains itself.
        """
        parent_id = self.parent_id_of(parent)
        group_id = self.new_id() if group_id is None else check_id(group_id, "group id")
        group = GroupResult(group_id, list(results_or_ids), backend=self)
        self._save(group, parent_id)
        group.look_up_parent()
        return self._marked(group)

    def save_group(self, group: GroupResult) -> GroupResult:
        """
        Store a group with its order, nesting and parent; saving again stores what has changed.

        Raises:
            ValueError: A member is in no store, or in another one.
        """
        parent = group.parent
        self._save(group, None if parent is None else self.parent_id_of(parent))
        return self._marked(group)

    def _marked(self, group: GroupResult) -> GroupResult:
        for member in group.results:
            if isinstance(member, GroupResult):
                self._marked(member)
        group.mark_as_stored()
        return group

    def _save(self, group: GroupResult, parent_id: str | None) -> None:
        self._check_members(group)
        now = self.clock.time()
        try:
            self._write(lambda connection: self._save_in(connection, group, parent_id, now))
        except Refused as exc:
            msg = f"group {group.id!r} can't be stored: {exc}"
            raise ValueError(msg) from exc

    def _check_members(self, group: GroupResult) -> None:
        for member in group.results:
            if isinstance(member, GroupResult):
                self._check_members(member)
            elif isinstance(member, EagerResult | ResultSet):
                msg = f"{member!r} is in no store, so the group {group.id!r} can't be stored with it"
                raise ValueError(msg)  # noqa: TRY004 - its type may be a member, but not of a stored group
            elif getattr(member.backend, "path", None) != self.path:
                msg = f"task {member.id!r} is in another store than group {group.id!r}"
                raise ValueError(msg)

    def _save_in(self, connection: sqlite3.Connection, group: GroupResult, parent_id: str | None, now: float) -> None:
        wanted: list[tuple[str, int, str | None, str | None]] = []
        for position, member in enumerate(group.results):
            if isinstance(member, GroupResult):
                self._save_nested(connection, member, now)
                wanted.append((group.id, position, None, member.id))
            else:
                wanted.append((group.id, position, member.id, None))
        if connection.execute("SELECT 1 FROM groups WHERE id = ?", (group.id,)).fetchone() is None:
            connection.execute(_INSERT_GROUP, (group.id, parent_id, now))
        else:
            connection.execute(_SAVED_AGAIN, (parent_id, group.id))
            stored = connection.execute(_MEMBERS, (group.id,)).fetchall()
            if stored == [(task_id or child_id, int(child_id is not None)) for _, _, task_id, child_id in wanted]:
                return
            connection.execute(_REMOVE_MEMBERS, (group.id,))
        execute_for_rows(connection, _ADD_MEMBER, wanted)

    def _save_nested(self, connection: sqlite3.Connection, group: GroupResult, now: float) -> None:
        """Save a group for the one that contains it; one that is there as it is stays so, deleted by name or not."""
        there = connection.execute("SELECT 1 FROM groups WHERE id = ?", (group.id,)).fetchone() is not None
        if not (there and group.is_as_stored()):
            parent = group.parent
            self._save_in(connection, group, None if parent is None else self.parent_id_of(parent), now)

    def restore_group(self, group_id: str) -> GroupResult | None:
        """Return a stored group, its members read when they are asked for; None if there is no such group."""
        if self._db.read(_IS_SAVED, (check_id(group_id, "group id"),)):
            return GroupResult.stored(group_id, self)
        return None

    def delete_group(self, group_id: str) -> None:
        """Delete a stored group, not its tasks; nothing happens if there is none."""
        check_id(group_id, "group id")

        def operation(connection: sqlite3.Connection) -> None:
            connection.execute(_UNSAVE, (group_id,))
            while connection.execute(_DELETE_UNSAVED).rowcount > 0:
                pass  # what only they contained

        self._write(operation)

    def group_members(self, group_id: str) -> Iterator[tuple[str, bool]]:
        """Yield the ids of a stored group's members, in order, each with whether it is a group."""
        for member, is_group in self._db.read(_MEMBERS, (group_id,)):
            yield member, bool(is_group)

    def group_values(self, group_id: str) -> list[Any] | None:
        """
        Return the values of a stored group of tasks all of which are DONE; None if it is not of that kind.

        Raises:
            DecodeError: A value can't be read.
        """
        rows = self._db.read(_VALUES, (group_id,))
        if not all(row[3] == DONE for row in rows):
            return None
        return self._serializer.decode_many([row[:3] for row in rows])

    def group_counts(self, group_id: str) -> GroupCounts | None:
        """Return a stored group's counts in one indexed read, whatever its size; None if there is no such group."""
        rows: list[Any] = self._db.read(_COUNTS, (group_id,))
        return GroupCounts(*rows[0]) if rows else None

    def parent_of(self, task_id: str) -> tuple[str, bool] | None:
        """Return the id of a task's, or group's, parent and whether that is a group; None if it has none."""
        rows = self._db.read(_PARENT, {"id": task_id})
        return (rows[0][0], bool(rows[0][1])) if rows else None

    def children_of(self, task_id: str) -> list[tuple[str, bool]]:
        """Return the ids of what a task submitted, in order, each with whether it is a group."""
        return [(row[0], bool(row[1])) for row in self._db.read(_CHILDREN, {"id": task_id})]
