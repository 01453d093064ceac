"""What Slurm tells a process of its job: the nodes, which of them this is, and where they can meet.

Host lists are expanded here and not by `scontrol show hostnames`: containers have Slurm's variables, not its programs.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megakd.common.errors import UserError

# The ids of steps that srun did not start: the batch script, an interactive shell and others of Slurm's own.
_OWN_STEPS = 0xFFFFFFF0
# Below the ports that systems give to connections, and without torchrun's default.
_FIRST_PORT, _PORTS = 20000, 9000
_FLAGS = "Give --nnodes, --node-rank and --rendezvous instead."


@dataclass(frozen=True)
class SlurmStep:
    """A step of a Slurm job with one task on each node, as one of the tasks sees it.

    Attributes:
        hosts: the step's nodes, the first of which has rank 0.
        port: derived from job and step, so that jobs on one node do not meet each other.
        restarts: how often the job was requeued.
    """

    job: int
    hosts: tuple[str, ...]
    rank: int
    port: int
    restarts: int

    def describe(self) -> str:
        """One line for the log."""
        again = f", start {self.restarts + 1}" if self.restarts else ""
        shown = ", ".join(self.hosts[:4]) + (f", ... {self.hosts[-1]}" if len(self.hosts) > 4 else "")
        return f"Slurm job {self.job}{again}: {len(self.hosts)} nodes ({shown}), meeting at {self.hosts[0]}:{self.port}"


def slurm_step(environment: Mapping[str, str] | None = None) -> SlurmStep | None:
    """The Slurm step that this process is a task of; None outside Slurm, and where there is one node only.

    Raises:
        UserError: the job has several nodes and srun did not start this process, or started more than one on a node;
            or the variables make no sense.
    """
    variables = os.environ if environment is None else environment
    if "SLURM_JOB_ID" not in variables:
        return None
    if not _is_in_step(variables):
        nodes = _number(variables, "SLURM_JOB_NUM_NODES" if "SLURM_JOB_NUM_NODES" in variables else "SLURM_NNODES")
        if nodes > 1:
            raise UserError(
                f"SLURM_JOB_NUM_NODES is {nodes} and srun did not start this process, so it would be alone. Start it "
                "on every node: srun --ntasks-per-node=1 ./launch.sh ..., or give --nnodes 1 to use this node only."
            )
        return None
    tasks = tasks_per_node(variables.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    if max(tasks) > 1:
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE is {variables['SLURM_STEP_TASKS_PER_NODE']}; it must be 1: each task starts "
            "all ranks of its node, and needs all its GPUs and cores. Use srun --ntasks-per-node=1."
        )
    hosts = expand_hosts(variables["SLURM_STEP_NODELIST"])
    if len(hosts) == 1:
        return None
    job, step = _number(variables, "SLURM_JOB_ID"), _number(variables, "SLURM_STEP_ID")
    rank = _number(variables, "SLURM_NODEID")
    if rank >= len(hosts):
        raise UserError(f"SLURM_NODEID is {rank}, and SLURM_STEP_NODELIST has {len(hosts)} nodes. {_FLAGS}")
    port = _FIRST_PORT + (job + 97 * step) % _PORTS
    return SlurmStep(
        job, tuple(hosts), rank, port, _number({"SLURM_RESTART_COUNT": "0", **variables}, "SLURM_RESTART_COUNT")
    )


def gpus_on_node(environment: Mapping[str, str] | None = None) -> int:
    """The GPUs of this node that Slurm gave to the job; 0 where it says nothing of them."""
    variables = os.environ if environment is None else environment
    found = re.fullmatch(r"(?:.*:)?(\d+)", variables.get("SLURM_GPUS_ON_NODE", ""))
    return int(found[1]) if found else 0


def expand_hosts(hosts: str) -> list[str]:
    """The hosts that a list of Slurm's stands for: `gpu[01-02,7],login` is gpu01, gpu02, gpu7 and login.

    Raises:
        UserError: it is no such list.
    """
    names: list[str] = []
    # Commas inside brackets separate numbers, those outside hosts.
    for part in re.findall(r"(?:[^\[\],]|\[[^\[\]]*\])+", hosts):
        pieces = re.split(r"\[([^\]]*)\]", part)
        choices = [[piece] if index % 2 == 0 else _expand_numbers(piece, hosts) for index, piece in enumerate(pieces)]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    if not names or hosts.count("[") != hosts.count("]") or re.search(r"^,|,,|,$|\[[^\]]*\[|\][^\[]*\]", hosts):
        raise _no_host_list(hosts)
    return names


def tasks_per_node(text: str) -> list[int]:
    """The tasks of each node: `2(x3),1` is 2, 2, 2 and 1.

    Raises:
        UserError: it says something else.
    """
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE is '{text}'; it must be like 1(x2). {_FLAGS}")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _expand_numbers(numbers: str, hosts: str) -> list[str]:
    expanded: list[str] = []
    for part in numbers.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if found is None or (found[2] and int(found[2]) < int(found[1])):
            raise _no_host_list(hosts)
        # Leading zeros belong to the names.
        expanded += [str(number).zfill(len(found[1])) for number in range(int(found[1]), int(found[2] or found[1]) + 1)]
    return expanded


def _no_host_list(hosts: str) -> UserError:
    return UserError(f"SLURM_STEP_NODELIST is '{hosts}'; it must be a list of hosts like gpu[01-04,7]. {_FLAGS}")


def _is_in_step(variables: Mapping[str, str]) -> bool:
    """Whether srun started this process, in the job that the other variables are of."""
    step, hosts = variables.get("SLURM_STEP_ID", ""), variables.get("SLURM_STEP_NODELIST")
    if not step.isdecimal() or int(step) >= _OWN_STEPS or hosts is None:
        return False
    # A batch script that was submitted from inside another job's step may have that step's variables.
    return set(expand_hosts(hosts)) <= set(expand_hosts(variables.get("SLURM_JOB_NODELIST", hosts)))


def _number(variables: Mapping[str, str], name: str) -> int:
    text = variables.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name} is {repr(text) if text else 'missing'}; Slurm sets it to a number. {_FLAGS}")
    return int(text)
