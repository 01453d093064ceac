"""torchrun in a process of its own: its log goes to a file and its failure table becomes data."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from megakd.launch.failures import AGENT_LOG, AGENT_RECORD, RankExit, save_rank_exits, unfinished_ranks
from megakd.launch.nodes import Nodes
from megakd.launch.processes import END_SIGNAL, RANK_MODULE, adopted_orphans, die_with_parent


def main(argv: list[str]) -> int:
    """Run `argv` = (JSON of the launcher's options, module, its arguments)."""
    options = json.loads(argv[0])
    # Not SIGKILL: torchrun must live on to end the ranks and what they started.
    die_with_parent(options["launcher_pid"], END_SIGNAL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Queues and service managers send these to every process of a job, where they mean to save and end. What the
    # launcher wants to end it ends with END_SIGNAL.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Blocked, as the ranks inherit it: with this one torchrun ends them, and one that is only starting hears it later.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from megakd.launch.rendezvous import register

    log_dir, nodes = Path(options["log_dir"]), Nodes(**options["nodes"])
    folders = [log_dir, Path(options["scratch_dir"])]
    if options["max_restarts"] or not nodes.is_alone:
        # torch 2.13's agents keep one store through restarts, in which restarted ranks find what the dead ones left. So
        # rank 0 opens one, on a port that was free; should another process have taken it since, a restart finds a new
        # one. Where ranks start once, the agent's store does, whose port nobody can take.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    register(nodes.rank)
    _log_to_file(log_dir / nodes.file(AGENT_LOG))
    rank_options = json.dumps({"agent_pid": os.getpid(), "folders": [str(folder) for folder in folders]})
    arguments = [
        *nodes.torchrun_arguments(),
        f"--nproc-per-node={options['nproc_per_node']}",
        f"--max-restarts={options['max_restarts']}",
        "--signals-to-handle=SIGINT,SIGHUP",
        f"--log-dir={options['scratch_dir']}",
        *("-m", RANK_MODULE, rank_options, *argv[1:]),
    ]
    try:
        try:
            with adopted_orphans():
                run(parse_args(arguments))
        finally:
            # Nothing is left to end, and torch's handler would raise wherever this process is, even at its exit.
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
    except ChildFailedError as error:
        exits = [RankExit(rank, f.timestamp, f.exitcode) for rank, f in error.failures.items()]
        save_rank_exits(folders, nodes.file(AGENT_RECORD), exits)
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    # A rank that left in the middle of its work may have done so with status 0.
    unfinished = unfinished_ranks(folders, nodes.ranks(options["nproc_per_node"]))
    if unfinished:
        exits = [RankExit(rank, time.time(), 0) for rank in unfinished]
        save_rank_exits(folders, nodes.file(AGENT_RECORD), exits)
        return 1
    return 0


def _log_to_file(path: Path) -> None:
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "torch"]:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.raiseExceptions = False  # a full disk is told by the ranks
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.root.addHandler(handler)
    logging.captureWarnings(True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
