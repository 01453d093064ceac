"""A disk that fills while a conversion writes: one line, and nothing is left."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megakd.common.errors import UserError
from megakd.convert.exporting import export_checkpoint
from megakd.convert.importing import import_checkpoint
from megakd.convert.output_folder import OutputFolder
from tests.convert.family_models import save_model

CONVERSIONS: dict[str, Callable[[Path, Path], None]] = {
    "import": lambda sources, out: import_checkpoint(sources / "hf", out),
    "export": lambda sources, out: export_checkpoint(sources / "megatron", out),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in both formats."""
    folder = tmp_path_factory.mktemp("sources")
    save_model(folder / "hf", "qwen2")
    (folder / "hf" / "tokenizer.json").write_text(" " * 100_000)
    import_checkpoint(folder / "hf", folder / "megatron")
    return folder


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look at the free space before."""
    monkeypatch.setattr(OutputFolder, "check_space", lambda *args: None)


@pytest.mark.parametrize("command", CONVERSIONS)
def test_a_disk_that_fills_at_any_place_leaves_nothing(
    sources: Path, small_disk: Callable[[str], Path], command: str, unchecked: None
) -> None:
    written, disk = 0, small_disk("2m")
    # In small steps where the last files go.
    tries = [*range(0, 144, 24), *range(144, 240, 6)]
    for pages in tries:
        free = os.statvfs(disk).f_bfree
        (disk / "ballast").write_bytes(bytes((free - pages) * resource.getpagesize()))
        try:
            CONVERSIONS[command](sources, disk / "new" / "out")
        except UserError as error:
            told = f"{disk}/new/out could not be written: No space left on device. Make room, or name a path "
            assert str(error) == told + "that can be written."
        else:
            written += 1
            shutil.rmtree(disk / "new")
        (disk / "ballast").unlink()
        assert not list(disk.iterdir())
    assert 0 < written < len(tries) - 6


@pytest.mark.parametrize("command", CONVERSIONS)
@pytest.mark.parametrize("limit", [4096, 200_000])
def test_a_file_that_cannot_grow_is_told_without_a_traceback(
    sources: Path, tmp_path: Path, command: str, limit: int, unchecked: None
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(UserError, match="out could not be written: File too large"):
            CONVERSIONS[command](sources, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", CONVERSIONS)
def test_what_is_said_to_fit_fits(sources: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("megakd.convert.output_folder._MARGIN_BYTES", 0)
    monkeypatch.setattr("megakd.convert.output_folder._show_size", lambda nbytes: told.append(nbytes) or str(nbytes))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(UserError, match=f"out needs [0-9]+ and {tmp_path} has 0 free. Make room"):
        CONVERSIONS[command](sources, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=told[0]))
    CONVERSIONS[command](sources, tmp_path / "out")
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert written <= told[0] < 2 * written
