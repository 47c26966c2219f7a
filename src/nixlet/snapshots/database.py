"""A sqlite database that mostly a thread of its own writes, commits grouped.

All changes that came while one transaction went on share the next, each in a savepoint of its own, so that sixteen clients wait
for one fsync and not for sixteen, and none of those who only read waits for it. Write-ahead log with ``synchronous=FULL``: what was
acknowledged survives a power cut.

The change of a client that is alone is made in the event loop's thread: while such a commit takes its time, everything waits for it.
Once a commit has been slow, all go to the other thread for a while; so a disk that becomes slow, or hangs, holds the loop up once.

What was refused stays undone: when COMMIT fails, the transaction's frames are in the log already, with the mark that makes a next
start take them for made. They are written over before anything else is, and until that has worked every change is refused.
"""

import asyncio
import collections
import contextlib
import itertools
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from nixlet import errors
from nixlet.host import uncut
from nixlet.snapshots import faults as faults_module
from nixlet.snapshots import opening, refusals

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


#: Seconds from which on a transaction is slow, and for which no other is made in the loop's thread then.
_SLOW = 0.005
_AVOIDED = 10.0

#: Seconds between two attempts to write over what a failed COMMIT left.
_AGAIN = 1.0

#: Seconds after which a change that still waits tells that the disk hangs.
_PATIENCE = 5.0


