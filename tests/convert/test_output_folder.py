"""What an output may be, and what may lie beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megakd.common.errors import UserError
from megakd.convert.earlier_output import OutputKind
from megakd.convert.importing import IMPORTED
from megakd.convert.output_folder import OutputFolder, write_errors_told
from megakd.convert.shard_writer import EXPORTED, ShardWriter, Weight


def make_import(path: Path) -> None:
    files = ("latest_checkpointed_iteration.txt", "config.json", "tokenizer.json", "release/.metadata")
    for name in (*files, "release/metadata.json", "release/common.pt", "release/__0_0.distcp"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)


def make_export(path: Path) -> None:
    path.mkdir()
    for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json", "config.json", "vocab.json"):
        (path / name).write_text(name)


MAKERS = {"import": (IMPORTED, make_import), "export": (EXPORTED, make_export)}


def listing(path: Path) -> list[str]:
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*"))


def write(out: str | Path, kind: OutputKind = EXPORTED, *sources: Path, overwrite: bool = False) -> None:
    with write_errors_told(out), OutputFolder(out, kind, *sources, overwrite=overwrite) as folder:
        folder.write_json("config.json", {"new": True})
        folder.publish()


def assert_written(out: Path) -> None:
    assert listing(out) == ["config.json"]
    assert json.loads((out / "config.json").read_text()) == {"new": True}


@pytest.mark.parametrize("word", MAKERS)
def test_an_earlier_output_and_an_empty_folder_are_replaced(tmp_path: Path, word: str) -> None:
    kind, make = MAKERS[word]
    make(tmp_path / "earlier")
    (tmp_path / "empty").mkdir()
    for name in ("earlier", "empty"):
        with pytest.raises(UserError, match=f"{name} exists. Name another path, or give --overwrite"):
            write(tmp_path / name, kind)
        write(tmp_path / name, kind, overwrite=True)
        assert_written(tmp_path / name)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["earlier", "empty"]


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


# What is done to an earlier output, and why it is not replaced then.
FOREIGN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a file": ("export", lambda path: (path / "thesis.tex").touch(), "holds thesis.tex, which no export writes"),
    "in the release": (
        "import",
        lambda path: (path / "release" / "thesis.tex").touch(),
        "holds release/thesis.tex, which no import writes; the import would replace it. Name another path.",
    ),
    "a folder": ("import", lambda path: (path / "iter_0000017").mkdir(), "holds iter_0000017, which"),
    "a folder in the release": ("import", lambda path: (path / "release" / "a").mkdir(), "holds release/a, which"),
    "another rank's": ("import", lambda path: (path / "release" / "__1_0.distcp").touch(), "holds release/__1_0"),
    "other weights": ("export", lambda path: (path / "adapter.safetensors").touch(), "holds adapter.safetensors"),
    "a folder by that name": (
        "export", lambda path: (path / "model-1-of-2.safetensors").mkdir(), "holds model-1-of-2.safetensors, which"
    ),
    "a link": ("export", lambda path: link(path / "config.json"), "holds config.json, which"),
    "no config": ("export", lambda path: (path / "config.json").unlink(), "has no config.json, which every export"),
    "no weights": (
        "export",
        lambda path: [(path / f).unlink() for f in listing(path) if f.startswith("model")],
        "has no model.safetensors or model.safetensors.index.json, which every export writes",
    ),
    "no tracker": (
        "import",
        lambda path: (path / "latest_checkpointed_iteration.txt").unlink(),
        "has no latest_checkpointed_iteration.txt, which every import writes; what it holds is not an earlier one's.",
    ),
    "no metadata": ("import", lambda path: (path / "release" / ".metadata").unlink(), "has no release/.metadata"),
    "no release": ("import", lambda path: shutil.rmtree(path / "release"), "has no release/.metadata, which every"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_what_no_conversion_wrote_is_kept(tmp_path: Path, name: str) -> None:
    word, change, message = FOREIGN[name]
    kind, make = MAKERS[word]
    make(tmp_path / "out")
    change(tmp_path / "out")
    before = listing(tmp_path)
    with pytest.raises(UserError) as refused:
        write(tmp_path / "out", kind, overwrite=True)
    assert f"{tmp_path / 'out'} {message}" in str(refused.value)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("word", MAKERS)
def test_the_other_directions_output_is_kept(tmp_path: Path, word: str) -> None:
    _, make = MAKERS[word]
    make(tmp_path / "out")
    (other,) = (kind for kind, _ in MAKERS.values() if kind.word != word)
    with pytest.raises(UserError, match=f"out holds .*, which no {other.word} writes"):
        write(tmp_path / "out", other, overwrite=True)


def test_what_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for overwrite, message in ((False, "out exists"), (True, "out holds thesis.tex")):
        with pytest.raises(UserError, match=message), OutputFolder(out, EXPORTED, overwrite=overwrite) as folder:
            out.mkdir(exist_ok=True)
            (out / "thesis.tex").touch()
            folder.publish()
        assert listing(tmp_path) == ["out", "out/thesis.tex"]
        shutil.rmtree(out)


@pytest.mark.parametrize(
    ("out", "source", "message"),
    [
        ("a", "a", "a is where the model comes from; the export would replace it."),
        ("link", "a", "link is where the model comes from"),
        ("a", "link", "a is where the model comes from"),
        ("a/b/../../a", "a", "is where the model comes from"),
        ("a/b/c", "a", "a/b/c lies in "),
        ("link/b", "a", "link/b lies in "),
        ("a", "a/b", "a/b, where the model comes from. Name another path."),
        ("", "a", "The output's path is empty. Name the folder to write."),
        ("loop", "a", "loop is a link that leads to itself. Remove it, or name another path."),
    ],
)
def test_an_output_is_apart_from_its_source(tmp_path: Path, out: str, source: str, message: str) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "loop").symlink_to("loop")
    before = listing(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(UserError) as refused:
            write(out and f"{tmp_path}/{out}", EXPORTED, tmp_path / source, overwrite=overwrite)
        assert message in str(refused.value)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("there", [False, True])
def test_a_link_is_followed_and_stays(tmp_path: Path, there: bool) -> None:
    (tmp_path / "link").symlink_to("disk/model")
    if there:
        (tmp_path / "disk").mkdir()
        make_export(tmp_path / "disk" / "model")
        with pytest.raises(UserError, match="link exists"):
            write(tmp_path / "link")
    write(tmp_path / "link", overwrite=there)
    assert (tmp_path / "link").is_symlink()
    assert_written(tmp_path / "disk" / "model")
    assert listing(tmp_path) == ["disk", "disk/model", "disk/model/config.json", "link"]


def test_parents_are_made_and_go_where_nothing_is_written(tmp_path: Path) -> None:
    OutputFolder(tmp_path / "a" / "b" / "out", EXPORTED, overwrite=False).discard()
    assert listing(tmp_path) == []
    (tmp_path / "a").mkdir()
    with OutputFolder(tmp_path / "a" / "b" / "out", EXPORTED, overwrite=False):
        (tmp_path / "a" / "b" / "mine").touch()
    assert listing(tmp_path) == ["a", "a/b", "a/b/mine"]
    write(tmp_path / "a" / "c" / "out")
    assert_written(tmp_path / "a" / "c" / "out")


def test_a_place_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="out could not be written: Not a directory. Make room, or name a path that"):
        write(tmp_path / "file" / "more" / "out")
    with pytest.raises(UserError, match="could not be written: File name too long"):
        write(tmp_path / "more" / ("x" * 253))
    assert listing(tmp_path) == ["file"]


def test_a_read_only_parent_and_a_mount_point(tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(UserError, match="out could not be written: Read-only file system"):
            write(tmp_path / "out")
        with pytest.raises(UserError, match="is a mount point, which cannot be replaced. Name a folder in it."):
            write(tmp_path, overwrite=True)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_two_conversions_at_once(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", EXPORTED, overwrite=False) as first:
        before = listing(tmp_path)
        with pytest.raises(UserError, match="Another conversion is writing .*out. Wait until it ends, or name another"):
            write(tmp_path / "out")
        assert listing(tmp_path) == before
        write(tmp_path / "other")
        first.write_json("config.json", {"new": True})
        first.publish()
    assert_written(tmp_path / "out")
    assert_written(tmp_path / "other")


@pytest.mark.parametrize("what", ["folder", "release", "file", "link", "dangling"])
def test_the_users_own_folder_of_that_name_is_kept(tmp_path: Path, what: str) -> None:
    work = tmp_path / ".out.tmp"
    if what in ("folder", "release"):
        work.mkdir()
        (work / ("new" if what == "release" else "precious")).touch()
    elif what == "file":
        work.write_text("precious")
    else:
        (tmp_path / "mine").mkdir()
        work.symlink_to("mine" if what == "link" else "nowhere")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"\.out\.tmp is where .* would be prepared, and is not a conversion's. Move"):
        write(tmp_path / "out")
    assert listing(tmp_path) == before


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_messages: list[str]) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr("fcntl.flock", flock)
    write(tmp_path / "out")
    assert_written(tmp_path / "out")
    assert [message for message in log_messages if "knows no file locks: do not write" in message]


def test_files_that_cannot_be_made_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(ShardWriter, "_open", fail)
    folder = OutputFolder(tmp_path / "new" / "out", EXPORTED, overwrite=False)
    with pytest.raises(OSError, match="No space left"):
        ShardWriter(folder, [Weight("w", (2, 2), torch.float32)], 10**9)
    assert listing(tmp_path) == []
