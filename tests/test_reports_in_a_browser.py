"""Every report in a real browser: offline, on a phone, light and dark, with a keyboard, for a screen reader."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

from vla.comparison.report import comparison_report
from vla.comparison.sweep import sweep
from vla.config import EvalConfig, SweepConfig
from vla.config_io import load_config
from vla.eval.evaluate import evaluate
from vla.eval.report import write_report

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PHONE = {"width": 360, "height": 740}
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@contextmanager
def opened(report: Path, **context) -> Iterator[Page]:
    """The report in a browser without network; fails on exit if the page asked for anything or logged an error."""
    executable = next((path for path in map(shutil.which, NAMES) if path), None)
    if executable is None:
        pytest.skip("no Chromium on this machine; `make browser` installs one")
    asked, errors = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=QUIET)
        page = browser.new_context(offline=True, **context).new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(report.resolve().as_uri())
        yield page
        browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert errors == []


def check_report(report: Path) -> None:
    """What every report promises."""
    for scheme in ("light", "dark"):
        with opened(report, viewport=PHONE, color_scheme=scheme) as page:
            overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert overflow <= 0, f"{overflow} px wider than a phone"
            found = Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
            assert reachable(page) >= set(page.locator("[tabindex], video, summary, a[href]").evaluate_all(IDENTITIES))
    with opened(report) as page:
        first = page.locator("main > *").nth(1)
        assert page.locator("main > *").first.evaluate("e => e.tagName") == "H1"
        assert first.get_attribute("aria-label") == "Answers"
        assert first.locator("li").count() > 0


IDENTITIES = "all => all.map(e => [...document.querySelectorAll('*')].indexOf(e))"


def reachable(page: Page) -> set[int]:
    """The elements that the Tab key comes by, as positions in the document."""
    visited: list[int] = []
    for _ in range(500):
        page.keyboard.press("Tab")
        here = page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)")
        body = page.evaluate("document.activeElement === document.body")
        if body or (visited and here == visited[0] and here != visited[-1]):  # a video's own buttons are the video
            break
        visited.append(here)
    return set(visited)


@pytest.fixture(scope="module")
def evaluation(policy_folder, tmp_path_factory) -> Path:
    """A short evaluation with videos."""
    return evaluate(
        EvalConfig(
            policy=str(policy_folder),
            output=str(tmp_path_factory.mktemp("eval") / "run"),
            tasks=("reach",),
            episodes=3,
            splits=("light", "synonym"),
            split_episodes=3,
            grounding_episodes=2,
            workers=1,
            videos=2,
            failures=4,
        )
    )


def test_the_report_of_an_alignment(encoder):
    check_report(encoder.parent / "report.html")


def test_the_report_of_an_evaluation(evaluation):
    check_report(evaluation / "report.html")


def test_the_failure_browser(evaluation):
    check_report(evaluation / "failures.html")


def test_the_report_of_a_comparison(tmp_path):
    result = json.loads((ROOT / "docs" / "results" / "compare" / "tabletop.json").read_text())
    write_report(tmp_path / "report.html", comparison_report(result))
    check_report(tmp_path / "report.html")


@pytest.mark.parametrize(
    ("swept", "ablations"), [({"policy.steps": ("1", "2")}, ()), ({}, ("policy.steps=1",))], ids=["sweep", "ablations"]
)
def test_the_report_of_a_sweep(data_root, tmp_path, swept, ablations):
    config = load_config(SweepConfig, ["--config_path", "configs/sweep/debug.yaml", f"--align.data.root={data_root}"])
    check_report(sweep(replace(config, output=str(tmp_path), ablations=ablations), swept) / "report.html")


def test_videos_play(evaluation):
    with opened(evaluation / "failures.html") as page:
        video = page.locator("video").first
        assert video.evaluate("async v => { v.muted = true; await v.play(); return v.videoWidth }") > 0
