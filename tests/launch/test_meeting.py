"""Nodes that meet before they start: threads that call `meet` as the launchers of several machines would."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megakd.common.errors import UserError
from megakd.launch import meeting
from megakd.launch.meeting import MeetingStopped, meet
from megakd.launch.nodes import Nodes

HOST = socket.gethostname()
TERMS = {"--nproc-per-node": 4, "optimizer.lr": 0.004}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Party:
    """Nodes that are started one by one; `results` is what became of each."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count, self.port = folder, count, free_port()
        self.begun: list[str] = []
        self.results: list[Future[Nodes]] = []
        self._threads = ThreadPoolExecutor(8)

    def start(
        self, rank: int, terms: dict[str, Any] = TERMS, *, count: int | None = None, folder: Path | None = None,
        stopped: Callable[[], str | None] = lambda: None, host: str = "127.0.0.1", join_seconds: float = 60,
    ) -> None:  # fmt: skip
        nodes = Nodes(count or self.count, rank, host, self.port)
        begin = lambda: self.begun.append(f"{rank} of {len(self.results)}")  # noqa: E731
        self.results.append(
            self._threads.submit(meet, nodes, terms, folder or self.folder, begin, stopped, join_seconds)
        )

    def wait_for_node_0(self) -> None:
        """Return when it listens."""
        while not list(self.folder.glob("meeting-*")):
            time.sleep(0.01)

    def problems(self) -> list[str]:
        """The line on every node, in the order in which they were started."""
        return [str(result.exception(timeout=100)) for result in self.results]


@pytest.fixture
def party(tmp_path: Path) -> Callable[[int], Party]:
    return lambda count: Party(tmp_path, count)


@pytest.fixture
def welcomed(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set as soon as another node has come to node 0."""
    has_come, welcome = threading.Event(), meeting._Reception._welcome

    def and_tell(*arguments: Any) -> None:
        welcome(*arguments)
        has_come.set()

    monkeypatch.setattr(meeting._Reception, "_welcome", and_tell)
    return has_come


def test_nodes_meet_in_any_order(party: Callable[[int], Party], tmp_path: Path) -> None:
    three = party(3)
    for rank in (2, 0, 1):
        three.start(rank)
    met = [result.result(100) for result in three.results]
    assert [nodes.rank for nodes in met] == [2, 0, 1]
    assert {nodes.address for nodes in met} == {"127.0.0.1"}
    assert len({nodes.job for nodes in met}) == 1 and len(met[0].job) == 16
    assert three.begun == ["0 of 3"]
    assert list(tmp_path.iterdir()) == []
    with socket.create_server(("", three.port)):  # left to torchrun
        pass


def test_a_node_is_told_although_node_0_is_slow_to_note_that_it_came(
    party: Callable[[int], Party], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has answered the greeting before the thread that greets it goes on."""
    send = meeting.Wire.send

    def slowly(self: Any, message: dict[str, Any]) -> None:
        send(self, message)
        if "job" in message:
            time.sleep(1.0)

    monkeypatch.setattr(meeting.Wire, "send", slowly)
    two = party(2)
    two.start(0)
    two.wait_for_node_0()
    time.sleep(0.2)  # it has reached itself
    two.start(1)
    assert [result.result(20).rank for result in two.results] == [0, 1]


def test_a_node_alone_meets_nobody(tmp_path: Path) -> None:
    begun: list[int] = []
    assert meet(Nodes(), TERMS, tmp_path, lambda: begun.append(1), lambda: None) == Nodes()
    assert begun == [1]


def test_a_setting_that_differs(party: Callable[[int], Party]) -> None:
    two = party(2)
    two.start(0)
    two.start(1, TERMS | {"optimizer.lr": 0.002})
    line = (
        f"optimizer.lr is 0.004 on node 0 ({HOST}) and 0.002 on node 1 ({HOST}); it must be the same on all nodes. "
        "Start them with one file and the same options."
    )
    assert two.problems() == [line, line]
    assert two.begun == []


def test_a_setting_that_only_one_has(party: Callable[[int], Party]) -> None:
    two = party(2)
    two.start(0)
    two.start(1, TERMS | {"cache.k": 3})
    assert all(line.startswith(f"cache.k is null on node 0 ({HOST}) and 3 on node 1") for line in two.problems())


def test_another_number_of_nodes(party: Callable[[int], Party]) -> None:
    two = party(2)
    two.start(0)
    two.start(2, count=3)
    assert all(line.startswith(f"--nnodes is 2 on node 0 ({HOST}) and 3 on node 2") for line in two.problems())


def test_one_rank_on_two_nodes(party: Callable[[int], Party]) -> None:
    three = party(3)
    for rank in (0, 1, 1):
        three.start(rank)
    line = f"--node-rank is 1 on two nodes, node 1 ({HOST}) and node 1 ({HOST}); each node has its own, from 0 to 2."
    assert three.problems() == [line] * 3


def test_a_folder_that_is_not_shared(
    party: Callable[[int], Party], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megakd.launch.meeting._SEE_SECONDS", 0.5)
    two, other = party(2), tmp_path / "other"
    other.mkdir()
    two.start(0)
    two.start(1, folder=other)
    line = f"{tmp_path} is not one folder on node 0 ({HOST}) and node 1 ({HOST}): what one writes the other does not "
    assert all(problem.startswith(line) for problem in two.problems())


def test_a_node_that_does_not_come(
    party: Callable[[int], Party], monkeypatch: pytest.MonkeyPatch, welcomed: threading.Event
) -> None:
    """Once node 2 has come, time flies."""
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 100 * welcomed.is_set(), sleep=time.sleep)
    monkeypatch.setattr(meeting, "time", later)
    three = party(3)
    three.start(0)
    three.start(2)
    line = (
        f"--nnodes is 3, and within 60 s not all nodes came to 127.0.0.1:{three.port}; missing: node 1. Start the same "
        "command there too, each with its --node-rank, or all with srun under Slurm."
    )
    assert three.problems() == [line] * 2


def test_node_0_does_not_come(party: Callable[[int], Party]) -> None:
    two = party(2)
    two.start(1, join_seconds=1)
    line = (
        rf"--rendezvous is 127.0.0.1:{two.port}, and node 0 is not there \(Connection refused; tried for \d+ s\). Start"
    )
    assert re.match(line, two.problems()[0])


def test_a_port_that_is_taken(party: Callable[[int], Party], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_GREETING_SECONDS", "_STRANGER_SECONDS"):
        monkeypatch.setattr(f"megakd.launch.meeting.{name}", 0.5)
    two = party(2)
    with socket.create_server(("127.0.0.1", two.port)):
        two.start(0)
        two.start(1)
        first, second = two.problems()
    assert first == (
        f"--rendezvous is 127.0.0.1:{two.port}; port {two.port} cannot be used on this machine, {HOST} "
        "(Address already in use). Give a free port, the same on every node."
    )
    assert second.startswith(
        f"--rendezvous is 127.0.0.1:{two.port}, and node 0 is not there (another program answers there; tried for "
    )


@pytest.mark.parametrize("occupied", [False, True])
def test_a_host_that_is_not_node_0(
    party: Callable[[int], Party], monkeypatch: pytest.MonkeyPatch, occupied: bool
) -> None:
    two = party(2)
    elsewhere = free_port()
    connect = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda _, timeout: connect(("127.0.0.1", elsewhere), timeout))
    monkeypatch.setattr("megakd.launch.meeting._GREETING_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", elsewhere)) if occupied else threading.Lock():
        two.start(0, host="node7")
        why = "nothing answers there" if occupied else "Connection refused"
        assert two.problems() == [
            f"--rendezvous is node7:{two.port}, which does not lead to this machine, {HOST} ({why}); it must be "
            "node 0's own name or address. Give that on every node, or another --node-rank here."
        ]


