"""Whatever happens to a file of a checkpoint is seen before it is read, and the one before is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakd.checkpoint.checksums import CHECKSUMS, Damage, check_files, file_digest
from megakd.common.errors import UserError
from tests.training.runs import build, layout, run_values, write_run_files

FILES = {
    ".metadata", "common.pt", "metadata.json", "random_states.safetensors", "record.json", CHECKSUMS, "__0_0.distcp",
    "__1_0.distcp",
}  # fmt: skip


def save_two(values: dict[str, Any], folder: Path) -> None:
    run = build(values)
    for step in (1, 2):
        run.train(step - 1, step)
        run.save(folder, step, mark=step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[Any]]) -> Path:
    """Two checkpoints of two ranks, and what they were written from."""
    folder = write_run_files(tmp_path_factory.mktemp("saved"))
    run_ranks(2, save_two, run_values(folder, **layout(2)), folder / "checkpoints")
    return folder


@pytest.fixture(scope="module")
def spoilt(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved / "checkpoints" / "step-00000002", tmp_path_factory.mktemp("spoilt") / "c"))


def test_a_checkpoint_is_what_sha256sum_says(saved: Path) -> None:
    for path in (saved / "checkpoints").iterdir():
        assert {file.name for file in path.iterdir()} == FILES
        lines = (path / CHECKSUMS).read_text().splitlines()
        assert dict(reversed(line.split("  ")) for line in lines) == {
            name: file_digest(path / name) for name in FILES - {CHECKSUMS}
        }
        check_files(path)


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, str, float, int]:
    kinds = ("flip", "cut", "remove", "empty", "longer")
    return (
        draw(st.sampled_from(sorted(FILES))), draw(st.sampled_from(kinds)),
        draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 255)),
    )  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages())
def test_every_damage_to_every_file_is_found(spoilt: Path, damage: tuple[str, str, float, int]) -> None:
    name, kind, place, mask = damage
    path = spoilt / name
    content = path.read_bytes()
    changed = bytearray(content)
    at = int(place * len(content))
    if kind == "flip":
        changed[at] ^= mask
    elif kind == "longer":
        changed[at:at] = bytes([mask])
    else:
        del changed[at if kind == "cut" else 0 :]
    path.write_bytes(changed)
    if kind == "remove":
        path.unlink()
    try:
        # As ranks do it: each looks at a share, and one of them finds it.
        found = []
        for part in range(3):
            try:
                check_files(spoilt, part, 3)
            except Damage as error:
                found.append(str(error))
        assert found
        assert all("\n" not in line for line in found)
        assert name == CHECKSUMS or any(name in line for line in found)
    finally:
        path.write_bytes(content)
    check_files(spoilt)


def test_a_file_that_nobody_wrote_is_damage(spoilt: Path) -> None:
    (spoilt / "__2_0.distcp").touch()
    try:
        with pytest.raises(Damage, match=r"__2_0\.distcp is not in SHA256SUMS"):
            check_files(spoilt)
    finally:
        (spoilt / "__2_0.distcp").unlink()


@pytest.mark.parametrize("line", [f"{'0' * 64}  ../outside", f"{'0' * 64}  /etc/passwd", f"{'0' * 63}A  x", "nothing"])
def test_checksums_of_other_places_are_damage(spoilt: Path, line: str) -> None:
    content = (spoilt / CHECKSUMS).read_text()
    (spoilt / CHECKSUMS).write_text(f"{content}{line}\n")
    try:
        with pytest.raises(Damage, match="SHA256SUMS is not as it was written"):
            check_files(spoilt)
    finally:
        (spoilt / CHECKSUMS).write_text(content)


def newest(values: dict[str, Any], folder: Path) -> int:
    """The mark of the checkpoint that a run goes on from; its state is loaded."""
    run = build(values)
    checkpoints = run.checkpoints(folder)
    path, record = checkpoints.newest()
    checkpoints.load(path, record, run.mesh.describe())
    checkpoints.tidy(path)
    return record.counters["mark"]


def copy_of(saved: Path, folder: Path) -> Path:
    return Path(shutil.copytree(saved / "checkpoints", folder / "checkpoints"))


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("kind", ["flip", "missing"])
def test_the_one_before_a_damaged_one_is_used(
    saved: Path, tmp_path: Path, name: str, kind: str, run_ranks: Callable[..., list[Any]],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = copy_of(saved, tmp_path)
    file = folder / "step-00000002" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    if kind == "missing":
        file.unlink()
    assert run_ranks(2, newest, run_values(saved, **layout(2)), folder) == [1, 1]
    # What is damaged is out of the way, and not gone.
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002.damaged-1"]


def test_undamaged_ones_load(saved: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    folder = copy_of(saved, tmp_path)
    for remains in ("step-00000003.partial", "step-00000001.removed"):
        shutil.copytree(folder / "step-00000001", folder / remains)
    assert run_ranks(2, newest, run_values(saved, **layout(2)), folder) == [2, 2]
    assert run_ranks(1, newest, run_values(saved), folder) == [2]
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]


def test_where_all_are_damaged_nothing_starts(saved: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    folder = copy_of(saved, tmp_path)
    for path in folder.iterdir():
        (path / "common.pt").write_bytes(b"")
    with pytest.raises(UserError, match="all of them are damaged"):
        run_ranks(2, newest, run_values(saved, **layout(2)), folder)


@pytest.mark.parametrize(("key", "value"), [("version", 2), ("format", "other-checkpoint")])
def test_another_version_is_refused_with_the_reason(
    saved: Path, tmp_path: Path, key: str, value: object, run_ranks: Callable[..., list[Any]]
) -> None:
    from megakd.checkpoint.checksums import read_checksums, write_checksums

    path = copy_of(saved, tmp_path) / "step-00000002"
    content = json.loads((path / "record.json").read_text())
    (path / "record.json").write_text(json.dumps({**content, key: value}))
    write_checksums(path, {**read_checksums(path), "record.json": file_digest(path / "record.json")})
    with pytest.raises(
        UserError, match=r"format .* version .*this version of megakd reads megakd-checkpoint version 1"
    ):
        run_ranks(1, newest, run_values(saved), path.parent)
