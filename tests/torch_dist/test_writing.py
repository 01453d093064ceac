"""What ends the writing of a checkpoint is what its caller hears of."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from megakd.common.piecewise_file import PiecewiseFile
from megakd.torch_dist import Piece, write_checkpoint

PIECES = [Piece("w", (3 * 4096,), (i * 4096,), (4096,), torch.float32, lambda: torch.ones(4096)) for i in range(3)]


@pytest.mark.parametrize("reason", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [0, 10_000, 20_000, 40_000, 50_000])
def test_torchs_zip_writer_hides_no_reason(
    tmp_path: Path, before: int, reason: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = PiecewiseFile.write
    done = 0

    def fail(self: PiecewiseFile, data: bytes) -> int:
        nonlocal done
        if done + len(data) > before:
            raise reason
        done += len(data)
        return write(self, data)

    monkeypatch.setattr(PiecewiseFile, "write", fail)
    with pytest.raises(type(reason)) as raised:
        write_checkpoint(tmp_path, PIECES, {"state": [None]}, {}, lambda count: None)
    assert raised.value is reason
