"""A worker's links: it listens for other workers, and tries on the coordinator's behalf whether it reaches them.

A connection that opens proves little, for a stopped process has a listening socket too. So the other side shows a
token, and answers after it has connected back where that is asked for. The listening socket lives as long as the
process. A refused connection therefore shows that the process is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
from collections.abc import Callable

from elastic_moe.control.codec import decode_link, encode
from elastic_moe.control.messages import CheckLinksMessage, LinksMessage
from elastic_moe.control.peer_messages import LinkedMessage, LinkMessage
from elastic_moe.coordination.gate import Gate, LineReader
from elastic_moe.coordination.listener import ListenerThread

LINK_TIMEOUT_S = 3.0  # for one link
BACK_TIMEOUT_S = 2.0  # for the way back, which is a part of it
CHECK_TIMEOUT_S = 10.0  # for all links of a check; those that were not tried by then are reported in no way
AT_ONCE = 64  # links that are tried at the same time

REACHED, SILENT, REFUSED = "reached", "silent", "refused"
Address = tuple[str, int]
logger = logging.getLogger(__name__)


def link_token(token: str, worker: str) -> str:
    """The secret of the links to one worker. Whoever takes over a dead worker's port does not learn the run's token."""
    return hmac.new(token.encode(), f"links of {worker}".encode(), hashlib.sha256).hexdigest()


class LinkProber:
    """One worker's links.

    Args:
        token: shared secret of the run.
        worker: this worker's id.
        report: takes the answer to a check, in the listener's thread.

    Attributes:
        address: host and port at which it listens; port 0: it does not.
    """

    def __init__(self, token: str, worker: str, report: Callable[[LinksMessage], None]) -> None:
        self._token, self._worker, self._report = token, worker, report
        self._gate = Gate(link_token(token, worker))
        self._listener: ListenerThread | None = None
        self.address: Address = ("", 0)

    def open(self, host: str) -> None:
        """Listen on this address of the machine. No-op if it does so already."""
        if self._listener is not None and host == self.address[0]:
            return
        self.close()
        listener = ListenerThread("links", host, self._serve)
        try:
            listener.start()
        except RuntimeError as error:
            logger.warning("other workers cannot try their links to this one: %s", error)
            return
        self._listener, self.address = listener, (host, listener.port)

    def check(self, message: CheckLinksMessage) -> None:
        """Try the links to the peers in the background; without an address, no peer is reported."""
        if (listener := self._listener) is None:
            self._report(LinksMessage(message.check, (), (), ()))
            return
        listener.call(lambda: listener.spawn(self._check(message)))

    def close(self) -> None:
        """Stop listening, and every check."""
        if self._listener is not None:
            self._listener.close()
        self._listener, self.address = None, ("", 0)

    # --- the listener's thread ---

    async def _check(self, message: CheckLinksMessage) -> None:
        places = asyncio.Semaphore(AT_ONCE)
        outcomes: dict[str, str] = {}

        async def attempt(worker: str, address: Address) -> None:
            async with places:
                outcomes[worker] = await _link(address, self._token, worker, self._worker, self.address, LINK_TIMEOUT_S)

        peers = [peer for peer in message.peers if peer.worker != self._worker]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await asyncio.gather(*(attempt(peer.worker, peer.address) for peer in peers))
        reached, silent, refused = (
            tuple(w for w, outcome in outcomes.items() if outcome == kind) for kind in (REACHED, SILENT, REFUSED)
        )
        self._report(LinksMessage(message.check, reached, silent, refused))

    async def _serve(self, lines: LineReader, writer: asyncio.StreamWriter) -> None:
        """Answer another worker."""
        message = decode_link(await self._gate.admit(lines, writer))
        if not isinstance(message, LinkMessage):
            raise ValueError("the first message of a link must be a link")
        back = True
        if message.back[1]:
            outcome = await _link(message.back, self._token, message.worker, self._worker, ("", 0), BACK_TIMEOUT_S)
            back = outcome == REACHED
        writer.write(encode(LinkedMessage(self._worker, back)))
        await writer.drain()


async def _link(address: Address, token: str, worker: str, own: str, back: Address, timeout_s: float) -> str:
    """Try one link. Returns `REACHED`, `SILENT` or `REFUSED`.

    Args:
        address: of the other worker.
        token: shared secret of the run.
        worker: id of the other worker.
        own: id of this worker.
        back: address to which the other worker should connect; port 0: none.
        timeout_s: for all of it.
    """
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(encode(LinkMessage(link_token(token, worker), back, own)))
            answer = decode_link(await LineReader(reader).line())
    except ConnectionRefusedError:
        return REFUSED
    except (OSError, TimeoutError, ValueError):
        return SILENT
    finally:
        if writer is not None:
            writer.close()
    return REACHED if isinstance(answer, LinkedMessage) and answer.worker == worker and answer.back else SILENT
