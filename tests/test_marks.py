"""`Marks`: which call a worker was at, read by those who find it dead; and what settling its death makes of it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from liteerresult import WorkerLostError
from liteerresult.batch import plan_group
from liteerresult.liveness import Owners
from liteerresult.marks import Mark, Marks, read_marks
from tests.support import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from liteerresult import ResultStore

DEAD = f"1@host-{0:032x}"
OTHER = f"2@host-{0:032x}"
SLOT_SIZE = 16


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "owner.running")


@pytest.fixture
def marks(path: str) -> Iterator[Marks]:
    made = Marks(path)
    yield made
    made.close()


# The file


def test_nothing_is_noted_at_first(marks: Marks, path: str) -> None:
    assert read_marks(path) == []
    assert marks.take() == 0
    assert read_marks(path) == []


def test_no_file(tmp_path: Path) -> None:
    assert read_marks(str(tmp_path / "nobody.running")) == []


@pytest.mark.parametrize(("number", "attempt"), [(1, 0), (7, 3), (2**63 - 1, 2**32 - 1), (-5, 0)])
def test_the_last_note_counts(marks: Marks, path: str, number: int, attempt: int) -> None:
    slot = marks.take()
    marks.mark(slot, Mark(99, 9, 5))
    marks.mark(slot, Mark(number, attempt, 5))
    assert read_marks(path) == [(number, attempt, 5)]
    marks.clear(slot)
    assert read_marks(path) == []


def test_each_slot_has_its_note(marks: Marks, path: str) -> None:
    slots = [marks.take() for _ in range(4)]
    assert slots == [0, 1, 2, 3]
    marks.mark(3, Mark(40, 4, 5))  # the empty ones before it are no notes
    assert read_marks(path) == [(40, 4, 5)]
    marks.mark(1, Mark(20, 2, 5))
    assert read_marks(path) == [(20, 2, 5), (40, 4, 5)]
    marks.clear(3)
    assert read_marks(path) == [(20, 2, 5)]


def test_a_slot_is_used_again(marks: Marks) -> None:
    assert [marks.take(), marks.take(), marks.take()] == [0, 1, 2]
    marks.give_back(1)
    assert [marks.take(), marks.take()] == [1, 3]


def test_no_two_threads_have_one_slot(marks: Marks) -> None:
    taken: list[int] = []
    threads = [threading.Thread(target=lambda: taken.extend(marks.take() for _ in range(50))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert sorted(taken) == list(range(400))


@pytest.mark.parametrize("length", [0, 1, SLOT_SIZE - 1, SLOT_SIZE, SLOT_SIZE + 1, 2 * SLOT_SIZE - 1])
def test_a_torn_note_is_none(marks: Marks, path: str, length: int) -> None:
    for number in (10, 20):
        marks.mark(marks.take(), Mark(number, 0, 5))
    os.truncate(path, length)
    assert read_marks(path) == [(10, 0, 5)][: length // SLOT_SIZE]


def test_what_stands_there_outlives_the_descriptor(marks: Marks, path: str) -> None:
    marks.mark(marks.take(), Mark(7, 1, 5))
    marks.close()
    marks.close()
    assert read_marks(path) == [(7, 1, 5)]
    with pytest.raises(OSError, match="Bad file descriptor"):
        marks.mark(0, Mark(8, 1, 5))


def test_what_an_earlier_one_left_is_gone(marks: Marks, path: str) -> None:
    marks.mark(marks.take(), Mark(7, 1, 5))
    again = Marks(path)
    assert read_marks(path) == []
    again.close()


# Beside the lock


@pytest.fixture
def owners(tmp_path: Path) -> Iterator[Owners]:
    made = Owners(str(tmp_path / "owners"))
    yield made
    made.release()


def test_a_process_has_one_file(owners: Owners) -> None:
    assert owners.marks() is owners.marks()
    assert owners.own is not None
    owners.marks().mark(owners.marks().take(), Mark(7, 0, 5))
    assert owners.marks_of(owners.own) == [(7, 0, 5)]
    assert sorted(os.listdir(owners.folder)) == [f"{owners.own}.lock", f"{owners.own}.running"]


def test_a_new_owner_has_a_new_file(owners: Owners) -> None:
    first = owners.acquire()
    old = owners.marks()
    old.mark(old.take(), Mark(7, 0, 5))
    owners.release()
    assert owners.marks() is not old
    assert owners.own != first
    assert owners.marks_of(owners.own or "") == []
    assert owners.marks_of(first) == [(7, 0, 5)]  # for those who settle it


def test_the_file_goes_with_the_lock(owners: Owners) -> None:
    owner = owners.acquire()
    owners.marks()
    owners.release()
    owners.discard(owner)
    assert os.listdir(owners.folder) == []
    owners.discard(owner)


# What settling does with it


def batch(store: ResultStore, count: int = 4) -> list[int]:
    """Record calls that wait, and return their rows' numbers."""
    plan_group(store, "g", "f", [((x,), {}) for x in range(count)], None)
    return [store._db.read("SELECT number FROM tasks WHERE id = ?", (f"g/{x}",))[0][0] for x in range(count)]


