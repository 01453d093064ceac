"""Weights of tokens, from the turns of examples through files and interruptions to samples."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.common.errors import UserError
from megakd.data import encoding, partial, preprocess, token_writer
from megakd.data.chat_encoder import encode_examples
from megakd.data.examples import Examples, ExampleSamples
from megakd.data.fingerprint import read_metadata
from megakd.data.inspection import inspect_tokens
from megakd.data.offsets import OffsetTokenizer, Turn, require_offsets
from megakd.data.records import Encoded, Problem, Record
from megakd.data.sources import file_sources
from megakd.data.token_writer import TokenWriter, WeightWriter, lengths_path
from megakd.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.chat_tokenizers import byte_level
from tests.data.example_files import write_examples, write_pair

Parts = list[tuple[str, float | None]]
# A question, then an answer of some weight, twice; a token per letter.
WEIGHTED: list[Parts] = [
    [("q", None), ("aa", 1.0), ("r", None), ("bb", 1.0)],
    [("q", None), ("aa", 0.0), ("r", None), ("bb", 1.0)],
    [("q", None), ("aa", 0.5), ("r", None), ("bbb", 2.0)],
    [("q", None), ("a", 3.0), ("r", None), ("bb", 0.0)],
    [("q", None), ("a", 1.0), ("r", None), ("b", 1.0)],
]
PLAIN = [WEIGHTED[0], WEIGHTED[1], WEIGHTED[4]]


@dataclass(frozen=True)
class FlaggedSettings:
    """Records of texts, each of an assistant's turn with its weight or of no turn."""

    fields: tuple[str, ...] = ("parts",)
    masks: bool = True

    def build(self, tokenizer: Tokenizer) -> Flagged:
        return Flagged(OffsetTokenizer(require_offsets(tokenizer)))

    def metadata(self) -> dict[str, Any]:
        return {}


class Flagged:
    def __init__(self, tokenizer: OffsetTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, records: Sequence[Record]) -> list[Encoded | Problem]:
        return encode_examples(self._tokenizer, [self._example(record["parts"]) for record in records])

    def _example(self, parts: Parts) -> tuple[str, list[Turn], tuple[str, ...]]:
        text, turns = "", []
        last = max(place for place, (_, weight) in enumerate(parts) if weight is not None)
        for place, (part, weight) in enumerate(parts):
            if weight is not None:
                turns.append(Turn(len(text), len(text) + len(part), place == last, weight))
            text += part
        return text, turns, ()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(byte_level(tmp_path_factory.mktemp("letters")))


def write(tokenizer: Tokenizer, prefix: Path, files: Sequence[Sequence[Parts]], **options: Any) -> preprocess.Summary:
    """Each of `files` is a source of its own."""
    folder = prefix.parent / "in"
    folder.mkdir(parents=True, exist_ok=True)
    for number, records in enumerate(files):
        path = folder / f"{number}.jsonl"
        if not path.exists():  # a run goes on only with files that nobody has touched
            path.write_text("".join(json.dumps({"parts": parts}) + "\n" for parts in records))
    sources = file_sources([str(folder / f"{number}.jsonl") for number in range(len(files))])
    return preprocess.write_sources(sources, prefix, tokenizer, FlaggedSettings(), **options)


def contents(prefix: Path) -> dict[str, bytes]:
    return {path.name.split(".", 1)[1]: path.read_bytes() for path in sorted(prefix.parent.glob(f"{prefix.name}.*"))}


def labels(parts: Parts, *, all_tokens: bool = False) -> list[float]:
    """The weight of each letter as a label, by the rule's own words."""
    found: list[float] = []
    for text, weight in parts:
        found += len(text) * [float(all_tokens) if weight is None else weight]
    return found


