"""Errors written for the person who reads them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input, told in one line that names the key or file, the value, the rule and the remedy.

    The command line prints the line without a traceback and exits with status 2.
    """


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Inside, a UserError about what a setting leads to (a file, a model) begins with the setting's key."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The hint " Did you mean 'x'?" for the candidate closest to `name`, or "" where none is close."""
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""
