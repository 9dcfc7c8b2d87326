"""A report as one self-contained HTML page: no network, no second file, light and dark, for keyboard and print.

The template `page.html.j2`, its style sheet and its script lie beside this file and are put into the page. Jinja
escapes everything that comes from data; a content security policy in the page forbids every request, so even a label
that got through could load nothing. Long tables show their first rows and hold the rest for filtering.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trajrec.replay.report.render import charts, words
from trajrec.replay.report.render.tables import save
from trajrec.replay.report.report import Report
from trajrec.replay.report.sections.pictures import Picture
from trajrec.replay.report.sections.top import Top

PAGE = Path(__file__).parent
GROUP_ROWS = 10
GROUPS = 60
TEXT_SHOWN = 280


@dataclass(frozen=True, slots=True)
class Cell:
    """An entry of the heat map: its text, and its strength from -100 to 100 per cent of the largest."""

    text: str
    strength: int


def write_html(report: Report, path: str | Path, force: bool = False) -> Path:
    """Write a report as one HTML file.

    Args:
        report: the report; pictures are embedded if it has them.
        path: the file to write.
        force: overwrite an existing file.

    Raises:
        OutputExistsError: the file exists and `force` is False.
    """
    return save(path, lambda file: file.write_text(html(report), encoding="utf-8"), force)


def html(report: Report) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    jinja.filters.update(number=words.number, percent=words.percent, ratio=words.ratio)
    return jinja.get_template("page.html.j2").render(model(report))


def model(report: Report) -> dict[str, Any]:
    """Everything the template names, in words and geometry."""
    return {
        "report": report,
        "words": words,
        "title": _title(report),
        "facts": _facts(report),
        "distrust": words.distrust(report.settings),
        "tiles": _tiles(report),
        "groups": [_shorter(top) for top in report.groups[:GROUPS]],
        "groups_left": max(0, len(report.groups) - GROUPS),
        "pictures": {(picture.set, picture.sample): shown(picture) for picture in report.pictures},
        "charts": _charts(report),
        "maps": _maps(report),
        "css": (PAGE / "page.css").read_text(encoding="utf-8"),
        "js": (PAGE / "page.js").read_text(encoding="utf-8"),
    }


def shown(picture: Picture) -> dict[str, str | None]:
    """A picture as a data URI, or a text cut to a few lines."""
    uri = f"data:image/png;base64,{base64.b64encode(picture.png).decode('ascii')}" if picture.png else None
    text = picture.text
    if text and len(text) > TEXT_SHOWN:
        text = text[:TEXT_SHOWN] + "\N{HORIZONTAL ELLIPSIS}"
    return {"uri": uri, "text": text}


def _title(report: Report) -> str:
    return Path(report.settings.run).name if report.settings.run else report.folder.name


def _facts(report: Report) -> list[tuple[str, str]]:
    settings = report.settings
    facts = [
        ("Run", " ".join(filter(None, [settings.run, f"({settings.run_id})" if settings.run_id else None]))),
        ("Training", words.training(settings)),
        ("Method", words.method(settings)),
        ("A number is", words.unit(settings)),
        ("Sign", words.SIGN),
        ("Share", words.SHARE),
        ("Sensitivity", words.sensitivity(settings)),
        ("Check", settings.taylor or ""),
        *((name.replace("_", " ").capitalize(), value) for name, value in settings.details),
        ("Command", settings.command or ""),
        ("Replayed", " ".join(filter(None, [settings.created, settings.version and f"by trajrec {settings.version}"]))),
    ]
    return [(name, value) for name, value in facts if value]


def _tiles(report: Report) -> list[tuple[str, str]]:
    tiles = [(f"{report.samples:,}", "training samples"), (f"{report.targets:,}", _noun(report))]
    if report.statistics:
        spread = report.statistics.samples
        tiles.append((_whole(spread.positive / spread.count), "of the training samples help"))
        part, _, share = report.statistics.concentration[0]
        tiles.append((_whole(share), f"of all influence lies in the {words.part(part)}"))
    if report.suspicions and (found := report.suspicions.rankings[0].detection) and found.wrong:
        tiles.append((_whole(found.found_20), "of known wrong labels are in the most harmful 20 %"))
    if report.comparison:
        tiles.append((words.ratio(report.comparison.agreement.spearman), "Spearman with the other replay"))
    return tiles


def _noun(report: Report) -> str:
    plural = "" if report.targets == 1 else "s"
    nouns = {"mean": "target: the mean loss", "class": f"class{'es' if plural else ''}"}
    return nouns.get(report.settings.targets, f"{report.settings.target_set} sample{plural}")


def _whole(share: float) -> str:
    return "undefined" if share != share else f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def _shorter(top: Top) -> Top:
    return replace(top, helpful=top.helpful[:GROUP_ROWS], harmful=top.harmful[:GROUP_ROWS])


def _charts(report: Report) -> dict[str, charts.Chart]:
    found = {}
    if report.statistics:
        found["histogram"] = charts.histogram(report.statistics.histogram)
    if report.timeline:
        found["phases"] = charts.phases(report.timeline)
        if report.timeline.tracks:
            found["tracks"] = charts.tracks(report.timeline)
    if report.comparison:
        found["scatter"] = charts.scatter(report.comparison)
    return found


def _maps(report: Report) -> list[tuple[str, str, list[list[Cell]]]]:
    if report.matrix is None:
        return []
    mean, ratios = report.matrix.mean, report.matrix.normalised
    maps = [("mean", "Mean contribution", _cells(mean))]
    if any(value is not None for row in ratios for value in row):
        maps.append(("normalised", "Normalised by \N{SQUARE ROOT}(row sum x column sum)", _cells(ratios)))
    return maps


def _cells(rows: tuple[tuple[float | None, ...], ...]) -> list[list[Cell]]:
    largest = max((abs(value) for row in rows for value in row if value is not None), default=0.0) or 1.0
    return [
        [Cell("" if v is None else charts.short(v), 0 if v is None else round(100 * v / largest)) for v in row]
        for row in rows
    ]