def leave(store: ResultStore, *notes: tuple[int, int] | Mark, recorded: bool = True) -> Path:
    """Be a worker that died, and return the file with its notes."""
    if recorded:
        store._db.transact(lambda c: c.execute("INSERT INTO owners (id, pid, host) VALUES (?, 1, 'host')", (DEAD,)))
    path = Path(store._owners.folder, f"{DEAD}.running")
    marks = Marks(str(path))
    for note in notes:
        marks.mark(marks.take(), note if isinstance(note, Mark) else mark_of(store, *note))
    marks.close()
    return path


def mark_of(store: ResultStore, number: int, attempt: int) -> Mark:
    rows = store._db.read("SELECT id FROM tasks WHERE number = ?", (number,))
    return Mark.of(rows[0][0] if rows else "nobody", number, attempt)


def statuses(store: ResultStore) -> list[str]:
    return [row[0] for row in store._db.read("SELECT status FROM tasks ORDER BY number")]


def test_the_call_that_was_noted_is_lost_and_no_other(store: ResultStore) -> None:
    """What was on record as STARTED is lost without a note."""
    numbers = batch(store)
    path = leave(store, (numbers[2], 0))
    assert store.reap() == ["g/2"]
    assert statuses(store) == ["PENDING", "PENDING", "LOST", "PENDING"]
    meta = store.get_task_meta("g/2")
    assert meta.owner == store.own_owner()  # the submitter decides
    assert meta.result["attributes"]["pid"] == 1
    assert meta.result["attributes"]["started"] is True
    assert not path.exists()
    assert store.reap() == []


def test_without_a_note_nobody_is_to_blame(store: ResultStore) -> None:
    """The control arm: it is the note that tells."""
    batch(store)
    leave(store)
    assert store.reap() == []
    assert statuses(store) == ["PENDING"] * 4


def test_several_calls_at_a_time(store: ResultStore) -> None:
    numbers = batch(store)
    leave(store, (numbers[0], 0), (numbers[3], 0))
    assert sorted(store.reap()) == ["g/0", "g/3"]
    assert statuses(store) == ["LOST", "PENDING", "PENDING", "LOST"]


def test_a_retried_call(store: ResultStore) -> None:
    numbers = batch(store)
    store.mark_as_retry("g/1", ValueError("first"))
    leave(store, (numbers[1], 1))
    assert store.reap() == ["g/1"]
    meta = store.get_task_meta("g/1")
    assert (meta.status, meta.retries) == ("LOST", 1)
    assert [str(attempt.result) for attempt in store.attempts("g/1")] == ["first"]


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_note_of_another_attempt(store: ResultStore, attempt: int) -> None:
    numbers = batch(store)
    leave(store, (numbers[1], attempt))
    assert store.reap() == []
    assert statuses(store) == ["PENDING"] * 4


