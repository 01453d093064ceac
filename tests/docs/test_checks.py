"""The checker finds what is wrong, and takes what is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.checks import find_faults
from tests.docs.pages import ROOT, parse_page

HERE = ROOT / "docs" / "page.md"

WRONG = {
    "`distill.los` is the loss": "there is no key distill.los",
    "`student.init.layer` is one": "there is no key student.init.layer",
    "a span `that goes on\nwith parallel.tensor_size` here": "there is no key parallel.tensor_size",
    "| x |\n|---|\n| `data.top_k` |": "there is no key data.top_k",
    "see `megakd/losses/fast.py`": "there is no file megakd/losses/fast.py",
    "all of `tests/nowhere/*.py`": "there is no file tests/nowhere/*.py",
    "run `./launch.sh trian x.yaml`": "there is no command trian",
    "```\n./launch.sh train x.yaml --nodes 2\n```": "train has no option --nodes",
    "```\n$ ./launch.sh train x.yaml \\\n    optimizer.rate=1\n```": "there is no key optimizer.rate",
    "```\n./launch.sh train x.yaml optimiser.lr=1\n```": "there is no section of optimiser.lr=1",
    "```\n./launch.sh evaluate configs/none.yaml\n```": "there is no file configs/none.yaml",
    "```\nOMP_NUM_THREADS=1 python -m megakd cache x.yaml --dry\n```": "cache has no option --dry",
    "```\npython tools/preprocess.py --input x\n```": "there is no file tools/preprocess.py",
    "```\npython tools/preprocess_data.py --in x | head\n```": "tools/preprocess_data.py has no option --in",
    "[a](nowhere.md)": "the link to nowhere.md leads nowhere",
    "[a](losses.md#the-end)": "losses.md has no heading #the-end",
    "# One\n[a](#two)": "has no heading #two",
    "![a](figures/none.svg)": "the link to figures/none.svg leads nowhere",
    "```yaml\ndistill: {loss: forward}\n```": "the YAML is refused: distill.loss",
    "```yaml\ndistill: {lose: 1}\n```": "the YAML is refused:",
    "```yaml\ndistill: [\n```": "the YAML is refused:",
}

RIGHT = [
    "`distill.loss: jsd`, `teacher.source=cache`, `parallel.*` and `<run.output_dir>/run.json`",
    "`run.json`, `config.yaml`, `megakd.data`, `model.data.top_k`",
    "`megakd/losses`, `megakd/convert/families`, `tests/test_layers.py`, `tests/**/test_docs.py`",
    "```\n./launch.sh train my.yaml optimizer.lr=3e-4 --nproc-per-node 4 & pid=$!   # --what\n```",
    "```\npython tools/preprocess_data.py --input x --no-append-eod --prompt-template $'Q: {prompt}\\nA: '\n```",
    "```python\nthere is = no check of this\n```\n[a](losses.md#how-it-is-computed)",
    "```yaml\ndata:\n  train: [{path: a, weight: 1}, {path: b, weight: 2}]\n```",
]


@pytest.mark.parametrize("text", WRONG)
def test_what_is_not_there_is_found(text: str) -> None:
    faults = find_faults(parse_page(HERE, text))
    assert len(faults) == 1
    assert faults[0].startswith("docs/page.md:") and WRONG[text] in faults[0]


@pytest.mark.parametrize("text", RIGHT)
def test_what_is_there_is_taken(text: str) -> None:
    assert find_faults(parse_page(HERE, text)) == []


def test_only_the_first_cell_of_a_row_may_be_foreign() -> None:
    page = parse_page(HERE, "| option | here |\n|---|---|\n| `data.top_k` | `data.k` |")
    assert find_faults(page, foreign_first_cells=True) == ["docs/page.md:3: there is no key data.k"]


def test_lines_are_those_of_the_page(tmp_path: Path) -> None:
    text = "# A\n\n```\nfine\n./launch.sh nothing\n```\n\nand `run.nothing`\n"
    lines = [fault.split(":")[1] for fault in find_faults(parse_page(tmp_path / "x.md", text))]
    assert sorted(lines) == ["5", "8"]
