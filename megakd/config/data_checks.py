"""Rules of data sets, held-out data and what is measured on it."""

from __future__ import annotations

from megakd.common.errors import UserError
from megakd.config.schema import Config


def check_held_out_source(config: Config) -> None:
    """Held-out data of each kind comes from one place, and some is left to train on."""
    data = config.data
    for kind in ("valid", "test"):
        sources, fraction = getattr(data, kind), getattr(data, f"{kind}_fraction")
        if sources is not None and fraction is not None:
            raise UserError(
                f"data.{kind} is {sources[0].path!r} and data.{kind}_fraction is {fraction:g}; at most one may be "
                "given. Set the other to null."
            )
    held_out = (data.valid_fraction or 0) + (data.test_fraction or 0)
    if held_out >= 1:
        raise UserError(
            f"data.valid_fraction is {data.valid_fraction:g} and data.test_fraction is {data.test_fraction:g}; "
            f"together they must be below 1. Lower one."
        )


def check_blend(config: Config) -> None:
    """Data sets of a blend are all given weights, or all epochs; held-out data is read once."""
    train = config.data.train
    weights = [source for source in train if source.weight is not None]
    both = [source for source in weights if source.epochs is not None]
    if both or 0 < len(weights) < len(train):
        if both:
            found = f"{both[0].path} has both weight and epochs"
        else:
            other = next(source for source in train if source.weight is None)
            found = f"{weights[0].path} has a weight and {other.path} has none"
        raise UserError(
            f"data.train: {found}; either every data set has a weight, or none has and epochs say how often each is "
            "read. Give all of them weights, or remove the weights."
        )
    if len(train) == 1 and weights:
        raise UserError(
            f"data.train: {train[0].path} has weight {weights[0].weight:g}, which has no effect on a single data set. "
            "Leave it out."
        )
    for key, sources in (("data.valid", config.data.valid), ("data.test", config.data.test)):
        for source in sources or ():
            for name in ("weight", "epochs"):
                if getattr(source, name) is not None:
                    raise UserError(
                        f"{key}: {source.path} has {name} {getattr(source, name):g}; held-out data is read once. "
                        "Leave it out."
                    )


def check_evaluation_data(config: Config) -> None:
    """Evaluations need held-out data."""
    evaluation, split = config.evaluation, config.evaluation.split
    if getattr(config.data, split) is not None or getattr(config.data, f"{split}_fraction") is not None:
        return
    wanted = {"interval": evaluation.interval, "at_start": evaluation.at_start, "at_end": evaluation.at_end}
    for key, value in wanted.items():
        if value:
            text = str(value).lower()
            raise UserError(
                f"evaluation.{key} is {text} and no held-out data is named. Set data.{split} or data.{split}_fraction, "
                f"or leave evaluation.{key} out."
            )
    if split != "valid":
        raise UserError(
            f"evaluation.split is {split} and no such data is named. Set data.{split} or data.{split}_fraction, or "
            "leave evaluation.split out."
        )


def check_best(config: Config) -> None:
    """The best checkpoint is one of several that are measured, by a figure that there is."""
    evaluation, teacher = config.evaluation, config.teacher
    if evaluation.patience is not None and evaluation.metric is None:
        raise UserError(
            f"evaluation.patience is {evaluation.patience} and evaluation.metric is null; patience counts evaluations "
            "without a better metric. Set evaluation.metric to cross_entropy, for example."
        )
    if evaluation.metric is None:
        return
    if evaluation.interval is None:
        raise UserError(
            f"evaluation.metric is {evaluation.metric} and evaluation.interval is null; the best checkpoint is one of "
            "those measured during training. Set evaluation.interval, or leave evaluation.metric out."
        )
    if evaluation.metric in ("kl_to_teacher", "agreement") and (teacher is None or teacher.source != "online"):
        found = "there is no teacher section" if teacher is None else f"teacher.source is {teacher.source}"
        raise UserError(
            f"evaluation.metric is {evaluation.metric} and {found}; it is measured against the teacher itself. Use "
            "cross_entropy or perplexity, or set teacher.source to online."
        )
