"""Tokenizers for chats, small enough to say by hand what their tokens are."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEMPLATES = Path(__file__).with_name("chat_templates")
SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]",
    "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<|user|>", "<|assistant|>",
)  # fmt: skip


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def byte_level(
    folder: Path,
    merges: tuple[tuple[str, str], ...] = (),
    *,
    strip: bool = False,
    special: tuple[str, ...] = SPECIAL,
) -> Path:
    """A token per byte, and one per merge; offsets are trimmed as GPT-2 and Llama 3 do; `strip`: as Phi-3's tokens."""
    pieces = [*bytes_to_unicode().values(), *(a + b for a, b in merges)]
    rust = RustTokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=list(merges)))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.post_processor = processors.ByteLevel(trim_offsets=True)
    rust.decoder = decoders.ByteLevel()
    return _save(rust, folder, strip, special)


def metaspace(folder: Path, words: tuple[str, ...], *, as_normalizer: bool = False) -> Path:
    """Words and their letters after "\u2581", bytes for other characters; Llama 2 does it with a normalizer."""
    letters = sorted({letter for word in words for letter in word} | {"\u2581"})
    prefixes = [word[:n] for word in words for n in range(2, len(word) + 1)]
    pieces = list(dict.fromkeys(["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *prefixes]))
    merges = list(dict.fromkeys((word[: n - 1], word[n - 1]) for word in words for n in range(2, len(word) + 1)))
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    rust = RustTokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    if as_normalizer:
        rust.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    rust.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    rust.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", len(pieces))])
    return _save(rust, folder, False)


def _save(rust: RustTokenizer, folder: Path, strip: bool, special: tuple[str, ...] = SPECIAL) -> Path:
    rust.add_special_tokens([AddedToken(text, special=True, rstrip=strip, normalized=False) for text in special])
    PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder
