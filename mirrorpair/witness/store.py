"""The witness's records, a file for each pair: durable before they are told, and one change at a time.

Rules:
- Every pair has a lock of its own. What has begun is finished, whoever asked for it has gone or not.
- A record is settled (`recordfile.settle`) before it is first told, and again after a write of which nobody knows
  whether it is durable: until that succeeds nothing is answered for this pair. So a swap whose reply was an error has
  happened for good by the next answer, or never will.
- F17 A damaged file is not believed, and not replaced: its pair gets an error until a person removes it. F10 Without
  space nothing changes, and reads go on.
- The folder is locked: two witnesses never write the same records.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any, TypeVar

from mirrorpair.arbiter import Register, Swap, Versioned, check_successor
from mirrorpair.arbiter.recordfile import UnsettledError, save, settle
from mirrorpair.errors import ImageError, RefusedError
from mirrorpair.linux import ofd_lock
from mirrorpair.text import printable

if TYPE_CHECKING:
    from collections.abc import Coroutine

MAX_PAIRS = 10_000
_FOLDER_MODE = 0o700
_T = TypeVar("_T")

log = logging.getLogger("mirrorpair.witness")


class _Record:
    """One pair's. `value` None: not settled."""

    def __init__(self, path: str, owner: str) -> None:
        self.path, self.owner = path, owner
        self.lock = asyncio.Lock()
        self.users = 0
        """who has it in hand: there is never a second one of this pair beside it"""
        self.value: Versioned | None = None


class Store:
    """The records in `folder`, which is made if it is missing, until `close`."""

    def __init__(self, folder: str) -> None:
        """RefusedError: another witness has the folder. ImageError: it cannot be made or used."""
        self._folder = folder
        self._records: dict[str, _Record] = {}
        self._work: set[asyncio.Task[Any]] = set()
        shown = printable(folder)
        try:
            os.makedirs(folder, mode=_FOLDER_MODE, exist_ok=True)
            self._fd = os.open(f"{folder}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ImageError(f"cannot use the folder {shown}: {error.strerror}") from error
        try:
            ofd_lock(self._fd, exclusive=True)
        except OSError:
            os.close(self._fd)
            raise RefusedError(f"another witness uses the folder {shown}") from None

    async def read(self, pair: str) -> Versioned:
        """ImageError: the storage failed. RefusedError: the file is damaged, or there are too many pairs."""
        record = self._record(pair)
        return await self._finished(record, self._read(record))

    async def cas(self, pair: str, version: int, new: Register) -> Swap:
        """OK or CONFLICT. Raises as `read`, and ImageError also when nobody knows whether it has happened."""
        record = self._record(pair)
        return await self._finished(record, self._cas(record, version, new))

    async def close(self) -> None:
        """Waits for what has begun."""
        await asyncio.gather(*self._work, return_exceptions=True)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    async def _read(self, record: _Record) -> Versioned:
        async with record.lock:
            return await self._settled(record)

    async def _cas(self, record: _Record, version: int, new: Register) -> Swap:
        async with record.lock:
            old = await self._settled(record)
            if version != old.version:
                return Swap.CONFLICT
            if (why := check_successor(old.register, new)) is not None:
                log.warning("pair %s: a change is refused: %s", record.owner, why)
                return Swap.CONFLICT
            value = Versioned(version=version + 1, register=new)
            try:
                await asyncio.to_thread(save, record.path, record.owner, value)
            except UnsettledError:
                record.value = None
                raise
            record.value = value
            return Swap.OK

    async def _settled(self, record: _Record) -> Versioned:
        if record.value is None:
            record.value = await asyncio.to_thread(settle, record.path, record.owner)
        return record.value

    def _record(self, pair: str) -> _Record:
        if pair not in self._records:
            if len(self._records) >= MAX_PAIRS:
                raise RefusedError(f"this witness keeps the records of {MAX_PAIRS} pairs already")
            self._records[pair] = _Record(f"{self._folder}/{pair}.record", pair)
        return self._records[pair]

    async def _finished(self, record: _Record, work: Coroutine[Any, Any, _T]) -> _T:
        """The caller may be cancelled, the work is not: a second write must not begin beside it."""
        task = asyncio.get_running_loop().create_task(work)
        self._work.add(task)
        record.users += 1

        def ended(task: asyncio.Task[_T]) -> None:
            self._work.discard(task)
            record.users -= 1
            if not record.users and record.value is not None and not record.value.version:
                del self._records[record.owner]  # a name under which nothing was ever written
            if not task.cancelled():
                task.exception()  # whoever asked may have gone

        task.add_done_callback(ended)
        return await asyncio.shield(task)
