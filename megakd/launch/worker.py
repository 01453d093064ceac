"""What a rank does: an action by name on a saved configuration."""

from __future__ import annotations

from collections.abc import Callable

from megakd.config.load import load_config
from megakd.config.schema import Config


def _train(config: Config) -> None:
    from megakd.training.loop import distill

    distill(config, preflighted=True)


def _evaluate(config: Config) -> None:
    from megakd.training.loop import evaluate_run

    evaluate_run(config, preflighted=True)


def _cache(config: Config, *flags: str) -> None:
    from megakd.training.caching import write_cache

    write_cache(config, dry_run="dry-run" in flags, overwrite="overwrite" in flags)


ACTIONS: dict[str, Callable[..., None]] = {"train": _train, "evaluate": _evaluate, "cache": _cache}


def main(args: list[str]) -> None:
    """Run `args` = (action, path of the configuration, flags of the action)."""
    action, path, *flags = args
    ACTIONS[action](load_config(path, []), *flags)

    from megakd.platform import shutdown_distributed

    shutdown_distributed()
