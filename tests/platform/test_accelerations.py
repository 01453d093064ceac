"""What is said of optional packages that are there, absent, broken or another project's."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from megakd.platform import Accelerations, detect_accelerations


def test_description_names_what_is_active_and_why_another_is_not() -> None:
    found = Accelerations(transformer_engine=None, apex="not installed", triton=None).describe()
    assert found == "accelerations active: Transformer Engine, Triton; not active: Apex (not installed)"
    assert Accelerations("no GPU", "no GPU", "no GPU").describe().startswith("accelerations none active; not active: ")
    assert "not active" not in Accelerations(None, None, None).describe()


def test_without_a_gpu_nothing_is_active(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect_accelerations() == Accelerations("no GPU", "no GPU", "no GPU")


def test_packages_that_are_absent_broken_or_not_nvidias(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")  # the package of this name on the Python index
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise OSError('libcudart.so.12: no such file')")
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("")
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "transformer_engine", "triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        found = detect_accelerations()
    finally:
        for name in ("apex", "triton"):
            sys.modules.pop(name, None)
    assert found.triton is None
    assert found.apex == "the installed package named apex is not NVIDIA Apex"
    assert found.transformer_engine == "does not import: OSError"


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert detect_accelerations() == Accelerations("not installed", "not installed", "not installed")
