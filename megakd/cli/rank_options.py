"""The options of every command that starts ranks: how many, on how many nodes, and where the nodes meet."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from megakd.common.errors import UserError
from megakd.common.logging import log
from megakd.config.layouts import least_ranks
from megakd.config.load import load_config
from megakd.config.schema import Config
from megakd.launch.nodes import DEFAULT_PORT, Nodes, check_host
from megakd.launch.slurm import gpus_on_node, slurm_step


def add_rank_options(parser: argparse.ArgumentParser, config_help: str = "YAML file") -> None:
    """Declare the configuration's and the ranks' arguments."""
    parser.add_argument("config", help=config_help)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument(
        "--nproc-per-node", type=int, default=None, help="ranks to start (default: GPUs, or as few as needed)"
    )
    parser.add_argument(
        "--nnodes",
        type=int,
        default=None,
        help="nodes of the job; the command is started on each (default: Slurm's, or 1)",
    )
    parser.add_argument("--node-rank", type=int, default=None, help="this node's number, from 0 (default: Slurm's)")
    parser.add_argument(
        "--rendezvous",
        default=None,
        metavar="HOST[:PORT]",
        help=f"node 0's address, port {DEFAULT_PORT} if not given (default: Slurm's first host)",
    )


def load_for_ranks(
    args: argparse.Namespace, prepare: Callable[[Config], Config] = lambda config: config
) -> tuple[Config, int, Nodes]:
    """The configuration `args.config` with `args.overrides`, on how many ranks it runs in all, and on which nodes.

    Args:
        prepare: makes of the configuration what the command does with it.

    Raises:
        UserError: the configuration, the number of ranks or the nodes cannot be used.
    """
    if args.nproc_per_node is not None and args.nproc_per_node < 1:
        raise UserError(f"--nproc-per-node is {args.nproc_per_node}; it must be at least 1.")
    nodes = _nodes(args)
    config = prepare(load_config(args.config, args.overrides))
    return config, nodes.count * choose_nproc_per_node(least_ranks(config), args.nproc_per_node, nodes.count), nodes


def choose_nproc_per_node(least: int, nproc_per_node: int | None, num_nodes: int = 1) -> int:
    """`nproc_per_node` where given, else one rank per GPU, else on CPU a node's share of the `least` that are needed.

    Raises:
        UserError: the least ranks do not divide into the nodes, or Slurm gave GPUs that torch does not see.
    """
    if nproc_per_node is not None:
        return nproc_per_node
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    if gpus := gpus_on_node():
        raise UserError(
            f"SLURM_GPUS_ON_NODE is {gpus}, and torch sees no GPU: torch {torch.__version__} may be built without "
            "CUDA, or not fit the driver. Install one that does, or give --nproc-per-node to run on CPU all the same."
        )
    share, rest = divmod(least, num_nodes)
    if rest or not share:
        raise UserError(
            f"--nnodes is {num_nodes}; the {least} ranks of one replica of the models do not divide into them. Give "
            "--nproc-per-node."
        )
    return share


def _nodes(args: argparse.Namespace) -> Nodes:
    """The options, and where one is not given what Slurm says."""
    if args.nnodes is not None and args.nnodes < 1:
        raise UserError(f"--nnodes is {args.nnodes}; it must be at least 1.")
    step = slurm_step() if args.nnodes != 1 and None in (args.nnodes, args.node_rank, args.rendezvous) else None
    count, rank, rendezvous = args.nnodes or 1, args.node_rank, args.rendezvous
    if step is not None:
        count = args.nnodes or len(step.hosts)
        rank = step.rank if rank is None else rank
        rendezvous = rendezvous or f"{step.hosts[0]}:{step.port}"
        if rank == 0:
            log.info(step.describe())
    if count == 1:
        for option, value in (("--node-rank", rank), ("--rendezvous", rendezvous)):
            if value not in (None, 0):
                raise UserError(f"{option} is {value} and has no effect with --nnodes 1. Leave it out.")
        return Nodes()
    if rank is None or not 0 <= rank < count:
        raise UserError(
            f"--node-rank is {'missing' if rank is None else rank}; with --nnodes {count} each node has its own, from "
            f"0 to {count - 1}."
        )
    found = re.fullmatch(r"([^\s:]+)(?::(\d{1,5}))?", rendezvous or "")
    port = int(found[2] or DEFAULT_PORT) if found else 0
    if found is None or not 0 < port < 2**16:
        raise UserError(
            f"--rendezvous is {rendezvous or 'missing'}; with several nodes it must be node 0's HOST or "
            "HOST:PORT, with a port from 1 to 65535 that is free there, the same on every node."
        )
    check_host(found[1], port)
    return Nodes(count, rank, found[1], port)
