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


ACTIONS: dict[str, Callable[[Config], None]] = {"train": _train, "evaluate": _evaluate}


def main(args: list[str]) -> None:
    """Run `args` = (action, path of the configuration)."""
    action, path = args
    ACTIONS[action](load_config(path, []))

    from megakd.platform import shutdown_distributed

    shutdown_distributed()
