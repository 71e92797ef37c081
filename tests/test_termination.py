from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from liteerresult.liveness import Owners, host_name
from liteerresult.termination import send_to_owner

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def never(_: str) -> bool:
    return False


def always(_: str) -> bool:
    return True


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """Yield the signals that reached this process."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGUSR1, before)


def myself() -> str:
    return f"{os.getpid()}@{host_name()}-{'0' * 32}"


def test_the_same_pid_on_another_host_is_not_signalled(heard: list[int]) -> None:
    assert not send_to_owner(f"{os.getpid()}@elsewhere-{'0' * 32}", signal.SIGUSR1, always)
    assert heard == []


def test_live_owner_is_signalled(heard: list[int], tmp_path: Path) -> None:
    owners = Owners(str(tmp_path))
    owner = owners.acquire()
    assert send_to_owner(owner, signal.SIGUSR1, owners.is_alive)
    assert heard == [signal.SIGUSR1]
    owners.release()


def test_process_that_only_has_the_pid_is_not_signalled(heard: list[int], tmp_path: Path) -> None:
    assert not send_to_owner(myself(), signal.SIGUSR1, Owners(str(tmp_path)).is_alive)
    assert heard == []


@pytest.mark.parametrize("owner", ["somebody", "0@host-" + "0" * 32, "-1@host-" + "0" * 32, ""])
def test_owner_without_a_pid_is_not_signalled(owner: str) -> None:
    assert not send_to_owner(owner, signal.SIGTERM, always)


def test_pid_that_nobody_has_is_not_signalled() -> None:
    with open("/proc/sys/kernel/pid_max") as file:
        nobody = int(file.read()) + 1
    assert not send_to_owner(f"{nobody}@{host_name()}-{'0' * 32}", signal.SIGTERM, always)


def test_liveness_is_asked_while_the_process_is_held(heard: list[int]) -> None:
    """Asking first and opening the process then would leave room for the pid to change hands."""
    held: list[bool] = []

    def is_alive(_: str) -> bool:
        held.append(any(os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[pidfd]" for fd in descriptors()))
        return False

    assert not send_to_owner(myself(), signal.SIGUSR1, is_alive)
    assert held == [True]
    assert heard == []


def descriptors() -> list[str]:
    """Return this process's open descriptors."""
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


@pytest.mark.parametrize("is_alive", [always, never])
def test_no_descriptor_is_left(is_alive: object, heard: list[int]) -> None:
    before = len(descriptors())
    send_to_owner(myself(), signal.SIGUSR1, is_alive)  # type: ignore[arg-type]
    assert len(descriptors()) == before
    assert threading.active_count() >= 1
