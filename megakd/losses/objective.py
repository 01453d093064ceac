"""What is computed per token, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from megakd.losses.divergences import Divergence
from megakd.losses.logit_form import LogitForm
from megakd.losses.shards import VocabularyShard


@dataclass(frozen=True)
class Objective:
    """What is computed per token. `divergence` is None without a teacher, and `temperature` 1.0 then.

    kd_slope: what the divergence's gradient with respect to z/T is multiplied by to be total's by z: kd_weight * T,
        or kd_weight / T without the T^2 factor.
    """

    shard: VocabularyShard
    divergence: Divergence | None
    temperature: float
    teacher_temperature: float
    kd_slope: float
    ce_weight: float
    student_form: LogitForm
    teacher_form: LogitForm

    @property
    def keeps_logits(self) -> bool:
        """Whether the gradient needs the student's logits beside q: for q at another temperature, or a softcap."""
        return (self.temperature != 1.0 and self.ce_weight != 0.0) or self.student_form.softcap is not None

    @property
    def second_round(self) -> bool:
        """Whether the divergence needs p and q to be known before its own sums."""
        return self.divergence is not None and self.divergence.evaluate is not None
