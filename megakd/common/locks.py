"""Files by which one writer at a time holds an output, as long as it lives."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from megakd.common.errors import UserError
from megakd.common.logging import log

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)


def try_lock(path: Path, busy: str) -> int | None:
    """Make and lock a file; the lock lives until the descriptor that is returned is closed, by the process or its end.

    None where its last holder removed the file, or the folder it is in, meanwhile: try again. On a file system without
    locks a warning is logged and nothing is held.

    Raises:
        UserError: another process holds it, with the line `busy`.
        OSError: it cannot be made.
    """
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), path.stat()):
            return lock
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno in _NO_LOCKS:
            log.warning(f"{path.parent} knows no file locks: do not write there from two places at once.")
            return lock
        os.close(lock)
        if error.errno in _BUSY:
            raise UserError(busy) from error
        raise
    os.close(lock)
    return None
