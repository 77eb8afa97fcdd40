"""Every command that writes: what is there stays as it is, unless it is told otherwise."""

import importlib
import pickle
import shutil

import numpy as np
import pytest
import torch
import typer
from PIL import Image

import parchgrad as pg
from parchgrad._io.files import check_outputs
from parchgrad.cli import app
from parchgrad.errors import OutputError
from parchgrad.evaluation.settings import Setting
from parchgrad.workflows.demonstration import Demonstration
from tests.support import Noise, cli, contents, run

# What each command with --force is given here; the place of its results comes last.
WRITING = {
    "explain": "red.png blue.png --model shapes --signed --out",
    "sweep": "red.png --model shapes --values 0.5,0.2 --out",
    "animate": "red.png --model shapes --values 0.5,0.2 --out",
    "demo": "--out",
    "report": "run --out",
    "stats collect": "--data photographs --labels predicted --model shapes --layers 0.5 -o",
    "stats merge": "one.safetensors two.safetensors -o",
    "stats import-pickles": "pickles --model shapes -o",
}
FILES = {
    "explain": [f"{name}{end}" for name in ("red", "blue") for end in (".png", ".npy", ".json", "-signed.png")],
    "sweep": ["red.png"],
    "animate": ["red.gif"],
    "demo": ["index.html", "overview.jpg"],
    "report": ["report.html", "report.md", "report.csv"],
    **{f"stats {name}": ["a.safetensors"] for name in ("collect", "merge", "import-pickles")},
}
# A lock stays, lest two have it.
LOCKS = {"stats collect": [".a.safetensors.checkpoint.lock"]}
# It adds to its own runs, and to nothing else; see below.
ADDING = {"evaluate"}
READING = {"models", "classes", "selectors", "explore", "stats show"}


def commands(command, name=""):
    """Every command of the app with the names of its options."""
    if hasattr(command, "commands"):
        for inner in command.commands.values():
            yield from commands(inner, f"{name} {inner.name}")
    else:
        yield name.strip(), {option for parameter in command.params for option in parameter.opts}


def test_no_command_is_left_out():
    found = dict(commands(typer.main.get_command(app)))
    assert {name for name, options in found.items() if "--force" in options} == set(WRITING) == set(FILES)
    assert {name for name, options in found.items() if "--out" in options} == set(WRITING) | ADDING
    assert set(found) == set(WRITING) | ADDING | READING


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    (folder / "photographs").mkdir()
    for colour in ("red", "blue"):
        for place in (folder, folder / "photographs"):
            Image.new("RGB", (70, 70), colour).save(place / f"{colour}.png")
    run(folder / "run", data=Noise(3), settings=[Setting(), Setting(selector="energy")])
    model = pg.load_model("shapes").model
    for name in ("one", "two"):
        images = [(torch.rand(3, 64, 64), index % 10) for index in range(20)]
        pg.collect_statistics(model, images, layers=0.5).save(folder / f"{name}.safetensors")
    channels = [convolution.out_channels for convolution in pg.find_convolutions(model).values()]
    (folder / "pickles").mkdir()
    for name in ("cls_p_values", "shapiro_p_values", "gap_mean", "gap_std"):
        tensors = [torch.rand((count, 10) if name.startswith("cls") else count) for count in channels]
        (folder / "pickles" / f"{name}.pkl").write_bytes(pickle.dumps(tensors, pickle.HIGHEST_PROTOCOL))
    return folder


@pytest.fixture
def quick_demonstration(monkeypatch):
    """What the demonstration finds, of a network that takes no time; test_cli.py has the true one."""
    classifier = pg.load_model("shapes")
    photographs = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "green", "white")]
    explained = tuple(pg.explain_images(classifier, photographs))
    found = Demonstration(
        explanations={"ParchGrad": explained},
        mosaic=np.zeros((128, 128, 3)),
        mosaic_maps={name: np.ones((4, 128, 128)) for name in ("gradient", "ParchGrad")},
        shares={name: np.full(4, 0.25) for name in ("gradient", "ParchGrad")},
    )
    monkeypatch.setattr("parchgrad.workflows.demonstration.demonstrate", lambda: found)


