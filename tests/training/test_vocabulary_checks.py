"""Ids that a model has no row for are refused before a rank starts, or when they are read; ends that part are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from megakd.common.errors import UserError
from megakd.common.logging import configure_logging
from megakd.config.schema import Config
from megakd.data import known_ids
from megakd.data.fingerprint import read_metadata
from megakd.data.known_ids import CheckedSamples, EmbeddingRows
from megakd.data.preprocess import write_sources
from megakd.data.samples import TokenSamples
from megakd.data.sources import DocumentsSource
from megakd.data.text_encoder import TextSettings
from megakd.data.tokenizer import load_tokenizer
from megakd.training.preflight import preflight, preflight_cache
from megakd.training.train_data import open_held_out_data, open_train_data
from tests.data.example_files import write_examples, write_pair
from tests.training.runs import SEQUENCE, layout, run_values, save_llama

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "teacher"
KNOWN, ADDED = 4096, "<|turn|>"
SIZES = {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small` lacks the row of a token that was added to its tokenizer, `large` has it; `plain` lacks the token too."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = transformers.AutoTokenizer.from_pretrained(QUICKSTART)
    for name, rows in (("plain", KNOWN), ("small", KNOWN), ("large", KNOWN + 4)):
        save_llama(folder / name, seed=1, vocab=rows, **SIZES)
        if name == "small":
            tokenizer.add_special_tokens({"additional_special_tokens": [ADDED]})
        tokenizer.save_pretrained(folder / name)
    return folder


def write(prefix: Path, tokenizer: Path, *documents: str) -> str:
    """A data set of text as tools/preprocess_data.py writes it, a special token's text as its id."""
    own = load_tokenizer(tokenizer)

    class Spoken:
        """The tokenizer, for which the added token is no mere text."""

        def __getattr__(self, name: str) -> Any:
            return getattr(own, name)

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            ids = own.encode_batch([text.replace(ADDED, "") for text in texts])
            return [[*[KNOWN] * text.count(ADDED), *found] for text, found in zip(texts, ids, strict=True)]

    write_sources([DocumentsSource(documents)], prefix, Spoken(), TextSettings())  # type: ignore[arg-type]
    return str(prefix)


TEXT = "def f(x): return x\n" * 20


@pytest.fixture(scope="module")
def data(models: Path) -> Path:
    """`used` holds the added token, `unused` does not, both written with a tokenizer that has it."""
    for name, text in (("used", f"{ADDED}{TEXT}"), ("unused", TEXT)):
        write(models / name, models / "small", text)
    # By another tool, with no word on the tokenizer.
    write_pair(models / "foreign", [[5, 6] * 20, [7, KNOWN] * 20])
    return models


def values_of(models: Path, out: Path, teacher: str, student: str, train: str, **settings: Any) -> dict[str, Any]:
    values = run_values(out, data__train=str(models / train), **settings)
    values["teacher"]["path"] = str(models / teacher)
    values["student"] = {"init": {"path": str(models / student)}}
    return values


