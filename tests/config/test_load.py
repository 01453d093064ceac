"""Files and overrides become a Config, or one line that says which key is wrong and what to do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakd.common.errors import UserError
from megakd.config.architecture import GPTArchitecture
from megakd.config.load import config_from_dict, config_schema, dump_config, load_config
from megakd.config.schema import Config, DataSource
from tests.config.examples import ARCHITECTURE, VALID, config, values

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message_of(call: Any, *args: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    text = str(caught.value)
    assert text and "\n" not in text and "\r" not in text
    return text


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path, yaml.safe_dump(VALID))


def test_a_file_is_read_and_defaults_are_filled_in(file: Path) -> None:
    read = load_config(file)
    assert read == config()
    assert (read.optimizer.lr, read.optimizer.adam_beta2, read.data.train[0].path) == (0.001, 0.95, "data/train")
    assert load_config(str(file)) == read


def test_shipped_configurations_load() -> None:
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert files
    for path in files:
        assert load_config(path).run.output_dir


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E-3", 0.001), ("1.0e-3", 0.001), ("1e3", 1000.0), ("+2e0", 2.0), (".5", 0.5), ("3", 3.0),
     ("1_0.5", 10.5)],
)  # fmt: skip
def test_numbers_in_files_and_overrides(tmp_path: Path, file: Path, text: str, value: float) -> None:
    written = write(tmp_path, file.read_text().replace("lr: 0.001", f"lr: {text}"))
    for lr in (load_config(written).optimizer.lr, load_config(file, [f"optimizer.lr={text}"]).optimizer.lr):
        assert lr == value
        assert isinstance(lr, float)


def test_whole_numbers_in_scientific_notation_are_integers(file: Path) -> None:
    read = load_config(file, ["schedule.train_steps=null", "schedule.train_tokens=2.5e9"]).schedule.train_tokens
    assert read == 2_500_000_000
    assert isinstance(read, int)
    assert load_config(file, ["schedule.train_steps=1_000"]).schedule.train_steps == 1000


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("student.init.path=a/b", ("student", "init", "path"), "a/b"),
        ("student.init.layers=[0, 2]", ("student", "init", "layers"), [0, 2]),
        ("student.init={path: q}", ("student", "init", "path"), "q"),
        ("teacher=null", ("teacher",), None),
        ("teacher.dtype=null", ("teacher", "dtype"), None),
        ("run.name=a=b", ("run", "name"), "a=b"),
        ('run.name="7"', ("run", "name"), "7"),
        ("run.name=2025-01-01", ("run", "name"), "2025-01-01"),
        ("run.name=12:30", ("run", "name"), "12:30"),
        ('run.name="\\ud83d\\ude00"', ("run", "name"), "\U0001f600"),
        ("run.name=no", ("run", "name"), "no"),
        ("checkpoint.resume=false", ("checkpoint", "resume"), False),
        (" distill.kd_weight =2", ("distill", "kd_weight"), 2.0),
        ("run.seed=010", ("run", "seed"), 10),
        ("run.seed=0x10", ("run", "seed"), 16),
    ],
)
def test_overrides(file: Path, override: str, path: tuple[str, ...], value: object) -> None:
    read: Any = load_config(file, [override])
    for part in path:
        read = getattr(read, part)
    assert read == value and type(read) is type(value)


def test_the_last_override_wins_and_an_override_makes_its_sections(file: Path) -> None:
    assert load_config(file, ["run.seed=1", "run.seed=2"]).run.seed == 2
    replaced = ["student.init=null", *(f"student.architecture.{key}={value}" for key, value in ARCHITECTURE.items())]
    assert load_config(file, replaced).student.architecture == GPTArchitecture(**ARCHITECTURE)


def test_a_value_that_yaml_shares_is_overridden_in_one_place(tmp_path: Path) -> None:
    text = yaml.safe_dump(values(student={}, teacher={}))
    text = text.replace("student: {}", "student:\n  init: &m\n    path: p").replace("teacher: {}", "teacher: *m")
    read = load_config(write(tmp_path, text), ["teacher.path=q"])
    assert read.teacher is not None and read.student.init is not None
    assert (read.student.init.path, read.teacher.path) == ("p", "q")


def test_a_section_whose_keys_are_commented_out_has_its_defaults() -> None:
    assert config(distill=None, parallel=None) == config()
    assert config(teacher=None).teacher is None


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("a", [DataSource(path="a")]),
        (["a", {"path": "b", "epochs": 2}], [DataSource(path="a"), DataSource(path="b", epochs=2.0)]),
        ({"path": "a", "epochs": 0.5}, [DataSource(path="a", epochs=0.5)]),
    ],
)
def test_data_sets_are_a_path_a_section_or_a_list(given: Any, read: list[DataSource]) -> None:
    loaded = config(data__train=given)
    assert loaded.data.train == read
    assert config_from_dict(yaml.safe_load(dump_config(loaded))) == loaded


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "data.train: 3 is not a path, nor a section with path and weight or epochs."),
        (["a", None], "data.train: None is not a path, nor a section with path and weight or epochs."),
        ([], "data.train is []; it must be at least 1 entry long."),
        ([{"path": "a", "wieght": 2}], "data.train[0].wieght is not a setting. Did you mean 'data.train[0].weight'?"),
        ({"path": "a", "weight": -1}, "data.train[0].weight is -1; it must be above 0."),
        ([{"weight": 1}], "data.train[0].path is missing. Set it."),
        ([{"path": 7}], "data.train[0].path is 7; it must be text."),
    ],
)
def test_bad_data_sets(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        config(data__train=given)


def test_relative_paths_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config("../x.yaml").data.train == [DataSource(path="data/train")]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"distill__temprature": 2}, "distill.temprature is not a setting. Did you mean 'distill.temperature'?"),
        ({"optimzer": {}}, "optimzer is not a setting. Did you mean 'optimizer'?"),
        ({"lr": 1}, "lr is not a setting. Did you mean 'optimizer.lr'?"),
        ({"optimizer__train_steps": 1}, "optimizer.train_steps is not a setting. Did you mean 'schedule.train_steps'?"),
        ({"teacher__xyz": 1}, "teacher.xyz is not a setting. teacher has source, path, dtype, "
         "parallel, placement, ranks, prefetch_steps, signal_window and offload."),
        ({"run": {"output_dir": "x", 1: 2}}, "run.1 is not a setting. run has name, output_dir, "),
        ({"optimizer__lr": "fast"}, "optimizer.lr is 'fast'; it must be a number."),
        ({"optimizer__lr": "1"}, "optimizer.lr is '1'; it must be a number."),
        ({"optimizer__lr": True}, "optimizer.lr is true; it must be a number."),
        ({"optimizer__lr": None}, "optimizer.lr is null; it must be a number."),
        ({"optimizer__lr": {"a": 1}}, "optimizer.lr is a mapping; it must be a number."),
        ({"optimizer__lr": float("nan")}, "optimizer.lr is .nan; it must be finite."),
        ({"optimizer__lr": float("inf")}, "optimizer.lr is .inf; it must be finite."),
        ({"distill__temperature": -float("inf")}, "distill.temperature is -.inf; it must be finite."),
        ({"optimizer__lr": 0}, "optimizer.lr is 0; it must be above 0. (Peak learning rate.)"),
        ({"optimizer__min_lr": -1.5}, "optimizer.min_lr is -1.5; it must be at least 0."),
        ({"optimizer__adam_beta1": 1}, "optimizer.adam_beta1 is 1; it must be below 1."),
        ({"run__seed": 2**32}, "run.seed is 4294967296; it must be below 4294967296."),
        ({"run__seed": 10**5000}, "run.seed is a huge number; it must be below 4294967296."),
        ({"schedule__train_steps": 2.5}, "schedule.train_steps is 2.5; it must be a whole number."),
        ({"schedule__train_steps": True}, "schedule.train_steps is true; it must be a whole number."),
        ({"schedule__train_steps": "10"}, "schedule.train_steps is '10'; it must be a whole number."),
        ({"checkpoint__resume": 1}, "checkpoint.resume is 1; it must be true or false."),
        ({"checkpoint__resume": "yes"}, "checkpoint.resume is 'yes'; it must be true or false."),
        ({"run__name": 7}, "run.name is 7; it must be text."),
        ({"run__name": ""}, "run.name is ''; it must be at least 1 character long."),
        ({"run__name": "\ud800"}, "run.name is '\\ud800'; it must be text without halves of characters."),
        ({"run__dtype": "fp16"}, "run.dtype is 'fp16'; it must be 'fp32' or 'bf16'."),
        ({"run__dtype": "a\nb"}, "run.dtype is 'a\\nb'; it must be 'fp32' or 'bf16'."),
        ({"run__dtype": "x" * 500}, f"run.dtype is '{'x' * 76}...; it must be 'fp32' or 'bf16'."),
        ({"optimizer": 3}, "optimizer is 3; it must be a section with keys such as lr, min_lr, "),
        ({"student__init": "models/x"}, "student.init is 'models/x'; it must be a section with keys such as path and "),
        ({"student__init": {"path": "x", "layers": 3}}, "student.init.layers is 3; it must be a list."),
        ({"student__init": {"path": "x", "layers": []}}, "student.init.layers is []; it must be at least 1 entry "),
        ({"student__init": {"path": "x", "layers": [0, -1]}}, "student.init.layers[1] is -1; it must be at least 0."),
        ({"student__init": {"path": "x", "layers": [0, "a"]}}, "student.init.layers[1] is 'a'; it must be a whole "),
        ({"optimizer": {}}, "optimizer.lr is missing. Set it. (Peak learning rate.)"),
        ({"optimizer": {"lrr": 1}}, "optimizer.lrr is not a setting. Did you mean 'optimizer.lr'?"),
        ({"teacher": {}}, "teacher.path is missing. Set it. (Hugging Face folder of safetensors or Megatron"),
    ],
)  # fmt: skip
def test_each_problem_is_one_line(changes: dict[str, Any], line: str) -> None:
    text = message_of(config_from_dict, values(**changes))
    assert text.startswith(line), text


def test_missing_sections_name_what_they_need() -> None:
    without_data = {key: section for key, section in VALID.items() if key != "data"}
    assert message_of(config_from_dict, without_data) == (
        "data is missing. Add it, with train, sequence_length and global_batch_size."
    )
    without_student = {key: section for key, section in VALID.items() if key != "student"}
    assert message_of(config_from_dict, without_student).startswith("student is missing. Add it, with init, arch")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"hiden_size": 4}, "hiden_size is not a setting. Did you mean 'student.architecture.hidden_size'?"),
        ({"num_layers": 0}, "num_layers is 0; it must be above 0."),
        ({"num_layers": "six"}, "num_layers is 'six'; it must be a whole number."),
        ({"activation": "relu"}, "activation is 'relu'; it must be 'swiglu', 'gelu' or 'gelu_tanh'."),
        ({"rotary_base": float("inf")}, "rotary_base is .inf; it must be finite."),
        ({"rope_scaling": {"factor": 0}}, "rope_scaling.factor is 0; it must be above 0."),
        ({"rope_scaling": {"factor": 8}}, "rope_scaling.low_freq_factor is missing."),
        ({"rope_scaling": 8}, "rope_scaling is 8; it must be a section with keys such as factor, "),
    ],
)
def test_the_students_architecture_has_the_same_messages(changes: dict[str, Any], line: str) -> None:
    text = message_of(config_from_dict, values(student={"architecture": ARCHITECTURE | changes}))
    assert text.startswith(f"student.architecture.{line}"), text


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_query_groups": 3}, "num_attention_heads (8) must be a multiple of num_query_groups (3)."),
        ({"hidden_size": 60}, "hidden_size (60) must be a multiple of num_attention_heads (8) where kv_channels is "),
        ({"kv_channels": 7}, "kv_channels (7) must be even"),
        ({"position_embedding_type": "learned_absolute", "rope_scaling": {
            "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}},
         "rope_scaling has no effect with position_embedding_type learned_absolute"),
    ],
)  # fmt: skip
def test_rules_within_the_architecture(changes: dict[str, Any], line: str) -> None:
    text = message_of(config_from_dict, values(student={"architecture": ARCHITECTURE | changes}))
    assert text.startswith(f"student.architecture: {line}"), text


def test_rope_scaling_bands_must_be_in_order() -> None:
    scaling = {"factor": 8, "low_freq_factor": 4, "high_freq_factor": 4, "original_max_position_embeddings": 64}
    text = message_of(config_from_dict, values(student={"architecture": ARCHITECTURE | {"rope_scaling": scaling}}))
    assert text == "student.architecture.rope_scaling: low_freq_factor (4.0) must be below high_freq_factor (4.0)."


def test_head_size_and_groups_follow_where_not_given() -> None:
    given = {key: value for key, value in ARCHITECTURE.items() if key != "num_query_groups"}
    architecture = config(student={"architecture": given}).student.architecture
    assert architecture is not None
    assert (architecture.num_query_groups, architecture.kv_channels) == (8, 8)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "holds nothing; it must hold a mapping of sections (run, student, "),
        ("# only a comment\n", "holds nothing; "),
        ("- a\n- b\n", "holds ['a', 'b']; "),
        ("text\n", "holds 'text'; "),
        ("run:\n  name: a\n  seed: 1\n  name: b\n", "line 4 is not valid: 'name' stands here and on line 2. Keep one."),
        ("run: {}\nrun: {}\n", "line 2 is not valid: 'run' stands here and on line 1. Keep one."),
        ("run:\n  name: [a\n", "line 3 is not valid: "),
        ("run:\n  name: a: b\n", "line 2 is not valid: mapping values are not allowed here."),
        ("run:\n\tname: a\n", "line 2 is not valid: found character '\\t'"),
        ("run:\n  name: !!python/name:os.system\n", "line 2 is not valid: could not determine a constructor"),
        ("run: {}\n---\nrun: {}\n", "line 2 is not valid: but found another document."),
        ("run: *nothing\nx: 1\n", "line 1 is not valid: found undefined alias 'nothing'."),
        ("run:\n  seed: " + "9" * 5000 + "\n", "holds a number that cannot be read"),
        ("run: \x07\n", "is not valid YAML: "),
    ],
)
def test_files_that_are_not_a_configuration(tmp_path: Path, text: str, line: str) -> None:
    path = write(tmp_path, text)
    message = message_of(load_config, path)
    assert message.startswith(f"{path} {line}"), message


def test_yaml_that_refers_to_itself(tmp_path: Path) -> None:
    assert message_of(load_config, write(tmp_path, "run: &r\n  name: *r\n")).startswith("the configuration refers to")


def test_merged_keys_may_be_replaced(tmp_path: Path) -> None:
    text = yaml.safe_dump(values(teacher={}))
    text = text.replace("teacher: {}", "teacher:\n  <<: {path: p, dtype: bf16}\n  dtype: fp32")
    teacher = load_config(write(tmp_path, text)).teacher
    assert teacher is not None
    assert (teacher.path, teacher.dtype) == ("p", "fp32")


def test_files_that_cannot_be_read(tmp_path: Path, file: Path) -> None:
    assert message_of(load_config, tmp_path / "y.yaml") == (
        f"{tmp_path / 'y.yaml'} does not exist; give a YAML file. Did you mean 'x.yaml'?"
    )
    missing = tmp_path / "none" / "y.yaml"
    assert message_of(load_config, missing) == f"{missing} does not exist; give a YAML file."
    assert message_of(load_config, tmp_path).startswith(f"{tmp_path} cannot be read (")
    file.write_bytes(b"run: \xff\xfe")
    assert message_of(load_config, file) == f"{file} is not UTF-8 text; give a YAML file."


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.lr", "'optimizer.lr' is not an override; write section.key=value."),
        ("a\nb", "'a b' is not an override; write section.key=value."),
        ("=3", "'=3' is not an override; write section.key=value."),
        ("optimizer..lr=3", "'optimizer..lr=3' is not an override; write section.key=value."),
        ("optimizer.lr=[1", "the value of override 'optimizer.lr' is not valid: "),
        ("run.name=@x", "the value of override 'run.name' is not valid: found character '@' that cannot start any"),
        ("run={name: a, name: b}", "the value of override 'run' is not valid: 'name' stands here and on line 1."),
        ("optimizer.lr.x=1", "optimizer.lr.x cannot be set: optimizer.lr is 0.001, not a section. Set optimizer.lr it"),
        ("student.init.path.x.y=1", "student.init.path.x.y cannot be set: student.init.path is 'models/teacher', not"),
        ("distill.temprature=2", "distill.temprature is not a setting. Did you mean 'distill.temperature'?"),
        ("distil.temperature=2", "distil is not a setting. Did you mean 'distill'?"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast'; it must be a number."),
        ("run.name=", "run.name is null; it must be text."),
    ],
)
def test_overrides_that_cannot_be_used(file: Path, override: str, line: str) -> None:
    message = message_of(load_config, file, [override])
    assert message.startswith(line), message


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
        ),
        max_leaves=5,
    ),
    st.sampled_from(
        [
            "run",
            "run.name",
            "student",
            "student.init",
            "student.init.layers",
            "student.architecture",
            "teacher",
            "optimizer.lr",
            "schedule.train_steps",
            "run.dtype",
            "extra",
            "optimizer.extra",
        ]
    ),
)
@settings(max_examples=150)  # fmt: skip
def test_any_value_anywhere_gives_a_config_or_one_line(value: object, path: str) -> None:
    changed = values()
    *parents, name = path.split(".")
    section = changed
    for parent in parents:
        section = section[parent]
    section[name] = value
    try:
        assert isinstance(config_from_dict(changed), Config)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        assert "Traceback" not in str(error) and "Input should" not in str(error)


numbers = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
counts = st.integers(min_value=1, max_value=10**15)
texts = st.text(min_size=1, max_size=12) | st.sampled_from(
    ["1e-3", "null", "yes", "true", "0x1", "0o7", "017", "1:30", "2025-01-01", "-", "~", "<<", "=", " a ", "a\nb",
     "\x85\u2028", "\ufeff", "\U0001f600", "#", ": ", "1_0", ".5", "[", "'", '"', "%", "@", "*x", "!", "  "]
)  # fmt: skip
architectures = st.builds(
    lambda groups, per_group, **rest: {
        "num_attention_heads": groups * per_group, "num_query_groups": groups, "kv_channels": 4, **rest,
    },
    st.integers(1, 4), st.integers(1, 4), num_layers=counts, hidden_size=counts, ffn_hidden_size=counts,
    vocab_size=counts, max_position_embeddings=counts, layernorm_epsilon=numbers, rotary_base=numbers,
    add_qkv_bias=st.booleans(), normalization=st.sampled_from(["RMSNorm", "LayerNorm"]),
    rope_scaling=st.none() | st.just({
        "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
)  # fmt: skip
configurations = st.fixed_dictionaries({
    "run": st.fixed_dictionaries({"output_dir": texts, "name": texts, "seed": st.integers(0, 2**32 - 1)}),
    "student": st.one_of(
        st.fixed_dictionaries({"architecture": architectures}),
        st.fixed_dictionaries({"init": st.fixed_dictionaries({
            "path": texts, "layers": st.none() | st.lists(st.integers(0, 10**6), min_size=1, max_size=60)})}),
    ),
    "teacher": st.none() | st.fixed_dictionaries({"path": texts}),
    "distill": st.fixed_dictionaries({"temperature": st.floats(allow_nan=False, allow_infinity=False)}),
    "data": st.fixed_dictionaries({"train": texts, "sequence_length": counts, "global_batch_size": counts}),
    "optimizer": st.fixed_dictionaries({"lr": numbers, "overlap_grad_reduce": st.booleans()}),
    "schedule": st.fixed_dictionaries({"train_tokens": st.none() | counts, "train_epochs": st.none() | numbers}),
})  # fmt: skip


@given(configurations)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_dumped_loads_back_equal(tmp_path: Path, drawn: dict[str, Any]) -> None:
    first = config_from_dict(drawn)
    text = dump_config(first)
    assert load_config(write(tmp_path, text)) == first
    assert dump_config(load_config(tmp_path / "x.yaml")) == text
    # Other readers of YAML, all of them older, must not see another value than we do.
    assert yaml.safe_load(text) == first.model_dump()


def test_dumped_yaml_is_ascii_with_lists_on_one_line() -> None:
    text = dump_config(config(student={"init": {"path": "été", "layers": [0, 2]}}))
    assert text.isascii()
    assert re.search(r"^    layers: \[0, 2\]$", text, re.MULTILINE)


def test_the_schema_knows_every_key_and_asks_only_for_what_a_file_must_have() -> None:
    schema = config_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert set(schema["properties"]) == set(Config.model_fields)
    assert set(schema["required"]) == {"run", "student", "data", "optimizer", "schedule"}
    architecture = schema["$defs"]["GPTArchitecture"]
    assert set(architecture["required"]) == set(ARCHITECTURE) - {"num_query_groups"}
    assert schema["$defs"]["OptimizerSection"]["additionalProperties"] is False


def test_configurations_are_read_without_torch() -> None:
    code = (
        "import sys, megakd.config.load, megakd.config.checks; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_an_unknown_loss_lists_the_known() -> None:
    with pytest.raises(UserError) as error:
        config_from_dict(values(distill__loss="kl"))
    for name in ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"):
        assert f"'{name}'" in str(error.value)