class Database:
    """An open database, for the event loop's thread.

    Attributes:
        connection: For what changes do, and for nobody else.
    """

    def __init__(
        self,
        path: str,
        migrations: Sequence[str],
        faults: faults_module.Faults,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open or create it.

        Args:
            path: The file.
            migrations: The schema's steps; a database at version N has had the first N applied.
            faults: Where tests can have the process killed.
            clock: Seconds, for telling what takes long.

        Raises:
            FailedPreconditionError: It is damaged, foreign, or of a later nixlet.
            ResourceExhaustedError: The disk is full.
            UnavailableError: The disk has another trouble, or another program has the database open.
        """
        self._path = path
        self._faults = faults
        self._clock = clock
        self._version = len(migrations)
        self._pending: list[_Pending] = []
        #: The changes of a turn of the loop each; None ends the writer.
        self._turns: queue.SimpleQueue[Sequence[_Pending] | None] = queue.SimpleQueue()
        #: When each of the changes came of which nobody has been told yet; and whether the last one came alone while there was none.
        self._since: collections.deque[float] = collections.deque()
        self._alone = False
        #: Until when none is made in the loop's thread.
        self._avoided = 0.0
        #: Why every change is refused from now on; empty: none is.
        self._refusal = ""
        self._closed = False
        #: What undoes the transaction that may come true though its COMMIT failed.
        self._doubtful: contextlib.ExitStack | None = None
        self._results: collections.deque[_Result] = collections.deque()
        self.connection = opening.connect(path, migrations)
        # Whoever doesn't close the database is not kept from ending.
        self._writer = threading.Thread(target=self._write_all, name="database", daemon=True)
        self._writer.start()

    async def close(self) -> None:
        """Write what is pending and close; changes are refused from now on."""
        if self._closed:
            return
        self._closed = True
        self._hand_over()
        self._refusal = self._refusal or f"the snapshotter's database {self._path} is closed"
        # A disk that hangs holds the writer up, and the last checkpoint.
        await uncut.to_its_end(asyncio.to_thread(self.close_unused))
        self._refuse_queued()
        while self._results:
            self._tell()

    def close_unused(self) -> None:
        """The same where nothing was ever changed (blocking)."""
        self._turns.put(None)
        self._writer.join()
        self.connection.close()

    def check(self, patience: float = _PATIENCE) -> None:
        """Check that changes are made.

        Args:
            patience: Seconds that a change may take.

        Raises:
            UnavailableError: They are refused, or one waits for longer than that.
        """
        what = f"the snapshotter's database {self._path}"
        if self._refusal:
            raise errors.UnavailableError(self._refusal)
        if self._doubtful is not None:
            raise errors.UnavailableError(f"{what} can't be written since a commit failed")
        if self._since and (waited := self._clock() - self._since[0]) > patience:
            raise errors.UnavailableError(
                f"{what} has a change waiting for {waited:.0f} seconds: the disk is slow or hangs"
            )

    def read(self, query: str) -> list[Any]:
        """All rows that a query has; before the first change, while nothing is written.

        Raises:
            FailedPreconditionError: The database is damaged.
            UnavailableError: The disk has a trouble.
        """
        try:
            return self.connection.execute(query).fetchall()
        except sqlite3.Error as error:
            # What Python can't make of a value has no code of sqlite's.
            if not hasattr(error, "sqlite_errorcode"):
                raise refusals.unreadable(self._path, error) from error
            raise refusals.in_words(self._path, error) from error

    async def write(self, change: Callable[[Effects], T]) -> T:
        """Run a change in a transaction, mostly in the writer's thread, and wait until it is durable.

        An exception of ``change`` undoes that change alone, and is raised here. A caller that is cancelled loses the answer, never
        the change, and goes on when that is made or refused.

        Raises:
            UnavailableError: The database is closed, or can't be written any more.
        """
        if self._refusal:
            raise errors.UnavailableError(self._refusal)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if not self._pending:
            loop.call_soon(self._hand_over)
        self._pending.append((change, future))
        self._since.append(self._clock())
        return await uncut.outcome(future)

    def _hand_over(self) -> None:
        """Give the writer what came in one turn of the loop; or, where one client does one thing after the other, make it here."""
        pending, self._pending = self._pending, []
        # The way to another thread and back takes some tenth of such a call, and there is nobody who would wait meanwhile.
        here, self._alone = self._alone, len(pending) == 1 == len(self._since) and self._clock() >= self._avoided
        if here and self._alone and not self._refusal and self._doubtful is None:
            self._results.extend(self._flush(pending))
            self._tell()
        elif pending:
            self._turns.put(pending)
            if self._refusal:
                # The writer may have ended meanwhile.
                self._refuse_queued()
                self._answer()

    def _answer(self) -> None:
        """Tell one of those who wait, and in the next turn of the loop the next: what came in meanwhile is not kept waiting."""
        if self._results:
            self._tell()
        if self._results:
            asyncio.get_running_loop().call_soon(self._answer)

    def _tell(self) -> None:
        """Do what follows the oldest result, and tell whoever waits for it."""
        self._since.popleft()
        result = self._results.popleft()
        problem = result.problem
        try:
            for follow in result.durable:
                follow()
        except BaseException as error:  # noqa: BLE001 (whoever waits is told, whatever it is)
            problem = self._end("what is stored is not what is known in memory", error)
        if result.future.done():
            return
        if problem is None:
            result.future.set_result(result.value)
        else:
            result.future.set_exception(problem)

    def _end(self, why: str, error: BaseException) -> errors.UnavailableError:
        """Refuse all changes from now on, after what must not happen."""
        _log.error("the snapshotter's database: %s", why, exc_info=error)
        self._refusal = f"the snapshotter's database {self._path} can't be written any more: {why}; a restart is needed"
        return errors.UnavailableError(self._refusal)

    # The writer's thread, or the loop's while the writer has nothing to do.

    def _write_all(self) -> None:
        pending: list[_Pending] = []
        try:
            ended = False
            while not ended:
                turns = self._next_turns()
                ended = None in turns
                pending = [each for turn in turns if turn is not None for each in turn]
                if pending:
                    self._results.extend(self._flush(pending))
                    _wake(pending, self._answer)
                elif self._doubtful is not None:
                    self._write_over()
        except BaseException as error:  # noqa: BLE001 (nobody must wait for ever)
            problem = self._end("its writer has ended", error)
            self._results.extend(_Result(future, problem=problem) for _, future in pending)
            pending += self._refuse_queued()
            _wake(pending, self._answer)

    def _next_turns(self) -> list[Sequence[_Pending] | None]:
        """What is to be written, once there is something; or, where something is to be written over, nothing after a while."""
        turns: list[Sequence[_Pending] | None] = []
        with contextlib.suppress(queue.Empty):
            turns.append(self._turns.get(timeout=None if self._doubtful is None else _AGAIN))
            while True:
                turns.append(self._turns.get_nowait())
        return turns

    def _refuse_queued(self) -> list[_Pending]:
        """Refuse what the writer has not taken and never will; what that was."""
        refused: list[_Pending] = []
        with contextlib.suppress(queue.Empty):
            while True:
                refused += self._turns.get_nowait() or ()
        problem = errors.UnavailableError(self._refusal)
        self._results.extend(_Result(future, problem=problem) for _, future in refused)
        return refused

    def _flush(self, pending: Sequence[_Pending]) -> list[_Result]:
        begun = self._clock()
        results: list[_Result] = []
        undo = contextlib.ExitStack()
        committing = False
        try:
            if self._doubtful is not None:
                self._overwrite()
            self._transact(pending, results, undo)
            committing = True
            self.connection.execute("COMMIT")
        except BaseException as error:  # noqa: BLE001 (whoever waits is told, whatever it is)
            with contextlib.suppress(sqlite3.Error):
                self.connection.execute("ROLLBACK")
            problem = refusals.told(self._path, error)
            if not committing:
                _undo(undo)
            else:
                self._doubtful = undo
                if not self._write_over():
                    problem = refusals.uncertain(problem)
                    # The writer goes on trying.
                    self._turns.put(())
            # A reason of one's own may be one that another change gave, which is undone now.
            own = list(itertools.takewhile(lambda result: result.problem is not None, results))
            results = own + [_Result(future, problem=problem) for _, future in pending[len(own) :]]
        ended = self._clock()
        if ended - begun > _SLOW:
            self._avoided = ended + _AVOIDED
        return results

    def _transact(self, pending: Sequence[_Pending], results: list[_Result], undo: contextlib.ExitStack) -> None:
        """Make changes, each in a savepoint of its own; whoever calls commits them."""
        run = self.connection.execute
        run("BEGIN IMMEDIATE")
        for change, future in pending:
            run("SAVEPOINT change")
            effects = Effects(contextlib.ExitStack(), [])
            try:
                results.append(_Result(future, change(effects), durable=effects.durable))
                undo.push(effects.undo)
            except BaseException as error:
                _undo(effects.undo)
                if not isinstance(error, Exception) or not self.connection.in_transaction:
                    # sqlite undoes the whole transaction by itself when the disk is full.
                    raise
                run("ROLLBACK TO change")
                results.append(_Result(future, problem=refusals.told(self._path, error)))
            run("RELEASE change")
        self._faults.reach("changes-made")

    def _write_over(self) -> bool:
        """Try to write over what a failed COMMIT left; whether that worked."""
        try:
            self._overwrite()
        except Exception as error:  # noqa: BLE001 (it is tried again, whatever it is)
            _log.error("a change whose commit failed can't be undone yet: %s", refusals.told(self._path, error))
            return False
        return True

    def _overwrite(self) -> None:
        """Write another transaction over the frames of the one whose COMMIT failed; it can't come true any more, and is undone.

        Each frame's checksum goes on from the one before it: with the first one all are void.
        """
        opening.write_something(self.connection, self._version)
        assert self._doubtful is not None
        _undo(self._doubtful)
        # Last: until then the loop's thread lets the connection alone.
        self._doubtful = None


def _wake(pending: Sequence[_Pending], answer: Callable[[], None]) -> None:
    """Have the loop answer those who wait."""
    if pending:
        # Who has closed the loop waits for nothing.
        with contextlib.suppress(RuntimeError):
            pending[0][1].get_loop().call_soon_threadsafe(answer)


def _undo(stack: contextlib.ExitStack) -> None:
    try:
        stack.close()
    except Exception as error:  # noqa: BLE001 (whoever waits is told of the change, whatever it left)
        # What stays behind has a number that is given to nobody else, and is swept at the next start.
        _log.warning("what a failed change did on the disk can't be undone: %s", error)