def test_two_nodes_0(party: Callable[[int], Party], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is on another machine, from which the rendezvous leads to the first."""
    three, other = party(3), free_port()
    three.start(0)
    three.wait_for_node_0()
    first, three.port = three.port, other
    connect = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda _, timeout: connect(("127.0.0.1", first), timeout))
    three.start(0)
    assert three.problems() == [
        f"--node-rank is 0 on two nodes, node 0 ({HOST}) and node 0 ({HOST}); each node has its own, from 0 to 2.",
        f"--rendezvous is 127.0.0.1:{other}, which does not lead to this machine, {HOST} (node 0 ({HOST}) answers "
        "there); it must be node 0's own name or address. Give that on every node, or another --node-rank here.",
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_node_ends_those_that_have_come(
    party: Callable[[int], Party], welcomed: threading.Event, rank: int
) -> None:
    three = party(3)
    for each in (1, 0):
        three.start(each, stopped=lambda each=each: "SIGUSR1" if welcomed.is_set() and each == rank else None)
    errors = [result.exception(100) for result in three.results]
    assert [type(error) for error in errors] == [MeetingStopped] * 2
    assert sorted(map(str, errors)) == ["SIGUSR1", f"SIGUSR1 on node {rank} ({HOST})"]


def test_a_node_that_dies_while_it_waits(party: Callable[[int], Party]) -> None:
    three = party(3)
    three.start(0)
    three.wait_for_node_0()
    with socket.create_connection(("127.0.0.1", three.port)) as dying:
        greeting = json.loads(dying.makefile().readline())
        assert greeting["node"] == f"node 0 ({HOST})"
        terms = {"--nnodes": 3, **TERMS}
        dying.sendall(json.dumps({"rank": 2, "host": "b", "terms": terms, "sees": True}).encode() + b"\n")
    assert three.problems() == ["node 2 (b) ended before all nodes had come; its last line tells more."]


def test_strangers_are_left_alone(party: Callable[[int], Party]) -> None:
    two = party(2)
    two.start(0)
    two.wait_for_node_0()
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"{}\n", b""):
        with socket.create_connection(("127.0.0.1", two.port)) as stranger:
            stranger.sendall(words)
    two.start(1)
    assert [result.result(100).rank for result in two.results] == [0, 1]


def test_what_fails_on_node_0_is_told_on_all(tmp_path: Path) -> None:
    port = free_port()

    def begin() -> None:
        raise OSError("no space left")

    with ThreadPoolExecutor(2) as threads:
        results = [
            threads.submit(meet, Nodes(2, rank, "127.0.0.1", port), TERMS, tmp_path, begin, lambda: None)
            for rank in (0, 1)
        ]
        assert isinstance(results[0].exception(100), OSError)
        with pytest.raises(UserError, match="^no space left"):
            results[1].result(100)
