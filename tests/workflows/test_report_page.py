import base64
import csv
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from parchgrad.errors import InputError, OutputError
from parchgrad.evaluation.examples import EXAMPLES_FILE, Examples, choose_examples
from parchgrad.evaluation.report import markdown_table, summarise
from parchgrad.evaluation.rows import read_rows
from parchgrad.evaluation.settings import Setting
from parchgrad.visual.charts import Curve, curve_chart
from parchgrad.visual.maps import paint
from parchgrad.workflows.report_page import make_report

SETTINGS = [
    Setting(),
    Setting(method="grad_cam"),
    *(
        Setting(selector="energy", quantile=quantile, layers=layers)
        for quantile in (0.1, 0.3)
        for layers in (0.5, "all")
    ),
]


def write_run(folder, *, model="<b>net</b>", images=12, settings=SETTINGS):
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    lines = []
    for place, setting in enumerate(settings):
        for index in range(images):
            value = 0.1 * place + 0.01 * ((7 * index + place) % 5)
            lines.append(
                {
                    "model": model,
                    "setting": setting.title,
                    **vars(setting),
                    "gamma": "inf",
                    "index": index,
                    "image": f"<i>image {index}</i>",
                    "label": index % 2,
                    "target": index % 3,
                    "predicted": index % 3,
                    "seconds": 1.0 + place,
                    "aopc": value,
                    **{f"aopc_{order}@{ratio}": value * ratio for order in ("morf", "lerf") for ratio in (0.1, 0.5)},
                    "mass_inside": None if index % 2 else value,
                }
            )
    (folder / "rows-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_examples(folder, shape=(40, 30)):
    """Examples of a run, of noise, and what they are of."""
    generator = np.random.default_rng(0)
    choice = choose_examples(read_rows(folder))
    pictures = tuple(generator.integers(0, 256, (*shape, 3), np.uint8) for _ in choice.examples)
    maps = tuple(generator.integers(0, 256, (len(choice.settings), *shape), np.uint8) for _ in choice.examples)
    found = Examples(choice=choice, categories={0: "cat", 1: "dog", 2: "owl"}, pictures=pictures, maps=maps)
    found.save(folder / EXAMPLES_FILE)
    return found


class Page(HTMLParser):
    """Rows of the tables, titles of the charts, sentences of the verdict, and every address that the page names."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.titles, self.addresses, self.open = [], [], [], []
        self.verdict, self.marked = [], []
        self.examples, self.captions = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "srcset", "href")]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "h4" and "figure" in self.open:
            self.titles.append("")
        if tag == "li":
            self.verdict.append("")
        if tag == "span" and {("class", "better"), ("class", "worse")} & set(attributes) and "td" in self.open:
            self.marked.append(self.tables[-1][-1][0])
        if ("class", "example") in attributes:
            self.examples.append("")
        if tag == "figcaption":
            self.captions.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if {"h4", "figure"} <= set(self.open):
            self.titles[-1] += data
        if "li" in self.open:
            self.verdict[-1] += f"{data.strip()} "
        if self.examples and "p" in self.open:
            self.examples[-1] += f"{data} "
        if "figcaption" in self.open:
            self.captions[-1] += f"{data.strip()} "


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A report and its page, with charts."""
    folder = tmp_path_factory.mktemp("drawn")
    report = make_report([write_run(folder / "run")])
    return report, report.save(folder / "out").read_text()


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    """Leave out the pictures of charts, which take most of the time, in all reports but that of `drawn`."""
    monkeypatch.setattr("parchgrad.workflows.report_page._picture", lambda figure: "data:image/png;base64,")


def test_the_page_needs_nothing_else_and_says_what_the_table_says(drawn):
    report, text = drawn
    page = Page(text)
    assert page.open == []
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,iVBOR") for address in page.addresses)
    assert "http" not in re.sub(r"data:[^\"]*", "", text)
    summary, names = report.summaries[0], report.labels[0].names
    for table, ranked in zip(page.tables, (False, True), strict=True):
        assert table[0] == ["setting", "AOPC ↑", "mass inside ↑", "time"]
        for place, (cells, setting) in enumerate(zip(table[1:], summary.settings, strict=True)):
            assert cells[0] == names[setting]
            for cell, name in zip(cells[1:], summary.scores, strict=False):
                assert cell.startswith(f"{summary.cells[setting, name].mean.value:.3f}")
                assert (f"rank {summary.cells[setting, name].rank:.1f}" in cell) == ranked
            assert cells[2].endswith("6 of 12 images")
            assert cells[-1] == f"{1 + place:.2f}"
    assert "<b>net</b>" not in text, "names are escaped"
    assert page.titles == [
        "AOPC ↑, against the plain gradient",
        "mass inside ↑, against the plain gradient",
        "Drop in probability",
        "AOPC ↑ by quantile",
        "AOPC ↑ by layers",
        "mass inside ↑ by quantile",
        "mass inside ↑ by layers",
        "Cost against quality",
    ]


def test_softness_and_gates_are_swept_with_all_else_kept(tmp_path, monkeypatch):
    drawn = {}

    def chart(curves, *, x_label, **options):
        drawn[x_label] = [(curve.label, list(curve.x)) for curve in curves]
        return curve_chart(curves, x_label=x_label, **options)

    monkeypatch.setattr("parchgrad.workflows.report_page.curve_chart", chart)
    settings = [
        Setting(),
        *(Setting(gates=gates) for gates in (2, 4)),
        Setting(method="grad_cam"),
        *(Setting(selector="energy", softness=softness) for softness in (0, 0.5, 1)),
        *(Setting(selector="energy", gates=gates) for gates in (2, 0)),
        *(Setting(selector="random", gates=gates) for gates in (2, 0)),
    ]
    folder = write_run(tmp_path / "run", settings=settings)
    page = Page(make_report([folder], scores=["aopc"]).save(tmp_path / "out").read_text())
    assert page.titles[2:4] == ["AOPC ↑ by softness", "AOPC ↑ by gates"]
    assert drawn["width of the ramp, as a share of the threshold"] == [
        # The hard cut has other gates, and is on no line with these.
        ("Gradient energy, gates 1, smooth strides, balance", [0.5, 1.0])
    ]
    assert drawn["width of the gates, in standard deviations"] == [
        ("plain gradient", [0.0, 2.0, 4.0]),
        ("Gradient energy, softness 0.5, smooth strides, balance", [0.0, 1.0, 2.0]),
        ("Random channels", [0.0, 2.0]),
    ]


def test_charts_of_many_settings_show_the_best_and_tables_all(tmp_path, monkeypatch):
    drawn = {}

    def chart(kind):
        def draw(found, **labels):
            drawn.setdefault(kind, []).append(found)
            return curve_chart([Curve(label="", x=[0, 1], y=[0, 1])], x_label="", y_label="")

        return draw

    for kind in ("curve_chart", "interval_chart", "scatter_chart"):
        monkeypatch.setattr(f"parchgrad.workflows.report_page.{kind}", chart(kind))
    quantiles = [round(0.01 * number, 2) for number in range(1, 31)]
    settings = [Setting()]
    for selector, layers in (("energy", 0.5), ("energy", "all"), ("random", "all")):
        settings += [Setting(selector=selector, quantile=quantile, layers=layers) for quantile in quantiles]
    report = make_report([write_run(tmp_path / "run", settings=settings)])
    page = report.save(tmp_path / "report").read_text()
    # The score grows from setting to setting, and controls come last.
    edits = [setting.title for setting in reversed(settings) if setting.selector == "energy"]
    best = [report.labels[0].names[title] for title in edits]
    assert [found.label for found in drawn["interval_chart"][0]] == best[:19]
    assert list(drawn["scatter_chart"][0]) == ["plain gradient", *best[:19]]
    curves, by_quantile, by_layers = drawn["curve_chart"][0], *drawn["curve_chart"][2:6:2]
    assert [curve.label for curve in curves if not curve.dashed] == ["plain gradient", *best[:6]]
    assert len(by_quantile) == 3
    assert [curve.label for curve in by_layers] == [f"Gradient energy, quantile {0.3 - 0.01 * n:g}" for n in range(7)]
    assert "the 19 other settings with the best AOPC" in page
    assert all(page.count(f">{name}<") >= 1 for name in best)


def test_rows_of_an_earlier_release_are_reported(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "rows-0.jsonl").read_text().splitlines()]
    for row in rows:
        for name in ("softness", "gates", "antialias", "balance"):
            del row[name]
    (folder / "rows-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    titles = Page(make_report([folder]).save(tmp_path / "out").read_text()).titles
    assert "AOPC ↑ by layers" in titles


def test_maps_of_random_weights_are_drawn_by_the_share_of_the_modules(tmp_path, monkeypatch):
    drawn = []

    def chart(curves, **options):
        drawn.append([(curve.label, list(curve.x), [round(y, 9) for y in curve.y]) for curve in curves])
        return curve_chart(curves, **options)

    monkeypatch.setattr("parchgrad.workflows.report_page.curve_chart", chart)
    rows = [
        {
            "model": "net",
            "setting": setting,
            "index": index,
            "seconds": 1.0,
            "randomisation_spearman": level + index / 10,
            "randomisation_spearman@0.5": level + index / 5,
            "randomisation_spearman@1": level,
        }
        for setting, level in (("gradient", 0.4), ("bad", 0.7), ("good", 0.1))
        for index in range(3)
    ]
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "rows-0.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    page = make_report([tmp_path]).save(tmp_path / "out").read_text()
    assert "Similarity of maps under random weights" in page
    # The plain gradient, then the others from the best on: less alike is better.
    curves = [("gradient", [0.5, 1.0], [0.6, 0.4]), ("good", [0.5, 1.0], [0.3, 0.1]), ("bad", [0.5, 1.0], [0.9, 0.7])]
    assert curves in drawn


def test_stability_is_drawn_by_the_noise_level_with_intervals_against_the_plain_gradient(tmp_path, monkeypatch):
    drawn = []

    def chart(curves, **options):
        drawn.append([(curve.label, list(curve.x), [round(y, 9) for y in curve.y]) for curve in curves])
        return curve_chart(curves, **options)

    monkeypatch.setattr("parchgrad.workflows.report_page.curve_chart", chart)
    rows = [
        {
            "model": "net",
            "setting": setting,
            "index": index,
            "seconds": 1.0,
            "stability_cosine": level - index / 1000,
            "stability_cosine@0.01": level - index / 500,
            "stability_cosine@0.0001": level,
            "stability_norm_ratio": 2 - level,
        }
        for setting, level in (("gradient", 0.7), ("bad", 0.4), ("good", 0.9))
        for index in range(21)
    ]
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "rows-0.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    report = make_report([tmp_path], scores=["stability_cosine", "stability_norm_ratio", "stability_cosine@0.0001"])
    cells = report.summaries[0].cells
    for name in ("stability_cosine", "stability_norm_ratio", "stability_cosine@0.0001"):
        assert (cells["good", name].verdict, cells["bad", name].verdict) == ("better", "worse")
    page = Page(report.save(tmp_path / "out").read_text())
    assert page.titles[:2] == ["stability, cosine ↑, against the plain gradient", "Stability of maps under noise"]
    # The noise levels by name; the plain gradient, then the others from the best on.
    names = ["0.0001", "0.01"]
    curves = [("gradient", names, [0.7, 0.68]), ("good", names, [0.9, 0.88]), ("bad", names, [0.4, 0.38])]
    assert curves in drawn


def test_controls_stand_at_the_bottom_and_never_win(tmp_path):
    edit = Setting(selector="energy")
    settings = [Setting(), Setting(method="random_map"), replace(edit, selector="random"), edit]
    folder = write_run(tmp_path / "run", images=24, settings=settings)
    report = make_report([folder])
    cells = report.summaries[0].cells
    for setting in settings[1:]:
        assert cells[setting.title, "aopc"].verdict == "better"
    page = Page(report.save(tmp_path / "out").read_text())
    names = ["plain gradient", "Gradient energy", "Controls", "random map", "random channels, as Gradient energy"]
    assert [line[0] for line in page.tables[0][1:]] == names
    assert page.marked == ["Gradient energy"] * 2
    assert page.verdict[0].startswith("Gradient energy is more faithful (AOPC) than the plain gradient.")
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert {line.split("|")[1].strip() for line in markdown.splitlines() if line.startswith("|") and "**" in line} == {
        "Gradient energy"
    }
    assert "| random map (control) |" in markdown


def test_many_scores_are_on_demand(tmp_path):
    folder = write_run(tmp_path / "run", images=4)
    rows = [json.loads(line) for line in (folder / "rows-0.jsonl").read_text().splitlines()]
    (folder / "rows-0.jsonl").write_text(
        "".join(json.dumps({**row, "gini": 0.5, "accuracy_morf": 1.0}) + "\n" for row in rows)
    )
    text = make_report([folder]).save(tmp_path / "out").read_text()
    page = Page(text)
    assert [len(table[0]) for table in page.tables] == [4, 6]
    assert text.index("<details>") < text.index("accuracy, MoRF")


def test_a_run_that_is_not_finished_says_so(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "run.json").write_text('{"images": 40}')
    page = make_report([folder]).save(tmp_path / "out")
    for path in (page, page.with_suffix(".md")):
        assert "12 of 40 images (unfinished run)" in path.read_text()
    (folder / "run.json").write_text('{"images": 12}')
    text = make_report([folder]).save(tmp_path / "out", force=True).read_text()
    assert "12 images, " in text
    assert "unfinished" not in text
    (folder / "run.json").write_text("[")
    with pytest.raises(InputError, match="Cannot read the run"):
        make_report([folder])


def test_several_runs_stand_in_one_report(tmp_path):
    folders = [write_run(tmp_path / name, model=name) for name in ("first", "second")]
    report = make_report(folders)
    page = report.save(tmp_path / "out")
    markdown = (tmp_path / "out" / "report.md").read_text()
    for name in ("first", "second"):
        assert f"## {name}, 12 images" in markdown
        assert f"<h2>{name}</h2>" in page.read_text()
        assert f"{name}, 12 images\n\n- **" in markdown, "the verdict opens each part"
    assert markdown_table(report.summaries[1], report.labels[1].names) in markdown
    with (tmp_path / "out" / "report.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["model"] for line in lines] == ["first"] * 12 + ["second"] * 12
    cell = summarise(report.rows[0]).cells[SETTINGS[2].title, "aopc"]
    chosen = [line for line in lines if (line["setting"], line["score"]) == (SETTINGS[2].title, "aopc")]
    assert [float(line["low"]) for line in chosen] == [cell.comparison.low] * 2
    assert not math.isnan(cell.comparison.low)


def test_what_cannot_be_reported_is_said(tmp_path):
    with pytest.raises(InputError, match="`folders` is empty"):
        make_report([])
    with pytest.raises(InputError, match=re.escape(repr(str(tmp_path)))):
        make_report([tmp_path])
    report = make_report([write_run(tmp_path / "run")])
    report.save(tmp_path / "out")
    with pytest.raises(OutputError, match="already exists"):
        report.save(tmp_path / "out")
    report.save(tmp_path / "out", force=True)


def test_the_page_shows_where_the_leading_setting_helps_and_where_it_fails(tmp_path):
    folder = write_run(tmp_path / "run")
    without = make_report([folder]).save(tmp_path / "without").read_text()
    assert "Where it helps most" not in without
    held = write_examples(folder)
    text = make_report([folder]).save(tmp_path / "out").read_text()
    page = Page(text)
    assert page.open == []
    assert page.titles == Page(without).titles
    assert "<i>" not in text, "names are escaped"
    assert "AOPC of Gradient energy, quantile 0.3, all layers over the plain gradient" in text
    # 0.1 for each of the five settings before it; the rest repeats after five.
    assert [round(example.gain, 9) for example in held.choice.examples] == [0.5] * 6
    assert len(page.examples) == 6
    for words, example in zip(page.examples, held.choice.examples, strict=True):
        assert f"image {example.index}" in words
        assert f"Class: {('cat', 'dog', 'owl')[example.target]}." in words
        assert (f"Its label is {('cat', 'dog')[example.label]}." in words) == (example.label != example.target)
        plain, edited, _ = example.values
        assert f"{edited:.3f} instead of {plain:.3f} with the plain gradient, 0.500 better." in words
    captions = [caption.strip() for caption in page.captions]
    assert len(captions) == 24
    names = ("plain gradient", "Gradient energy, quantile 0.3, all layers", "Grad-CAM")
    shown = [f"{name} {value:.3f}" for name, value in zip(names, held.choice.best[0].values, strict=True)]
    assert captions[:4] == ["image", *shown]
    sources = [address for address in page.addresses if address.startswith("data:image/jpeg;base64,")]
    assert len(sources) == 24
    picture, heat = held.pictures[0] / 255, held.maps[0][0]
    for source, expected in ((sources[0], picture), (sources[1], paint(picture, heat / 255))):
        drawn = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert drawn.size == (120, 160), "pixels are drawn four times as large"
        # The means of the pixels survive the compression, that of colours less.
        seen = np.asarray(drawn.convert("L").resize((30, 40), Image.Resampling.BOX), dtype=float)
        grey = np.asarray(Image.fromarray((expected * 255).round().astype(np.uint8)).convert("L"), dtype=float)
        assert abs(seen - grey).mean() < 6


def test_what_is_better_low_and_what_is_worse_is_said_in_words(tmp_path):
    folder = write_run(tmp_path / "run", images=4)
    rows = [json.loads(line) for line in (folder / "rows-0.jsonl").read_text().splitlines()]
    for row in rows:
        # Low is good: the plain gradient is best at the first image, and no worse at the second.
        others = 0.2 if row["index"] == 0 else 0.1 if row["index"] == 1 else 0.05
        row["deletion"] = 0.1 if row["setting"] == "gradient" else others
        del row["aopc"], row["mass_inside"]
    (folder / "rows-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = write_examples(folder)
    assert [example.index for example in held.choice.examples] == [2, 3, 0, 1]
    words = Page(make_report([folder]).save(tmp_path / "out").read_text()).examples
    assert "deletion: 0.050 instead of 0.100 with the plain gradient, 0.050 better." in words[0]
    assert "deletion: 0.200 instead of 0.100 with the plain gradient, 0.100 worse." in words[2]
    assert "deletion: 0.100 instead of 0.100 with the plain gradient, no difference." in words[3]


def test_the_examples_keep_the_page_small(tmp_path):
    folder = write_run(tmp_path / "run")
    without = len(make_report([folder]).save(tmp_path / "without").read_text())
    # Nothing is larger than noise.
    write_examples(folder, shape=(300, 299))
    assert len(make_report([folder]).save(tmp_path / "out").read_text()) - without < 1_000_000


def test_examples_of_an_earlier_state_are_left_out_and_damaged_ones_said(tmp_path):
    folder = write_run(tmp_path / "run")
    write_examples(folder)
    rows = [json.loads(line) for line in (folder / "rows-0.jsonl").read_text().splitlines()]
    later = [{**row, "setting": "later", "aopc": 9.0} for row in rows if row["setting"] == SETTINGS[-1].title]
    (folder / "rows-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in later))
    assert make_report([folder]).examples == (None,)
    (folder / "rows-1.jsonl").unlink()
    assert make_report([folder]).examples != (None,)
    (folder / EXAMPLES_FILE).write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"Cannot read the examples"):
        make_report([folder])
