"""How many ranks a command starts, on which nodes, and what is said of options that do not fit."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megakd.cli import rank_options, train_command
from megakd.cli.main import main
from megakd.cli.rank_options import add_rank_options, choose_nproc_per_node, load_for_ranks
from megakd.common.errors import UserError
from megakd.launch import launcher
from megakd.launch.nodes import Nodes
from tests.config.examples import config


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`parsed("--nnodes 2")`: what a command makes of its options."""
    monkeypatch.setattr(rank_options, "load_config", lambda path, overrides: config())
    parser = argparse.ArgumentParser()
    add_rank_options(parser)
    return lambda options: load_for_ranks(parser.parse_args(["x.yaml", *options.split()]))[1:]


def test_nodes_and_ranks(parsed: Any) -> None:
    assert parsed("--nproc-per-node 4") == (4, Nodes())
    assert parsed("--nproc-per-node 4 --nnodes 1 --node-rank 0") == (4, Nodes())
    several = "--nproc-per-node 4 --nnodes 3 --node-rank 2 --rendezvous"
    assert parsed(f"{several} localhost:1234") == (12, Nodes(3, 2, "localhost", 1234))
    assert parsed(f"{several} 127.0.0.1") == (12, Nodes(3, 2, "127.0.0.1", 29400))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--nproc-per-node 0", "--nproc-per-node is 0; it must be at least 1."),
        ("--nnodes 0", "--nnodes is 0; it must be at least 1."),
        ("--node-rank 1", "--node-rank is 1 and has no effect with --nnodes 1. Leave it out."),
        ("--rendezvous a:1", "--rendezvous is a:1 and has no effect with --nnodes 1. Leave it out."),
        ("--nnodes 2 --rendezvous a:1", "--node-rank is missing; with --nnodes 2 each node has its own, from 0 to 1."),
        ("--nnodes 2 --node-rank 2", "--node-rank is 2; with --nnodes 2 each node has its own, from 0 to 1."),
        ("--nnodes 2 --node-rank 0", "--rendezvous is missing; with several nodes it must be node 0's HOST or "),
        ("--nnodes 2 --node-rank 0 --rendezvous a:b", "--rendezvous is a:b; with several nodes it must be "),
        ("--nnodes 2 --node-rank 0 --rendezvous a:70000", "--rendezvous is a:70000; with several nodes it must be "),
    ],
)
def test_options_that_do_not_fit(parsed: Any, options: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(options)
    assert str(caught.value).startswith(line)


STEP = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "localhost,b", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "localhost,b", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "0",
}  # fmt: skip


def test_slurms_nodes(parsed: Any, monkeypatch: pytest.MonkeyPatch, log_messages: list[str]) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert parsed("--nproc-per-node 4") == (8, Nodes(2, 0, "localhost", 20007))
    assert log_messages == ["Slurm job 7: 2 nodes (localhost, b), meeting at localhost:20007"]


def test_options_win_over_slurms_variables(
    parsed: Any, monkeypatch: pytest.MonkeyPatch, log_messages: list[str]
) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    four = "--nproc-per-node 4"
    assert parsed(f"{four} --rendezvous 127.0.0.1:99") == (8, Nodes(2, 0, "127.0.0.1", 99))
    assert parsed(f"{four} --node-rank 1") == (8, Nodes(2, 1, "localhost", 20007))
    assert parsed(f"{four} --nnodes 3") == (12, Nodes(3, 0, "localhost", 20007))
    log_messages.clear()
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "8(x2)")  # is not looked at where options say all
    assert parsed(f"{four} --nnodes 1") == (4, Nodes())
    assert parsed(f"{four} --nnodes 2 --node-rank 0 --rendezvous localhost") == (8, Nodes(2, 0, "localhost", 29400))
    assert log_messages == []
    with pytest.raises(UserError, match=r"^SLURM_STEP_TASKS_PER_NODE is 8\(x2\); it must be 1"):
        parsed(four)


def test_gpus_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert choose_nproc_per_node(1, 1) == 1
    with pytest.raises(UserError, match=r"^SLURM_GPUS_ON_NODE is 8, and torch sees no GPU: torch 2.* Install one that"):
        choose_nproc_per_node(1, None)


def test_a_host_that_nobody_knows(parsed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match=r"--rendezvous is nowhere:29400; nowhere cannot be reached \(Name or service"):
        parsed("--nnodes 2 --node-rank 0 --rendezvous nowhere")


def test_a_replica_is_shared_out_over_the_nodes() -> None:
    assert [choose_nproc_per_node(4, None, nodes) for nodes in (1, 2, 4)] == [4, 2, 1]
    for nodes in (3, 8):
        with pytest.raises(
            UserError, match=f"--nnodes is {nodes}; the 4 ranks of one replica of the models do not divide"
        ):
            choose_nproc_per_node(4, None, nodes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_there_are_ranks_asks_to_be_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    monkeypatch.setattr(train_command, "check_configuration", lambda args, **_: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    assert main(["train", "x.yaml"]) == 75
    assert capsys.readouterr().err == (
        f"stopped by {number.name} before the ranks were started; the same command starts them\n"
    )
    assert signal.getsignal(number) == before


def test_two_jobs_do_not_train_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once, begun = config(run__output_dir=str(tmp_path / "run")), []

    def launch(*_: object, begin: Callable[[], None], **__: object) -> int:
        begin()
        if begun:
            return 0
        begun.append(True)
        with pytest.raises(
            UserError, match=r"^run.output_dir is .*run; another job trains there. Wait for it, or give"
        ):
            launcher.run_action("train", once, 1)
        return 0

    monkeypatch.setattr(launcher, "launch_ranks", launch)
    assert launcher.run_action("train", once, 1) == 0
    assert launcher.run_action("train", once, 1) == 0  # the first has ended


def test_the_environment_of_ranks_on_gpus_is_said_on_node_0(
    monkeypatch: pytest.MonkeyPatch, log_messages: list[str]
) -> None:
    two = config(parallel__tensor_model_parallel_size=2)
    assert launcher._gpu_variables(two, Nodes()) == {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("megakd.platform.lowest_compute_capability", lambda: 9.0)
    expected = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "2100"}
    for name in expected:
        monkeypatch.delenv(name, raising=False)
    assert launcher._gpu_variables(two, Nodes()) == expected
    assert log_messages == ["GPU environment: set CUDA_DEVICE_MAX_CONNECTIONS=1, TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=2100"]
    on_loopback = launcher._gpu_variables(two, Nodes(2, 1, address="127.0.0.1"))
    assert on_loopback == expected | {"NCCL_SOCKET_IFNAME": "=lo"}
    assert len(log_messages) == 1
