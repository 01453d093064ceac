"""What a rank does: an action by name on a saved configuration."""

from __future__ import annotations

from collections.abc import Callable

from megakd.common.stop_request import Interruption
from megakd.config.load import load_config
from megakd.config.schema import Config


def _train(config: Config, *flags: str) -> Interruption | None:
    from megakd.training.loop import distill

    return distill(config, preflighted=True, accept_changes="accept-changes" in flags).interrupted


def _evaluate(config: Config) -> None:
    from megakd.training.loop import evaluate_run

    evaluate_run(config, preflighted=True)


def _cache(config: Config, *flags: str) -> None:
    from megakd.training.caching import write_cache

    write_cache(config, dry_run="dry-run" in flags, overwrite="overwrite" in flags)


ACTIONS: dict[str, Callable[..., Interruption | None]] = {"train": _train, "evaluate": _evaluate, "cache": _cache}


def main(args: list[str]) -> Interruption | None:
    """Run `args` = (action, path of the configuration, flags of the action); what interrupted it, if anything."""
    action, path, *flags = args
    interrupted = ACTIONS[action](load_config(path, []), *flags)

    from megakd.platform import shutdown_distributed

    shutdown_distributed()
    return interrupted
