"""The report page in a real headless Chromium: it sorts, filters, prints, escapes, and asks the network for nothing."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests import browser
from tests.made import replay_folder
from trajrec.errors import OutputExistsError
from trajrec.replay.folder.png import png
from trajrec.replay.report.render import charts
from trajrec.replay.report.render.html import html, write_html
from trajrec.replay.report.report import Ask, build

CLASSES = ["cat", "dog", "emu"]
HOSTILE = "<script>window.hacked = 1</script>"
HOSTILE_NAME = '"><img src=x onerror="window.hacked = 2">'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 samples, 12 targets, 4 epochs, labels, names, pictures and known wrong labels."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 120, 12)) * 1e-5
    path = replay_folder.write(
        tmp_path_factory.mktemp("page") / "lenet-replay",
        values,
        labels=rng.integers(0, 3, 120).tolist(),
        names=[f"pets/{i:03}.png" for i in range(120)],
        noisy=(rng.random(120) < 0.2).tolist(),
        target_labels=rng.integers(0, 3, 12).tolist(),
        predictions=[0] * 12,
        classes=CLASSES,
    )
    pictures = [("train", i, png(rng.random((8, 8)))) for i in range(120)] + [("test", 5, png(rng.random((3, 8, 8))))]
    pl.DataFrame(pictures, schema=["set", "sample", "png"], orient="row").write_parquet(path / "thumbnails.parquet")
    replay_folder.write(path.parent / "free-replay", values.sum(0) * 1.1, exact=False)
    return path


@pytest.fixture(scope="module")
def full(folder: Path) -> Path:
    ask = Ask(by="class", why=(5,), compare=folder.parent / "free-replay", everything=True, pictures=True)
    return write_html(build(folder, 100, ask), folder.parent / "report.html")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = browser.find()
    assert path, "No Chromium found: run `python tests/browser.py --install`."
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Any]:
    """Open a file; the test fails if the page asked for anything else or complained."""
    opened: list[Any] = []

    def open_(path: Path, **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        page = context.new_page()
        page.requests, page.complaints = [], []
        page.on("request", lambda r: page.requests.append(r.url) if not r.url.startswith("data:") else None)
        page.on("console", lambda m: page.complaints.append(m.text))
        page.on("pageerror", lambda e: page.complaints.append(str(e)))
        page.goto(path.as_uri())
        opened.append((context, page, path))
        return page

    yield open_
    for context, page, path in opened:
        assert page.requests == [path.as_uri()]
        assert page.complaints == []
        context.close()


def column(page: Any, table: str, index: int) -> list[str]:
    return page.eval_on_selector_all(
        f"#{table} tbody tr", f"rows => rows.filter(r => r.offsetParent).map(r => r.cells[{index}].innerText.trim())"
    )


def test_page_has_every_section_and_loads_every_picture(visit: Any, full: Path) -> None:
    page = visit(full)
    names = [link.inner_text() for link in page.query_selector_all("nav a")]
    assert names == [
        "Top samples",
        "By class",
        "Why",
        "Distribution",
        "Classes",
        "Suspects",
        "Timeline",
        "Agreement",
        "How to read",
    ]
    assert all(page.query_selector(link.get_attribute("href")) for link in page.query_selector_all("nav a"))
    widths = page.evaluate("[...document.images].map(i => i.naturalWidth)")
    assert len(widths) > 100
    assert set(widths) == {8}
    assert "positive = helpful: removing the sample would raise the loss" in page.inner_text("header")
    assert "63 of 63 steps were made again" in page.inner_text(".proof.good")


def test_numbers_on_the_page_are_those_of_the_report(visit: Any, folder: Path, full: Path) -> None:
    report = build(folder, 15)
    page = visit(full)
    assert column(page, "overall-1-1", 1) == [str(sample) for sample in report["overall"].helpful["sample"]]
    shown = page.eval_on_selector_all("#overall-1-2 td[data-v].harmful", "cells => cells.map(c => +c.dataset.v)")
    assert shown[:15] == report["overall"].harmful["contribution"].to_list()


def test_a_click_and_a_key_sort_a_table(visit: Any, full: Path) -> None:
    page = visit(full)
    head = page.locator("#overall-1-1 thead th").nth(1)
    head.get_by_role("button").click()
    rising = [int(text) for text in column(page, "overall-1-1", 1)]
    assert head.get_attribute("aria-sort") == "ascending"
    assert rising == sorted(rising)
    assert rising[0] == min(int(s) for s in page.locator("#overall-1-1 tbody td:nth-child(2)").all_text_contents())
    page.keyboard.press("Enter")  # the button kept the focus
    falling = [int(text) for text in column(page, "overall-1-1", 1)]
    assert head.get_attribute("aria-sort") == "descending"
    assert falling == sorted(falling, reverse=True)
    assert len(rising) == len(falling) == 15


def test_sorting_by_contribution_is_by_value_not_by_text(visit: Any, full: Path) -> None:
    page = visit(full)
    page.locator("#overall-1-1 thead th").nth(4).get_by_role("button").click()
    values = page.eval_on_selector_all("#overall-1-1 tbody tr", "rows => rows.map(r => +r.cells[4].dataset.v)")
    assert values == sorted(values)


def test_filter_searches_hidden_rows_too(visit: Any, full: Path) -> None:
    page = visit(full)
    total = page.locator("#overall-1-1 tbody tr").count()
    assert len(column(page, "overall-1-1", 3)) == 15 < total
    page.get_by_label("Filter").first.fill("DOG")
    found = column(page, "overall-1-1", 3)
    assert found
    assert all(text.startswith("dog") for text in found)
    texts = page.locator("#overall-1-1 tbody tr").all_text_contents()
    assert len(found) == sum("dog" in text for text in texts)
    assert page.locator("output[data-count=overall-1-1]").inner_text() == f"{len(found)} found"
    page.get_by_label("Filter").first.fill("")
    page.locator("button.more").first.click()
    assert len(column(page, "overall-1-1", 3)) == total


def test_all_controls_are_reached_by_keyboard(visit: Any, full: Path) -> None:
    page = visit(full)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.tagName + ':' + document.activeElement.innerText.trim().slice(0, 30)")
        )
    assert {"BUTTON:Dark", "A:Suspects", "BUTTON:contribution", "INPUT:"} <= reached
    assert any(name.startswith("BUTTON:Show all") for name in reached)


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_light_and_dark_follow_the_system_and_the_button(visit: Any, full: Path, scheme: str, dark: bool) -> None:
    page = visit(full, color_scheme=scheme)

    def is_dark() -> bool:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) < 300

    assert is_dark() is dark
    page.click("#theme")
    assert is_dark() is not dark


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_of_the_window(visit: Any, full: Path, width: int) -> None:
    page = visit(full, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_top_tables_are_whole_at_1280(visit: Any, full: Path) -> None:
    page = visit(full)
    assert page.eval_on_selector_all("#top .scroll", "all => all.every(e => e.scrollWidth <= e.clientWidth + 1)")


def test_print_opens_everything_and_hides_controls(visit: Any, full: Path) -> None:
    page = visit(full)
    assert page.locator("details:not([open])").count() > 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.locator("details:not([open])").count() == 0
    assert not page.is_visible("nav")
    assert not page.is_visible("#theme")
    assert page.pdf()[:5] == b"%PDF-"


def test_page_is_complete_without_its_script(visit: Any, full: Path) -> None:
    page = visit(full, java_script_enabled=False)
    assert page.locator("#overall-1-1 tbody tr").count() > 15
    assert page.locator("svg").count() == 4


def test_markup_in_data_is_text(visit: Any, tmp_path: Path) -> None:
    path = replay_folder.write(
        tmp_path / "<b>r</b>-replay",
        np.array([[1.0, 2.0], [-1.0, -2.0], [3.0, 1.0]]),
        labels=[HOSTILE, "&lt;", "c"],
        names=[HOSTILE_NAME, "b", "c"],
        target_labels=[HOSTILE, "y"],
        predictions=[HOSTILE_NAME, "y"],
        run=f"runs/{HOSTILE}.h5",
        optimizer=HOSTILE,
        certificate={"verdict": "bit-exact", "sentence": HOSTILE},
    )
    rows = pl.DataFrame({"set": ["train"], "sample": [0], "text": [HOSTILE]})
    rows.write_parquet(path / "thumbnails.parquet")
    report = build(path, 5, Ask(by="target", why=(0,), everything=True, pictures=True))
    page = visit(write_html(report, tmp_path / "x.html"))
    assert page.evaluate("window.hacked") is None
    assert page.locator("script").count() == 1
    assert page.locator("img").count() == 0
    texts = page.inner_text("#overall-1-1")
    assert HOSTILE in texts
    assert HOSTILE_NAME in texts
    assert "&lt;" in page.inner_text("#overall-1-2")


def test_page_without_pictures_is_small_and_names_no_address(folder: Path) -> None:
    ask = Ask(by="class", why=(5,), compare=folder.parent / "free-replay", everything=True)
    text = html(build(folder, 100, ask))
    assert len(text.encode()) < 1_000_000
    assert not re.search(r"https?:|//cdn|@import|url\(", text)


def test_a_sparse_folder_makes_a_page_too(visit: Any, tmp_path: Path) -> None:
    path = replay_folder.write(tmp_path / "r", np.array([[1e-5]]), certificate=None)
    (path / "replay.json").unlink()
    page = visit(write_html(build(path, 5, Ask(everything=True)), tmp_path / "x.html"))
    assert "How much did each of 1 training sample" in page.inner_text("h1")
    assert "Nothing proves" in page.inner_text(".proof.open")
    assert "Not shown: This replay cannot answer the timeline" in page.inner_text("#reading")


def test_page_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.html").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists already"):
        write_html(build(folder), tmp_path / "x.html")


def test_heat_map_and_bars_show_the_numbers(visit: Any, folder: Path, full: Path) -> None:
    report = build(folder, 5, Ask(matrix=True, statistics=True))
    assert report["matrix"] is not None
    assert report["statistics"] is not None
    page = visit(full)
    cells = page.locator("#matrix table").first.locator("td").all_text_contents()
    assert [float(text) for text in cells] == pytest.approx([v for row in report["matrix"].mean for v in row], rel=1e-2)
    bars = page.locator("#spread svg rect")
    assert bars.count() == len(report["statistics"].histogram.counts)
    counts = [int(re.match(r"[\d,]+", t).group().replace(",", "")) for t in bars.all_text_contents()]  # type: ignore[union-attr]
    assert sum(counts) == 120


def test_scale_maps_and_ticks_by_hand() -> None:
    scale = charts.Scale(0, 10, 100, 200)
    assert [scale(0), scale(5), scale(10)] == [100, 150, 200]
    assert scale.ticks(5) == [(100.0, "0"), (120.0, "2"), (140.0, "4"), (160.0, "6"), (180.0, "8"), (200.0, "10")]
    assert [text for _, text in charts.Scale(-3e-6, 3.1e-6, 0, 1).ticks(3)] == ["-2.5e-6", "0", "2.5e-6"]
    assert charts.Scale(2, 2, 0, 1).ticks() == [(0.0, "2")]


@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (3, 5, 7), (5, 7, 3)])
def test_png_holds_the_pixels(shape: tuple[int, ...]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    data = png(picture)
    channels = 3 if 3 in shape else 1
    start = data.index(b"IDAT") + 4
    lines = np.frombuffer(zlib.decompress(data[start:]), np.uint8).reshape(5, 1 + 7 * channels)
    expected = picture if shape[-1] == 3 or picture.ndim == 2 else np.moveaxis(picture, 0, 2)
    assert (lines[:, 0] == 0).all()
    assert (lines[:, 1:].ravel() == expected.ravel()).all()


def test_png_stretches_normalised_and_thins_large_pictures() -> None:
    start = (data := png(np.array([[-2.0, 2.0]]))).index(b"IDAT") + 4
    assert zlib.decompress(data[start:]) == b"\x00\x00\xff"
    width, height = np.frombuffer(png(np.zeros((3, 200, 130)))[16:24], ">u4")
    assert (width, height) == (33, 50)
    with pytest.raises(ValueError, match=r"not \[2, 2, 2\]"):
        png(np.zeros((2, 2, 2)))
