"""One rank of a job, started by torchrun: runs a worker module's `main(args)` and records how it failed."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from megakd.common.errors import UserError
from megakd.common.stop_request import listen, request_stop
from megakd.launch.failures import RankError, clear_rank_records, save_end, save_rank_error
from megakd.launch.processes import die_with_parent


def main(argv: list[str]) -> int:
    """Run `argv` = (JSON of agent_pid and of folders for what is to be told, worker module, its arguments)."""
    options = json.loads(argv[0])
    die_with_parent(options["agent_pid"])
    # A rank inside a collective would never see Python's KeyboardInterrupt; the launcher speaks for all ranks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The launcher's way to say: save, and end.
    listen([signal.SIGUSR1])
    faulthandler.enable()
    _tell_sigterms_apart(options["agent_pid"])
    rank, folders = int(os.environ["RANK"]), [Path(folder) for folder in options["folders"]]
    clear_rank_records(folders, rank)
    try:
        interrupted = importlib.import_module(argv[1]).main(argv[2:])
        # Python takes its handlers away before the process ends, and the launcher may say it again.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        save_end(folders, rank, interrupted)
    except BaseException as error:  # sys.exit(0) too: the other ranks wait for what this one was about to do
        text = "".join(traceback.format_exception(error))
        record = RankError(rank, time.time(), _describe(error), isinstance(error, UserError), text)
        save_rank_error(folders, record)
        if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < int(os.environ["TORCHELASTIC_MAX_RESTARTS"]):
            # The next attempt overwrites the record.
            print(text, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # Tearing down a process group whose peers are gone can hang; a failing rank must end the job at once.
        os._exit(1)
    return 0


def _tell_sigterms_apart(agent_pid: int) -> None:
    """SIGTERM from torchrun ends this process as ever; from anybody else it is a wish to stop, as SIGUSR1 is."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Blocked in every thread, so that the one below takes it, whatever the others are doing.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def take() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != agent_pid:
            request_stop(signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=take, name="megakd-sigterm", daemon=True).start()


def _describe(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, SystemExit):
        return f"SystemExit: {error.code}, before its work was done"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
