"""The launchers of a job's nodes meet before torchrun starts: what is wrong on one is told on all of them, in one line.

torchrun's own rendezvous waits minutes for a node that cannot come and compares nothing. Node 0 listens where torchrun
will; the others connect, say what they were started with, and wait for its word. Messages are JSON objects, one a line.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty, Queue
from threading import Lock, Thread
from typing import Any

from megakd.common.errors import UserError
from megakd.common.logging import log
from megakd.config.problems import show
from megakd.launch.nodes import Nodes
from megakd.launch.wire import Inbox, Wire, connect

# Nodes that are started by hand, or that set up their environment first, come minutes apart.
JOIN_SECONDS = 300.0
_SAY_SECONDS = 10.0
_CONNECT_SECONDS = 5.0
_GREETING_SECONDS = 10.0
# What listens where node 0 should may be an earlier job's, about to end.
_STRANGER, _STRANGER_SECONDS = "another program", 15.0
# A shared file system may show a new file late.
_SEE_SECONDS = 20.0
_POLL_SECONDS = 0.2


class MeetingStopped(Exception):
    """A signal to a node's launcher came before all nodes had met; `name` is the signal's."""

    def __init__(self, name: str, where: str = "") -> None:
        super().__init__(f"{name}{where}")
        self.name = name


def meet(
    nodes: Nodes,
    terms: Mapping[str, Any],
    log_dir: Path,
    begin: Callable[[], None],
    stopped: Callable[[], str | None],
    join_seconds: float = JOIN_SECONDS,
) -> Nodes:
    """Wait for the other nodes; returns `nodes` with this node's address and the job's name.

    Args:
        terms: what must be the same on all nodes, by the option or setting to name.
        log_dir: a folder that all nodes share.
        begin: called on node 0 alone, before any node goes on.
        stopped: the name of a signal that asks for an end, if one came.

    Raises:
        UserError: nodes are missing or do not fit together, on every node that has come.
        MeetingStopped: a signal came first, here or on another node.
    """
    if nodes.is_alone:
        begin()
        return nodes
    terms = {"--nnodes": nodes.count, **terms}
    deadline = time.monotonic() + join_seconds
    if nodes.rank > 0:
        return _come(nodes, terms, log_dir, stopped, deadline)
    reception = _Reception(nodes, terms, log_dir)
    try:
        address = reception.wait(stopped, deadline, join_seconds)
        begin()
        reception.tell({"go": True})
    except MeetingStopped as stop:
        reception.tell({"stopped": stop.name})
        raise
    except BaseException as error:
        reception.tell({"error": str(error) or type(error).__name__})
        raise
    finally:
        reception.close()
    log.info(f"{nodes.count} nodes have met at {nodes.host}:{nodes.port}; node 0 is {address}")
    return replace(nodes, address=address, job=reception.job)


class _Reception:
    """Node 0's side: who has come."""

    def __init__(self, nodes: Nodes, terms: Mapping[str, Any], log_dir: Path) -> None:
        self.job = secrets.token_hex(8)
        self._nodes, self._terms = nodes, terms
        self._sign = log_dir / f"meeting-{self.job}"
        self._inbox: Inbox = Queue()
        self._wires: list[Wire] = []
        self._lock = Lock()
        self._last: dict[str, Any] | None = None
        self._guests: dict[int, Wire] = {}
        self._names = {0: f"node 0 ({socket.gethostname()})"}
        self._is_reached = False
        self._listener = _listen(nodes)
        self._sign.touch()
        for task in (self._accept, self._reach_oneself):
            Thread(target=task, name="megakd-meeting", daemon=True).start()

    def wait(self, stopped: Callable[[], str | None], deadline: float, join_seconds: float) -> str:
        """Wait for all nodes. Returns this one's address as they reach it."""
        where, said_at = f"{self._nodes.host}:{self._nodes.port}", time.monotonic() + _SAY_SECONDS
        while not self._is_reached or len(self._guests) < self._nodes.count - 1:
            if name := stopped():
                raise MeetingStopped(name)
            missing = ", ".join(str(rank) for rank in range(1, self._nodes.count) if rank not in self._guests)
            if time.monotonic() > deadline:
                raise UserError(
                    f"--nnodes is {self._nodes.count}, and within {join_seconds:.0f} s not all nodes came to {where}; "
                    f"missing: node {missing}. Start the same command there too, each with its --node-rank, or all "
                    "with srun under Slurm."
                )
            if time.monotonic() > said_at:
                log.info(f"waiting at {where} for node {missing} of {self._nodes.count}")
                said_at = deadline
            try:
                self._take(*self._inbox.get(timeout=_POLL_SECONDS))
            except Empty:
                continue
        return self._guests[1].own_address

    def tell(self, message: dict[str, Any]) -> None:
        """Say how it ended to all who have connected."""
        with self._lock:
            self._last = message
            for wire in self._wires:
                wire.send(message)

    def close(self) -> None:
        """Leave the port to torchrun."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # a thread in accept() would keep the port
        self._listener.close()
        self._sign.unlink(missing_ok=True)
        with self._lock:
            for wire in self._wires:
                wire.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            wire = Wire(connection, self._inbox)
            with self._lock:  # who answers the greeting at once is among those who are told all the same
                wire.send({"job": self.job, "node": self._names[0]})
                self._wires.append(wire)
                if self._last is not None:  # it came when all was over
                    wire.send(self._last)
                    wire.close()

    def _reach_oneself(self) -> None:
        """See that the rendezvous leads here, and not to another machine or nowhere."""
        inbox: Inbox = Queue()
        try:
            wire = connect(self._nodes.host, self._nodes.port, _CONNECT_SECONDS, inbox)
            greeting = inbox.get(timeout=_GREETING_SECONDS)[1] or {}
            problem = None if greeting.get("job") == self.job else f"{greeting.get('node', _STRANGER)} answers there"
            if problem is not None:
                wire.send(_introduction(self._nodes, self._terms, sees=True))  # two nodes 0: it is told as well
            wire.close()
        except OSError as error:
            problem = error.strerror or str(error)
        except Empty:
            problem = "nothing answers there"
        self._inbox.put((None, {"problem": problem}))

    def _take(self, wire: Wire | None, message: dict[str, Any] | None) -> None:
        if wire is None:
            self._is_reached = message is not None and message["problem"] is None
            if not self._is_reached:
                raise UserError(
                    f"--rendezvous is {self._nodes.host}:{self._nodes.port}, which does not lead to this machine, "
                    f"{socket.gethostname()} ({(message or {})['problem']}); it must be node 0's own name or address. "
                    "Give that on every node, or another --node-rank here."
                )
            return
        known = next((rank for rank, guest in self._guests.items() if guest is wire), None)
        if message is None:
            if known is not None:
                raise UserError(f"{self._names[known]} ended before all nodes had come; its last line tells more.")
        elif "stopped" in message:
            raise MeetingStopped(str(message["stopped"]), f" on {self._names[known]}" if known else " on another node")
        elif known is None and {"rank", "host", "terms", "sees"} <= message.keys():
            self._welcome(wire, message)

    def _welcome(self, wire: Wire, message: dict[str, Any]) -> None:
        rank, count = int(message["rank"]), self._nodes.count
        name = f"node {rank} ({message['host']})"
        if rank in self._names:
            raise UserError(
                f"--node-rank is {rank} on two nodes, {self._names[rank]} and {name}; each node has its own, from 0 to "
                f"{count - 1}."
            )
        self._guests[rank], self._names[rank] = wire, name
        theirs = message["terms"]
        for key in (*self._terms, *theirs):
            if self._terms.get(key) != theirs.get(key):
                raise UserError(
                    f"{key} is {show(self._terms.get(key))} on {self._names[0]} and {show(theirs.get(key))} on {name}; "
                    "it must be the same on all nodes. Start them with one file and the same options."
                )
        if not message["sees"]:
            raise UserError(
                f"{self._sign.parent} is not one folder on {self._names[0]} and {name}: what one writes the other does "
                "not see. Set run.output_dir to a folder on a file system that all nodes share."
            )


def _listen(nodes: Nodes) -> socket.socket:
    """The port, on every address of this machine.

    Raises:
        UserError: it is taken or forbidden.
    """
    try:
        if socket.has_dualstack_ipv6():
            try:
                return socket.create_server(("", nodes.port), family=socket.AF_INET6, dualstack_ipv6=True)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:  # IPv6 is switched off
                    raise
        return socket.create_server(("", nodes.port))
    except OSError as error:
        raise UserError(
            f"--rendezvous is {nodes.host}:{nodes.port}; port {nodes.port} cannot be used on this machine, "
            f"{socket.gethostname()} ({os.strerror(error.errno or 0)}). Give a free port, the same on every node."
        ) from error


def _come(
    nodes: Nodes, terms: Mapping[str, Any], log_dir: Path, stopped: Callable[[], str | None], deadline: float
) -> Nodes:
    """The other nodes' side: go to node 0 and do as it says."""
    inbox: Inbox = Queue()
    wire, greeting = _find_node_0(nodes, inbox, stopped, deadline)
    try:
        sees, sign = False, log_dir / f"meeting-{greeting['job']}"
        until = time.monotonic() + _SEE_SECONDS
        while not (sees := sign.exists()) and time.monotonic() < until and stopped() is None:
            time.sleep(_POLL_SECONDS)
        wire.send(_introduction(nodes, terms, sees))
        # Node 0 has the same patience, and says so when it is over.
        word = _hear(wire, inbox, stopped, deadline + JOIN_SECONDS)
    finally:
        wire.close()
    if word is None:
        raise UserError(f"{greeting['node']} ended before all nodes had come; its last line tells more.")
    if "stopped" in word:
        raise MeetingStopped(str(word["stopped"]), f" on {greeting['node']}")
    if "error" in word:
        raise UserError(str(word["error"]))
    return replace(nodes, address=wire.own_address, job=str(greeting["job"]))


