"""Opening the snapshotter's database: whose it is, how it writes, its schema, and its log."""

import contextlib
import os
import sqlite3
from collections.abc import Sequence

from nixlet import errors
from nixlet.host import files
from nixlet.snapshots import refusals

#: "nixl", so that a database of another program is recognised (sqlite's PRAGMA application_id).
_APPLICATION_ID = 0x6E69786C

#: The write-ahead log's length (bytes): the 1,000 pages after which sqlite makes a checkpoint, with their headers. On a full disk a
#: checkpoint may find no room; the 250 pages behind them are for what is removed then.
_LOG_SIZE = 1_250 * (4096 + 24) + 32


def connect(path: str, migrations: Sequence[str]) -> sqlite3.Connection:
    """Open or create a database; the connection may be used in every thread, in one at a time.

    Args:
        path: The file.
        migrations: The schema's steps; a database at version N has had the first N applied.

    Raises:
        FailedPreconditionError: It is damaged, foreign, or of a later nixlet.
        ResourceExhaustedError: The disk is full.
        UnavailableError: The disk has another trouble, or another program has the database open.
    """
    with contextlib.ExitStack() as stack:
        try:
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            stack.callback(connection.close)
            with files.refusing(f"the snapshotter's database {path} can't be written"):
                _prepare(connection, path, migrations)
        except sqlite3.Error as error:
            raise refusals.in_words(path, error) from error
        stack.pop_all()
    return connection


def write_something(connection: sqlite3.Connection, version: int) -> None:
    """Write a transaction that changes nothing.

    Args:
        connection: An open database.
        version: The version that its schema has.
    """
    connection.execute(f"PRAGMA user_version = {version}")


def _prepare(connection: sqlite3.Connection, path: str, migrations: Sequence[str]) -> None:
    run = connection.execute
    # Nobody else opens it: no locks are taken for each statement. Said before anything is read: sqlite would make a file of
    # shared memory beside it otherwise, which a full disk has no room for.
    run("PRAGMA locking_mode = EXCLUSIVE")
    version = run("PRAGMA user_version").fetchone()[0]
    application = run("PRAGMA application_id").fetchone()[0]
    if (version or application) and application != _APPLICATION_ID:
        raise errors.FailedPreconditionError(
            f"{path} is not a database of nixlet", hint="choose another root for the snapshotter"
        )
    if version > len(migrations):
        raise errors.FailedPreconditionError(
            f"{path} was written by a later nixlet (schema {version}, this one knows {len(migrations)})",
            hint="run that nixlet, or choose another root for the snapshotter",
        )
    run("PRAGMA journal_mode = WAL")
    run("PRAGMA synchronous = FULL")
    run("PRAGMA foreign_keys = ON")
    # Some builds overwrite what is deleted, which takes room in the log: nothing here is secret.
    run("PRAGMA secure_delete = OFF")
    for number, script in enumerate(migrations[version:], start=version + 1):
        connection.executescript(
            f"BEGIN; {script} PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {number}; COMMIT;"
        )
    # A write, so that the log is there.
    write_something(connection, len(migrations))
    _extend(f"{path}-wal")


def _extend(log: str) -> None:
    """Let the write-ahead log have the length from the start to which it grows before it is used again from its beginning.

    A commit that makes a file longer costs the file system a commit of its own journal; one that writes over what is there
    doesn't. What stands behind the last valid frame is ignored (https://www.sqlite.org/fileformat2.html, 4.4).
    """
    with open(log, "ab") as file:
        file.write(bytes(max(0, _LOG_SIZE - file.tell())))
        file.flush()
        os.fsync(file.fileno())