@pytest.mark.parametrize("loss_on", ["assistant", "response", "all"])
@pytest.mark.parametrize("packing", [False, True])
def test_samples_have_the_turns_weights(tmp_path: Path, tokenizer: Tokenizer, loss_on: Any, packing: bool) -> None:
    write(tokenizer, tmp_path / "d", [WEIGHTED])
    examples = Examples(str(tmp_path / "d"), loss_on)
    made = ExampleSamples(examples, range(len(WEIGHTED)), 12, truncation="drop", packing=packing)
    read = [made.sample(number) for number in range(made.num_samples)]
    assert {sample.loss_mask.dtype for sample in read} == {np.dtype(np.float32)}
    wanted = []
    for parts in WEIGHTED:
        weights = labels(parts, all_tokens=loss_on == "all")
        if loss_on == "response":
            weights = [0.0] * (len(weights) - len(parts[-1][0])) + weights[-len(parts[-1][0]) :]
        wanted.append(weights[1:])
    found = np.concatenate([sample.loss_mask for sample in read])
    if packing:  # the longest first, behind each other
        wanted.sort(key=len, reverse=True)
        assert [x for x in found if x] == [x for weights in wanted for x in weights if x]
    else:
        assert found.reshape(-1, 12).tolist() == [weights + [0.0] * (12 - len(weights)) for weights in wanted]


def test_files_only_where_a_weight_is_neither_0_nor_1(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tokenizer, tmp_path / "plain" / "d", [PLAIN])
    assert set(contents(tmp_path / "plain" / "d")) == {"bin", "idx", "mask.bin", "mask.idx", "json", "vocab.json.gz"}
    metadata = read_metadata(tmp_path / "plain" / "d")
    assert metadata is not None and (metadata["mask_version"], metadata["weights"]) == (2, False)
    write(tokenizer, tmp_path / "weighted" / "d", [WEIGHTED])
    metadata = read_metadata(tmp_path / "weighted" / "d")
    assert metadata is not None and (metadata["mask_version"], metadata["weights"]) == (2, True)
    write_pair(
        tmp_path / "theirs", [[w or 1.0 for w in labels(parts, all_tokens=True)] for parts in WEIGHTED], np.float32
    )  # type: ignore[arg-type]
    found, theirs = contents(tmp_path / "weighted" / "d"), contents(tmp_path / "theirs")
    assert (found["weight.bin"], found["weight.idx"]) == (theirs["bin"], theirs["idx"])


@settings(max_examples=30, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.booleans()), max_size=6),
    cut=st.integers(0, 6),
    block=st.integers(1, 5),
)
def test_the_writer_fills_up_with_ones_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[tuple[list[int], bool]], cut: int, block: int
) -> None:
    folder = tmp_path_factory.mktemp("writer")
    weights = [(np.arange(sum(lengths)) + 2).astype(np.float32) if heavy else None for lengths, heavy in chunks]

    def added(writer: WeightWriter, numbers: range) -> None:
        for number in numbers:
            writer.add(weights[number], sum(chunks[number][0]))
        writer.close()

    cut = min(cut, len(chunks))
    tokens = sum(sum(lengths) for lengths, _ in chunks[:cut])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_writer, "BLOCK", block)
        first = WeightWriter(folder / "d.weight")
        added(first, range(cut))
        # The journal is behind the files.
        with (folder / "d.weight.bin").open("ab") as file:
            file.write(b"behind the journal")
        second = WeightWriter(folder / "d.weight", tokens=tokens, has_weights=first.has_weights)
        added(second, range(cut, len(chunks)))
        lengths = np.array([size for sizes, _ in chunks for size in sizes], dtype=np.int32)
        lengths_path(folder / "d").write_bytes(lengths.tobytes())
        second.finish(lengths_path(folder / "d"))
    assert second.has_weights == any(heavy for _, heavy in chunks)
    assert second.has_weights == (folder / "d.weight.idx").exists() == (folder / "d.weight.bin").exists()
    if second.has_weights:
        flat = np.concatenate(
            [
                np.ones(sum(chunk[0])) if weight is None else weight
                for chunk, weight in zip(chunks, weights, strict=True)
            ]
        )
        documents = [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])]
        write_pair(folder / "theirs", documents, np.float32)
        for ending in ("bin", "idx"):
            assert (folder / f"d.weight.{ending}").read_bytes() == (folder / f"theirs.{ending}").read_bytes()


