"""What is made of Slurm's variables, as its documentation and source say they are set."""

from __future__ import annotations

import pytest

from megakd.common.errors import UserError
from megakd.launch.slurm import SlurmStep, expand_hosts, gpus_on_node, slurm_step, tasks_per_node

# What sbatch and salloc set; in a batch script also the process's place, which is the first node's.
JOB = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "3", "SLURM_NNODES": "3", "SLURM_JOB_NODELIST": "gpu[08-10]",
    "SLURM_TASKS_PER_NODE": "64(x3)", "SLURM_NTASKS_PER_NODE": "1",
}  # fmt: skip
BATCH = JOB | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
# What srun adds.
STEP = JOB | {
    "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NODELIST": "gpu[08-10]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_NODEID": "1", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("hosts", "names"),
    [
        ("gpu1", "gpu1"),
        ("a,b", "a b"),
        ("gpu[1-3]", "gpu1 gpu2 gpu3"),
        ("gpu[001-003,7]", "gpu001 gpu002 gpu003 gpu7"),
        ("gpu[08-11]", "gpu08 gpu09 gpu10 gpu11"),
        ("gpu[9-10,099-101]", "gpu9 gpu10 gpu099 gpu100 gpu101"),
        ("gpu[001-003,7],login-[1-2]x[3,5]", "gpu001 gpu002 gpu003 gpu7 login-1x3 login-1x5 login-2x3 login-2x5"),
        ("n[1-2]-ib.cluster.org,m", "n1-ib.cluster.org n2-ib.cluster.org m"),
        ("[1-2]", "1 2"),
        ("10.0.0.[1-2]", "10.0.0.1 10.0.0.2"),
        ("a[0]", "a0"),
        ("a[1-2][3-4]", "a13 a14 a23 a24"),
    ],
)
def test_host_lists(hosts: str, names: str) -> None:
    assert expand_hosts(hosts) == names.split()


@pytest.mark.parametrize(
    "hosts",
    ["", ",", "a,", ",a", "a,,b", "a[", "a]", "a[]", "a[1", "a1]", "a[1-]", "a[x]", "a[3-1]", "a[1,,2]", "a[1[2]]"],
)
def test_what_is_no_host_list(hosts: str) -> None:
    with pytest.raises(UserError) as caught:
        expand_hosts(hosts)
    assert str(caught.value) == (
        f"SLURM_STEP_NODELIST is '{hosts}'; it must be a list of hosts like gpu[01-04,7]. Give --nnodes, --node-rank "
        "and --rendezvous instead."
    )


def test_tasks_per_node() -> None:
    assert tasks_per_node("1") == [1]
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(UserError, match=r"^SLURM_STEP_TASKS_PER_NODE is 'x2'; it must be like 1\(x2\)."):
        tasks_per_node("x2")


def test_a_task_of_a_step() -> None:
    step = slurm_step(STEP)
    assert step == SlurmStep(4711, ("gpu08", "gpu09", "gpu10"), 1, 20000 + 4711 + 2 * 97, 0)
    assert step.describe() == "Slurm job 4711: 3 nodes (gpu08, gpu09, gpu10), meeting at gpu08:24905"


def test_a_requeued_job_of_many_nodes() -> None:
    hosts = {"SLURM_STEP_NODELIST": "n[1-64]", "SLURM_JOB_NODELIST": "n[1-64]", "SLURM_RESTART_COUNT": "2"}
    step = slurm_step(STEP | hosts)
    assert step is not None and step.restarts == 2
    assert step.describe().startswith("Slurm job 4711, start 3: 64 nodes (n1, n2, n3, n4, ... n64), meeting at n1:")


def test_a_step_on_some_of_the_nodes() -> None:
    step = slurm_step(STEP | {"SLURM_STEP_NODELIST": "gpu[09-10]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"})
    assert step is not None and step.hosts == ("gpu09", "gpu10")


def test_jobs_and_steps_have_ports_of_their_own() -> None:
    pairs = [(job, step) for job in range(100000, 100090) for step in range(5)]
    found = [slurm_step(STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}) for job, step in pairs]
    ports = {step.port for step in found if step is not None}
    assert len(ports) == len(pairs)
    assert 20000 <= min(ports) and max(ports) < 29000


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_CONF": "/etc/slurm.conf"},
        BATCH | {"SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "gpu08"},
        STEP | {"SLURM_STEP_NODELIST": "gpu08", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "0"},
    ],
)
def test_one_node_or_no_slurm(variables: dict[str, str]) -> None:
    assert slurm_step(variables) is None


@pytest.mark.parametrize(
    "variables",
    [
        JOB,  # salloc's shell
        BATCH,
        # salloc's shell where Slurm starts it as an interactive step on the first node.
        JOB | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NODELIST": "gpu08", "SLURM_STEP_TASKS_PER_NODE": "1"},
        # A batch script that was submitted from inside another job's step.
        BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "login1", "SLURM_STEP_TASKS_PER_NODE": "1"},
    ],
)
def test_several_nodes_without_srun(variables: dict[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        slurm_step(variables)
    assert str(caught.value) == (
        "SLURM_JOB_NUM_NODES is 3 and srun did not start this process, so it would be alone. Start it on every node: "
        "srun --ntasks-per-node=1 ./launch.sh ..., or give --nnodes 1 to use this node only."
    )


@pytest.mark.parametrize("tasks", ["8(x3)", "1(x2),2"])
def test_several_tasks_on_a_node(tasks: str) -> None:
    with pytest.raises(UserError) as caught:
        slurm_step(STEP | {"SLURM_STEP_TASKS_PER_NODE": tasks})
    assert str(caught.value).startswith(
        f"SLURM_STEP_TASKS_PER_NODE is {tasks}; it must be 1: each task starts all ranks"
    )
    assert str(caught.value).endswith("Use srun --ntasks-per-node=1.")


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"SLURM_NODEID": "7"}, "SLURM_NODEID is 7, and SLURM_STEP_NODELIST has 3 nodes. Give --nnodes,"),
        ({"SLURM_NODEID": "x"}, "SLURM_NODEID is 'x'; Slurm sets it to a number. Give --nnodes,"),
        ({"SLURM_NODEID": ""}, "SLURM_NODEID is missing; Slurm sets it to a number."),
    ],
)
def test_variables_that_make_no_sense(variables: dict[str, str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        slurm_step(STEP | variables)
    assert str(caught.value).startswith(line)


def test_gpus_on_a_node() -> None:
    assert [gpus_on_node({"SLURM_GPUS_ON_NODE": text}) for text in ("8", "gpu:2", "gpu:h100:4", "")] == [8, 2, 4, 0]
    assert gpus_on_node({}) == 0
