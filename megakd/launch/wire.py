"""A connection between two launchers: JSON objects, one a line, heard by a thread."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from queue import Queue
from threading import Thread
from typing import Any, TypeAlias

_LONGEST_LINE = 1 << 20


class Wire:
    """One side of a connection. What the other says goes into `inbox` with the wire, and None when it is gone."""

    def __init__(self, connection: socket.socket, inbox: Inbox) -> None:
        self._connection, self._inbox = connection, inbox
        self._connection.settimeout(None)
        # As the other side reaches it: an IPv4 address where it came over IPv4.
        self.own_address = str(connection.getsockname()[0]).removeprefix("::ffff:").partition("%")[0]
        Thread(target=self._listen, name="megakd-wire", daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """Say something; one that is gone already is noticed by listening."""
        with suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """Hang up, after what was said; heard is what the other still says, since to break off would lose it."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def _listen(self) -> None:
        with suppress(OSError, ValueError), self._connection, self._connection.makefile("rb") as lines:
            while line := lines.readline(_LONGEST_LINE):
                message = json.loads(line)
                if not isinstance(message, dict):
                    break
                self._inbox.put((self, message))
        self._inbox.put((self, None))


Inbox: TypeAlias = Queue[tuple[Wire | None, dict[str, Any] | None]]


def connect(host: str, port: int, timeout_seconds: float, inbox: Inbox) -> Wire:
    """Call a host.

    Raises:
        OSError: nobody answers.
    """
    return Wire(socket.create_connection((host, port), timeout_seconds), inbox)
