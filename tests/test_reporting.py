import csv
import json
import math
import re
from html.parser import HTMLParser

import pytest

from parchgrad.errors import InputError, OutputError
from parchgrad.evaluation.report import markdown_table, summarise
from parchgrad.evaluation.runs import Setting
from parchgrad.reporting import make_report

SETTINGS = [
    Setting(),
    Setting(method="grad_cam"),
    *(
        Setting(selector="energy", quantile=quantile, layers=layers)
        for quantile in (0.1, 0.3)
        for layers in (0.5, "all")
    ),
]


def write_run(folder, *, model="<b>net</b>", images=12):
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    lines = []
    for place, setting in enumerate(SETTINGS):
        for index in range(images):
            value = 0.1 * place + 0.01 * ((7 * index + place) % 5)
            lines.append(
                {
                    "model": model,
                    "setting": setting.title,
                    **vars(setting),
                    "gamma": "inf",
                    "index": index,
                    "seconds": 1.0 + place,
                    "aopc": value,
                    **{f"aopc_{order}@{ratio}": value * ratio for order in ("morf", "lerf") for ratio in (0.1, 0.5)},
                    "mass_inside": None if index % 2 else value,
                }
            )
    (folder / "rows-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Page(HTMLParser):
    """Cells of the tables, titles of the charts, and every address that the page names."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.titles, self.addresses, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "srcset", "href")]
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "h3":
            self.titles.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data
        if "h3" in self.open:
            self.titles[-1] += data


def test_the_page_needs_nothing_else_and_says_what_the_table_says(tmp_path):
    report = make_report([write_run(tmp_path / "run")])
    text = report.save(tmp_path / "out").read_text()
    page = Page(text)
    assert page.open == []
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "http" not in re.sub(r"data:[^\"]*", "", text)
    summary = report.summaries[0]
    width = 2 + len(summary.scores)
    header, lines = page.cells[:width], page.cells[width:]
    assert header == ["setting", "AOPC, MoRF minus LeRF ↑", "mass inside ↑", "time"]
    for place, setting in enumerate(summary.settings):
        cells = lines[place * width : (place + 1) * width]
        assert cells[0] == setting
        for cell, name in zip(cells[1:], summary.scores, strict=False):
            assert cell.startswith(f"{summary.cells[setting, name].mean.value:.3f}")
        assert cells[2].endswith("6 of 12 images")
        assert cells[-1] == f"{1 + place:.2f}"
    assert "<b>net</b>" not in text, "names are escaped"
    assert page.titles == [
        "AOPC, MoRF minus LeRF ↑, against the plain gradient",
        "mass inside ↑, against the plain gradient",
        "How far the probability falls",
        "AOPC, MoRF minus LeRF ↑ by quantile",
        "AOPC, MoRF minus LeRF ↑ by layers",
        "mass inside ↑ by quantile",
        "mass inside ↑ by layers",
        "Cost against quality",
    ]


def test_several_runs_stand_in_one_report(tmp_path):
    folders = [write_run(tmp_path / name, model=name) for name in ("first", "second")]
    report = make_report(folders)
    page = report.save(tmp_path / "out")
    markdown = (tmp_path / "out" / "report.md").read_text()
    for name in ("first", "second"):
        assert f"## {name}, 12 images" in markdown
        assert f"<h2>{name}</h2>" in page.read_text()
    assert markdown_table(report.summaries[1]) in markdown
    with (tmp_path / "out" / "report.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["model"] for line in lines] == ["first"] * 12 + ["second"] * 12
    cell = summarise(report.rows[0]).cells[SETTINGS[2].title, "aopc"]
    chosen = [line for line in lines if (line["setting"], line["score"]) == (SETTINGS[2].title, "aopc")]
    assert [float(line["low"]) for line in chosen] == [cell.comparison.low] * 2
    assert not math.isnan(cell.comparison.low)


def test_what_cannot_be_reported_is_said(tmp_path):
    with pytest.raises(InputError, match="one run at least"):
        make_report([])
    with pytest.raises(InputError, match="no run"):
        make_report([tmp_path])
    report = make_report([write_run(tmp_path / "run")])
    report.save(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        report.save(tmp_path / "out")
    report.save(tmp_path / "out", force=True)
