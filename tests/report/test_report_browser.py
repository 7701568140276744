"""The page in a headless Chromium: nothing complains, nothing planted runs, nothing scrolls sideways, and the controls work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_browser import Browser
from report_hostile import poison

from vaopd.report import write_report


@pytest.mark.parametrize("kind", ["run", "study"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_complains_and_nothing_scrolls_sideways(
    browser: Browser, request: Any, tmp_path: Path, kind: str, width: int
) -> None:
    page = write_report(request.getfixturevalue(f"{kind}_folder"), tmp_path / "page.html")
    browser.open(page, width=width, dark=width == 390)
    assert browser.errors() == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("getComputedStyle(document.querySelector('.swatch.v12')).backgroundColor") not in ("rgba(0, 0, 0, 0)", "")


def test_in_a_browser_planted_scripts_do_not_run(browser: Browser, new_run: Callable[..., Path]) -> None:
    run = new_run()
    poison(run)
    browser.open(write_report(run), width=390)
    assert browser.run("window.planted === undefined")
    assert browser.errors() == []
    assert browser.run("document.querySelectorAll('script, iframe, object, link').length") == 1
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert browser.run("getComputedStyle(document.body).display") == "block"


def test_in_a_browser_the_policy_stops_inline_scripts(browser: Browser, run_folder: Path, tmp_path: Path) -> None:
    page = write_report(run_folder, tmp_path / "page.html")
    page.write_text(
        page.read_text(encoding="utf-8").replace(
            "</body>", "<script>window.planted=1</script><img src=x onerror='window.planted=1'></body>"
        ),
        encoding="utf-8",
    )
    browser.open(page)
    assert browser.run("window.planted === undefined")
    assert any("Content Security Policy" in error for error in browser.errors())


def test_in_a_browser_tokens_can_be_read_sorted_and_filtered(browser: Browser, run_folder: Path, tmp_path: Path) -> None:
    browser.open(write_report(run_folder, tmp_path / "page.html"))
    browser.run("document.querySelectorAll('.heat span')[3].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))")
    tip = browser.run("document.querySelector('#tip').innerText")
    assert all(words in tip for words in ("visual advantage", "teacher, degraded", "student", "× uniform"))
    browser.run("sort.value = 'va'; only.value = 'correct'; only.dispatchEvent(new Event('change'))")
    shown = browser.run(
        "[...document.querySelectorAll('.cell.n1 .lead .rollout:not([hidden])')].map(r => [r.dataset.mark, Number(r.dataset.va)])"
    )
    first_cell = browser.run(
        "[...document.querySelector('.cell.n1').querySelectorAll('.rollout:not([hidden])')].map(r => Number(r.dataset.va))"
    )
    assert {mark for mark, _ in shown} == {"correct"}
    assert first_cell == sorted(first_cell, reverse=True)
    assert "of 18 rollouts" in browser.run("document.querySelector('#count').textContent")


def test_in_a_browser_without_scripts_the_page_still_reads(browser: Browser, run_folder: Path, tmp_path: Path) -> None:
    browser.open(write_report(run_folder, tmp_path / "page.html"), scripts=False)
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.run("document.querySelector('.scripted').hidden")
    assert browser.run("document.querySelectorAll('.heat span')[3].title").startswith("VA ")
    assert browser.run("document.querySelector('.heat').offsetHeight") > 10
