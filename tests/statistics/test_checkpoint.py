import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from parchgrad.errors import SettingError, StatisticsError
from parchgrad.statistics import checkpoint
from tests.support import DATA, IMAGES, assert_same, collect, small_network


class StoppedError(Exception):
    pass


def stop_after(images):
    def told(stage, done, total):
        if done >= images:
            raise StoppedError

    return told


@pytest.mark.parametrize("labels", ["given", "predicted"])
def test_stopped_anywhere_it_ends_as_if_unbroken(tmp_path, labels):
    whole = collect(tmp_path / "whole", labels=labels)
    for images in (1, 14, 15, 56, 60):
        path = tmp_path / f"{images}.checkpoint"
        with pytest.raises(StoppedError):
            collect(path, labels=labels, on_progress=stop_after(images))
        seen = []
        resumed = collect(path, labels=labels, on_progress=lambda *told, seen=seen: seen.append(told))
        assert_same(resumed, whole, rtol=0)
        assert torch.equal(resumed.sample.keys, whole.sample.keys)
        # Images before the last checkpoint are not passed again.
        first = next(done for stage, done, _ in seen if stage == "images")
        assert first == (60 if images == 60 else max(7, images - images % 14))
    assert_same(collect(labels=labels), whole)


def test_an_interrupt_keeps_every_batch_that_was_added(tmp_path):
    class Interrupted(TensorDataset):
        fingerprint, at = "interrupted", 40

        def __getitem__(self, index):
            if index == self.at:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    data, seen = Interrupted(*DATA.tensors), []
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "run", data=data, checkpoint_every=100)
    data.at = None
    resumed = collect(tmp_path / "run", data=data, checkpoint_every=100, on_progress=lambda *told: seen.append(told))
    assert seen[0] == ("images", 35, 60)
    assert_same(resumed, collect())


def test_a_finished_checkpoint_gives_the_result_at_once(tmp_path):
    whole = collect(tmp_path / "a")
    assert_same(collect(tmp_path / "a", on_progress=lambda stage, *_: None), whole, rtol=0)
    checkpoint.remove_checkpoints(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == [".a.lock"]


def other_weights():
    model = small_network()
    with torch.no_grad():
        model[7].bias[0] += 1e-3
    return model


def other_architecture():
    model = small_network()
    model[5] = torch.nn.AdaptiveMaxPool2d(2).eval()
    return model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": other_weights()}, "since weights was"),
        ({"model": other_architecture()}, "since architecture was"),
        ({"data": TensorDataset(IMAGES[:59], DATA.tensors[1][:59])}, "since data was"),
        ({"data": TensorDataset(IMAGES, (DATA.tensors[1] + 1) % 5)}, "since data was"),
        ({"layers": ["0"]}, "since layers was 'all' and is '0'"),
        ({"labels": "predicted"}, "since labels was 'given' and is 'predicted'"),
        ({"batch_size": 8}, "since batch_size was '7' and is '8'"),
        ({"seed": 3, "batch_size": 9}, "batch_size was '7' and is '9', seed was '0' and is '3'"),
    ],
)
def test_what_has_changed_is_named(tmp_path, change, words):
    path = tmp_path / "run.checkpoint"
    with pytest.raises(StoppedError):
        collect(path, on_progress=stop_after(30))
    with pytest.raises(StatisticsError, match=words):
        collect(path, **change)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(StatisticsError, match="autocast was 'off' and is 'torch"),
    ):
        collect(path)


def test_a_data_set_may_speak_for_itself(tmp_path):
    class Named(TensorDataset):
        fingerprint = "first"

    data = Named(IMAGES, DATA.tensors[1])
    with pytest.raises(StoppedError):
        collect(tmp_path / "a", data=data, on_progress=stop_after(30))
    data.fingerprint = "second"
    with pytest.raises(StatisticsError, match="data was 'first' and is 'second'"):
        collect(tmp_path / "a", data=data)


