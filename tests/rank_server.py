"""Imported once by the process that all ranks are forked from: what takes long to import and starts no threads."""

from __future__ import annotations

import gc
import importlib
from contextlib import suppress

from tests.workers import prepare_platform

# Whatever is broken fails again, and is told, in the tests that import it.
with suppress(Exception):
    prepare_platform()
for name in (
    "megatron.core.models.gpt",
    "megakd.losses",
    "megakd.training.loop",
    "megakd.training.caching",
    "transformers.models.llama.modeling_llama",
):
    with suppress(Exception):
        importlib.import_module(name)
# Ranks collect garbage after every call that made groups; what is imported here is none.
gc.freeze()
