"""The quickstart: standard-library text, a distilled student, one trained without the teacher, a table of both."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megakd
from megakd.common.errors import UserError
from megakd.common.logging import log
from megakd.config.load import load_config
from megakd.config.schema import Config
from megakd.data.preprocess import write_documents
from megakd.data.tokenizer import load_tokenizer
from megakd.launch.launcher import run_action
from megakd.report.writing import write_report
from megakd.training.preflight import preflight

_MIN_HELD_OUT_TOKENS = 50_000


def run_quickstart(output_dir: Path, steps: int | None) -> int:
    """Run the whole quickstart below `output_dir`; returns the exit status.

    Raises:
        UserError: the repository's files or the interpreter's standard library are not there.
    """
    folder = Path(megakd.__file__).resolve().parents[1] / "configs" / "quickstart"
    if not (folder / "distill.yaml").exists():
        raise UserError(f"{folder / 'distill.yaml'} is missing; the quickstart needs a clone of the repository.")
    teacher = str(folder / "teacher")
    prepare_text(folder, teacher, output_dir / "data")
    common = [
        f"teacher.path={json.dumps(teacher)}",
        f"student.init.path={json.dumps(teacher)}",
        f"data.train={json.dumps(str(output_dir / 'data' / 'train'))}",
        f"data.valid={json.dumps(str(output_dir / 'data' / 'held_out'))}",
        "checkpoint.resume=false",
    ]
    if steps is not None:
        common += [f"schedule.train_steps={steps}", f"schedule.lr_warmup_steps={min(10, steps - 1)}"]
    runs = {
        "distilled": ("distil the student from its teacher", ["run.name=distilled"]),
        "cross_entropy": (
            "the same student, the same steps, on cross-entropy alone",
            ["run.name=cross-entropy", "distill.kd_weight=0", "distill.ce_weight=1", "evaluation.at_start=false"],
        ),
    }
    scores = {}
    for name, (title, overrides) in runs.items():
        log.info(f"\n== {title}")
        settings = [*common, *overrides, f"run.output_dir={json.dumps(str(output_dir / name))}"]
        config = load_config(folder / "distill.yaml", settings)
        status = _train(config)
        if status:
            return status
        scores[name] = _evaluations(output_dir / name)
    _print_table(scores["distilled"], scores["cross_entropy"])
    _continue_text(output_dir / "distilled" / "student", "def ")
    page, _ = write_report([output_dir / name for name in runs], output_dir / "report.html")
    log.info(f"\nBoth runs' curves, and where their time went: {page}")
    return 0


def _train(config: Config) -> int:
    parallel = config.parallel
    world_size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    preflight(config, world_size)
    return run_action("train", config, world_size)


def standard_library_documents(root: Path, held_out: set[str], want_held_out: bool) -> Iterator[str]:
    """Python files below `root` in sorted order: those named in `held_out`, or all the others."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("site-packages/", "dist-packages/")) or (name in held_out) != want_held_out:
            continue
        try:
            yield path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # the library's own tests hold files that are meant not to decode


def prepare_text(folder: Path, teacher: str, output: Path) -> None:
    """Write the standard library's text as `output`/train and `output`/held_out.

    Raises:
        UserError: there is too little of it.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    held_out = set((folder / "held_out_files.txt").read_text().split())
    tokenizer = load_tokenizer(teacher)
    log.info(f"== text: the Python standard library in {root}")
    for name, want_held_out in (("train", False), ("held_out", True)):
        documents = standard_library_documents(root, held_out, want_held_out)
        summary = write_documents(documents, output / name, tokenizer, prepend_bos=True, overwrite=True)
        log.info(f"{name}: {summary.documents:,} files, {summary.tokens:,} tokens")
        if want_held_out and summary.tokens < _MIN_HELD_OUT_TOKENS:
            raise UserError(
                f"only {summary.tokens:,} held-out tokens: {root} has {summary.documents} of the {len(held_out)} files "
                f"named in {folder / 'held_out_files.txt'}; at least {_MIN_HELD_OUT_TOKENS:,} are needed for figures "
                "that mean something. Use a Python that comes with its whole standard library ($PYTHON)."
            )


def _evaluations(folder: Path) -> dict[int, dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records}


def _print_table(distilled: dict[int, dict[str, Any]], cross_entropy: dict[int, dict[str, Any]]) -> None:
    before, after, alone = distilled[0], distilled[max(distilled)], cross_entropy[max(cross_entropy)]
    rows = [
        ("teacher", after["teacher_cross_entropy"], 0.0, 1.0),
        ("student before", before["cross_entropy"], before["kl_to_teacher"], before["agreement"]),
        ("student distilled", after["cross_entropy"], after["kl_to_teacher"], after["agreement"]),
        ("student, cross-entropy only", alone["cross_entropy"], alone["kl_to_teacher"], alone["agreement"]),
    ]
    log.info(f"\nHeld-out text, {after['num_tokens']:,} tokens, after {max(distilled)} steps:\n")
    log.info(f"{'':<29}{'cross-entropy':>14}{'KL to teacher':>15}{'top-1 agreement':>17}")
    for name, ce, kl, agreement in rows:
        log.info(f"{name:<29}{ce:>14.3f}{kl:>15.3f}{agreement:>17.3f}")
    gain = 1 - after["kl_to_teacher"] / alone["kl_to_teacher"]
    log.info(
        f"\nDistillation left {after['kl_to_teacher'] / before['kl_to_teacher']:.2f} of the divergence there was, "
        f"{100 * gain:.0f} % less than cross-entropy on the same text did."
    )


def _continue_text(folder: Path, prompt: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    # The vocabulary joins a space to the word after it: left at the end, it would be a token of its own, never seen.
    inputs = tokenizer(tokenizer.bos_token + prompt.rstrip(), return_tensors="pt", add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    log.info(f"\nThe student, loaded by transformers from {folder}, continues {prompt!r}:\n\n{text}")
