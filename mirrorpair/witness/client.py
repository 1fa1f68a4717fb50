"""`arbiter = "witness"`: a node's way to the register that the witness keeps.

Rules:
- One connection, kept, and one request at a time. Made anew when it is lost; whoever asks next pays for that.
- A0 A swap of which no reply came is "unknown", and its connection is never used again, so that no late reply is taken
  for another one's. Only what was never sent is an error: UnreachableError, nothing has happened.
- F17 A record that is older than one that this node has seen is not believed, whoever serves it: StaleRecordError.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from mirrorpair.arbiter import Register, Swap, Versioned
from mirrorpair.errors import (
    MirrorpairError,
    PeerError,
    PeerProtocolError,
    PeerTimeoutError,
    RefusedError,
    UnreachableError,
)
from mirrorpair.peersocket import connect
from mirrorpair.text import printable
from mirrorpair.witness import (
    MAX_LINE,
    PREAMBLE,
    CasRequest,
    ReadRequest,
    Reply,
    Request,
    decode_reply,
    encode_line,
)

if TYPE_CHECKING:
    from mirrorpair.address import Address

REPLY_S = 2.0


class StaleRecordError(RefusedError):
    """The witness's record is older than what is known: lost, or restored from a copy (F17)."""


class WitnessRegister:
    """The pair's register at the witness. `seen` is the highest (epoch, version) that this node knows of."""

    def __init__(
        self, address: Address, pair: str, *, seen: tuple[int, int] = (0, 0), reply_s: float = REPLY_S
    ) -> None:
        self._address = address
        self._pair = pair
        self._reply_s = reply_s
        self.seen = seen
        self._turn = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._next_id = 1

    async def read(self, *, however_old: bool = False) -> Versioned:
        """UnreachableError, PeerTimeoutError, PeerProtocolError: no record can be had. PeerError: the witness says why
        not. StaleRecordError, unless `however_old`."""
        async with self._turn:
            kept = self._streams is not None
            try:
                reply = await self._ask(ReadRequest(id=self._number(), pair=self._pair))
            except UnreachableError:
                if not kept:
                    raise
                # It was started anew since the last request.
                reply = await self._ask(ReadRequest(id=self._number(), pair=self._pair))
            record = reply.record
            if record is None:
                raise self._foreign("a reply without a record")
            number = (record.register.epoch, record.version)
            if number < self.seen and not however_old:
                raise StaleRecordError(
                    f"the witness at {self._address} has version {number[1]} of the record, of epoch {number[0]}; this "
                    f"node has seen version {self.seen[1]} of epoch {self.seen[0]}: its file was lost or restored from "
                    "an older copy, and it is not believed"
                )
            self.seen = max(self.seen, number)
            return record

    async def cas(self, version: int, new: Register) -> Swap:
        """Raises only if it has certainly not happened: UnreachableError."""
        async with self._turn:
            await self._connected()
            try:
                reply = await self._ask(CasRequest(id=self._number(), pair=self._pair, version=version, register=new))
                if reply.swap is None:
                    raise self._foreign("a reply without a result")
            except MirrorpairError:
                return Swap.UNKNOWN
            if reply.swap == "conflict":
                return Swap.CONFLICT
            self.seen = max(self.seen, (new.epoch, version + 1))
            return Swap.OK

    async def close(self) -> None:
        """Again: no effect. The next request connects anew."""
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].transport.abort()
            with contextlib.suppress(OSError):
                await streams[1].wait_closed()

    def _number(self) -> int:
        self._next_id += 1
        return self._next_id

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is not None and (self._streams[0].at_eof() or self._streams[1].is_closing()):
            await self.close()
        if self._streams is None:
            try:
                sock = await connect(self._address, PREAMBLE)
            except OSError as error:
                reason = "it does not answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
                raise UnreachableError(f"the witness at {self._address} cannot be reached: {reason}") from None
            self._streams = await asyncio.open_connection(sock=sock, limit=MAX_LINE)
        return self._streams

    async def _ask(self, request: Request) -> Reply:
        reader, writer = await self._connected()
        done = False
        try:
            async with asyncio.timeout(self._reply_s):
                writer.write(encode_line(request))
                await writer.drain()
                line = await reader.readuntil(b"\n")
            reply = decode_reply(line)
            if reply.id != request.id:
                raise self._foreign("a reply to something else")
            done = True
        except TimeoutError:
            raise PeerTimeoutError(
                f"the witness at {self._address} did not answer within {self._reply_s:g} s"
            ) from None
        except (OSError, asyncio.IncompleteReadError):
            raise UnreachableError(f"the witness at {self._address} hung up before it answered") from None
        except (asyncio.LimitOverrunError, ValueError):
            raise self._foreign(f"a reply of more than {MAX_LINE} bytes") from None
        finally:
            if not done:
                await self.close()
        if reply.code:
            raise PeerError(f"the witness: {printable(reply.message)}", reply.code)
        return reply

    def _foreign(self, what: str) -> PeerProtocolError:
        return PeerProtocolError(f"the witness at {self._address} sent {what}")
