"""A process with an open store that does what a test tells it, one expression a line."""

from __future__ import annotations

import base64
import json
import pickle
import sys
import time
from typing import TYPE_CHECKING, Any

from tests.support import DEADLINE, Child

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Puppet", "monotonic", "spread", "timed"]


class Puppet(Child):
    """
    A child process with ``store`` open on *path*. What an expression raises is raised in the test.

    Args:
        path: The database file.
        tick: The store's fallback tick, in seconds; "default" leaves it, None switches it off.
        **options: As for `ResultStore`; no sync per commit unless told.
    """

    def __init__(self, path: Path, tick: float | str | None = "default", **options: Any) -> None:
        settings = {"durability": "process-crash", **options}
        super().__init__("-m", "tests.process.puppet", path, json.dumps(settings), json.dumps(tick))
        assert self.read_line() == "open", self.report()

    def tell(self, expression: str) -> None:
        """Send an expression; `answer` gets its value."""
        self.write_line(expression)

    def answer(self, timeout: float = DEADLINE) -> Any:
        """Return the value of the oldest expression that was not answered yet, or raise what it raised."""
        raised, value = pickle.loads(base64.b64decode(self.read_line(timeout)))
        if raised:
            raise value
        return value

    def ask(self, expression: str) -> Any:
        """Send an expression and return its value."""
        self.tell(expression)
        return self.answer()


def monotonic() -> float:
    """Return the time on a clock that all processes of this machine share."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return when *call* ended, and its value or the exception that it raised."""
    try:
        outcome = call()
    except Exception as exc:  # noqa: BLE001 - the outcome, whatever it is
        outcome = exc
    return monotonic(), outcome


def spread(what: str, seconds: list[float]) -> str:
    """Print, for ``pytest -s``, how long things took."""
    ordered = sorted(seconds)
    middle, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    text = f"{what}: n={len(ordered)} p50={middle * 1e3:.3f} ms p99={p99 * 1e3:.3f} ms max={ordered[-1] * 1e3:.3f} ms"
    print(f"\n{text}")  # noqa: T201 - the measurement
    return text


def _main(path: str, options: str, tick: str) -> None:
    import liteerresult

    store = liteerresult.ResultStore(path, **json.loads(options))
    if json.loads(tick) != "default":
        store.fallback_tick = json.loads(tick)
    names = {**vars(liteerresult), "store": store, "path": path, "timed": timed, "monotonic": monotonic}
    print("open", flush=True)  # noqa: T201 - the pipe
    for line in sys.stdin:
        try:
            answer = (False, eval(line, names))
        except Exception as exc:  # noqa: BLE001 - the test's to judge
            answer = (True, exc)
        print(base64.b64encode(pickle.dumps(answer)).decode(), flush=True)  # noqa: T201 - the pipe


if __name__ == "__main__":
    _main(*sys.argv[1:])
