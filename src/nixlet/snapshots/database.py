"""A sqlite database that a thread of its own writes, commits grouped.

All changes that came while one transaction went on share the next, each in a savepoint of its own, so that sixteen clients wait
for one fsync and not for sixteen, and none of those who only read waits for it. Write-ahead log with ``synchronous=FULL``: what was
acknowledged survives a power cut.
"""

import asyncio
import collections
import contextlib
import errno
import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from nixlet import errors
from nixlet.host import files
from nixlet.snapshots import faults as faults_module

T = TypeVar("T")

_log = logging.getLogger("nixlet.snapshots")


class Effects(NamedTuple):
    """What a change does outside of the database, for it to fill.

    Attributes:
        undo: Takes it back, last first, when the change or the transaction that it shares fails; in the writer's thread.
        durable: What follows when the change is durable, before whoever waits is told; in the event loop's thread.
    """

    undo: contextlib.ExitStack
    durable: list[Callable[[], object]]


#: A change that waits for the next transaction, and whoever waits for it.
_Pending = tuple[Callable[[Effects], Any], asyncio.Future[Any]]


class _Result(NamedTuple):
    """How a change went: what it returned and what follows, or why it was not made."""

    future: asyncio.Future[Any]
    value: Any = None
    problem: BaseException | None = None
    durable: Sequence[Callable[[], object]] = ()

    def tell(self) -> None:
        """Tell whoever waits."""
        for follow in self.durable:
            follow()
        if self.future.cancelled():
            return
        if self.problem is None:
            self.future.set_result(self.value)
        else:
            self.future.set_exception(self.problem)


#: "nixl", so that a database of another program is recognised (sqlite's PRAGMA application_id).
_APPLICATION_ID = 0x6E69786C

#: The write-ahead log's length (bytes): the 1,000 pages after which sqlite makes a checkpoint, with their headers. On a full disk a
#: checkpoint may find no room; the 250 pages behind them are for what is removed then.
_LOG_SIZE = 1_250 * (4096 + 24) + 32


