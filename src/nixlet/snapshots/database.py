"""A sqlite database that is written in the event loop, commits grouped.

All changes that arrive in one turn of the loop share a transaction, each in a savepoint of its own, so that sixteen clients
wait for one fsync and not for sixteen. Write-ahead log with ``synchronous=FULL``: what was acknowledged survives a power cut.
"""

import asyncio
import contextlib
import errno
import logging
import os
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from nixlet import errors
from nixlet.host import files
from nixlet.snapshots import faults as faults_module

T = TypeVar("T")

_log = logging.getLogger("nixlet.snapshots")

#: A change that waits for the next transaction, and whoever waits for it.
_Pending = tuple[Callable[[contextlib.ExitStack], Any], asyncio.Future[Any]]

#: Whoever waits, and what the change returned or why it was not made.
_Result = tuple[asyncio.Future[Any], Any, BaseException | None]

#: "nixl", so that a database of another program is recognised (sqlite's PRAGMA application_id).
_APPLICATION_ID = 0x6E69786C

#: The write-ahead log's length (bytes): the 1,000 pages after which sqlite makes a checkpoint, with their headers. On a full disk a
#: checkpoint may find no room; the 250 pages behind them are for what is removed then.
_LOG_SIZE = 1_250 * (4096 + 24) + 32


class Database:
    """An open database; it is used in the event loop's thread only.

    Attributes:
        connection: For reading, and for changing inside ``write``.
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
        with contextlib.ExitStack() as stack:
            try:
                self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=True)
                stack.callback(self.connection.close)
                with files.refusing(f"the snapshotter's database {path} can't be written"):
                    self._prepare(migrations)
            except sqlite3.Error as error:
                raise self._told(error) from error
            stack.pop_all()

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
        self._flush()
        self.connection.close()

    async def write(self, change: Callable[[contextlib.ExitStack], T]) -> T:
        """Run a change in a transaction and wait until it is durable.

        An exception of ``change`` undoes that change alone, and is raised here. What a change does outside of the
        database it pairs with a callback on the stack that it is given: these run, last first, when the change or the
        transaction that it shares fails.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if not self._pending:
            loop.call_soon(self._flush)
        self._pending.append((change, future))
        # A caller that is cancelled here loses the answer, never the change.
        return await future

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        results: list[_Result] = []
        effects = contextlib.ExitStack()
        try:
            self._transact(pending, results, effects)
        except Exception as error:  # noqa: BLE001 (whoever waits is told, whatever it is)
            with contextlib.suppress(sqlite3.Error):
                self.connection.execute("ROLLBACK")
            _undo(effects)
            told = self._told(error) if isinstance(error, sqlite3.Error) else error
            # Those that were refused by themselves keep their own reason.
            refused = {future: problem for future, _, problem in results if problem is not None}
            results = [(future, None, refused.get(future) or told) for _, future in pending]
        for future, result, problem in results:
            if future.cancelled():
                continue
            if problem is None:
                future.set_result(result)
            else:
                future.set_exception(problem)

    def _transact(self, pending: Sequence[_Pending], results: list[_Result], effects: contextlib.ExitStack) -> None:
        run = self.connection.execute
        run("BEGIN IMMEDIATE")
        for change, future in pending:
            run("SAVEPOINT change")
            effect = contextlib.ExitStack()
            try:
                results.append((future, change(effect), None))
                effects.push(effect)
            except Exception as error:
                _undo(effect)
                if not self.connection.in_transaction:
                    # sqlite has undone the whole transaction by itself, as it does when the disk is full.
                    raise
                run("ROLLBACK TO change")
                results.append((future, None, self._told(error) if isinstance(error, sqlite3.Error) else error))
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


def _undo(effects: contextlib.ExitStack) -> None:
    try:
        effects.close()
    except OSError as error:
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
