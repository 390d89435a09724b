"""The documentation's tables come from result files alone."""

import json
import shutil

import pytest

from vla import cli
from vla.config import ResultsConfig
from vla.eval.report import Report, write_report
from vla.eval.results import results
from vla.types import UserError

RATE = {"success_rate": 0.5, "interval": [0.4, 0.6], "n": 10}


def evaluation(folder, name: str) -> None:
    record = RATE | {
        "tasks": {"reach": RATE},
        "splits": {"train": RATE},
        "grounding": {"swap": {"follows_new": RATE}, "blank": RATE},
        "episodes": [{"seed": 1}],
        "command": "python evaluate.py",
        "config": {"seed": 1, "policy": str(folder / "policy" / name / "policy")},
        "policy": {"encoder": str(folder / "align" / name / "clip"), "steps": 10},
        "versions": {"processor": "a processor", "cores": 2, "torch": "2", "lerobot": "0.6"},
    }
    path = folder / "eval" / name / "eval.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    (path.parent / "pipeline.json").write_text(json.dumps({"seconds": {"align": 120.0}}))


def test_a_run_becomes_a_table_with_its_minutes_and_data_wait(tmp_path):
    evaluation(tmp_path / "outputs", "mine")
    log = tmp_path / "outputs" / "align" / "mine" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 20, "data_wait": 0.02}\n{"step": 40, "data_wait": 0.04}\n')
    page = results(ResultsConfig(runs=str(tmp_path / "outputs"), docs=str(tmp_path / "docs" / "results"))).read_text()
    assert "| align | 2.0 | 3.0 % |" in page
    assert "episodes" not in json.loads((tmp_path / "docs" / "results" / "mine.json").read_text())


def test_the_page_is_the_same_without_the_runs(tmp_path):
    evaluation(tmp_path / "outputs", "mine")
    docs = str(tmp_path / "docs" / "results")
    first = results(ResultsConfig(runs=str(tmp_path / "outputs"), docs=docs)).read_text()
    assert results(ResultsConfig(runs=str(tmp_path / "nothing"), docs=docs)).read_text() == first


def test_towers_become_a_table(tmp_path):
    evaluation(tmp_path / "outputs", "mine")
    folder = tmp_path / "outputs" / "align" / "tower_wide"
    folder.mkdir(parents=True)
    names = ("target_probe_r2", "state_probe_r2", "context_to_action_r1", "image_to_text_r1")
    record = {"steps": 900, "seconds": 1200, "metrics": dict.fromkeys(names, 0.25)}
    (folder / "alignment.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text("tower: {patch_size: 12, width: 192, layers: 6}\n")
    page = results(ResultsConfig(runs=str(tmp_path / "outputs"), docs=str(tmp_path / "docs" / "results"))).read_text()
    assert "| 12 / 192 / 6 | 900 | 20 | 0.250 | 0.250 | 0.250 | 0.250 |" in page


def test_no_result_at_all_is_an_error(tmp_path):
    with pytest.raises(UserError, match="make tabletop"):
        cli.results([f"--runs={tmp_path}", f"--docs={tmp_path / 'results'}"])


def test_comparisons_alone_make_their_page(tmp_path):
    runs = tmp_path / "runs" / "compare" / "mine"
    runs.mkdir(parents=True)
    shutil.copy("docs/results/compare/metaworld_five.json", runs / "comparison.json")
    cli.results([f"--runs={tmp_path / 'runs'}", f"--docs={tmp_path / 'docs' / 'results'}"])
    assert (tmp_path / "docs" / "comparison_results.md").is_file()
    assert not (tmp_path / "docs" / "results.md").exists()


def test_a_report_shows_markup_as_text(tmp_path):
    text = '<script>document.title = "broken"</script>'
    write_report(tmp_path / "report.html", Report("title", (text,), (), f"python {text}", {text: text}))
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") == 4