def refusal(check: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("check", [preflight, preflight_cache])
@pytest.mark.parametrize("lacking", ["teacher", "student"])
@pytest.mark.parametrize("train", ["used", "foreign"])
def test_an_id_without_a_row_is_refused_before_a_rank_starts(
    data: Path, tmp_path: Path, tp: int, check: Any, lacking: str, train: str
) -> None:
    names = {"teacher": "large", "student": "large", lacking: "small"}
    config = Config.model_validate(values_of(data, tmp_path, **names, train=train, **layout(tp)))
    setting = "teacher.path" if lacking == "teacher" else "student.init.path"
    assert refusal(lambda: check(config, tp)).startswith(
        f"data.train: {data / train} has the id {KNOWN}, and the {lacking} ({setting}: {data / 'small'}) has rows for "
        f"the ids 0 to {KNOWN - 1} and none for {KNOWN}. Resize its embedding to the tokenizer"
    )


@pytest.mark.parametrize("key", ["valid", "test"])
def test_held_out_data_too(data: Path, tmp_path: Path, key: str) -> None:
    values = values_of(data, tmp_path, "small", "large", "unused", **{f"data__{key}": str(data / "used")})
    assert refusal(lambda: preflight(Config.model_validate(values), 1)).startswith(
        f"data.{key}: {data}/used has the id"
    )


def test_a_student_of_a_shape_of_its_own(data: Path, tmp_path: Path) -> None:
    values = values_of(data, tmp_path, "large", "large", "used")
    shape = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": KNOWN}
    shape["max_position_embeddings"] = 64
    values["student"] = {"architecture": shape}
    told = refusal(lambda: preflight(Config.model_validate(values), 1))
    assert told.endswith(f"none for {KNOWN}. Raise student.architecture.vocab_size.")
    values["student"]["architecture"]["vocab_size"] += 1
    preflight(Config.model_validate(values), 1)


@pytest.mark.parametrize("names", [("small", "large"), ("large", "small"), ("small", "small")])
def test_ids_of_the_tokenizer_alone_do_no_harm(data: Path, tmp_path: Path, names: tuple[str, str]) -> None:
    assert read_metadata(data / "unused")["tokenizer"]["vocab_size"] == KNOWN + 1  # type: ignore[index]
    config = Config.model_validate(values_of(data, tmp_path, *names, train="unused"))
    preflight(config, 1)
    preflight_cache(config, 1)


def test_a_tokenizer_without_the_token_is_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    preflight(Config.model_validate(values_of(data, tmp_path, "plain", "large", "unused")), 1)
    assert capsys.readouterr().out.splitlines() == [
        f"data.train: the teacher's tokenizer lacks the id {KNOWN} ('{ADDED}'); the data holds none of these ids"
    ]
    told = refusal(lambda: preflight(Config.model_validate(values_of(data, tmp_path, "plain", "large", "used")), 1))
    assert "it is the student's. Add these tokens to the teacher: save the data's tokenizer" in told


def without_max_id(data: Path, name: str) -> None:
    """A data set's description as it was before it said which id is the largest."""
    file = data / f"{name}.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "max_id"}))


def test_data_that_does_not_say_its_largest_id(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("used", f"{ADDED}{TEXT}"), ("unused", TEXT)):
        write(tmp_path / name, models / "small", text)
        without_max_id(tmp_path, name)
    rows = [EmbeddingRows("the teacher", KNOWN, "Resize it."), EmbeddingRows("the student", KNOWN + 1, "Resize it.")]
    known_ids.check_ids(str(tmp_path / "unused"), rows)
    assert f"has the id {KNOWN}, and the teacher has rows for" in refusal(
        lambda: known_ids.check_ids(str(tmp_path / "used"), rows)
    )
    monkeypatch.setattr(known_ids, "_READ_WHOLE_BYTES", 10)
    for name in ("used", "unused"):
        told = refusal(lambda: known_ids.check_ids(str(tmp_path / name), rows))  # noqa: B023
        assert f"was written with a tokenizer of {KNOWN + 1} ids, and the teacher has" in told
    known_ids.check_ids(str(tmp_path / "used"), rows[1:])


@pytest.mark.parametrize("name", ["foreign", "chat"])
def test_large_data_of_another_tool_is_checked_as_it_is_read(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(known_ids, "_READ_WHOLE_BYTES", 10)
    write_examples(data / "chat", [([5] * 9, [2] * 9), ([5] * 8 + [KNOWN], [2] * 9)])
    values = values_of(data, tmp_path, "small", "large", name, data__valid=str(data / name), data__global_batch_size=2)
    config = Config.model_validate(values)
    preflight(config, 1)
    for key, opened in (("train", open_train_data(config)), ("valid", open_held_out_data(config, "valid"))):
        samples = opened.samples
        samples.sample(0)
        told = refusal(lambda: [samples.sample(number) for number in range(samples.num_samples)])  # noqa: B023
        place = {"foreign": 2, "chat": 1}[name]
        assert told.startswith(f"data.{key}: sample {place} of {data / name} has the id {KNOWN}, and the teacher (")


def test_labels_that_do_not_count_may_be_anything(memory_like: Callable[..., Any]) -> None:
    rows = [EmbeddingRows("the student", 10, "Resize it.")]
    ends_beyond = memory_like([1] * 4 + [10])
    told = refusal(lambda: CheckedSamples(ends_beyond, rows, key="data.train", prefix="p").sample(0))
    has_rows = "the student has rows for the ids 0 to 9 and none for 10. Resize it."
    assert told == f"data.train: sample 0 of p has the id 10, and {has_rows}"
    CheckedSamples(memory_like([1] * 4 + [10], counted=3), rows, key="data.train", prefix="p").sample(0)
    told = refusal(lambda: CheckedSamples(memory_like([-1, 1, 1]), rows, key="data.train", prefix="p").sample(0))
    assert told == "data.train: sample 0 of p has -1, which is no id. Write the data again."


@pytest.fixture
def memory_like() -> Callable[..., Any]:
    """Makes samples of one sample of the given tokens, of which the first `counted` labels count."""

    class Stream:
        prefix = "p"

        def __init__(self, tokens: list[int]) -> None:
            self.num_tokens, self._tokens = len(tokens), np.array(tokens, dtype=np.int64)

        def slice(self, start: int, stop: int) -> Any:
            return self._tokens[start:stop].copy()

        def document_starts(self, start: int, stop: int) -> Any:
            return np.empty(0, dtype=np.int64)

    def make(tokens: list[int], counted: int | None = None) -> Any:
        samples = TokenSamples(Stream(tokens), len(tokens) - 1)
        whole = samples.sample

        def sample(number: int) -> Any:
            found = whole(number)
            found.loss_mask[counted:] = 0 if counted is not None else found.loss_mask
            return found

        samples.sample = sample  # type: ignore[method-assign]
        return samples

    return make


def end_at(folder: Path, ids: int | list[int] | None) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({} if ids is None else {"eos_token_id": ids}))


def told(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    preflight(Config.model_validate(config), 1)
    return [line for line in capsys.readouterr().out.splitlines() if "not checked" not in line]


def test_ends_of_turn(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base student that ends texts with </s> (2), and a teacher and chats that end turns with another token."""
    configure_logging()
    chats = [([1, 30, KNOWN, 40, 41, end], [0, 0, 0, 2, 2, 2]) for end in (KNOWN, KNOWN, 2)] * 40
    # Its last example has a line's end behind the response.
    write_examples(data / "ends", [*chats, ([1, 40, KNOWN, 13], [0, 2, 2, 0])])
    values = values_of(data, tmp_path, "large", "tuned", "ends")
    save_llama(data / "tuned", seed=1, vocab=KNOWN + 4, **SIZES)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (data / "tuned" / file).write_bytes((data / "large" / file).read_bytes())
    file = data / "tuned" / "generation_config.json"
    end_at(data / "tuned", 2)
    end_at(data / "large", [KNOWN, 2])
    assert told(values, capsys) == [
        f"data.train: the responses of {data / 'ends'} end with the id {KNOWN} ('{ADDED}'), where the exported student "
        f'will not stop: eos_token_id is 2 in {file}. Write "eos_token_id": [2, {KNOWN}] there before the run.'
    ]
    # What the data does not say the teacher does.
    text = values_of(data, tmp_path, "large", "tuned", "unused")
    assert told(text, capsys) == [
        f"teacher.path: the teacher ends a text ({data / 'large' / 'generation_config.json'}) with the id {KNOWN} "
        f"('{ADDED}'), where the exported student will not stop: eos_token_id is 2 in {file}. "
        f'Write "eos_token_id": [2, {KNOWN}] there before the run.'
    ]
    end_at(data / "tuned", None)
    assert [line.partition("eos_token_id ")[2] for line in told(values, capsys)] == [
        f'is not given in {file}. Write "eos_token_id": {KNOWN} there before the run.',
        f'is not given in {file}. Write "eos_token_id": [{KNOWN}, 2] there before the run.',
    ]
    end_at(data / "tuned", [2, KNOWN])  # as advised
    assert told(values, capsys) == told(text, capsys) == []
    file.unlink()
    assert [f"is 2 in {data / 'tuned' / 'config.json'}." in line for line in told(values, capsys)] == [True]
    assert told({**values, "run": values["run"] | {"export": False}}, capsys) == []


def test_no_word_where_nothing_is_wrong(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Responses without an end token, which preprocessing counts, and models that end as their data does."""
    configure_logging()
    end_at(data / "large", 2)
    write_examples(data / "open", [([1, 30, 40 + n % 7, 50], [0, 0, 2, 2]) for n in range(50)])
    write_examples(data / "closed", [([1, 30, 40, 2], [0, 0, 2, 2])] * 50)
    write_examples(data / "unlearned", [([1, 30, 40, 2], [0, 0, 1, 1])] * 50)
    for name in ("open", "closed", "unlearned", "unused"):
        assert told(values_of(data, tmp_path, "large", "large", name), capsys) == []


def test_the_quickstart_is_told_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    write(tmp_path / "text", QUICKSTART, TEXT * 3)
    values = run_values(tmp_path, data__train=str(tmp_path / "text"), data__sequence_length=SEQUENCE)
    values["teacher"]["path"] = str(QUICKSTART)
    values["student"] = {"init": {"path": str(QUICKSTART), "layers": [0, 2, 5]}}
    assert told(values, capsys) == []
