"""Rules about what is written while a run goes on."""

from __future__ import annotations

from megakd.common.errors import UserError
from megakd.config.layouts import teacher_is_dedicated
from megakd.config.schema import Config


def check_profile(config: Config) -> None:
    """The steps to trace are a first and a last one."""
    profile = config.logging.profile
    if profile is not None and profile.steps[0] > profile.steps[1]:
        first, last = profile.steps
        raise UserError(
            f"logging.profile.steps is [{first}, {last}]; the first step must not come after the last. Use "
            f"[{last}, {first}]."
        )


def check_profiled_steps(config: Config, steps: int) -> None:
    """The steps to trace are among the run's `steps`.

    Raises:
        UserError: they are not.
    """
    profile = config.logging.profile
    if profile is not None and profile.steps[1] > steps:
        raise UserError(
            f"logging.profile.steps is {profile.steps}; the run ends at step {steps}. Name earlier steps, or make the "
            "run longer."
        )


def check_profiled_ranks(config: Config, students: int) -> None:
    """The ranks that trace are among those that train."""
    profile = config.logging.profile
    if profile is not None and max(profile.ranks) >= students:
        whose = "the student has" if teacher_is_dedicated(config) else "the run has"
        raise UserError(
            f"logging.profile.ranks has {max(profile.ranks)}; {whose} ranks 0 to {students - 1}. Name some of these."
        )