@pytest.mark.usefixtures("quick_demonstration")
@pytest.mark.parametrize("command", WRITING)
def test_what_is_there_stays_unless_forced(desk, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(desk)
    before = contents(desk)
    typed, names = [*command.split(), *WRITING[command].split()], FILES[command]
    typed.append(tmp_path / names[0] if command.startswith("stats") else tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    # Any of them is enough.
    for name in names:
        (tmp_path / name).write_text("earlier")
        code, _, said = cli(capsys, *typed)
        assert code == 2
        assert said.startswith(f"Error: {str(tmp_path / name)!r} already exists. ")
        assert "--force" in said
        assert contents(tmp_path) == {name: b"earlier", "notes.txt": b"mine"}
        (tmp_path / name).unlink()
    for name in names:
        (tmp_path / name).write_text("earlier")
    code, _, said = cli(capsys, *typed, "--force")
    assert code == 0, said
    written = contents(tmp_path)
    assert sorted(written) == sorted([*names, *LOCKS.get(command, ()), "notes.txt"]), "and these are all that it writes"
    assert written.pop("notes.txt") == b"mine"
    assert b"earlier" not in written.values()
    assert contents(desk) == before


# The last that each command does before it writes.
BEFORE_WRITING = {
    "explain": ["parchgrad.workflows.photographs.explain_images", "parchgrad.visual.save_figure"],
    "sweep": ["parchgrad.visual.save_figure"],
    "animate": ["parchgrad.visual.animation.save_animation"],
    "demo": ["parchgrad.workflows.demonstration.demonstrate"],
    "report": ["parchgrad.workflows.report_page.make_report"],
    "stats collect": ["parchgrad.workflows.collection.collect_from_folder"],
    "stats merge": ["parchgrad.statistics.accumulate.merge_statistics"],
    "stats import-pickles": ["parchgrad.legacy.pickles.import_pickles"],
}


@pytest.mark.usefixtures("quick_demonstration")
@pytest.mark.parametrize(
    ("command", "function"), [(command, function) for command, names in BEFORE_WRITING.items() for function in names]
)
def test_what_appears_while_a_command_goes_on_stays(desk, tmp_path, monkeypatch, capsys, command, function):
    monkeypatch.chdir(desk)
    place = tmp_path / "out"
    name = "red-signed.png" if "explain" in command and "save_figure" in function else FILES[command][0]
    place.mkdir()
    module, _, attribute = function.rpartition(".")
    act = getattr(importlib.import_module(module), attribute)

    def meanwhile(*given, **options):
        (place / name).write_text("meanwhile")
        return act(*given, **options)

    monkeypatch.setattr(function, meanwhile)
    typed = [*command.split(), *WRITING[command].split(), place / name if command.startswith("stats") else place]
    code, _, said = cli(capsys, *typed)
    assert code == 2
    assert f"Error: {str(place / name)!r} already exists. " in said
    assert (place / name).read_text() == "meanwhile"


@pytest.mark.parametrize(
    ("command", "read"),
    {
        "stats merge": "one.safetensors",
        "stats collect": "photographs/red.png",
        "stats import-pickles": "pickles/gap_std.pkl",
    }.items(),
)
def test_statistics_do_not_overwrite_what_they_are_made_from(desk, tmp_path, monkeypatch, capsys, command, read):
    shutil.copytree(desk, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    code, _, said = cli(capsys, *command.split(), "--force", *WRITING[command].split(), read)
    assert code == 2
    assert "is an input" in said
    assert contents(tmp_path) == before


EVALUATING = "evaluate --model shapes --data shapes --count 2 --scores sparsity --method gradient --selector none --out"


def test_an_evaluation_adds_to_its_own_run_alone(tmp_path, capsys):
    typed = [*EVALUATING.split(), tmp_path]
    assert cli(capsys, *typed)[0] == 0
    before = contents(tmp_path)
    code, *_ = cli(capsys, *typed)
    assert (code, contents(tmp_path)) == (0, before)
    code, _, said = cli(capsys, *typed, "--seed", "7")
    assert code == 2
    assert "Choose another folder" in said
    assert contents(tmp_path) == before
    assert cli(capsys, *typed, "--selector", "energy")[0] == 0
    after = contents(tmp_path)
    assert after["shapes/rows-0.jsonl"].startswith(before["shapes/rows-0.jsonl"])
    assert after["shapes/run.json"] == before["shapes/run.json"]


@pytest.mark.parametrize("name", ["rows-0.jsonl", "rows-3.jsonl", "examples.safetensors"])
def test_a_folder_that_holds_no_run_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine, without an end of the line")
    with pytest.raises(OutputError, match=rf"'{name}', but no 'run\.json'"):
        run(tmp_path, data=Noise(2), settings=[Setting()])
    assert contents(tmp_path) == {name: b"mine, without an end of the line"}


@pytest.mark.parametrize("linked", [True, False])
def test_rows_that_no_evaluation_wrote_are_not_cut(tmp_path, linked):
    run(tmp_path / "run", data=Noise(2), settings=[Setting()])
    rows, mine = tmp_path / "run" / "rows-0.jsonl", tmp_path / "mine.json"
    mine.write_text('{"my": "only copy"}')
    rows.unlink()
    if linked:
        rows.symlink_to(mine)
    else:
        rows.write_bytes(mine.read_bytes())
    with pytest.raises(OutputError, match="it is a link" if linked else "its last line is not a row of a run"):
        run(tmp_path / "run", data=Noise(2), settings=[Setting()])
    assert mine.read_text() == rows.read_text() == '{"my": "only copy"}'


@pytest.mark.parametrize("command", ["explain", "sweep"])
def test_a_photograph_is_not_overwritten_by_its_own_panel(tmp_path, capsys, command):
    photograph = tmp_path / "red.png"
    Image.new("RGB", (70, 70), "red").save(photograph)
    (tmp_path / "link").symlink_to(tmp_path)
    before = contents(tmp_path)
    for folder in (tmp_path, tmp_path / "link"):
        code, _, said = cli(capsys, command, photograph, "--model", "shapes", "--out", folder, "--force")
        assert code == 2
        assert "is an input" in said
        assert contents(tmp_path) == before


def test_two_results_of_one_name_are_refused(tmp_path, capsys):
    for name in ("red.png", "red-signed.png"):
        Image.new("RGB", (70, 70), "red").save(tmp_path / name)
    photographs = [tmp_path / "red.png", tmp_path / "red-signed.png"]
    code, _, said = cli(capsys, "explain", *photographs, "--model", "shapes", "--signed", "--out", tmp_path / "out")
    assert code == 2
    assert "Two results would be written to" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="is an input"):
        check_outputs([tmp_path / "red.png"], force=True, inputs=photographs)
