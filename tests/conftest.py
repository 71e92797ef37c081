"""The store, the clock and the ids of a test: nothing else lives here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support import ManualClock, counting_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from liteerresult import ResultStore


@pytest.fixture
def clock() -> ManualClock:
    """Return a clock that only the test moves."""
    return ManualClock()


@pytest.fixture
def ids() -> Callable[[], str]:
    """Return a source of ids: id-1, id-2, ..."""
    return counting_ids("id-")


@pytest.fixture
def store(tmp_path: Path, clock: ManualClock, ids: Callable[[], str]) -> Iterator[ResultStore]:
    """Yield an empty store in a real file; no sync per commit, since no test pulls the plug on it."""
    from liteerresult import ResultStore

    with ResultStore(tmp_path / "results.db", clock=clock, new_id=ids, durability="process-crash") as opened:
        yield opened
