"""Jobs: their order, what is passed over, and what is run again."""

import pytest

from vla.comparison.jobs import Job, refuse_failed, run_jobs
from vla.types import UserError


def test_a_job_waits_for_what_it_needs(tmp_path):
    order = []

    def make(name: str):
        def run() -> None:
            order.append(name)
            (tmp_path / name).write_text("")

        return run

    jobs = [
        Job("second", tmp_path / "second", make("second"), ("first",)),
        Job("first", tmp_path / "first", make("first")),
    ]
    run_jobs(jobs, tmp_path / "jobs", lambda text: None, {})
    assert order == ["first", "second"]


def test_what_does_not_need_a_failed_job_is_run_all_the_same(tmp_path):
    def fail() -> None:
        raise UserError("loss is not finite")

    jobs = [
        Job("of the failed", tmp_path / "b", (tmp_path / "b").touch, ("failed",)),
        Job("failed", tmp_path / "a", fail),
        Job("other", tmp_path / "c", (tmp_path / "c").touch),
    ]
    failed = run_jobs(jobs, tmp_path / "jobs", lambda text: None, {})
    assert failed == {"failed": "loss is not finite"}
    assert [(tmp_path / name).exists() for name in "abc"] == [False, False, True]
    with pytest.raises(UserError, match=r"failed failed, everything that does not need it is done: loss is not finite"):
        refuse_failed(failed, tmp_path)


def test_a_job_that_fails_here_and_is_made_by_another_process_did_not_fail(tmp_path):
    def fail() -> None:
        raise UserError("no space left")

    jobs = [
        Job("failed", tmp_path / "a", fail),
        Job("of the failed", tmp_path / "b", (tmp_path / "b").touch, ("failed",)),
        Job("meanwhile", tmp_path / "c", lambda: [(tmp_path / name).touch() for name in "ac"]),
    ]
    assert run_jobs(jobs, tmp_path / "jobs", lambda text: None, {}) == {}
    assert (tmp_path / "b").exists()


def test_a_line_is_in_a_jobs_log_as_soon_as_it_is_printed(tmp_path):
    def run() -> None:
        print("begun")
        (tmp_path / "seen").write_text((tmp_path / "jobs" / "first" / "log.txt").read_text())

    run_jobs([Job("first", tmp_path / "seen", run)], tmp_path / "jobs", lambda text: None, {})
    assert (tmp_path / "seen").read_text() == "begun\n"


def test_a_folder_that_cannot_be_written_into_is_said_and_not_waited_for(tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "first").write_text("not a folder")
    job = Job("first", tmp_path / "first", lambda: None)
    said = []
    failed = run_jobs([job], tmp_path / "jobs", said.append, {})
    assert "cannot be written into" in failed["first"]
    assert "first failed" in said[-1]


def test_what_only_finished_results_needed_may_be_deleted(tmp_path):
    ran = []

    def make(name: str):
        return lambda: (ran.append(name), (tmp_path / name).touch())

    jobs = [
        Job("weights", tmp_path / "weights", make("weights")),
        Job("first result", tmp_path / "first", make("first"), ("weights",)),
        Job("second result", tmp_path / "second", make("second"), ("weights",)),
    ]
    (tmp_path / "first").touch()
    (tmp_path / "second").touch()
    run_jobs(jobs, tmp_path / "jobs", lambda text: None, {})
    assert ran == []
    (tmp_path / "second").unlink()
    run_jobs(jobs, tmp_path / "jobs", lambda text: None, {})
    assert ran == ["weights", "second"]


def test_a_job_is_run_again_if_something_beside_its_result_is_gone(tmp_path):
    ran = []

    def make() -> None:
        ran.append("made")
        (tmp_path / "record").touch()
        (tmp_path / "beside").touch()

    job = Job("data", tmp_path / "record", make, beside=(tmp_path / "beside",))
    (tmp_path / "record").touch()
    run_jobs([job], tmp_path / "jobs", lambda text: None, {})
    run_jobs([job], tmp_path / "jobs", lambda text: None, {})
    assert ran == ["made"]
