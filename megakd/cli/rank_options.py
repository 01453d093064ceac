"""The options of every command that starts ranks: how many, on how many nodes, and where the nodes meet."""

from __future__ import annotations

import argparse
import re

from megakd.common.errors import UserError
from megakd.config.load import load_config
from megakd.config.schema import Config, ParallelSection
from megakd.launch.nodes import DEFAULT_PORT, Nodes, check_host


def add_rank_options(parser: argparse.ArgumentParser, config_help: str = "YAML file") -> None:
    """Declare the configuration's and the ranks' arguments."""
    parser.add_argument("config", help=config_help)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--nproc-per-node", type=int, default=None, help="ranks to start (default: GPUs, or TP x PP)")
    parser.add_argument("--nnodes", type=int, default=1, help="nodes of the job; the command is started on each")
    parser.add_argument("--node-rank", type=int, default=None, help="this node's number, from 0")
    parser.add_argument(
        "--rendezvous", default=None, metavar="HOST[:PORT]", help=f"node 0's address, port {DEFAULT_PORT} if not given"
    )


def load_for_ranks(args: argparse.Namespace) -> tuple[Config, int, Nodes]:
    """The configuration `args.config` with `args.overrides`, on how many ranks it runs in all, and on which nodes.

    Raises:
        UserError: the configuration, the number of ranks or the nodes cannot be used.
    """
    if args.nproc_per_node is not None and args.nproc_per_node < 1:
        raise UserError(f"--nproc-per-node is {args.nproc_per_node}; it must be at least 1.")
    nodes = _nodes(args)
    config = load_config(args.config, args.overrides)
    return config, nodes.count * choose_nproc_per_node(config.parallel, args.nproc_per_node, nodes.count), nodes


def choose_nproc_per_node(parallel: ParallelSection, nproc_per_node: int | None, num_nodes: int = 1) -> int:
    """`nproc_per_node` where given, else one rank per GPU, else on CPU a node's share of one model replica's ranks.

    Raises:
        UserError: a replica's ranks do not divide into the nodes.
    """
    if nproc_per_node is not None:
        return nproc_per_node
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    share, rest = divmod(model_ranks * parallel.context_parallel_size, num_nodes)
    if rest or not share:
        raise UserError(
            f"--nnodes is {num_nodes}; the {model_ranks * parallel.context_parallel_size} ranks of one model replica "
            "do not divide into them. Give --nproc-per-node."
        )
    return share


def _nodes(args: argparse.Namespace) -> Nodes:
    if args.nnodes < 1:
        raise UserError(f"--nnodes is {args.nnodes}; it must be at least 1.")
    if args.nnodes == 1:
        for name in ("node_rank", "rendezvous"):
            if getattr(args, name) not in (None, 0):
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} is {getattr(args, name)} and has no effect with --nnodes 1. Leave it out.")
        return Nodes()
    if args.node_rank is None or not 0 <= args.node_rank < args.nnodes:
        raise UserError(
            f"--node-rank is {'missing' if args.node_rank is None else args.node_rank}; with --nnodes {args.nnodes} "
            f"each node has its own, from 0 to {args.nnodes - 1}."
        )
    found = re.fullmatch(r"([^\s:]+)(?::(\d{1,5}))?", args.rendezvous or "")
    port = int(found[2] or DEFAULT_PORT) if found else 0
    if found is None or not 0 < port < 2**16:
        raise UserError(
            f"--rendezvous is {args.rendezvous or 'missing'}; with several nodes it must be node 0's HOST or "
            "HOST:PORT, with a port from 1 to 65535 that is free there, the same on every node."
        )
    check_host(found[1], port)
    return Nodes(args.nnodes, args.node_rank, found[1], port)