def test_a_run_that_is_killed_anywhere_goes_on(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [PLAIN, PLAIN, [WEIGHTED[2]], PLAIN, WEIGHTED]
    whole = tmp_path / "whole" / "d"
    kept: list[Path] = []

    def keep(method: str, owner: Any) -> None:
        original = getattr(owner, method)

        def kept_first(self: Any, *arguments: Any, **named: Any) -> Any:
            if partial.partial_path(whole).exists():
                kept.append(tmp_path / f"kept{len(kept)}")
                shutil.copytree(partial.partial_path(whole), kept[-1])
            return original(self, *arguments, **named)

        monkeypatch.setattr(owner, method, kept_first)

    with monkeypatch.context():
        # What a kill leaves at each of these, of what the files' buffers have handed over.
        monkeypatch.setattr(preprocess, "COMMIT_SECONDS", 0)
        monkeypatch.setattr(encoding, "CHUNK_RECORDS", 2)
        keep("add", TokenWriter)
        keep("add", WeightWriter)
        keep("_append", partial.Partial)
        keep("finish", WeightWriter)
        keep("complete", partial.Partial)
        write(tokenizer, whole, files)
        expected, kills = contents(whole), len(kept)
    monkeypatch.undo()
    assert "weight.bin" in expected and kills > 20
    (whole.parent / "in").rename(tmp_path / "in")
    for number in range(kills):
        prefix = whole.parent / f"other{number}"
        shutil.copytree(tmp_path / "in", whole.parent / "in", copy_function=shutil.copy2, dirs_exist_ok=True)
        kept[number].rename(partial.partial_path(prefix))
        write(tokenizer, prefix, files)
        assert contents(prefix) == expected, number


def test_a_data_set_that_is_replaced_leaves_no_weights(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = tmp_path / "d"
    write(tokenizer, prefix, [WEIGHTED])
    assert Path(f"{prefix}.weight.bin").exists()
    with pytest.raises(UserError, match="exists. Use --overwrite"):
        write(tokenizer, prefix, [WEIGHTED])
    shutil.rmtree(tmp_path / "in")
    write(tokenizer, prefix, [PLAIN], overwrite=True)
    assert not list(tmp_path.glob("d.weight.*"))
    Examples(str(prefix), "all")


def test_nothing_to_learn_is_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    flagged: Parts = [("q", None), ("aa", 0.0), ("r", None), ("bb", 1e-60)]  # which float32 has no room for
    # The data are in order: that stops no run.
    summary = write(tokenizer, tmp_path / "d", [[flagged, *PLAIN]], on_error="stop")
    assert summary.dropped == {"nothing to learn": 1} and summary.documents == 3


def edit_metadata(prefix: Path, **values: Any) -> None:
    path = Path(f"{prefix}.json")
    metadata = {key: value for key, value in (json.loads(path.read_text()) | values).items() if value is not None}
    path.write_text(json.dumps(metadata))


def test_masks_of_other_versions(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = tmp_path / "d"
    write(tokenizer, prefix, [PLAIN])
    edit_metadata(prefix, mask_version=None, weights=None)  # as it was written before there were versions
    assert Examples(str(prefix), "assistant").read(0, slice(None))[1].tolist() == labels(PLAIN[0])
    edit_metadata(prefix, mask_version=3)
    with pytest.raises(UserError, match=r"mask has version 3; this version of megakd reads 1 to 2. Update megakd, or"):
        Examples(str(prefix), "assistant")


def test_files_that_are_not_of_one_data_set(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = tmp_path / "d"
    write(tokenizer, prefix, [WEIGHTED])
    index = Path(f"{prefix}.weight.idx")
    kept = index.rename(tmp_path / "kept")
    with pytest.raises(UserError, match=r"data.train: .*/d is a data set with token weights and .*weight.idx does not"):
        Examples(str(prefix), "all")
    with pytest.raises(UserError, match=r"PREFIX: .*weight.idx does not exist"):
        inspect_tokens(prefix)
    kept.rename(index)
    edit_metadata(prefix, weights=False)
    with pytest.raises(UserError, match='says nothing of token weights and .*weight.idx exists.*write "weights": true'):
        Examples(str(prefix), "all")
    edit_metadata(prefix, weights=True)
    write_pair(f"{prefix}.weight", [[1.0], [2.0]], np.float32)
    with pytest.raises(UserError, match="weight.idx speaks of other examples"):
        Examples(str(prefix), "all")
    write_pair(f"{prefix}.weight", [[1], [2]], np.int32)
    with pytest.raises(UserError, match="is no index of megatron-core's token files that hold float32"):
        Examples(str(prefix), "all")


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
def test_weights_that_are_none_are_refused(tmp_path: Path, weight: float) -> None:
    """Of another tool: there is no metadata."""
    prefix = write_examples(tmp_path / "d", [([1, 2, 3], [0, 2, 2]), ([4, 5, 6, 7], [0, 2, 0, 2])])
    write_pair(f"{prefix}.weight", [[0.0, 2.0, 1.0], [1.0, 1.0, weight, 1.0]], np.float32)
    made = ExampleSamples(Examples(prefix, "response"), range(2), 4, truncation="drop", packing=False)
    assert made.sample(0).loss_mask.tolist() == [2, 1, 0, 0]
    with pytest.raises(
        UserError, match=rf"data.train: .*d.weight.bin has {weight} as the weight of token 2 of example 1"
    ):
        made.sample(1)


def test_a_long_example_whose_rest_weighs_nothing_is_dropped(tmp_path: Path) -> None:
    prefix = write_examples(tmp_path / "d", [([1, 2, 3, 4], [0, 2, 2, 2]), ([5, 6, 7, 8], [0, 2, 2, 2])])
    write_pair(f"{prefix}.weight", [[1.0, 0.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]], np.float32)
    made = ExampleSamples(Examples(prefix, "all"), range(2), 2, truncation="keep_start", packing=False)
    assert made.fit.uncounted == 1 and made.num_samples == 1


def test_data_of_which_nothing_counts_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    skipped = WEIGHTED[3]
    summary = write(tokenizer, tmp_path / "d", [[skipped, skipped]])
    assert summary.noted == {"last turn flagged not to be learned": 2}
    for loss_on in ("assistant", "all"):
        ExampleSamples(Examples(str(tmp_path / "d"), loss_on), range(2), 8, truncation="drop", packing=True)
    with pytest.raises(
        UserError, match="none of the 2 examples that are left has a token that counts with data.loss_on re"
    ):
        ExampleSamples(Examples(str(tmp_path / "d"), "response"), range(2), 8, truncation="drop", packing=True)


def test_inspect_shows_flags_and_weights(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tokenizer, tmp_path / "d", [WEIGHTED])
    out = io.StringIO()
    inspect_tokens(tmp_path / "d", start=1, samples=3, out=out)
    assert out.getvalue().splitlines()[1:] == [
        "── document 1: 6 tokens, 2 counted (2 in the response) of a weight of 2 in all, 2 flagged not to be learned",
        "q⟦0:aa⟧r⟦bb⟧",
        "── document 2: 7 tokens, 5 counted (2 in earlier turns, 3 in the response) of a weight of 7 in all",
        "q⟦1:×0.5:aa⟧r⟦×2:bbb⟧",
        "── document 3: 5 tokens, 1 counted (1 in earlier turns) of a weight of 3 in all, 2 flagged not to be learned",
        "q⟦1:×3:a⟧r⟦0:bb⟧",
    ]
