"""`megakd plan`: what a run needs and costs on a cluster that need not be there."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megakd.common.errors import UserError
from megakd.config.layouts import least_ranks, with_teacher_alone
from megakd.config.load import load_config

_SHAPES = Path(__file__).resolve().parents[2] / "configs" / "models"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("plan", help="memory, traffic, time and cost of a run on a cluster")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--cluster", required=True, metavar="NAME", help="a known cluster, a YAML file, or local")
    parser.add_argument("--nnodes", type=int, default=None, help="nodes (default: those of one replica of each model)")
    parser.add_argument("--nproc-per-node", type=int, default=None, help="ranks of a node (default: the cluster's)")
    parser.add_argument("--price-per-gpu-hour", type=float, default=None, metavar="USD", help="what a GPU costs you")
    parser.add_argument(
        "--models", type=Path, default=None, metavar="DIR", help=f"config.json of models not here (default: {_SHAPES})"
    )
    parser.add_argument(
        "--cache", action="store_true", help="plan `cache`, which writes what the teacher says, instead"
    )
    parser.add_argument("--sweep", action="store_true", help="rank the layouts that are possible instead")
    parser.add_argument("--top", type=int, default=None, metavar="N", help="layouts that --sweep prints (default: 10)")
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the plan. Returns 0 where it fits, 1 where it does not."""
    from megakd.planning.cache_plan import build_cache_plan
    from megakd.planning.clusters import load_cluster
    from megakd.planning.job import build_cache_job, build_job, find_models
    from megakd.planning.plan import build_plan
    from megakd.planning.render import describe_plan
    from megakd.planning.render_cache import describe_cache_plan
    from megakd.planning.render_sweep import describe_sweep
    from megakd.planning.sweep import sweep

    _check(args)
    config = load_config(args.config, args.overrides)
    cluster = load_cluster(args.cluster, args.nproc_per_node)
    if args.price_per_gpu_hour is not None:
        cluster = cluster.model_copy(update={"price_per_gpu_hour": args.price_per_gpu_hour})
    least = least_ranks(with_teacher_alone(config) if args.cache else config)
    world_size = cluster.ranks_per_node * (args.nnodes or -(-least // cluster.ranks_per_node))
    config, lines = find_models(config, _SHAPES if args.models is None else args.models)
    figures: dict[str, object]
    if args.cache:
        cache_plan = build_cache_plan(build_cache_job(config, world_size, cluster.device_type), cluster)
        lines += describe_cache_plan(cache_plan, config)
        figures, fits = cache_plan.to_dict(), cache_plan.fits
    elif args.sweep:
        candidates, refused = sweep(config, world_size, cluster)
        lines += describe_sweep(candidates, refused, args.top or 10)
        figures = {"layouts": [{"settings": c.settings(), **c.plan.to_dict()} for c in candidates], "refused": refused}
        fits = bool(candidates) and candidates[0].plan.fits
    else:
        plan = build_plan(build_job(config, world_size, cluster.device_type), cluster)
        lines += describe_plan(plan)
        figures, fits = plan.to_dict(), plan.fits
    print(json.dumps(figures) if args.json else "\n".join(lines))
    return 0 if fits else 1


def _check(args: argparse.Namespace) -> None:
    for option in ("nnodes", "nproc_per_node", "top"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} is {value}; it must be at least 1.")
    if args.price_per_gpu_hour is not None and not 0 <= args.price_per_gpu_hour < float("inf"):
        raise UserError(f"--price-per-gpu-hour is {args.price_per_gpu_hour:g}; it must be at least 0.")
    if args.top is not None and not args.sweep:
        raise UserError(f"--top is {args.top} and has no effect without --sweep. Leave it out, or add --sweep.")
    if args.cache and args.sweep:
        raise UserError("--cache and --sweep are both given; layouts are ranked for training alone. Leave one out.")
    if args.models is not None and not args.models.is_dir():
        raise UserError(f"--models is {args.models}; it must be a folder of folders with a config.json each.")