def test_batches_cannot_be_resumed(tmp_path):
    with pytest.raises(SettingError, match=r"loader\.dataset"):
        collect(tmp_path / "a", data=DataLoader(DATA, 7))


def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "run.checkpoint"
    for content in (b"", b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(StatisticsError, match="Cannot read"):
            collect(path)
    collect().save(path)
    with pytest.raises(StatisticsError, match="not a checkpoint"):
        collect(path)


class Arrays:
    """Items as numpy arrays, which are long enough for their text to be cut."""

    def __init__(self, shift):
        self.images = IMAGES.numpy().copy()
        self.images[:, 1, 4, 4] += shift

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return self.images[index], index % 5


def test_small_changes_in_the_middle_of_the_data_are_seen(tmp_path):
    changed = IMAGES.clone()
    changed[17, 1, 4, 4] += 1e-9
    for first, second in ((DATA, TensorDataset(changed, DATA.tensors[1])), (Arrays(0), Arrays(1e-9))):
        path = tmp_path / f"{type(first).__name__}.checkpoint"
        with pytest.raises(StoppedError):
            collect(path, data=first, on_progress=stop_after(30))
        with pytest.raises(StatisticsError, match="since data was"):
            collect(path, data=second)


class Scaled(TensorDataset):
    """Items that a transform makes out of tensors."""

    def __init__(self, *tensors, scale):
        super().__init__(*tensors)
        self.scale = scale

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image * self.scale, label


def test_another_transform_of_the_same_tensors_is_seen(tmp_path):
    with pytest.raises(StoppedError):
        collect(tmp_path / "run", data=Scaled(*DATA.tensors, scale=1.0), on_progress=stop_after(30))
    with pytest.raises(StatisticsError, match="since data was"):
        collect(tmp_path / "run", data=Scaled(*DATA.tensors, scale=100.0))


class OpenedLate(TensorDataset):
    """Opens its file when the first item is fetched, as data sets over one large file do."""

    opened_in = None

    def __getitem__(self, index):
        self.opened_in = self.opened_in or os.getpid()
        return super().__getitem__(index)


def test_workers_inherit_nothing_that_a_data_set_opened(tmp_path):
    data = OpenedLate(*DATA.tensors)
    collect(tmp_path / "run", data=data, workers=2)
    assert data.opened_in is None


def test_a_run_whose_name_begins_alike_is_another(tmp_path):
    others = [tmp_path / "run-50-1-of-2.checkpoint", tmp_path / "run-50.checkpoint"]
    for file in others:
        file.touch()
    collect(tmp_path / "run.checkpoint")
    checkpoint.remove_checkpoints(tmp_path / "run.checkpoint")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / ".run.checkpoint.lock", *others])


def test_another_number_of_processes_is_refused(tmp_path):
    (tmp_path / "run-1-of-2.checkpoint").touch()
    with pytest.raises(StatisticsError, match="written by 2 processes, but there are now 1"):
        collect(tmp_path / "run.checkpoint")
    with pytest.raises(StatisticsError, match="written by 2 processes, but there are now 3"):
        checkpoint.check_parts(tmp_path / "run.checkpoint", 3)
    checkpoint.check_parts(tmp_path / "run.checkpoint", 2)


def test_a_checkpoint_without_its_parts_is_damaged(tmp_path):
    path = tmp_path / "run.checkpoint"
    collect(path)
    with safe_open(path, "pt") as opened:
        header, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    for change in ({"keys": None}, {"class/mean": torch.zeros(1)}, {"batches": None}):
        parts = {name: value for name, value in {**tensors, **change}.items() if value is not None}
        save_file(parts, path, header)
        with pytest.raises(StatisticsError, match=r"run\.checkpoint' is damaged"):
            collect(path)
    for settings in ("[1]", "3", "{"):
        save_file(tensors, path, {**header, "settings": settings})
        with pytest.raises(StatisticsError, match="Cannot read"):
            collect(path)
