from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megakd.common.errors import UserError
from megakd.convert import safetensors_folder
from megakd.convert.safetensors_folder import SafetensorsFolder

A, B = torch.arange(12.0).reshape(4, 3), torch.arange(5.0)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": A}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": B.bfloat16()}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(tmp_path, a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors")
    return tmp_path


def write_index(path: Path, **weight_map: str) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def read_all(path: Path) -> None:
    with SafetensorsFolder(path) as folder:
        for name in folder.names:
            folder.read(name)


def test_names_shapes_types_and_slices(sharded: Path) -> None:
    with SafetensorsFolder(sharded) as folder:
        assert folder.names == ["a", "b"]
        assert folder.shape("a") == (4, 3)
        assert (folder.dtype("a"), folder.dtype("b")) == ("F32", "BF16")
        assert torch.equal(folder.read("a"), A)
        assert torch.equal(folder.read("a", (slice(1, 3),)), A[1:3])
        assert torch.equal(folder.read("a", (slice(None), slice(1, 2))), A[:, 1:2])
        assert folder.read("a", (slice(4, 4),)).shape == (0, 3)


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    with SafetensorsFolder(tmp_path) as folder:
        assert folder.names == ["a"]
        assert torch.equal(folder.read("a"), A)


def test_a_weight_under_two_names(tmp_path: Path) -> None:
    save_file({"a": A, "module.a": A + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="has the weight a twice, as a and as module.a"):
        SafetensorsFolder(tmp_path)


def test_only_whole_parts_of_a_name_are_wrappers(tmp_path: Path) -> None:
    save_file({"_orig_mod.submodule.a": A, "module._orig_mod.b": B, "b.module": B + 1}, tmp_path / "model.safetensors")
    with SafetensorsFolder(tmp_path) as folder:
        assert sorted(folder.names) == ["b", "b.module", "submodule.a"]
        assert list(folder.unwrapped) == ["_orig_mod.submodule.a", "module._orig_mod.b"]
        assert torch.equal(folder.read("submodule.a"), A)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        SafetensorsFolder(tmp_path / "nowhere")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has neither model.safetensors nor"):
        SafetensorsFolder(tmp_path)


def test_pickled_weights_are_refused_with_a_remedy(tmp_path: Path) -> None:
    torch.save({"a": A}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled weights only \(pytorch_model.bin\).*safe_serialization=True"):
        SafetensorsFolder(tmp_path)


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="weight b in model-00002-of-00002.safetensors, which is not in the folder"):
        SafetensorsFolder(sharded)


def test_an_index_may_not_point_outside_its_folder(sharded: Path) -> None:
    outside = sharded.parent / "outside.safetensors"
    save_file({"a": A}, outside)
    write_index(sharded, a="../outside.safetensors")
    with pytest.raises(UserError, match="which is not in the folder"):
        SafetensorsFolder(sharded)


def test_weight_that_the_shard_does_not_hold(sharded: Path) -> None:
    write_index(sharded, a="model-00001-of-00002.safetensors", c="model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="puts weight c in model-00001-of-00002.safetensors, which does not hold it"):
        read_all(sharded)


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": A}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match="model.safetensors is not a whole safetensors file") as caught:
        read_all(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="is not an index of safetensors"):
        SafetensorsFolder(tmp_path)


def test_unknown_weight_names_the_nearest(sharded: Path) -> None:
    save_file({"lm_head.weight": A}, sharded / "model.safetensors")
    with (
        SafetensorsFolder(sharded) as folder,
        pytest.raises(UserError, match=r"has no weight lm_head.weigth. Did you mean 'lm_head.weight'\?"),
    ):
        folder.read("lm_head.weigth")


def test_a_weight_that_the_index_does_not_list(sharded: Path) -> None:
    save_file({"b": B.bfloat16(), "extra": A}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="00002.safetensors holds weight extra, and .*index.json does not list it"):
        read_all(sharded)


def test_a_weight_in_two_shards(sharded: Path) -> None:
    save_file({"b": B.bfloat16(), "a": A + 1}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="holds weight a, and .* puts it in model-00001-of-00002.safetensors"):
        read_all(sharded)


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 12345\n")
    with pytest.raises(UserError, match=r"model.safetensors is git-lfs's note of a file .* Run `git lfs pull`"):
        read_all(tmp_path)


def header(entries: dict[str, object], data: bytes = b"\0" * 16) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


WEIGHT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        (1 << 40).to_bytes(8, "little") + b"{}",
        header({"a": WEIGHT, "b": WEIGHT | {"data_offsets": [4, 12]}}),
        header({"a": WEIGHT | {"shape": [3]}}),
        header({"a": WEIGHT | {"data_offsets": [0, 800], "shape": [200]}}),
        header({"a": WEIGHT, "b": WEIGHT | {"data_offsets": [8, 16]}}, b"\0" * 8),
        (5).to_bytes(8, "little") + b"[1,2]",
    ],
    ids=["huge header", "overlap", "shape", "beyond the end", "cut", "no object"],
)
def test_a_header_that_contradicts_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is not a whole safetensors file") as caught:
        read_all(tmp_path)
    assert "\n" not in str(caught.value)


LIMITED = """
import resource, sys
from pathlib import Path
from megakd.common.errors import UserError
from megakd.convert.safetensors_folder import SafetensorsFolder
size = (Path(sys.argv[1]) / "model.safetensors").stat().st_size
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for share in (0.5, 1.5):
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(share * size), resource.RLIM_INFINITY))
    try:
        SafetensorsFolder(sys.argv[1])
    except UserError as error:
        print(error)
"""


def test_a_file_that_there_is_no_room_to_map(tmp_path: Path) -> None:
    size = 1 << 30
    file = tmp_path / "model.safetensors"
    file.write_bytes(header({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}, b""))
    with file.open("ab") as stream:
        stream.truncate(stream.tell() + size)  # takes no room on disk
    ended = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    # The first has no room for safetensors' mapping, the second none for torch's beside it.
    first, second = ended.stdout.splitlines()
    assert first.startswith(f"{file} cannot be opened (") and "ulimit -v" in first
    assert second.startswith(f"{file} cannot be opened (unable to mmap ") and "ulimit -v" in second


def test_a_file_that_cannot_be_read(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **settings: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(safetensors_folder, "safe_open", fails)
    with pytest.raises(UserError, match=r"00001-of-00002.safetensors cannot be opened \(.*Input/output error\)\. It"):
        read_all(sharded)
