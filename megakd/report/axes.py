"""Axes of charts: where they begin and end, and the figures beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# What is nearer to 0 is as good as it: steps between ticks must stay numbers.
_LEAST = 1e-200
# From here on figures have a power of ten instead of all their digits.
_LONG = 1e15


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, with labelled ticks; on a logarithmic one both are above 0."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def place(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where values are, from 0 at the low end to 1 at the high end; what is outside lies on the end."""
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.log(np.where(values > 0, values, self.low))
            low, high = math.log(self.low), math.log(self.high)
        else:
            low, high = self.low, self.high
        placed: NDArray[np.float64] = np.clip((values - low) / (high - low), 0.0, 1.0)
        return placed


def step_axis(last: int) -> Axis:
    """Steps from 0 to `last`."""
    high = max(last, 1)
    step = math.ceil(_nice_step(high / 5))  # steps are whole, and 2.5 of them are none
    values = np.arange(0, high + step / 1000, step)
    return Axis(0.0, float(high), tuple((float(v), f"{v:,.0f}") for v in values))


def value_axis(low: float, high: float, *, from_zero: bool = False, log: bool = False) -> Axis:
    """An axis that holds `low` to `high` between round figures; `log` holds where `low` is above 0."""
    if log and low > _LEAST:
        return _log_axis(low, high)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    size = max(abs(low), abs(high))
    if high - low <= max(_LEAST, 1e-9 * size):  # no ticks fit between them
        margin = size * 0.1 if size > _LEAST else 1.0
        low, high = (0.0 if from_zero else low - margin), high + margin
    step = _nice_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple((number * step, _label(number * step, step)) for number in range(first, last + 1))
    return Axis(first * step, last * step, ticks)


def _log_axis(low: float, high: float) -> Axis:
    high = max(high, low * 1.0001)
    bases = [1.0] if math.log10(high / low) > 3 else [1.0, 2.0, 5.0]
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    values = sorted(base * 10.0**exponent for exponent in exponents for base in bases)
    first = max(v for v in values if v <= low * (1 + 1e-9))
    last = min(v for v in values if v >= high * (1 - 1e-9))
    inside = [v for v in values if first <= v <= last]
    every = math.ceil(len(inside) / 7)
    return Axis(first, last, tuple((v, f"{v:,g}") for v in inside[::every]), log=True)


def _nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is not below `rough`."""
    power: float = 10.0 ** math.floor(math.log10(rough))
    return float(next(base * power for base in (1, 2, 2.5, 5, 10) if base * power >= rough * (1 - 1e-9)))


def _label(value: float, step: float) -> str:
    """A tick with as many decimals as all ticks `step` apart need."""
    if value == 0:
        return "0"
    decimals = (
        None
        if abs(value) >= _LONG
        else next((n for n in range(5) if math.isclose(step * 10**n, round(step * 10**n), rel_tol=1e-6)), None)
    )
    if decimals is not None:
        return f"{value:,.{decimals}f}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def format_figure(value: float | None) -> str:
    """A figure for people: four digits, thousands set apart."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 1000 <= abs(value) < _LONG:
        return f"{value:,.0f}"
    return f"{value:.2e}" if abs(value) < 1e-3 or abs(value) >= _LONG else f"{value:.4g}"