@pytest.mark.parametrize("status", ["DONE", "FAILURE", "REVOKED"])
def test_a_call_that_ended_meanwhile(store: ResultStore, status: str) -> None:
    numbers = batch(store)
    report: dict[str, Any] = {
        "DONE": store.mark_as_done,
        "FAILURE": lambda task_id: store.mark_as_failure(task_id, "why"),
        "REVOKED": store.revoke,
    }
    report[status]("g/1")
    before = store.get_task_meta("g/1").done_number
    path = leave(store, (numbers[1], 0))
    assert store.reap() == []
    assert (store.get_task_meta("g/1").status, store.get_task_meta("g/1").done_number) == (status, before)
    assert not path.exists()


def test_a_call_that_another_worker_has_begun(store: ResultStore) -> None:
    numbers = batch(store)
    store.mark_as_started("g/1")
    leave(store, (numbers[1], 0))
    assert store.reap() == []
    assert store.get_task_meta("g/1").owner == store.own_owner()
    assert statuses(store) == ["PENDING", "STARTED", "PENDING", "PENDING"]


def test_a_call_of_no_batch(store: ResultStore) -> None:
    store.create_task("by hand", task_id="own")
    leave(store, (1, 0))
    assert store.reap() == []
    assert store.get_task_meta("own").status == "PENDING"


def test_the_submitter_is_dead_too(store: ResultStore) -> None:
    numbers = batch(store)
    store._db.transact(lambda c: c.execute("UPDATE tasks SET owner = ?, submitter = ?", (OTHER, OTHER)))
    leave(store, (numbers[2], 0))
    assert sorted(store.reap()) == [f"g/{x}" for x in range(4)]
    assert statuses(store) == ["FAILURE"] * 4
    errors: list[Any] = [store.get_task_meta(f"g/{x}").exception() for x in range(4)]
    assert all(isinstance(error, WorkerLostError) for error in errors)
    assert [error.started for error in errors] == [False, False, True, False]
    assert [error.pid for error in errors] == [2, 2, 1, 2]


def test_the_submitter_is_dead_and_the_worker_is_at_a_call(store: ResultStore) -> None:
    """What a worker that lives has in hand is not failed as never begun: a resumed run would make it beside that."""
    numbers = batch(store)
    store._db.transact(lambda c: c.execute("UPDATE tasks SET owner = ?, submitter = ?", (DEAD, DEAD)))
    store._db.transact(store.register_owner)
    marks = store.own_marks()
    marks.mark(marks.take(), mark_of(store, numbers[2], 0))
    assert sorted(store.reap()) == ["g/0", "g/1", "g/3"]


def test_a_death_that_was_settled_before(store: ResultStore) -> None:
    """Somebody was faster, and the call is being made again: the note is an old one."""
    numbers = batch(store)
    path = leave(store, (numbers[2], 0), recorded=False)
    assert store.settle(DEAD) == []
    assert statuses(store) == ["PENDING"] * 4
    assert path.exists()  # he who settled it deletes it


def test_a_death_that_somebody_settles_at_this_moment(store: ResultStore) -> None:
    """The owner is not recorded any more, though it looked as if it owed a task: its notes are settled, too."""
    numbers = batch(store)
    store._db.transact(lambda c: c.execute("UPDATE tasks SET status = 'STARTED', owner = ? WHERE id = 'g/0'", (DEAD,)))
    leave(store, (numbers[2], 0), recorded=False)
    assert store.settle(DEAD) == ["g/0"]
    assert statuses(store) == ["LOST", "PENDING", "PENDING", "PENDING"]


def test_a_torn_note_blames_nobody(store: ResultStore) -> None:
    numbers = batch(store)
    path = leave(store, (numbers[2], 0))
    os.truncate(path, SLOT_SIZE - 1)
    assert store.reap() == []
    assert statuses(store) == ["PENDING"] * 4
    assert not path.exists()


def test_a_number_that_was_used_again(store: ResultStore) -> None:
    """The call that was being made is forgotten, and another task gets its row's number."""
    numbers = batch(store)
    store.forget("g/3")
    plan_group(store, "h", "f", [((1,), {})], None)
    leave(store, Mark.of("g/3", numbers[3], 0))  # before that, in truth: `plan_group` settles the dead
    assert store._db.read("SELECT number FROM tasks WHERE id = 'h/0'") == [(numbers[3],)]
    assert store.reap() == []
    assert store.get_task_meta("h/0").status == "PENDING"
