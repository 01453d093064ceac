"""The example in docs/losses.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "losses.md"


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, str(PAGE), "exec"), names)
    kd, ce = (float(figure) for figure in re.findall(r"tensor\(([\d.]+)", capsys.readouterr().out))
    assert 0 < kd < 0.7 and ce > 0
    assert names["head"].grad.shape == (1000, 64)