def _introduction(nodes: Nodes, terms: Mapping[str, Any], sees: bool) -> dict[str, Any]:
    return {"rank": nodes.rank, "host": socket.gethostname(), "terms": dict(terms), "sees": sees}


def _find_node_0(
    nodes: Nodes, inbox: Inbox, stopped: Callable[[], str | None], deadline: float
) -> tuple[Wire, dict[str, Any]]:
    """Connect to node 0 as soon as it is there; its greeting."""
    where, begun = f"{nodes.host}:{nodes.port}", time.monotonic()
    said_at, stranger_since = begun + _SAY_SECONDS, None
    while True:
        try:
            wire = connect(nodes.host, nodes.port, _CONNECT_SECONDS, inbox)
            greeting = _hear(wire, inbox, stopped, time.monotonic() + _GREETING_SECONDS)
            if greeting is not None and {"job", "node"} <= greeting.keys():
                return wire, greeting
            wire.close()
            problem, stranger_since = f"{_STRANGER} answers there", stranger_since or time.monotonic()
        except OSError as error:
            problem, stranger_since = error.strerror or str(error), None
        if name := stopped():
            raise MeetingStopped(name)
        now = time.monotonic()
        if now > deadline or (stranger_since is not None and now - stranger_since > _STRANGER_SECONDS):
            raise UserError(
                f"--rendezvous is {where}, and node 0 is not there ({problem}; tried for {now - begun:.0f} s). Start "
                "node 0 too, and give its own name or address and a free port that no firewall closes, the same on "
                "every node."
            )
        if now > said_at:
            log.info(f"node {nodes.rank} waits for node 0 at {where} ({problem})")
            said_at = deadline
        time.sleep(_POLL_SECONDS)


def _hear(wire: Wire, inbox: Inbox, stopped: Callable[[], str | None], deadline: float) -> dict[str, Any] | None:
    """The next message; None where the other side is gone or silent until the deadline."""
    while time.monotonic() < deadline:
        if name := stopped():
            wire.send({"stopped": name})
            wire.close()
            raise MeetingStopped(name)
        try:
            sender, message = inbox.get(timeout=_POLL_SECONDS)
        except Empty:
            continue
        if sender is wire:
            return message
    return None
