"""Who may import whom: every package only from packages in lower rows, and outside libraries only where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "megakd"
ROWS = [
    {"common"},
    {"config"},
    {"job"},
    {"parameters", "torch_dist"},
    {"platform"},
    {"parallel"},
    {"models", "losses", "data"},
    {"checkpoint", "cache"},
    {"convert"},
    {"teacher"},
    {"evaluation"},
    {"training"},
    {"launch", "planning"},
    {"report"},
    {"cli"},
]
ROW = {package: row for row, packages in enumerate(ROWS) for package in packages}
# Library -> packages or single modules that may name it.
LIBRARIES = {
    "megatron": {"platform", "parallel", "models", "checkpoint", "data", "training"},
    "transformer_engine": {"platform", "models.layer_specs"},
    "apex": {"platform"},
    "triton": {"platform", "losses.kernels"},
    "jinja2": {"data.chat_template"},
    "transformers": {"convert", "data.tokenizer", "data.chat_template", "report.quickstart"},
}
NO_TORCH = {"common", "config", "job"}


def _imports(path: Path) -> Iterator[str]:
    """Dotted names imported anywhere in a module, those only for type checkers left out."""
    tree = ast.parse(path.read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_module_imports_only_what_its_row_allows(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    package = module.split(".")[0]
    for name in _imports(path):
        root, *rest = name.split(".")
        if root == "megakd" and rest and rest[0] in ROW and rest[0] != package:
            assert ROW[rest[0]] < ROW[package], f"{package} imports {name}, which is not in a lower row"
        if root in LIBRARIES:
            parts = module.split(".")
            within = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
            assert within & LIBRARIES[root], f"{module} imports {name}"
        assert root != "torch" or package not in NO_TORCH, f"{module} imports torch"


def test_every_package_has_a_row() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert packages == set(ROW)
