from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from liteerresult import liveness
from liteerresult.bell import Bell
from liteerresult.liveness import Owners, parse_owner
from tests.support import DEADLINE


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "owners")


@pytest.mark.parametrize(
    ("owner", "parsed"),
    [
        ("12@host-" + "a" * 32, (12, "host")),
        ("12@my-host.example-" + "0" * 32, (12, "my-host.example")),
        ("12@host", (None, None)),
        ("somebody", (None, None)),
        ("x@host-" + "a" * 32, (None, None)),
        ("12@host-" + "a" * 32 + "\n", (None, None)),
        ("", (None, None)),
    ],
)
def test_parse_owner(owner: str, parsed: tuple[int | None, str | None]) -> None:
    assert parse_owner(owner) == parsed


def test_own_id_tells_the_process(folder: str) -> None:
    owners = Owners(folder)
    assert owners.own is None
    owner = owners.acquire()
    assert parse_owner(owner)[0] == os.getpid()
    assert (owners.acquire(), owners.own) == (owner, owner)
    assert list(owners.names()) == [owner]
    owners.release()


def test_alive_until_released(folder: str) -> None:
    mine, theirs = Owners(folder), Owners(folder)
    owner = mine.acquire()
    assert theirs.is_alive(owner)
    assert mine.is_alive(owner)
    mine.release()
    assert mine.own is None
    assert not theirs.is_alive(owner)
    mine.release()


def test_each_acquisition_is_a_new_owner(folder: str) -> None:
    owners = Owners(folder)
    first = owners.acquire()
    owners.release()
    second = owners.acquire()
    assert first != second
    assert not owners.is_alive(first)
    owners.release()


def test_unknown_owner_is_dead(folder: str) -> None:
    owners = Owners(folder)
    assert not owners.is_alive("12@host-" + "a" * 32)
    assert not owners.is_alive("../../etc/passwd")


@pytest.mark.parametrize("owner", ["x" * 300, "nul\0in it"])
def test_owner_that_cannot_be_a_file_name_is_dead(folder: str, owner: str) -> None:
    """Plain SQL may write any text as owner: whoever waits for that task must not stumble over it."""
    assert not Owners(folder).is_alive(owner)


def test_discard_removes_the_file_and_is_repeatable(folder: str) -> None:
    owners = Owners(folder)
    owner = owners.acquire()
    owners.release()
    owners.discard(owner)
    owners.discard(owner)
    assert list(owners.names()) == []


def test_names_of_a_folder_that_is_gone(folder: str) -> None:
    owners = Owners(folder)
    Path(folder).rmdir()
    assert list(owners.names()) == []
    owner = owners.acquire()
    assert Path(folder, f"{owner}.lock").exists()
    owners.release()


def test_threads_share_one_owner(folder: str) -> None:
    owners = Owners(folder)
    barrier = threading.Barrier(8)
    seen: list[str] = []

    def acquire() -> None:
        barrier.wait(DEADLINE)
        seen.append(owners.acquire())

    threads = [threading.Thread(target=acquire) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert len(seen) == 8
    assert set(seen) == {owners.own}
    assert list(owners.names()) == [owners.own]
    owners.release()


def test_those_who_probe_at_once_do_not_see_each_other(folder: str) -> None:
    """The probe's lock is shared: an exclusive one would make the second prober think that the first is the owner."""
    owners = Owners(folder)
    dead = owners.acquire()
    owners.release()
    lives: list[bool] = []

    def probe() -> None:
        lives.extend(owners.is_alive(dead) for _ in range(300))

    threads = [threading.Thread(target=probe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert len(lives) == 1200
    assert not any(lives)


def test_probe_makes_no_event_and_death_does(tmp_path: Path, folder: str) -> None:
    owners, others = Owners(folder), Owners(folder)
    owner = owners.acquire()
    path = tmp_path / "bell"
    bell = Bell(str(path), lambda suffix: os.open(f"{path}{suffix}", os.O_RDWR | os.O_CREAT), folder)
    with bell.watch() as watch:
        assert others.is_alive(owner)
        assert not watch.wait(0.02)
        owners.release()
        assert watch.wait(5)
        assert watch.names == {f"{owner}.lock"}
        assert not others.is_alive(owner)
        assert not watch.wait(0.02)
    bell.close()


def test_what_a_forked_child_does_leaves_the_lock_to_the_parent(folder: str) -> None:
    """The hook itself, without a fork: the new owner is another one, and the old lock is still held."""
    owners, others = Owners(folder), Owners(folder)
    owner = owners.acquire()
    lock = owners._lock
    assert lock is not None
    owners.after_fork_in_child()
    assert owners.own is None
    assert others.is_alive(owner)
    assert owners.acquire() != owner
    owners.release()
    assert others.is_alive(owner)
    lock.release(force=True)
    liveness._abandoned.remove(lock)
