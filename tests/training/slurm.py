"""A Slurm of two programs, enough for the script in configs/slurm."""

from __future__ import annotations

from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "configs" / "slurm" / "train.sbatch"

# One task on each of two nodes, and the highest status; the tasks' pids are left for who sends signals.
SRUN = """
while [[ $1 == --* ]]; do shift; done
pids=()
for node in 0 1; do
    SLURM_STEP_ID=0 SLURM_STEP_NODELIST=127.0.0.[1-2] SLURM_STEP_TASKS_PER_NODE='1(x2)' SLURM_NODEID=$node \\
        SLURM_PROCID=$node SLURM_LOCALID=0 "$@" &
    pids+=($!)
done
echo "${pids[@]}" >"$FAKE_SLURM/tasks.partial"
mv "$FAKE_SLURM/tasks.partial" "$FAKE_SLURM/tasks"
highest=0
for pid in "${pids[@]}"; do
    wait "$pid"
    status=$?
    ((status <= highest)) || highest=$status
done
exit "$highest"
"""


def fake_slurm(folder: Path, srun: str = SRUN) -> None:
    """Write `srun` and a `scontrol` that notes its calls; both need FAKE_SLURM, which is the folder."""
    for name, body in (("srun", srun), ("scontrol", 'echo "scontrol $*" >>"$FAKE_SLURM/calls"')):
        path = folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
