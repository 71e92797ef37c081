from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
import warnings
from typing import TYPE_CHECKING

import inotify_simple
import pytest

from liteerresult import bell as bell_module
from liteerresult.bell import Bell, Watch, notification_in_use
from tests.support import DEADLINE, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def make_bell(folder: Path) -> Bell:
    path = folder / "results.db"
    owners = folder / "owners"
    owners.mkdir(exist_ok=True)
    return Bell(str(path), lambda suffix: os.open(f"{path}{suffix}", os.O_RDWR | os.O_CREAT), str(owners))


@pytest.fixture
def bell(tmp_path: Path) -> Iterator[Bell]:
    bell = make_bell(tmp_path)
    yield bell
    bell.close()


@pytest.fixture
def polling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process one that got no inotify instance."""

    def refuse(**_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(bell_module, "_hub", None)
    monkeypatch.setattr(inotify_simple, "INotify", refuse)


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    return thread, answers


def settled(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()


def assert_woken(watch: Watch, leader: threading.Thread) -> None:
    leader.join(1)
    slept_on = leader.is_alive()
    watch.fire()
    settled(leader)
    assert not slept_on, "the bell rang, and the leader slept on"


def led() -> bool:
    return bell_module._the_hub()._leader is not None


def followers() -> int:
    return len(bell_module._the_hub()._followers)


def test_armed_watch_hears_a_ring_from_before_its_wait(bell: Bell) -> None:
    with bell.watch() as watch:
        bell.ring()
        assert watch.wait(0) or watch.wait(5)
        assert not watch.wait(0)


def test_watch_does_not_hear_what_came_before_it(bell: Bell) -> None:
    bell.ring()
    with bell.watch() as watch:
        assert not watch.wait(0)


def test_wait_without_a_ring_ends_with_its_timeout(bell: Bell) -> None:
    with bell.watch() as watch:
        before = time.monotonic()
        assert not watch.wait(0.02)
        assert time.monotonic() - before >= 0.02


def test_one_ring_wakes_everybody(bell: Bell) -> None:
    watches = [bell.watch() for _ in range(10)]
    waits = [in_thread(lambda watch=watch: watch.wait(DEADLINE)) for watch in watches]
    eventually(lambda: led() and followers() == 9, what="one leads, nine follow")
    bell.ring()
    settled(*[thread for thread, _ in waits])
    assert [answers for _, answers in waits] == [[True]] * 10
    for watch in watches:
        watch.close()


def test_a_leader_that_leaves_hands_over(bell: Bell) -> None:
    with bell.watch() as first, bell.watch() as second:
        leader, left = in_thread(lambda: first.wait(DEADLINE))
        eventually(led)
        follower, heard = in_thread(lambda: second.wait(DEADLINE))
        eventually(lambda: followers() == 1)
        first.fire()
        settled(leader)
        assert left == [True]
        eventually(lambda: led() and followers() == 0, what="the follower leads")
        bell.ring()
        settled(follower)
        assert heard == [True]


def test_a_follower_whose_time_is_up_leaves(bell: Bell) -> None:
    with bell.watch() as first, bell.watch() as second:
        leader, heard = in_thread(lambda: first.wait(DEADLINE))
        eventually(led)
        assert not second.wait(0.01)
        assert followers() == 0
        first.fire()
        settled(leader)
        assert heard == [True]


# Who hears of which task


def ids_by_shard() -> tuple[str, str, str]:
    """Return two ids whose tasks share a bell file, and one whose does not."""
    first = "t0"
    names = [f"t{number}" for number in range(1, 2_000)]
    same = next(name for name in names if bell_module.shard_of(name) == bell_module.shard_of(first))
    other = next(name for name in names if bell_module.shard_of(name) != bell_module.shard_of(first))
    return first, same, other


def test_a_waiter_for_one_task_sleeps_through_the_others(bell: Bell) -> None:
    mine, neighbour, other = ids_by_shard()
    with bell.watch(mine) as watch, bell.watch() as any_task:
        bell.ring([other])
        assert any_task.wait(5)
        assert not watch.wait(0)
        for heard in ([mine], [neighbour], [other, mine], None):
            bell.ring(heard)
            assert watch.wait(5), heard
            assert any_task.wait(5), heard


def test_a_change_of_many_tasks_is_heard_by_all(bell: Bell) -> None:
    mine, _, _ = ids_by_shard()
    others = [
        f"u{number}" for number in range(1_000) if bell_module.shard_of(f"u{number}") != bell_module.shard_of(mine)
    ]
    with bell.watch(mine) as watch:
        bell.ring(others[:1])
        assert not watch.wait(0)
        bell.ring(others)
        assert watch.wait(5)


def test_without_a_file_for_the_task_everybody_is_woken(bell: Bell, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(bell, "_open_file", refuse)
    with bell.watch("mine") as watch:
        bell.ring(["mine"])
        assert watch.wait(5)


def test_the_kernels_watch_goes_with_the_wait_for_a_task(bell: Bell) -> None:
    """Else a process that has waited for many tasks would be woken for all of them for ever."""
    hub = bell_module._the_hub()
    known = len(hub._paths)
    for number in range(500):
        bell.watch(f"t{number}").close()
    assert len(hub._paths) <= known + 4
    with bell.watch("t0") as one, bell.watch("t0") as two:
        bell.ring(["t0"])
        assert one.wait(5)
        assert two.wait(5)


def test_a_watch_that_was_dropped_is_made_again(bell: Bell) -> None:
    mine, _, other = ids_by_shard()
    for name in (mine, other, mine):
        with bell.watch(name) as watch:
            bell.ring([name])
            assert watch.wait(5)
            assert not watch.wait(0)


def test_only_those_meant_are_woken(tmp_path: Path, bell: Bell) -> None:
    (tmp_path / "other").mkdir()
    other = make_bell(tmp_path / "other")
    with bell.watch() as meant, other.watch() as not_meant:
        bell.ring()
        assert meant.wait(5)
        assert not not_meant.wait(0)
    other.close()


def test_what_another_thread_reads_reaches_the_leader(bell: Bell) -> None:
    """
    Arming reads the queue for the newcomer's sake; what it finds there may be what the leader sleeps for.

    Fails if the reader doesn't also wake the leader out of its poll: the kernel has nothing left to wake it with.
    """
    for _ in range(200):
        with bell.watch() as watch:
            leader, heard = in_thread(lambda watch=watch: watch.wait(DEADLINE))
            eventually(led)
            bell.ring()
            bell.watch().close()
            assert_woken(watch, leader)
            assert heard == [True]


def test_what_a_loop_reads_reaches_the_leader(bell: Bell) -> None:
    """Same hazard, where an asyncio loop of another thread reads."""

    async def wait_again_and_again() -> None:
        while not stop.is_set():
            with bell.watch() as watch:
                await watch.wait_async(0.001)

    stop = threading.Event()
    looper, _ = in_thread(lambda: asyncio.run(wait_again_and_again()))
    try:
        for _ in range(200):
            with bell.watch() as watch:
                leader, heard = in_thread(lambda watch=watch: watch.wait(DEADLINE))
                eventually(led)
                bell.ring()
                assert_woken(watch, leader)
                assert heard == [True]
    finally:
        stop.set()
        settled(looper)


def test_fire_ends_one_wait(bell: Bell) -> None:
    with bell.watch() as watch, bell.watch() as other:
        watch.fire()
        assert watch.wait(0)
        assert not watch.wait(0)
        assert not other.wait(0)


def test_closed_watch_hears_nothing(bell: Bell) -> None:
    watch = bell.watch()
    watch.close()
    bell.ring()
    assert not watch.wait(0)
    watch.close()


def test_closing_a_file_in_the_folder_is_heard_by_name(tmp_path: Path, bell: Bell) -> None:
    with bell.watch() as watch:
        (tmp_path / "owners" / "someone.lock").touch()
        assert watch.wait(5)
        assert watch.names == {"someone.lock"}


def test_looking_at_a_file_in_the_folder_is_not_heard(tmp_path: Path, bell: Bell) -> None:
    (tmp_path / "owners" / "someone.lock").touch()
    with bell.watch() as watch:
        os.close(os.open(tmp_path / "owners" / "someone.lock", os.O_RDONLY))
        assert not watch.wait(0.02)
        assert watch.names == set()


def test_bell_that_cannot_ring_is_silent(bell: Bell) -> None:
    bell.close()
    bell.ring()
    bell.close()


def test_bell_file_does_not_grow(tmp_path: Path, bell: Bell) -> None:
    for _ in range(5):
        bell.ring()
    assert (tmp_path / "results.db-bell").stat().st_size == 1


def test_bell_file_that_was_removed_and_made_again(tmp_path: Path) -> None:
    first = make_bell(tmp_path)
    first.watch().close()
    first.close()
    (tmp_path / "results.db-bell").unlink()
    again = make_bell(tmp_path)
    with again.watch() as watch:
        again.ring()
        assert watch.wait(5)
    again.close()


def test_closing_one_bell_leaves_the_watches_of_another_on_the_same_file(tmp_path: Path, bell: Bell) -> None:
    with bell.watch() as watch:
        make_bell(tmp_path).close()
        bell.ring()
        assert watch.wait(5)


def test_closing_one_bell_while_nobody_listens_does_not_deafen_the_other(tmp_path: Path, bell: Bell) -> None:
    bell.watch().close()
    make_bell(tmp_path).close()
    with bell.watch() as watch:
        bell.ring()
        assert watch.wait(5)


def test_one_instance_for_all(tmp_path: Path, bell: Bell) -> None:
    other = make_bell(tmp_path)
    with bell.watch() as one, other.watch() as two:
        assert one._hub is two._hub
    other.close()
    assert notification_in_use() == "inotify"


def test_overflow_wakes_everybody(bell: Bell) -> None:
    """The kernel dropped events: it is not known whose."""
    with bell.watch() as watch, bell.watch() as other:
        hub = watch._hub
        with hub._mutex:
            hub._hear(-1, inotify_simple.flags.Q_OVERFLOW, "")
        assert watch.wait(0)
        assert other.wait(0)


# asyncio


def test_async_wait_hears(bell: Bell) -> None:
    async def main() -> bool:
        with bell.watch() as watch:
            asyncio.get_running_loop().call_soon(bell.ring)
            return await watch.wait_async(DEADLINE)

    assert asyncio.run(main())


def test_async_wait_hears_a_ring_from_before(bell: Bell) -> None:
    async def main() -> bool:
        with bell.watch() as watch:
            bell.ring()
            return await watch.wait_async(DEADLINE)

    assert asyncio.run(main())


def test_async_wait_ends_with_its_timeout(bell: Bell) -> None:
    async def main() -> bool:
        with bell.watch() as watch:
            return await watch.wait_async(0.01)

    assert not asyncio.run(main())


def test_many_async_waits_at_once(bell: Bell) -> None:
    async def main() -> list[bool]:
        watches = [bell.watch() for _ in range(20)]
        waits = [asyncio.ensure_future(watch.wait_async(DEADLINE)) for watch in watches]
        asyncio.get_running_loop().call_soon(bell.ring)
        answers = await asyncio.gather(*waits)
        for watch in watches:
            watch.close()
        return answers

    assert asyncio.run(main()) == [True] * 20


def test_cancelled_async_wait_leaves_nothing_behind(bell: Bell) -> None:
    async def main() -> None:
        with bell.watch() as watch:
            waiting = asyncio.ensure_future(watch.wait_async(None))
            await asyncio.sleep(0)
            assert watch._hub._loops
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert not watch._hub._loops
            bell.ring()
            assert await watch.wait_async(5)

    asyncio.run(main())


def test_fire_from_another_thread_ends_an_async_wait(bell: Bell) -> None:
    async def main() -> bool:
        with bell.watch() as watch:
            waiting = asyncio.ensure_future(watch.wait_async(DEADLINE))
            await asyncio.sleep(0)
            threading.Thread(target=watch.fire).start()
            return await waiting

    assert asyncio.run(main())


# Where there are no file events


def test_out_of_instances_polls_and_says_so_once(polling: None, tmp_path: Path) -> None:
    bell = make_bell(tmp_path)
    with pytest.warns(RuntimeWarning, match="max_user_instances") as caught:
        first = bell.watch()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = bell.watch()
    assert notification_in_use() == "polling"
    with first, second:
        assert not first.wait(5)
        assert not second.wait(0)
    bell.close()


def test_polling_backs_off_up_to_a_limit(polling: None, tmp_path: Path) -> None:
    bell = make_bell(tmp_path)
    with pytest.warns(RuntimeWarning, match="polls"):
        watch: Watch = bell.watch()
    delays = [watch._next_delay(None) for _ in range(30)]
    assert delays == sorted(delays)
    assert delays[0] == bell_module.POLL_FIRST
    assert delays[-1] == bell_module.POLL_LONGEST
    assert watch._next_delay(0.003) == 0.003
    bell.close()


def test_polling_async_wait_returns(polling: None, tmp_path: Path) -> None:
    async def main() -> bool:
        with bell.watch() as watch:
            return await watch.wait_async(5)

    bell = make_bell(tmp_path)
    with pytest.warns(RuntimeWarning, match="polls"):
        assert not asyncio.run(main())
    bell.close()
