"""A checkpoint that would run code when it is unpickled: every reader refuses it, or leaves its pickles alone."""

from __future__ import annotations

import argparse
import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megakd.common.errors import UserError
from megakd.convert.exporting import export_checkpoint
from megakd.convert.importing import import_checkpoint
from megakd.convert.inspecting import describe_model
from megakd.convert.loading import load_head
from megakd.convert.megatron_weights import MegatronWeights
from megakd.convert.verifying import open_both
from megakd.torch_dist import TorchDistFolder, check_pickles
from tests.convert.family_models import save_model
from tests.training.runs import build, run_values, write_run_files
from tools.convert_checkpoint import main


class Runs:
    """Pickled, it is a call that makes the marker."""

    def __init__(self, function: Callable[..., Any], argument: str) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return self.call


def attacks(marker: Path) -> dict[str, Runs]:
    return {
        "os.system": Runs(os.system, f"touch {marker}"),
        "builtins.eval": Runs(eval, f"open({str(marker)!r}, 'w').close()"),
        "builtins.exec": Runs(exec, f"open({str(marker)!r}, 'w').close()"),
    }


ATTACKS = list(attacks(Path()))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder in `hf` and its import in `megatron`."""
    save_model(tmp_path / "hf", "llama2")
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    return tmp_path


def metadata_of(checkpoint: Path) -> Metadata:
    found = pickle.loads((checkpoint / ".metadata").read_bytes())
    assert isinstance(found, Metadata)
    return found


def write_metadata(checkpoint: Path, metadata: object) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_object(checkpoint: Path, data: bytes) -> str:
    """Put bytes in the place of the first object that is not a tensor; returns its key."""
    metadata = metadata_of(checkpoint)
    key = next(k for k, entry in metadata.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata))
    info = metadata.storage_data[MetadataIndex(key)]
    file = checkpoint / info.relative_path
    metadata.storage_data[MetadataIndex(key)] = replace(info, offset=file.stat().st_size, length=len(data))
    file.write_bytes(file.read_bytes() + data)
    write_metadata(checkpoint, metadata)
    return key


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_attacks_work_where_nothing_checks(attack: str, marker: Path) -> None:
    pickle.loads(pickle.dumps(attacks(marker)[attack]))
    assert marker.exists()
    marker.unlink()
    torch.load(io.BytesIO(saved([attacks(marker)[attack]])), weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("place", ["alone", "inside"])
def test_metadata_that_runs_code(
    folder: Path, marker: Path, attack: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, megatron, out = str(folder / "hf"), str(folder / "megatron"), str(folder / "out")
    release = folder / "megatron" / "release"
    content: Any = attacks(marker)[attack]
    if place == "inside":
        metadata = metadata_of(release)
        metadata.planner_data = {"x": content}
        content = metadata
    write_metadata(release, content)
    for read in (
        lambda: MegatronWeights(megatron),
        lambda: TorchDistFolder(release),
        lambda: check_pickles(release),
        lambda: describe_model(megatron),
        lambda: export_checkpoint(megatron, out),
        lambda: open_both(hf, megatron),
        lambda: load_head(megatron, tp_rank=0, tp_size=1, padded_vocab=256, dtype=torch.float32, device="cpu"),
    ):
        with pytest.raises(
            UserError, match=rf"\.metadata asks for \w+\.{attack.split('.')[1]}, which no checkpoint needs"
        ):
            read()
    for arguments in (
        ["export", "--megatron", megatron, "--out", out],
        ["verify", "--hf", hf, "--megatron", megatron],
        ["inspect", megatron],
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert sorted(entry.name for entry in folder.iterdir()) == ["hf", "megatron"]


# Names of classes that a checkpoint does need, turned to another use.
_MISUSED = {
    # An attribute of a class replaced for the whole process: BUILD with the state (None, {name: value}).
    "class_changed": b"cpathlib\nPosixPath\nN}X\x07\x00\x00\x00changedNs\x86b.",
    "persistent_id": b"Pmarker\n.",
    "dotted": b"\x80\x04\x8c\x27torch.distributed.checkpoint.metadata\x8c\x11Metadata.__init__\x93.",
    "attribute_of_torch": b"ctorch\nload\n.",
    "module_of_torch": b"ctorch\nos\n.",
    "told_in_two_lines": b"\x80\x04\x8c\x01a\x8c\x04b\nc\x1b\x93.",
    "getattr": b"cbuiltins\ngetattr\n.",
    "not_metadata": pickle.dumps({"state_dict_metadata": {}}),
    "no_pickle": b"\xff\x00\x01",
    "empty": b"",
}


def test_a_class_is_changed_where_nothing_checks() -> None:
    pickle.loads(_MISUSED["class_changed"])
    changed: Any = type(Path())
    assert changed.changed is None
    del changed.changed


@pytest.mark.parametrize("name", _MISUSED)
def test_metadata_that_is_something_else(folder: Path, name: str) -> None:
    (folder / "megatron" / "release" / ".metadata").write_bytes(_MISUSED[name])
    before = dict(vars(type(Path())))
    with pytest.raises(UserError, match=r"\.metadata (asks for|is damaged|is not the metadata)") as caught:
        MegatronWeights(folder / "megatron")
    assert "\n" not in str(caught.value)
    assert dict(vars(type(Path()))) == before


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("place", ["common.pt", "object"])
def test_other_pickles_are_not_opened_by_a_conversion_and_refused_before_megatron_core(
    folder: Path, marker: Path, attack: str, place: str
) -> None:
    release, data = folder / "megatron" / "release", saved({"args": attacks(marker)[attack]})
    check_pickles(release)
    if place == "object":
        plant_object(release, data)
    else:
        (release / "common.pt").write_bytes(data)
    export_checkpoint(folder / "megatron", folder / "out")
    assert main(["verify", "--hf", str(folder / "hf"), "--megatron", str(folder / "megatron")]) == 0
    assert main(["inspect", str(folder / "megatron")]) == 0
    with pytest.raises(UserError, match="holds a Python object that may run code when loaded") as caught:
        check_pickles(release)
    assert attack.split(".")[1] in str(caught.value) and "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("file", ["../outside", "/etc/passwd", "..", "", "a/b", "a\0b"])
def test_files_outside_the_folder(folder: Path, file: str) -> None:
    release = folder / "megatron" / "release"
    (folder / "megatron" / "outside").write_bytes(b"")
    metadata = metadata_of(release)
    metadata.storage_data = {index: replace(info, relative_path=file) for index, info in metadata.storage_data.items()}
    write_metadata(release, metadata)
    for read in (lambda: MegatronWeights(folder / "megatron"), lambda: check_pickles(release)):
        with pytest.raises(UserError, match="which is not a file of its folder"):
            read()


def test_a_link_is_followed(folder: Path) -> None:
    """Checkpoints are put together from links; a link is there because the folder's owner put it there."""
    release = folder / "megatron" / "release"
    (file,) = release.glob("*.distcp")
    file.rename(folder / "elsewhere")
    file.symlink_to(folder / "elsewhere")
    check_pickles(release)
    export_checkpoint(folder / "megatron", folder / "out")


