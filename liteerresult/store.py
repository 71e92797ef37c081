"""`ResultStore`: the whole store."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakValueDictionary

from .backend import set_opener
from .clock import uuid7
from .upkeep import Upkeep

if TYPE_CHECKING:
    from collections.abc import Callable

    from .clock import Clock
    from .connection import Durability

__all__ = ["ResultStore", "open_store"]


class ResultStore(Upkeep):
    """
    Results in one SQLite file, waited on and joined across processes.

    Thread-safe and fork-safe; use it as a context manager, or `close` it. Pickles to its path and options.

    Args:
        path: The database file; made if there is none.
        durability: ``"power-loss"``: what was acknowledged survives the machine going down.
            ``"process-crash"``: it survives any death of processes, and is faster.
        serializer: How values are stored: ``"json"``, or ``"pickle"``, which must be in *accept* too.
        accept: What is read: ``("json", "pickle")`` lets a file that strangers can write run their code here.
        clock: Where time comes from; the machine's clocks if None.
        new_id: Makes ids.

    Raises:
        NotAResultStore: The file is something else; it was left as it was.
        SchemaMismatch: The file is in a newer format; it was left as it was.
        StoreError: The file can't be used there: permissions, a network file system, no folder.
        ValueError: An option has no such value.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durability: Durability = "power-loss",
        serializer: str = "json",
        accept: tuple[str, ...] = ("json",),
        clock: Clock | None = None,
        new_id: Callable[[], str] = uuid7,
    ) -> None:
        super().__init__(path, durability=durability, serializer=serializer, accept=accept, clock=clock, new_id=new_id)
        self._attempts = {}
        self._reported = set()
        try:
            self.reap()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ResultStore: {self.path}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.path, *self._options)


_open: WeakValueDictionary[tuple[Any, ...], ResultStore] = WeakValueDictionary()
_guard = threading.Lock()


def open_store(
    path: str | os.PathLike[str],
    durability: Durability = "power-loss",
    serializer: str = "json",
    accept: tuple[str, ...] = ("json",),
) -> ResultStore:
    """Return this process's store of that path and these options, opened if it is not open: what unpickling calls."""
    key = (os.path.realpath(path), durability, serializer, tuple(accept))
    with _guard:
        store = _open.get(key)
        if store is None or store.closed:
            store = _open[key] = ResultStore(path, durability=durability, serializer=serializer, accept=accept)
    return store


def _after_fork_in_child() -> None:
    global _guard  # noqa: PLW0603 - another thread of the parent may have held it
    _guard = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
set_opener(open_store)
