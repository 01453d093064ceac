"""Which failure is told: rules of first_failure on made-up records."""

from __future__ import annotations

import signal
from pathlib import Path

from megakd.common.stop_request import Interruption
from megakd.launch.failures import (
    AGENT_RECORD,
    RankError,
    RankExit,
    clear_rank_records,
    clear_records,
    first_failure,
    load_interruption,
    load_rank_errors,
    load_rank_exits,
    save_end,
    save_rank_error,
    save_rank_exits,
    unfinished_ranks,
)


def rank_error(rank: int, time: float, user_error: bool = False) -> RankError:
    return RankError(rank, time, f"message {rank}", user_error, "traceback")


def test_the_earliest_exception_is_first(tmp_path: Path) -> None:
    for error in (rank_error(0, 12.5), rank_error(10, 11.0), rank_error(2, 13.0)):
        save_rank_error([tmp_path], error)
    assert [error.rank for error in load_rank_errors([tmp_path])] == [10, 0, 2]
    assert first_failure(load_rank_errors([tmp_path]), []) == rank_error(10, 11.0)


def test_a_record_that_its_rank_removes_meanwhile_is_passed_over(tmp_path: Path) -> None:
    """A link to nothing is listed, and is not there when it is read."""
    save_rank_error([tmp_path], rank_error(0, 12.5))
    (tmp_path / "rank-1.error").symlink_to(tmp_path / "gone")
    (tmp_path / "rank-1.interrupted").symlink_to(tmp_path / "gone")
    assert [error.rank for error in load_rank_errors([tmp_path])] == [0]
    assert load_interruption([tmp_path]) is None


def test_a_crash_comes_before_its_peers_exceptions() -> None:
    crash = RankExit(3, 20.0, -signal.SIGSEGV)
    assert first_failure([rank_error(0, 10.0)], [RankExit(0, 20.0, 1), crash]) is crash


def test_an_abort_by_a_watchdog_does_not_hide_the_exception() -> None:
    error = rank_error(0, 10.0)
    assert first_failure([error], [RankExit(3, 20.0, -signal.SIGABRT), RankExit(0, 20.0, 1)]) is error


def test_an_abort_alone_is_told() -> None:
    abort = RankExit(3, 20.0, -signal.SIGABRT)
    assert first_failure([], [RankExit(0, 20.0, -signal.SIGTERM), abort]) is abort


def test_bad_input_is_never_a_consequence() -> None:
    bad = rank_error(1, 11.0, user_error=True)
    assert first_failure([rank_error(0, 10.0), bad], [RankExit(2, 9.0, -signal.SIGKILL)]) is bad


def test_ranks_that_torchrun_killed_in_the_end_do_not_count(tmp_path: Path) -> None:
    failed, killed = RankExit(1, 100.0, 1), RankExit(0, 130.0, -signal.SIGKILL)
    save_rank_exits([tmp_path], AGENT_RECORD, [killed, failed])
    assert load_rank_exits([tmp_path]) == [failed]


def test_nothing_failed(tmp_path: Path) -> None:
    save_rank_error([tmp_path], rank_error(0, 1.0))
    save_rank_exits([tmp_path], AGENT_RECORD, [RankExit(0, 1.0, 1)])
    clear_records(tmp_path)
    assert first_failure(load_rank_errors([tmp_path]), load_rank_exits([tmp_path])) is None


def test_a_record_that_finds_no_room_goes_to_the_next_folder(tmp_path: Path) -> None:
    """A folder that is not there is as good as one on a full disk."""
    save_rank_error([tmp_path / "none", tmp_path], rank_error(0, 1.0))
    assert load_rank_errors([tmp_path / "none", tmp_path]) == [rank_error(0, 1.0)]
    save_rank_error([tmp_path / "none"], rank_error(0, 1.0))  # and where there is none, nothing is raised


SAVED = Interruption("SIGUSR1", "after a checkpoint; the same command goes on from it")


def test_only_a_rank_that_says_so_has_finished(tmp_path: Path) -> None:
    save_end([tmp_path], 2, None)
    save_end([tmp_path], 3, SAVED)
    assert unfinished_ranks([tmp_path / "none", tmp_path], range(1, 5)) == [1, 4]
    assert load_interruption([tmp_path]) == SAVED


def test_an_interruption_that_nobody_can_be_told_of_is_not_taken_for_the_end(tmp_path: Path) -> None:
    """A folder of the record's name stands for a disk that is full; the empty record of the end still finds room."""
    (tmp_path / "rank-0.interrupted").mkdir()
    save_end([tmp_path], 0, SAVED)
    assert unfinished_ranks([tmp_path], [0]) == [0]


def test_a_rank_that_starts_again_has_not_finished(tmp_path: Path) -> None:
    save_end([tmp_path], 0, SAVED)
    save_end([tmp_path], 1, None)
    save_rank_error([tmp_path], rank_error(0, 1.0))
    clear_rank_records([tmp_path / "none", tmp_path], 0)
    assert unfinished_ranks([tmp_path], [0, 1]) == [0]
    assert load_interruption([tmp_path]) is None and load_rank_errors([tmp_path]) == []
    save_rank_error([tmp_path], rank_error(1, 1.0, user_error=True))
    clear_rank_records([tmp_path], 1)
    assert load_rank_errors([tmp_path]) == [rank_error(1, 1.0, user_error=True)]
    assert unfinished_ranks([tmp_path], [1]) == [1]


def test_records_of_ranks_that_finished_are_removed_for_the_next_job(tmp_path: Path) -> None:
    save_end([tmp_path], 0, None)
    clear_records(tmp_path)
    assert unfinished_ranks([tmp_path], [0]) == [0]
