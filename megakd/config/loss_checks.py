"""Rules of the loss and of what is known of a teacher for it."""

from __future__ import annotations

from megakd.common.errors import UserError
from megakd.config.schema import Config
from megakd.config.wording import either


def check_temperature(config: Config) -> None:
    """Logits are divided by the temperature."""
    temperature, teacher_temperature = config.distill.temperature, config.distill.teacher_temperature
    if temperature <= 0:
        raise UserError(
            f"distill.temperature is {temperature:g}; it must be > 0. Use 1.0 to leave the logits unscaled."
        )
    if teacher_temperature is not None and teacher_temperature <= 0:
        raise UserError(
            f"distill.teacher_temperature is {teacher_temperature:g}; it must be > 0. Leave it out to use "
            "distill.temperature for both models."
        )


def check_divergence(config: Config) -> None:
    """A divergence's parameter is given to its own divergence, and inside the range where it means something."""
    distill = config.distill
    owners = {"jsd_beta": ("jsd",), "skew_alpha": ("skew_forward_kl", "skew_reverse_kl")}
    for key, losses in owners.items():
        value = getattr(distill, key)
        if value is None:
            continue
        if distill.loss not in losses:
            raise UserError(
                f"distill.{key} is {value:g} and has no effect on distill.loss {distill.loss}. Leave it out, or set "
                f"distill.loss to {either(list(losses))}."
            )
        if not 0 < value < 1:
            kl = distill.loss.replace("skew_", "")
            ends = "forward_kl (what 0 tends to) or reverse_kl (1)" if key == "jsd_beta" else f"{kl} for 0"
            raise UserError(
                f"distill.{key} is {value:g}; it must be between 0 and 1, both excluded. Use distill.loss {ends}."
            )


def check_without_divergence(config: Config) -> None:
    """Settings of the divergence need a weight on it."""
    distill = config.distill
    if distill.kd_weight > 0:
        return
    for key in ("jsd_beta", "skew_alpha", "teacher_temperature"):
        value = getattr(distill, key)
        if value is not None:
            raise UserError(
                f"distill.{key} is {value:g} and has no effect with distill.kd_weight 0. Leave it out, or set "
                "distill.kd_weight above 0."
            )
    defaults = type(distill).model_fields
    for key in ("loss", "temperature", "temperature_squared"):
        value, default = getattr(distill, key), defaults[key].default
        if value != default:
            raise UserError(
                f"distill.{key} is {str(value).lower()} and has no effect with distill.kd_weight 0. Leave it out "
                f"(or {str(default).lower()}), or set distill.kd_weight above 0."
            )


def check_loss_weights(config: Config) -> None:
    """Something must be trained on."""
    if config.distill.kd_weight == 0 and config.distill.ce_weight == 0:
        raise UserError(
            "distill.kd_weight and distill.ce_weight are both 0; at least one must be > 0. Set distill.kd_weight to 1 "
            "to learn from the teacher, or distill.ce_weight to 1 to learn from the data."
        )


def check_teacher(config: Config) -> None:
    """A divergence needs a teacher."""
    if config.distill.kd_weight > 0 and config.teacher is None:
        raise UserError(
            f"distill.kd_weight is {config.distill.kd_weight:g} and there is no teacher section. Set teacher.path, or "
            "distill.kd_weight to 0 and distill.ce_weight above 0 to train without a teacher."
        )


def check_cached_teacher(config: Config) -> None:
    """A cache serves the divergence that it can, and is no model."""
    teacher, distill = config.teacher, config.distill
    if teacher is None or teacher.source != "cache":
        return
    if teacher.dtype is not None:
        raise UserError(
            f"teacher.dtype is {teacher.dtype} and has no effect on a cache (teacher.source). Leave it out."
        )
    if distill.kd_weight == 0:
        raise UserError(
            "teacher.source is cache and has no effect with distill.kd_weight 0. Leave the teacher section out, or "
            "set distill.kd_weight above 0."
        )
    require_forward_kl(config, "teacher.source is cache")


def require_forward_kl(config: Config, found: str) -> None:
    """Of a cache's teacher a few ids are known; `found` begins the message."""
    if config.distill.loss != "forward_kl":
        raise UserError(
            f"{found} and distill.loss is {config.distill.loss}; only forward_kl can be had from some of the teacher's "
            "ids, the others need its probability of every id. Set distill.loss to forward_kl, or use the teacher "
            "itself (teacher.source online)."
        )


def check_cache(config: Config) -> None:
    """Each mode has its own settings."""
    cache = config.cache
    for mode, keys in (("sampled", ("num_samples",)), ("topk", ("k", "log_probability_bits", "tail_samples"))):
        for key in keys:
            value = getattr(cache, key)
            if value is not None and cache.mode != mode:
                raise UserError(
                    f"cache.{key} is {value} and has no effect on cache.mode {cache.mode}. Leave it out, or set "
                    f"cache.mode to {mode}."
                )
