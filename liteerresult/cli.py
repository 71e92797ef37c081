"""The command line: `liteerresult run` and its kin. docs/cli.md shows each command with its output."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from . import __version__, tables
from .connection import Database
from .errors import LiteerresultError
from .runner import Runner
from .states import DONE
from .store import ResultStore, open_store

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["main"]

EXIT_FAILED, EXIT_USAGE, EXIT_TIMEOUT, EXIT_SIGNAL = 1, 2, 124, 128

SEPARATOR = ":::"
_AGE = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

_OWED_TO_THE_DEAD = "SELECT id FROM tasks WHERE owner = ? AND done_number IS NULL ORDER BY number"


class _Main(click.Group):
    """The group, with one place that turns errors into a line and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            value = super().invoke(ctx)
            sys.stdout.flush()  # a closed pipe is to be met here, where click is quiet about it
        except LiteerresultError as exc:
            _fail(str(exc))
        except KeyboardInterrupt:
            ctx.exit(EXIT_SIGNAL + signal.SIGINT)
        return value


def _fail(message: str, status: int = EXIT_USAGE) -> None:
    click.echo(f"liteerresult: {message}", err=True)
    click.get_current_context().exit(status)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """
    Run commands and keep what became of them in a SQLite file; wait for results, join and read them.

    \b
    liteerresult run results.db -j 4 --group words -- wc -w {} ::: *.md
    liteerresult join results.db words

    Exit status: 0 all well, 1 a task failed, 2 bad usage or a file that can't be used, 124 timed out.
    """


