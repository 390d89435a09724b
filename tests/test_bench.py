"""The benchmark measures every figure that the documentation quotes."""

import json
import sys
import time

import pytest

from vla.bench import bench
from vla.bench_alignment import best, run_together
from vla.config import BenchConfig
from vla.types import UserError


@pytest.mark.slow
def test_bench_writes_every_figure(tmp_path, data_root):
    small = {"seconds": 0.05, "expert_seeds": 2, "episodes": 3, "alignment_steps": 1, "alignment_rows": (8, 16)}
    config = BenchConfig(output=str(tmp_path / "bench"), data=str(data_root), **small)
    written = json.loads(bench(config).read_text())
    assert written["triplets_per_s"] > written["lerobot_samples_per_s"] > 0
    alignment = written["alignment"]
    assert all(alignment[name]["rows_per_s"] > 0 for name in ("step", "open_clip", "open_clip, trimmed"))
    assert all(alignment[name]["peak_mib"] > 100 for name in ("plain", "cached", "large"))
    exchanged = {count: one["exchanged_mib"] for count, one in alignment["processes"].items()}
    assert exchanged["1"] == 0 < exchanged["2"]
    assert set(exchanged) == {"1", "2", "4"}
    assert 0 < written["policy_latency_ms"]["p50"] <= written["policy_latency_ms"]["p95"]
    assert written["tabletop"]["steps_per_s"] > 0
    assert all(run["episodes_per_minute"] > 0 for run in written["evaluation"]["runs"].values())
    assert written["evaluation"]["agree"] == [3, 3, 3]
    assert {task: row["successes"] for task, row in written["expert"]["plain"].items()} == dict.fromkeys(
        ("reach", "push", "pick", "place", "next_to", "separate"), 2
    )


def test_an_output_that_cannot_be_a_folder_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/bench: cannot be written into"):
        bench(BenchConfig(output=str(tmp_path / "file" / "bench")))


def test_of_equal_measurements_the_fastest_counts_with_the_most_memory():
    turns = [{"seconds": s, "rows_per_s": 1 / s, "peak_mib": mib} for s, mib in ((3.0, 1.0), (2.0, 5.0), (4.0, 7.0))]
    assert best(turns) == {"seconds": 2.0, "rows_per_s": 0.5, "peak_mib": 7.0}


def test_when_one_process_fails_the_others_are_not_waited_for():
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    started = time.monotonic()
    with pytest.raises(RuntimeError, match="failed with status 1: no memory left"):
        run_together([python("import time; time.sleep(60)"), python("raise SystemExit('no memory left')")])
    assert time.monotonic() - started < 30
    assert run_together([python("print(1)"), python("print(2)")]) == ["1\n", "2\n"]


def test_a_process_that_a_signal_ends_is_named():
    with pytest.raises(RuntimeError, match="failed with status -9"):
        run_together([[sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]])


def test_a_peer_that_is_not_installed_is_named_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("vla.bench.find_spec", lambda package: None)
    with pytest.raises(UserError, match="open_clip beside us, which is not installed"):
        bench(BenchConfig(output=str(tmp_path / "bench")))
    assert not (tmp_path / "bench").exists()
