"""tools/check_requirements.py against `packaging`, and against what this environment has."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata, util
from pathlib import Path
from types import ModuleType

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = util.spec_from_file_location("check_requirements", ROOT / "tools" / "check_requirements.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VERSIONS = ["0.9", "1.0", "1.26.4", "2.0.0", "2.4.10", "2.13.0+cpu", "3", "10.1.post1"]
BOUNDS = [">=1.26", ">=1.26,<3", "<2.0", ">=2.0", ">=2.4.9,<2.5", "==3.0", ">=9", "<10"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_releases_compare_like_packaging(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str, bounds: str
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    # The release segment is what both compare; local and post parts do not count here.
    expected = SpecifierSet(bounds).contains(Version(version).base_version)
    assert (check.problem(f"numpy{bounds}") is None) == expected


def test_a_vendors_alpha_counts_as_its_release(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.8.0a0+5228986c39.nv25.06")
    assert check.problem("torch>=2.8") is None
    assert check.problem("torch>=2.9") == "torch 2.8.0a0+5228986c39.nv25.06 is installed, >=2.9 is needed"


def test_a_missing_package_is_named(check: ModuleType) -> None:
    assert check.problem("megakd-no-such-package>=1") == "megakd-no-such-package is not installed"


def test_metadata_without_the_module_is_a_problem(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    assert check.problem("megakd_no_such_module>=1") is not None


def test_an_unreadable_requirement_is_an_error(check: ModuleType) -> None:
    with pytest.raises(ValueError, match="cannot read requirement"):
        check.problem("numpy~=1.0")


def test_every_pin_lies_in_setups_range(check: ModuleType) -> None:
    """The versions that launch.sh installs are ones that setup.py allows, on every supported Python."""
    names = {"runtime": "INSTALL_REQUIRES", "dev": "DEV_REQUIRES"}
    for file, name in names.items():
        ranges = {}
        for requirement in check.declared(ROOT / "setup.py", [name]):
            package = requirement.split(">=")[0]
            ranges[package] = SpecifierSet(requirement.removeprefix(package))
        lines = (ROOT / "tools" / "requirements" / f"{file}.txt").read_text().splitlines()
        pins = [line.split(";")[0].strip().split("==") for line in lines if not line.startswith("#")]
        assert {package for package, _ in pins} == set(ranges)
        assert [pin for pin in pins if not ranges[pin[0]].contains(pin[1])] == []


def test_this_environment_satisfies_it() -> None:
    command = [sys.executable, str(ROOT / "tools" / "check_requirements.py"), "--dev"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "")


def test_a_bare_python_does_not() -> None:
    command = [sys.executable, "-I", "-S", str(ROOT / "tools" / "check_requirements.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "torch is not installed" in result.stdout.splitlines()
