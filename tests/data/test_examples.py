"""Samples of examples, token by token: which are predicted, what truncation and packing make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.common.errors import UserError
from megakd.data.examples import Examples, ExampleSamples
from tests.data.example_files import write_examples, write_pair

# prompt 10 11 | first answer 12 13 | next question 14 | last answer 15 16 (16 ends the turn)
CHAT = ([10, 11, 12, 13, 14, 15, 16], [0, 0, 1, 1, 0, 2, 2])
SHORT = ([20, 21, 22], [0, 2, 2])


def samples(prefix: str, length: int, **settings: object) -> ExampleSamples:
    chosen = {"loss_on": "assistant", "truncation": "drop", "packing": False} | settings
    examples = Examples(prefix, chosen.pop("loss_on"))  # type: ignore[arg-type]
    members = chosen.pop("members", range(len(examples)))
    return ExampleSamples(examples, members, length, **chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss_on", "mask"),
    [
        ("assistant", [0, 1, 1, 0, 1, 1, 0, 0]),
        ("response", [0, 0, 0, 0, 1, 1, 0, 0]),
        ("all", [1, 1, 1, 1, 1, 1, 0, 0]),
    ],
)
def test_one_example_and_its_padding(tmp_path: Path, loss_on: str, mask: list[int]) -> None:
    sample = samples(write_examples(tmp_path / "d", [CHAT]), 8, loss_on=loss_on).sample(0)
    assert sample.tokens.tolist() == [10, 11, 12, 13, 14, 15, 0, 0]
    assert sample.labels.tolist() == [11, 12, 13, 14, 15, 16, 0, 0]
    # At each place: is the label, the token one further, to be learnt?
    assert sample.loss_mask.tolist() == mask
    assert sample.position_ids.tolist() == list(range(8))
    assert sample.segments == (8,)


def test_an_example_that_just_fits_has_no_padding(tmp_path: Path) -> None:
    made = samples(write_examples(tmp_path / "d", [CHAT]), 6)
    assert made.sample(0).labels.tolist() == [11, 12, 13, 14, 15, 16]
    assert made.fit.too_long == 0 and made.fit.padding == 0


@pytest.mark.parametrize(
    ("truncation", "length", "tokens", "labels", "mask"),
    [
        ("keep_start", 5, [10, 11, 12, 13, 14], [11, 12, 13, 14, 15], [0, 1, 1, 0, 1]),  # the end of turn is lost
        ("keep_start", 4, [10, 11, 12, 13], [11, 12, 13, 14], [0, 1, 1, 0]),
        ("keep_start", 2, [10, 11], [11, 12], [0, 1]),
        ("keep_end", 5, [11, 12, 13, 14, 15], [12, 13, 14, 15, 16], [1, 1, 0, 1, 1]),
        ("keep_end", 4, [12, 13, 14, 15], [13, 14, 15, 16], [1, 0, 1, 1]),
        ("keep_end", 1, [15], [16], [1]),
    ],
)
def test_truncation(
    tmp_path: Path, truncation: str, length: int, tokens: list[int], labels: list[int], mask: list[int]
) -> None:
    made = samples(write_examples(tmp_path / "d", [CHAT]), length, truncation=truncation)
    sample = made.sample(0)
    assert (sample.tokens.tolist(), sample.labels.tolist(), sample.loss_mask.tolist()) == (tokens, labels, mask)
    (line, _) = made.fit.describe("data.train", "d")
    lost = {"keep_start": "keep the start and lose their end of turn", "keep_end": "keep the end and lose their start"}
    assert line == (
        f"data.train: 1 of 1 examples in d are longer than data.sequence_length + 1 = {length + 1} tokens and "
        f"{lost[truncation]} (data.truncation {truncation})"
    )


def test_what_is_too_long_is_dropped_and_counted(tmp_path: Path) -> None:
    prefix = write_examples(tmp_path / "d", [CHAT, SHORT, ([5], [2]), CHAT, SHORT])
    made = samples(prefix, 4)
    assert made.num_samples == 2 and made.sample(1).labels.tolist() == [21, 22, 0, 0]
    assert made.fit.describe("data.train", "d") == [
        "data.train: 2 of 5 examples in d are longer than data.sequence_length + 1 = 5 tokens and are dropped "
        "(data.truncation drop)",
        "data.train: 1 examples in d are a single token and are dropped",
        "data.train: 2 examples of d in 2 samples; padding 50.0%",
    ]


def test_an_example_cut_before_its_response_is_dropped_and_counted(tmp_path: Path) -> None:
    made = samples(write_examples(tmp_path / "d", [CHAT, SHORT]), 4, truncation="keep_start", loss_on="response")
    assert made.num_samples == 1 and made.sample(0).tokens.tolist() == [20, 21, 0, 0]
    assert "1 of them have no token left that counts and are dropped" in made.fit.describe("k", "d")[0]


def test_no_example_left(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of its 2 examples is left: 1 are longer than data.sequence_length"):
        samples(write_examples(tmp_path / "d", [CHAT, ([5], [2])]), 4)


def test_packing_borders(tmp_path: Path) -> None:
    prefix = write_examples(tmp_path / "d", [SHORT, CHAT, ([30, 31], [0, 2])])
    made = samples(prefix, 10, packing=True)
    assert made.num_samples == 1 and made.has_segments
    sample = made.sample(0)
    assert sample.tokens.tolist() == [10, 11, 12, 13, 14, 15, 20, 21, 30, 0]
    assert sample.labels.tolist() == [11, 12, 13, 14, 15, 16, 21, 22, 31, 0]
    assert sample.loss_mask.tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 1, 0]
    assert sample.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 0, 0]
    assert sample.segments == (6, 2, 1, 1)
    assert made.fit.describe("data.train", "d") == [
        "data.train: 3 examples of d in 1 samples; padding 70.0% unpacked, 10.0% packed"
    ]


def test_members_are_a_part(tmp_path: Path) -> None:
    made = samples(write_examples(tmp_path / "d", [SHORT, CHAT, CHAT, SHORT]), 8, members=range(1, 4))
    assert [made.sample(i).tokens[0] for i in range(made.num_samples)] == [10, 10, 20]


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=20),
    length=st.integers(3, 12),
    truncation=st.sampled_from(["drop", "keep_start", "keep_end"]),
)
def test_packed_and_unpacked_samples_hold_the_same_predictions(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, truncation: str
) -> None:
    examples = [([100 * n + i for i in range(size)], [0, *[2] * (size - 1)]) for n, size in enumerate(lengths)]
    prefix = write_examples(tmp_path_factory.mktemp("d") / "d", examples)
    if truncation == "drop" and min(lengths) > length + 1:
        return

    def predictions(packing: bool) -> list[tuple[int, int, int]]:
        made = samples(prefix, length, truncation=truncation, packing=packing)
        read = [made.sample(i) for i in range(made.num_samples)]
        assert all(sum(sample.segments) == length for sample in read)
        return sorted(
            (int(t), int(label), int(p))
            for s in read
            for t, label, p, m in zip(s.tokens, s.labels, s.position_ids, s.loss_mask, strict=True)
            if m
        )

    assert predictions(packing=True) == predictions(packing=False)


def test_a_mask_of_other_examples(tmp_path: Path) -> None:
    prefix = write_examples(tmp_path / "d", [CHAT, SHORT])
    write_pair(f"{prefix}.mask", [[0, 2, 2], CHAT[1]], np.uint8)
    with pytest.raises(UserError, match="speaks of other examples than"):
        Examples(prefix, "all")
