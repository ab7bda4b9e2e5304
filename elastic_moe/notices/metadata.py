"""Asks a cloud's metadata service: HTTP on a link-local address, without proxies, within a bound.

A proxy of the environment is not used: it would answer for another machine, or not at all. The bound is one for the
whole answer: a timer closes the connection, because a socket's timeout begins anew with every byte.
"""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.parse
from collections.abc import Mapping
from contextlib import suppress

from elastic_moe.errors import UserError
from elastic_moe.notices.answers import Answer, MetadataError

LINK_LOCAL = "http://169.254.169.254"
MAX_BYTES = 256 << 10


class MetadataClient:
    """Makes single requests to one metadata service.

    Args:
        endpoint: `http://HOST[:PORT]`.
        timeout_s: for a whole answer.

    Raises:
        UserError: the endpoint is not of this form.
    """

    def __init__(self, endpoint: str = LINK_LOCAL, timeout_s: float = 2.0) -> None:
        try:
            parts = urllib.parse.urlsplit(endpoint)
            self._host, self._port = parts.hostname or "", parts.port or 80
        except ValueError:
            parts, self._host = urllib.parse.SplitResult("", "", "", "", ""), ""
        if parts.scheme != "http" or not self._host or parts.path not in ("", "/"):
            raise UserError(f"the endpoint {endpoint!r} is not of the form http://HOST:PORT")
        self.endpoint, self._timeout_s = endpoint, timeout_s

    def ask(self, method: str, path: str, headers: Mapping[str, str], patience_s: float = 0.0) -> Answer:
        """One request.

        Args:
            method: GET or PUT.
            path: with its query.
            headers: of the request.
            patience_s: seconds that the service may wait before it answers, beside the timeout.

        Raises:
            MetadataError: no answer within the time, a broken one, or one that is too long.
        """
        within_s = self._timeout_s + patience_s
        connection = http.client.HTTPConnection(self._host, self._port, timeout=within_s)
        late = threading.Event()
        opened: list[socket.socket] = []  # the connection forgets its socket when the answer is to end with it

        def cut() -> None:
            late.set()
            for each in opened:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(within_s, cut)
        timer.daemon = True
        try:
            timer.start()
            connection.connect()
            opened.append(connection.sock)
            connection.request(method, path, headers=dict(headers))
            response = connection.getresponse()
            body = response.read(MAX_BYTES + 1)
            told = {name.lower(): value for name, value in response.getheaders()}
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = f"no answer within {within_s:g} s" if late.is_set() or isinstance(error, TimeoutError) else str(error)
            raise MetadataError(f"{path.partition('?')[0]}: {why or type(error).__name__}") from error
        finally:
            timer.cancel()
            connection.close()
        if late.is_set() or len(body) > MAX_BYTES:
            raise MetadataError(f"{path.partition('?')[0]}: {'no whole answer' if late.is_set() else 'too long'}")
        return Answer(response.status, body.decode(errors="replace"), told)
