"""What is written while a run goes on: settings that cannot be meant are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from megakd.common.errors import UserError
from megakd.config.checks import check_config
from megakd.config.logging_checks import check_profile, check_profiled_ranks, check_profiled_steps
from tests.config.examples import config


def profiled(steps: list[int], ranks: list[int] | None = None) -> Any:
    return config(logging__profile={"steps": steps} | ({} if ranks is None else {"ranks": ranks}))


def test_steps_in_the_wrong_order() -> None:
    line = r"^logging.profile.steps is \[5, 4\]; the first step must not come after the last. Use \[4, 5\]\.$"
    with pytest.raises(UserError, match=line):
        check_profile(profiled([5, 4]))
    with pytest.raises(UserError, match=line):
        check_config(profiled([5, 4]))
    check_config(profiled([4, 4]))
    check_config(config())


def test_steps_beyond_the_run() -> None:
    check_profiled_steps(profiled([9, 10]), 10)
    check_profiled_steps(config(), 10)
    with pytest.raises(UserError, match=r"^logging.profile.steps is \[9, 11\]; the run ends at step 10. Name earlier "):
        check_profiled_steps(profiled([9, 11]), 10)


def test_ranks_that_do_not_exist() -> None:
    check_profiled_ranks(profiled([1, 2], [0, 3]), 4)
    check_config(profiled([1, 2], [0, 3]), 4)
    line = r"^logging.profile.ranks has 4; the run has ranks 0 to 3. Name some of these.$"
    with pytest.raises(UserError, match=line):
        check_profiled_ranks(profiled([1, 2], [4, 0]), 4)
    with pytest.raises(UserError, match=line):
        check_config(profiled([1, 2], [4]), 4)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"profile": {"steps": [1]}}, "logging.profile.steps"),
        ({"profile": {"steps": [0, 1]}}, "logging.profile.steps"),
        ({"profile": {"steps": [1, 2], "ranks": []}}, "logging.profile.ranks"),
        ({"profile": {"ranks": [0]}}, "logging.profile.steps"),
        ({"wandb": {}}, "logging.wandb.project"),
        ({"wandb": {"project": ""}}, "logging.wandb.project"),
        ({"wandb": {"project": "p", "mode": "disabled"}}, "logging.wandb.mode"),
        ({"wandb": {"project": "p", "naem": "x"}}, "logging.wandb.naem"),
    ],
)
def test_values_of_the_wrong_kind(section: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as error:
        config(logging=section)
    assert key in str(error.value) and "\n" not in str(error.value)