def test_objects_that_are_not_there(folder: Path) -> None:
    release = folder / "megatron" / "release"
    (file,) = release.glob("*.distcp")
    metadata = metadata_of(release)
    places = [
        metadata.storage_data[MetadataIndex(key)].offset
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, BytesStorageMetadata)
    ]
    file.write_bytes(file.read_bytes()[: max(places) + 10])
    with pytest.raises(UserError, match=r"distcp is damaged \("):
        check_pickles(release)
    file.unlink()
    with pytest.raises(UserError, match=r"distcp cannot be read \(No such file"):
        check_pickles(release)


def test_a_transformed_object_is_refused(folder: Path) -> None:
    """What is checked would not be what torch unpickles."""
    release = folder / "megatron" / "release"
    metadata = metadata_of(release)
    changed = {i: replace(info, transform_descriptors=["stream.zstd"]) for i, info in metadata.storage_data.items()}
    metadata.storage_data = changed
    write_metadata(release, metadata)
    with pytest.raises(UserError, match=r"\.metadata says that .* is compressed"):
        check_pickles(release)


def test_what_megatron_core_allows_for_its_own_loading_stays_allowed(folder: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    check_pickles(folder / "megatron" / "release")
    assert set(torch.serialization.get_safe_globals()) == before
    with torch.serialization.safe_globals([argparse.Namespace]):
        check_pickles(folder / "megatron" / "release")
        assert argparse.Namespace in torch.serialization.get_safe_globals()


# The check reads .metadata into inert records, a loader after it into real classes: the two must not differ.


def opcodes(value: object) -> bytes:
    """A value's pickle, to be put inside another."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, 2)
    pickler.fast = True
    pickler.dump(value)
    return stream.getvalue()[2:-1]


def named(cls: type) -> bytes:
    return f"c{cls.__module__}\n{cls.__qualname__}\n".encode()


def mapping(**fields: bytes) -> bytes:
    return b"}(" + b"".join(opcodes(key) + value for key, value in fields.items()) + b"u"


def instance(cls: type, *states: bytes) -> bytes:
    return named(cls) + b")\x81" + b"".join(state + b"b" for state in states)


def disguised(name: str, code: int, length: int, harmless: int) -> bytes:
    """`.metadata` with an object `k` at `code`; a careless reader takes it to be the one at the file's beginning."""

    def place(offset: int, size: int) -> bytes:
        return mapping(relative_path=opcodes("file.distcp"), offset=opcodes(offset), length=opcodes(size))

    def key(fqn: str) -> bytes:
        return instance(MetadataIndex, mapping(fqn=opcodes(fqn), offset=b"N", index=b"N"))

    entry = instance(BytesStorageMetadata, b"}")
    info = instance(_StorageInfo, place(code, length))
    storage = b"}" + key("k") + info + b"s"
    if name == "key_renamed":
        # Another key is given the same name when it is in the dict already.
        renamed = b"h\x05" + mapping(fqn=opcodes("k"), offset=b"N", index=b"N") + b"b0"
        storage += key("c") + b"q\x05" + instance(_StorageInfo, place(0, harmless)) + b"s" + renamed
    elif name == "state_changed_later":
        changed = b"h\x07" + opcodes("offset") + opcodes(0) + b"s" + opcodes("length") + opcodes(harmless) + b"s0"
        storage = b"}" + key("k") + instance(_StorageInfo, place(code, length) + b"q\x07") + changed + b"s"
    elif name == "items_shadowed":
        storage = named(OrderedDict) + b")R" + key("k") + info + b"s" + mapping(items=named(OrderedDict)) + b"b"
    elif name == "class_changed":
        properties = pickle.dumps(TensorProperties(dtype=torch.float32), 2)[2:-1].replace(b"q\x00", b"")
        tensor = mapping(properties=properties, size=opcodes((1,)), chunks=b"]")
        other = b"N" + mapping(__class__=named(BytesStorageMetadata)) + b"\x86"
        entry = instance(TensorStorageMetadata, other, tensor)
    entries = b"}" + opcodes("k") + entry + b"s"
    state = mapping(state_dict_metadata=entries, planner_data=b"N", storage_data=storage, storage_meta=b"N")
    return b"\x80\x02" + instance(Metadata, state) + b"."


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("name", ["as_it_is", "key_renamed", "state_changed_later", "items_shadowed", "class_changed"])
def test_no_object_hides_from_the_check(tmp_path: Path, marker: Path, name: str) -> None:
    harmless, code = saved([1]), saved([attacks(marker)["builtins.eval"]])
    (tmp_path / "file.distcp").write_bytes(harmless + code)
    (tmp_path / ".metadata").write_bytes(disguised(name, len(harmless), len(code), len(harmless)))
    with pytest.raises(UserError):
        check_pickles(tmp_path)
    assert not marker.exists()
    # A loader that does not check finds the code.
    load({"k": None}, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert marker.exists()


# Resuming: megatron-core's loader would unpickle all of it.


def save_run(values: dict[str, Any], folder: Path) -> list[str]:
    """A checkpoint of one step."""
    run = build(values)
    run.train(0, 1)
    path = run.save(folder, 1)
    check_pickles(path)
    entries = metadata_of(path).state_dict_metadata
    return [key for key, entry in entries.items() if isinstance(entry, BytesStorageMetadata)]


def load_run(values: dict[str, Any], path: Path, with_optimizer: bool) -> str:
    """Whoever plants code writes fitting checksums too: what they hold is not looked at here."""
    from megakd.checkpoint.state import load_state

    run = build(values)
    load_state(path, run.student.model, run.optimizer if with_optimizer else None, run.mesh)
    return "loaded"


@pytest.mark.parametrize("sharded", [False, True])
def test_a_runs_own_checkpoint_passes(tmp_path: Path, sharded: bool, run_ranks: Callable[..., list[Any]]) -> None:
    values = run_values(write_run_files(tmp_path), optimizer__use_distributed_optimizer=sharded)
    objects = run_ranks(2, save_run, values, tmp_path / "checkpoints")[0]
    # There is something to check, also here, where megatron-core is not loaded to widen what torch.load allows.
    assert any("_extra_state" in key for key in objects)
    check_pickles(tmp_path / "checkpoints" / "step-00000001")
    found = run_ranks(2, load_run, values, tmp_path / "checkpoints" / "step-00000001", True)
    assert found == ["loaded"] * 2


@pytest.mark.parametrize("place", [".metadata", "common.pt", "object"])
def test_resuming_refuses_code(tmp_path: Path, marker: Path, place: str, run_ranks: Callable[..., list[Any]]) -> None:
    values = run_values(write_run_files(tmp_path))
    run_ranks(1, save_run, values, tmp_path / "checkpoints")
    path, attack = tmp_path / "checkpoints" / "step-00000001", attacks(marker)["os.system"]
    if place == "object":
        plant_object(path, saved([attack]))
    elif place == "common.pt":
        (path / "common.pt").write_bytes(saved({"args": attack}))
    else:
        metadata = metadata_of(path)
        metadata.planner_data = attack
        write_metadata(path, metadata)
    for with_optimizer in (True, False):
        with pytest.raises(UserError, match="which may run code|that may run code") as caught:
            run_ranks(1, load_run, values, path, with_optimizer)
        assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_resuming_tells_damaged_metadata(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    values = run_values(write_run_files(tmp_path))
    run_ranks(1, save_run, values, tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "step-00000001"
    (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:-200])
    with pytest.raises(UserError, match=r"\.metadata is damaged .* Copy or write the checkpoint again"):
        run_ranks(1, load_run, values, path, True)
