"""Colors that are told apart in every kind of color vision, after Okabe and Ito (jfly.uni-koeln.de/color)."""

from __future__ import annotations

# On a light and on a dark ground.
RUNS = (
    ("#0072b2", "#56b4f0"),
    ("#d55e00", "#ff8f4a"),
    ("#00896a", "#35d0a5"),
    ("#b0538c", "#ee9fcb"),
    ("#8a6d00", "#f0d24a"),
    ("#3f88b5", "#a5dcff"),
    ("#5b5b5b", "#c9c9c9"),
)
PARTS = {
    "data": ("#f0c419", "#f0d24a"),
    "teacher": ("#0072b2", "#3d9be0"),
    "forward": ("#56b4e9", "#8fd2fb"),
    "loss": ("#e69f00", "#ffb733"),
    "backward": ("#009e73", "#2cc79b"),
    "communication": ("#d55e00", "#ff7f33"),
    "optimizer": ("#cc79a7", "#e9a0c8"),
    "other": ("#9a9a9a", "#8b8b8b"),
}
# Lines beyond the last color take the first again, broken.
DASHES = ("", "7 4", "2 3")


def run_color(number: int) -> tuple[str, str]:
    """A run's color on a light and on a dark ground."""
    return RUNS[number % len(RUNS)]


def run_dash(number: int) -> str:
    """Lengths of a run's dashes and gaps, as SVG has them; "" for a whole line."""
    return DASHES[min(number // len(RUNS), len(DASHES) - 1)]


def color_of(name: str) -> tuple[str, str]:
    """The color of a curve: of a part, or of a run by its number (run-0)."""
    return PARTS[name] if name in PARTS else run_color(int(name.removeprefix("run-")))