class _Store(click.Path):
    """A database file that is there: reading never makes one."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = os.fsdecode(super().convert(value, param, ctx))
        if os.stat(path).st_size == 0 and not os.path.exists(path + "-wal"):
            self.fail(f"File {path!r} is empty: not a result store.", param, ctx)
        return path


class _Age(click.ParamType[float]):
    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw]?)", str(value))
        if match is None:
            self.fail(f"{value!r} is not an age such as 7d, 12h, 30m or 90s.", param, ctx)
        return float(match[1]) * _AGE[match[2] or "s"]


store_argument = click.argument("db", type=_Store())
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
timeout_option = click.option(
    "--timeout", type=click.FloatRange(0), metavar="SECONDS", help="Longest wait; 0 looks once."
)


# run


class _Work(NamedTuple):
    """The calls of a batch."""

    calls: list[tuple[tuple[str, ...], dict[str, Any]]]
    name: str


@main.command(
    epilog="Example: liteerresult run results.db -j 4 --group film -- ./render {} ::: frames/*.exr\n\n"
    "Example: ls *.log | liteerresult run results.db -- gzip -k"
)
@click.argument("db", type=click.Path(dir_okay=False))
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "-j", "--jobs", type=click.IntRange(1), help="Commands at once; as many as there are processors if not given."
)
@click.option("--group", "group_id", help="Name of the batch: the same command again runs only what is not DONE.")
@click.option(
    "--retries", type=click.IntRange(0), default=0, show_default=True, help="Further attempts for a command that fails."
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="Longest time for one command."
)
@click.option("--name", help="Kind of work, for people; the program's name if not given.")
@click.option(
    "--durability",
    type=click.Choice(["power-loss", "process-crash"]),
    default="power-loss",
    show_default=True,
    help="What a recorded result survives.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each task as it finishes.")
def run(
    db: str,
    command: tuple[str, ...],
    jobs: int | None,
    group_id: str | None,
    retries: int,
    timeout: float | None,
    name: str | None,
    durability: Any,
    as_json: bool,
) -> None:
    """
    Run a command for each item, several at once, each as a task.

    COMMAND is a program and its arguments, then ::: and the items. {} stands for the item; without {} the item is
    the last argument. No shell is involved. Without ::: the lines of standard input are the items. Without a
    program each item is a shell command. Put -- before COMMAND.

    A task's result has the command's returncode, stdout and stderr; a command that ends with another status than 0
    is a FAILURE. Exit status 0 only if all succeeded.
    """
    from .commands import Batch, Commands, signals_to

    work = _work(command, name)
    with open_store(db, durability) as store:  # the workers' threads get the same one
        runner = Runner(store, ThreadPoolExecutor(jobs or os.cpu_count() or 1, "liteerresult-command"))
        commands = Commands(store, timeout)
        events: SimpleQueue[Any] = SimpleQueue()
        with signals_to(events):
            known = store.completion_number()
            try:
                group = runner.run_calls(commands, work.calls, group_id=group_id, retries=retries, name=work.name)
            except BaseException as exc:
                runner.close(cancel=True)
                if isinstance(exc, ValueError):
                    raise click.UsageError(str(exc)) from exc
                raise
            batch = Batch(store, runner, commands, events)
            with tables.Report(group.id, len(work.calls), as_json) as report:
                succeeded = batch.attend([result.id for result in group.results], known, report.show)
    if batch.interrupted is not None:
        click.get_current_context().exit(EXIT_SIGNAL + batch.interrupted)
    click.get_current_context().exit(0 if succeeded else EXIT_FAILED)


def _work(command: tuple[str, ...], name: str | None) -> _Work:
    """Return the calls that the words of a command line mean."""
    program, items = command, None
    if SEPARATOR in command:
        at = command.index(SEPARATOR)
        program, items = command[:at], list(command[at + 1 :])
        if SEPARATOR in items:
            raise click.UsageError(f"more than one {SEPARATOR} is not supported: there is one list of items")
    if items is None:
        items = _lines()
    if not program:
        return _Work([(("sh", "-c", item), {"item": item}) for item in items], name or "sh")
    if not any("{}" in word for word in program):
        program = (*program, "{}")
    calls = [(tuple(word.replace("{}", item) for word in program), {"item": item}) for item in items]
    first = program[0]
    return _Work(calls, name or (os.path.basename(first) if "{}" not in first else "command"))


def _lines() -> list[str]:
    if sys.stdin.isatty():
        click.echo("liteerresult: reading items from the terminal, one a line; Ctrl-D ends them", err=True)
    data = sys.stdin.buffer.read()
    return [os.fsdecode(line) for line in data.split(b"\n") if line.strip()]


# Reading


@main.command("ls", epilog="Example: liteerresult ls results.db --status FAILURE")
@store_argument
@click.option("--status", type=str.upper, help="Only tasks of this status, such as FAILURE.")
@click.option("--group", "group_id", help="Only tasks of this group, those of nested groups included.")
@click.option("--limit", type=click.IntRange(1), help="Only so many: the newest tasks, the oldest groups.")
@click.option("--groups", is_flag=True, help="List groups instead.")
@json_option
def list_tasks(
    db: str, status: str | None, group_id: str | None, limit: int | None, groups: bool, as_json: bool
) -> None:
    """List tasks, or groups, in the order of their creation. With --json an object a line."""
    with ResultStore(db) as store:
        if groups:
            _list_groups(db, limit, as_json)
            return
        if group_id is not None and store.group_counts(group_id) is None:
            _fail(f"no group {group_id!r}")
        metas = tables.tasks_in_order(
            store, {"status": "DONE" if status == "SUCCESS" else status, "group_id": group_id}, limit
        )
        if as_json:
            for meta in metas:
                tables.print_json(tables.task_record(meta))
            return
        columns = ("id", "status", "name", "item", "seconds", "result")
        tables.print_table(
            columns,
            (
                (m.task_id, m.status, m.name or "", tables.item_text(m), tables.seconds_text(m), tables.result_text(m))
                for m in metas
            ),
        )


def _list_groups(db: str, limit: int | None, as_json: bool) -> None:
    with contextlib.closing(Database(db, "process-crash")) as database:
        rows = database.read(tables.GROUPS, {"limit": -1 if limit is None else limit})
    if as_json:
        for row in rows:
            tables.print_json(dict(zip(tables.GROUP_COLUMNS, row, strict=True)))
    else:
        tables.print_table(tables.GROUP_COLUMNS, rows)


@main.command(epilog="Example: liteerresult show results.db film/3")
@store_argument
@click.argument("id")
@json_option
def show(db: str, id: str, as_json: bool) -> None:  # noqa: A002 - shown as ID in the help
    """Show a task with its call, result, traceback, attempts and family; or a group with its counts and members."""
    with ResultStore(db) as store:
        if store.exists(id):
            record = tables.task_details(store, id)
        elif store.group_counts(id) is not None:
            record = tables.group_details(store, id)
        else:
            _fail(f"no task or group {id!r}")
            return
        if as_json:
            tables.print_json(record)
        else:
            tables.print_pairs(tables.detail_pairs(record))


def _wait_for(store: ResultStore, is_ready: Callable[[], bool], timeout: float | None) -> bool:
    """Wait until *is_ready* says so, or *timeout* seconds passed."""
    deadline = None if timeout is None else time.monotonic() + timeout
    with store.watch() as watch:
        while not is_ready():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            watch.wait(left)
    return True


@main.command(epilog="Example: liteerresult wait results.db film/3 --timeout 60")
@store_argument
@click.argument("id")
@timeout_option
@json_option
def wait(db: str, id: str, timeout: float | None, as_json: bool) -> None:  # noqa: A002
    """
    Wait for a task and print its value: text as it is, a command's output, anything else as JSON.

    Exit status: 0 done, 1 failed or revoked, 124 timed out.
    """
    with ResultStore(db) as store:
        if not store.exists(id):
            if store.group_counts(id) is not None:
                _fail(f"{id!r} is a group; try: liteerresult join {db} {id}")
            click.echo(f"liteerresult: no task {id!r} yet; waiting for it to be recorded", err=True)
        if not _wait_for(store, lambda: store.get_task_meta(id).ready, timeout):
            _fail(f"task {id!r} is not ready after {timeout:g} s", EXIT_TIMEOUT)
        meta = store.get_task_meta(id)
        if as_json:
            tables.print_json(tables.task_record(meta))
        elif meta.status == DONE:
            tables.print_line(tables.result_text(meta))
        else:
            tables.print_line(f"{meta.status} {tables.result_text(meta)}".rstrip(), err=True)
        click.get_current_context().exit(0 if meta.status == DONE else EXIT_FAILED)


@main.command(epilog="Example: liteerresult join results.db film --format csv > film.csv")
@store_argument
@click.argument("group_id")
@timeout_option
@click.option("--format", "form", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json: an array of objects.")
def join(db: str, group_id: str, timeout: float | None, form: str, as_json: bool) -> None:
    """
    Wait for a group and print its results in their order, those of nested groups included.

    Exit status: 0 all done, 1 some failed or were revoked, 124 timed out.
    """
    with ResultStore(db) as store:
        if store.group_counts(group_id) is None:
            _fail(f"no group {group_id!r}")

        def is_ready() -> bool:
            counts = store.group_counts(group_id)
            return counts is None or not counts.waiting

        if not _wait_for(store, is_ready, timeout):
            counts = store.group_counts(group_id)
            left = counts.waiting if counts is not None else 0
            _fail(f"group {group_id!r}: {left} tasks are not ready after {timeout:g} s", EXIT_TIMEOUT)
        ids = list(tables.leaves(store, group_id))
        metas = list(tables.metas_of(store, ids))
        if as_json or form == "json":
            tables.print_json([tables.task_record(meta) for meta in metas])
        else:
            print_rows = tables.print_csv if form == "csv" else tables.print_table
            print_rows(
                ("item", "status", "result"), ((tables.item_text(m), m.status, tables.result_text(m)) for m in metas)
            )
        click.get_current_context().exit(0 if all(meta.status == DONE for meta in metas) else EXIT_FAILED)


# Changing


@main.command(epilog="Example: liteerresult reap results.db")
@store_argument
@json_option
def reap(db: str, as_json: bool) -> None:
    """Fail what dead processes left, and print the ids of these tasks."""
    # Opening the store is what reaps; what it will find is looked up before.
    from .liveness import Owners

    with contextlib.closing(Database(db, "process-crash")) as database:
        owners = Owners(f"{database.path}-owners")
        dead = [row[0] for row in database.read("SELECT id FROM owners") if not owners.is_alive(row[0])]
        owed = [row[0] for owner in dead for row in database.read(_OWED_TO_THE_DEAD, (owner,))]
    with ResultStore(db) as store:
        lost = [meta.task_id for meta in store.get_many(owed) if meta.ready or meta.status == "LOST"]
    if as_json:
        tables.print_json(lost)
    else:
        for task_id in lost:
            tables.print_line(task_id)


@main.command(epilog="Example: liteerresult cleanup results.db 7d")
@store_argument
@click.argument("age", type=_Age())
@json_option
def cleanup(db: str, age: float, as_json: bool) -> None:
    """
    Delete groups and tasks that became final longer ago than AGE, and print how many tasks.

    AGE is a number of seconds, or of what the letter after it says: 90s, 30m, 12h, 7d, 2w.
    """
    with ResultStore(db) as store:
        count = store.cleanup(age)
    if as_json:
        tables.print_json({"deleted": count})
    else:
        tables.print_line(f"{count} deleted")


@main.command(epilog="Example: liteerresult revoke results.db film/3 --terminate")
@store_argument
@click.argument("id")
@click.option("--terminate", is_flag=True, help="Also end the process that runs it, by SIGTERM.")
def revoke(db: str, id: str, terminate: bool) -> None:  # noqa: A002
    """
    Cancel a task, or all tasks of a group, unless final already.

    Exit status: 0 cancelled, 1 it was final already.
    """
    with ResultStore(db) as store:
        if store.exists(id):
            revoked = store.revoke(id, terminate=terminate)
        elif (group := store.restore_group(id)) is not None:
            revoked = group.revoke(terminate=terminate)
        else:
            _fail(f"no task or group {id!r}")
            return
        if not revoked:
            _fail(f"{id!r} is final already", EXIT_FAILED)
    tables.print_line(f"revoked {id}")


@main.command(epilog="Example: liteerresult resubmit results.db film/3")
@store_argument
@click.argument("id")
def resubmit(db: str, id: str) -> None:  # noqa: A002
    """
    Send a failed or revoked task back to PENDING, for whoever runs it next.

    It runs nothing: a batch is taken up again by the same `liteerresult run --group`.
    """
    with ResultStore(db) as store:
        store.resubmit(id)
    tables.print_line(f"resubmitted {id}")


@main.command(epilog="Example: liteerresult doctor results.db")
@store_argument
@click.option("--quick", is_flag=True, help="Leave out that indexes agree with their tables: faster for a large file.")
@json_option
def doctor(db: str, quick: bool, as_json: bool) -> None:
    """
    Examine a store without changing anything in it: the file, its counts, its owners, its surroundings.

    Exit status: 0 all well, warnings allowed; 1 problems found.
    """
    from .doctor import examine

    found = examine(os.path.realpath(db), quick=quick)
    well = all(finding.level != "problem" for finding in found)
    if as_json:
        tables.print_json(
            {"path": os.path.realpath(db), "ok": well, "findings": [finding.as_dict() for finding in found]}
        )
    else:
        for finding in found:
            level = finding.level.upper() if finding.level == "problem" else finding.level
            tables.print_line(f"{level:<9}{finding.check:<14}{finding.text}")
    click.get_current_context().exit(0 if well else EXIT_FAILED)


if __name__ == "__main__":
    main(prog_name="liteerresult")