class Database:
    """An open database, for the event loop's thread.

    Attributes:
        connection: For what changes do, and for nobody else.
    """

    def __init__(self, path: str, migrations: Sequence[str], faults: faults_module.Faults) -> None:
        """Open or create it.

        Args:
            path: The file.
            migrations: The schema's steps; a database at version N has had the first N applied.
            faults: Where tests can have the process killed.

        Raises:
            FailedPreconditionError: It is damaged, foreign, or of a later nixlet.
            ResourceExhaustedError: The disk is full.
            UnavailableError: The disk has another trouble, or another program has the database open.
        """
        self._path = path
        self._faults = faults
        self._pending: list[_Pending] = []
        #: The changes of a turn of the loop each; None ends the writer.
        self._turns: queue.SimpleQueue[Sequence[_Pending] | None] = queue.SimpleQueue()
        #: Changes of which nobody has been told yet, and whether the last one came alone while there were none.
        self._under_way = 0
        self._alone = False
        self._results: collections.deque[_Result] = collections.deque()
        with contextlib.ExitStack() as stack:
            try:
                self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                stack.callback(self.connection.close)
                with files.refusing(f"the snapshotter's database {path} can't be written"):
                    self._prepare(migrations)
            except sqlite3.Error as error:
                raise self._told(error) from error
            stack.pop_all()
        # Whoever doesn't close the database is not kept from ending.
        self._writer = threading.Thread(target=self._write_all, name="database", daemon=True)
        self._writer.start()

    def _prepare(self, migrations: Sequence[str]) -> None:
        run = self.connection.execute
        # Nobody else opens it: no locks are taken for each statement. Said before anything is read: sqlite would make a file of
        # shared memory beside it otherwise, which a full disk has no room for.
        run("PRAGMA locking_mode = EXCLUSIVE")
        version = run("PRAGMA user_version").fetchone()[0]
        application = run("PRAGMA application_id").fetchone()[0]
        if (version or application) and application != _APPLICATION_ID:
            raise errors.FailedPreconditionError(
                f"{self._path} is not a database of nixlet", hint="choose another root for the snapshotter"
            )
        if version > len(migrations):
            raise errors.FailedPreconditionError(
                f"{self._path} was written by a later nixlet (schema {version}, this one knows {len(migrations)})",
                hint="run that nixlet, or choose another root for the snapshotter",
            )
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("PRAGMA foreign_keys = ON")
        # Some builds overwrite what is deleted, which takes room in the log: nothing here is secret.
        run("PRAGMA secure_delete = OFF")
        for number, script in enumerate(migrations[version:], start=version + 1):
            self.connection.executescript(
                f"BEGIN; {script} PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {number}; COMMIT;"
            )
        # A write, so that the log is there.
        run(f"PRAGMA user_version = {len(migrations)}")
        _extend(f"{self._path}-wal")

    def close(self) -> None:
        """Write what is pending and close."""
        self._hand_over()
        self._turns.put(None)
        self._writer.join()
        while self._results:
            self._tell()
        self.connection.close()

    def read(self, query: str) -> list[Any]:
        """All rows that a query has; before the first change, while nothing is written.

        Raises:
            FailedPreconditionError: The database is damaged.
            UnavailableError: The disk has a trouble.
        """
        try:
            return self.connection.execute(query).fetchall()
        except sqlite3.Error as error:
            raise self._told(error) from error

    async def write(self, change: Callable[[Effects], T]) -> T:
        """Run a change in a transaction, mostly in the writer's thread, and wait until it is durable.

        An exception of ``change`` undoes that change alone, and is raised here.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if not self._pending:
            loop.call_soon(self._hand_over)
        self._pending.append((change, future))
        # A caller that is cancelled here loses the answer, never the change.
        return await future

    def _hand_over(self) -> None:
        """Give the writer what came in one turn of the loop; or, where one client does one thing after the other, make it here."""
        pending, self._pending = self._pending, []
        alone, self._alone = self._alone, len(pending) == 1 and not self._under_way
        self._under_way += len(pending)
        if alone and self._alone:
            # The way to another thread and back takes some tenth of such a call, and there is nobody who would wait meanwhile.
            self._results.extend(self._flush(pending))
            self._tell()
        elif pending:
            self._turns.put(pending)

    def _answer(self) -> None:
        """Tell one of those who wait, and in the next turn of the loop the next: what came in meanwhile is not kept waiting."""
        if self._results:
            self._tell()
        if self._results:
            asyncio.get_running_loop().call_soon(self._answer)

    def _tell(self) -> None:
        self._under_way -= 1
        self._results.popleft().tell()

    # The writer's thread, or the loop's while the writer has nothing to do.

    def _write_all(self) -> None:
        ended = False
        while not ended:
            turns = [self._turns.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    turns.append(self._turns.get_nowait())
            ended = None in turns
            pending = [each for turn in turns if turn is not None for each in turn]
            if pending:
                self._results.extend(self._flush(pending))
                # Who has closed the loop waits for nothing.
                with contextlib.suppress(RuntimeError):
                    pending[0][1].get_loop().call_soon_threadsafe(self._answer)

    def _flush(self, pending: Sequence[_Pending]) -> list[_Result]:
        results: list[_Result] = []
        undo = contextlib.ExitStack()
        try:
            self._transact(pending, results, undo)
        except Exception as error:  # noqa: BLE001 (whoever waits is told, whatever it is)
            with contextlib.suppress(sqlite3.Error):
                self.connection.execute("ROLLBACK")
            _undo(undo)
            told = self._told(error) if isinstance(error, sqlite3.Error) else error
            # Those that were refused by themselves keep their own reason.
            refused = {result.future: result.problem for result in results if result.problem is not None}
            results = [_Result(future, problem=refused.get(future) or told) for _, future in pending]
        return results

    def _transact(self, pending: Sequence[_Pending], results: list[_Result], undo: contextlib.ExitStack) -> None:
        run = self.connection.execute
        run("BEGIN IMMEDIATE")
        for change, future in pending:
            run("SAVEPOINT change")
            effects = Effects(contextlib.ExitStack(), [])
            try:
                results.append(_Result(future, change(effects), durable=effects.durable))
                undo.push(effects.undo)
            except Exception as error:
                _undo(effects.undo)
                if not self.connection.in_transaction:
                    # sqlite has undone the whole transaction by itself, as it does when the disk is full.
                    raise
                run("ROLLBACK TO change")
                told = self._told(error) if isinstance(error, sqlite3.Error) else error
                results.append(_Result(future, problem=told))
            run("RELEASE change")
        self._faults.reach("changes-made")
        run("COMMIT")

    def _disk_is_full(self) -> bool:
        # A broken disk doesn't even say that.
        with contextlib.suppress(OSError):
            return files.is_full(os.path.dirname(self._path))
        return False

    def _told(self, error: sqlite3.Error) -> errors.NixletError:
        told = self._in_words(error)
        told.__cause__ = error
        return told

    def _in_words(self, error: sqlite3.Error) -> errors.NixletError:
        """What sqlite says, with what to do about it (https://www.sqlite.org/rescode.html)."""
        # Errors that Python makes up itself have no code.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        what = f"the snapshotter's database {self._path}"
        if code == sqlite3.SQLITE_FULL or (
            code in {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN} and self._disk_is_full()
        ):
            return files.refused(f"{what} can't be written", OSError(errno.ENOSPC, ""))
        if code == sqlite3.SQLITE_IOERR:
            return files.refused(f"{what} can't be used", OSError(errno.EIO, ""))
        if code == sqlite3.SQLITE_READONLY:
            return files.refused(f"{what} can't be written", OSError(errno.EROFS, ""))
        if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            return errors.FailedPreconditionError(f"{what} can't be read: {error}", hint=way_out(self._path))
        return errors.UnavailableError(f"{what} can't be used: {error}")


def way_out(path: str) -> str:
    """What to do about a database that can't be used any more, as a hint.

    containerd relies on the snapshots that it was told of: its own directory (of which the snapshotter's is often a part) has to begin
    anew as well.
    """
    return (
        f"restore {path} from a backup; or, to begin anew: end nixlet and containerd, move containerd's directory and"
        f" {os.path.dirname(path)} away, and load the images again"
    )


def _undo(stack: contextlib.ExitStack) -> None:
    try:
        stack.close()
    except Exception as error:  # noqa: BLE001 (whoever waits is told of the change, whatever it left)
        # What stays behind has a number that is given to nobody else, and is swept at the next start.
        _log.warning("what a failed change did on the disk can't be undone: %s", error)


def _extend(log: str) -> None:
    """Let the write-ahead log have the length from the start to which it grows before it is used again from its beginning.

    A commit that makes a file longer costs the file system a commit of its own journal; one that writes over what is there
    doesn't. What stands behind the last valid frame is ignored (https://www.sqlite.org/fileformat2.html, 4.4).
    """
    with open(log, "ab") as file:
        file.write(bytes(max(0, _LOG_SIZE - file.tell())))
        file.flush()
        os.fsync(file.fileno())
