import pickle
import struct
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

import parchgrad as pg
from parchgrad.core.selectors import LayerSignal
from parchgrad.errors import StatisticsError
from parchgrad.legacy.pickles import import_pickles, read_tensor_list

pytestmark = pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.10"), reason="Older releases of torch, which may execute code, are refused."
)
MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3)).eval()


@pytest.fixture
def folder(tmp_path):
    """What the research code writes for `MODEL`, three classes."""
    inner = tmp_path / "tiny" / "pickles"
    inner.mkdir(parents=True)
    lists = {
        "cls_p_values": [torch.rand(4, 3) * 0.9 + 0.05, torch.rand(6, 3) * 0.9 + 0.05],
        "shapiro_p_values": [torch.zeros(4), torch.zeros(6)],
        "gap_mean": [torch.rand(4), torch.rand(6)],
        "gap_std": [torch.rand(4), torch.rand(6)],
    }
    lists["cls_p_values"][0][0] = torch.tensor([0.0, torch.nan, 1.0])
    # The smallest number that float32 knows.
    lists["cls_p_values"][0][1] = torch.tensor([1.5e-45, 0.5, 0.5])
    for name, tensors in lists.items():
        (inner / f"{name}.pkl").write_bytes(pickle.dumps(tensors, pickle.HIGHEST_PROTOCOL))
    return tmp_path / "tiny", lists


def test_the_numbers_of_the_research_code(folder, tmp_path):
    root, lists = folder
    statistics = import_pickles(root, MODEL, name="tiny")
    assert list(statistics) == ["0", "2"]
    torch.testing.assert_close(statistics["2"].class_log_p(), lists["cls_p_values"][1].double().log())
    torch.testing.assert_close(statistics["2"].std, lists["gap_std"][1].double())
    torch.testing.assert_close(statistics["0"].mean, lists["gap_mean"][0].double())
    # Zero has underflowed below the smallest float32, what is not defined counts as one.
    assert statistics["0"].log_p[0, 0] < statistics["0"].log_p[1, 0] < -100
    assert statistics["0"].log_p[0, 1:].tolist() == [0, 0]
    statistics.save(tmp_path / "tiny.safetensors")
    loaded = pg.ChannelStatistics.load(tmp_path / "tiny.safetensors", MODEL)
    assert torch.equal(loaded["2"].log_p, statistics["2"].log_p)
    assert loaded.metadata["data"] == "pickles in tiny"
    masks = pg.ClassWise(loaded, quantile=0.5, softness=0).class_weights("2")
    assert torch.equal(masks, (lists["cls_p_values"][1].argsort(dim=0).argsort(dim=0) < 3).T)


FOR_CLASSES = ("cls_p_values", "shapiro_p_values")
FOR_IMAGES = ("shapiro_p_values", "gap_mean", "gap_std")


def keep_files(root, names):
    for path in (root / "pickles").iterdir():
        if path.stem not in names:
            path.unlink()


def saved_and_loaded(statistics, tmp_path):
    statistics.save(tmp_path / "few.safetensors")
    return pg.ChannelStatistics.load(tmp_path / "few.safetensors", MODEL)


def test_two_files_select_by_class_as_all_four_do(folder, tmp_path):
    root, _ = folder
    every = import_pickles(root, MODEL, name="tiny")
    keep_files(root, FOR_CLASSES)
    few = import_pickles(root, MODEL, name="tiny")
    assert (few["2"].mean, few["2"].std) == (None, None)
    signal = LayerSignal(layer="2", gradient=torch.ones(3, 6, 1), classes=torch.arange(3))
    for held in (few, saved_and_loaded(few, tmp_path)):
        held.require("class")
        masks = pg.ClassWise(held, quantile=0.5).select(signal)
        assert masks.any()
        assert torch.equal(masks, pg.ClassWise(every, quantile=0.5).select(signal))
        words = r"lack the mean and standard deviation .* without 'gap_mean\.pkl' and 'gap_std\.pkl'"
        with pytest.raises(StatisticsError, match=words):
            held.require("instance")


def test_three_files_select_by_image_as_all_four_do(folder, tmp_path):
    root, _ = folder
    every = import_pickles(root, MODEL, name="tiny")
    keep_files(root, FOR_IMAGES)
    few = import_pickles(root, MODEL, name="tiny")
    assert (few.classes, few["2"].log_p) == (0, None)
    observed = {"gradient": torch.ones(3, 6, 1), "observation": torch.rand(3, 6), "classes": torch.arange(3)}
    signal = LayerSignal(layer="2", **observed)
    for held in (few, saved_and_loaded(few, tmp_path)):
        held.require("instance")
        masks = pg.InstanceWise(held, quantile=0.5).select(signal)
        assert masks.any()
        assert torch.equal(masks, pg.InstanceWise(every, quantile=0.5).select(signal))
        for use in (
            lambda held: held.require("class"),
            lambda held: held["2"].class_log_p(),
            lambda held: held.restrict(classes=[0]),
            lambda held: held.compact(),
            lambda held: pg.ClassWise(held, quantile=0.5).select(signal),
        ):
            with pytest.raises(StatisticsError, match=r"lack p-values per class: .* without 'cls_p_values\.pkl'"):
                use(held)


def test_a_set_of_files_must_be_complete(folder):
    root, _ = folder
    keep_files(root, {*FOR_CLASSES, "gap_mean"})
    with pytest.raises(StatisticsError, match=r"without 'gap_std\.pkl'"):
        import_pickles(root, MODEL, name="tiny").require("instance")
    keep_files(root, ("shapiro_p_values", "gap_mean"))
    with pytest.raises(StatisticsError, match=r"pickles' lacks 'cls_p_values\.pkl', 'gap_std\.pkl'\. "):
        import_pickles(root, MODEL, name="tiny")
    with pytest.raises(
        StatisticsError, match=r"missing' lacks 'cls_p_values\.pkl', 'shapiro_p_values\.pkl', 'gap_mean"
    ):
        import_pickles(root / "missing", MODEL, name="tiny")


# The research code wrote the highest protocol, 4 or 5; up to 2 bytes are made by a call of a codec.
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_every_protocol_with_bytes(tmp_path, protocol):
    tensors = [torch.rand(3, 2), torch.rand(5).double(), torch.rand(4, 2).T, torch.rand(0, 3)]
    (tmp_path / "list.pkl").write_bytes(pickle.dumps(tensors, protocol))
    assert all(map(torch.equal, read_tensor_list(tmp_path / "list.pkl"), tensors))


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class WithState:
    def __init__(self):
        self.value = 1


def in_a_storage(tmp_path, value, *, archive=False):
    """A list of tensors whose storage, a file of its own within the pickle, holds a value."""
    inner = tmp_path / "inner.pt"
    torch.save(value, inner, _use_new_zipfile_serialization=archive)
    return [Calls(torch.storage._load_from_bytes, inner.read_bytes())]


def opcodes(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


def write(tmp_path, content):
    path = tmp_path / "evil.pkl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_not_executed(tmp_path, protocol):
    marker = tmp_path / "ran"
    call = Calls(exec, f"import pathlib; pathlib.Path({str(marker)!r}).touch()")
    content = pickle.dumps([torch.zeros(2), call], protocol)
    with pytest.raises(StatisticsError, match="more than a list of tensors"):
        read_tensor_list(write(tmp_path, content))
    assert not marker.exists()
    # The pickle does what it says where it is trusted: the test would see it.
    pickle.loads(content)
    assert marker.exists()


def test_nor_is_one_hidden_in_a_storage(tmp_path):
    call = Calls(exec, f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    with pytest.raises(StatisticsError, match="is not a pickled list of tensors"):
        read_tensor_list(write(tmp_path, pickle.dumps(in_a_storage(tmp_path, call))))
    assert not (tmp_path / "ran").exists()


def test_a_storage_is_as_large_as_it_looks(tmp_path):
    archive = in_a_storage(tmp_path, torch.zeros(1_000), archive=True)
    with pytest.raises(StatisticsError, match="more than a list of tensors: an archive instead of a storage"):
        read_tensor_list(write(tmp_path, pickle.dumps(archive)))


# The hash of a deep tuple recurses in C, and would end the interpreter.
def test_what_is_nested_deeply_is_not_hashed(tmp_path):
    for depth, words in ((80_000, "takes no arguments|takes 0 positional arguments"), (150_000, "100,000 steps")):
        deep = b"ccollections\nOrderedDict\n])" + b"\x85" * depth + b"N\x86a\x85R"
        with pytest.raises(StatisticsError, match=words):
            read_tensor_list(write(tmp_path, opcodes(deep)))
    deep = Calls(torch.storage._load_from_bytes, opcodes(b"})" + b"\x85" * 80_000 + b"Ns"))
    with pytest.raises(StatisticsError, match="a storage whose magic number takes more than 1,000 steps"):
        read_tensor_list(write(tmp_path, pickle.dumps([deep])))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps([WithState()], 2), "the global copyreg|the opcode|the global"),
        (pickle.dumps({"a": 1}, 2), "the opcode EMPTY_DICT"),
        (opcodes(b"U\x02id", b"cposix\nsystem\n"), "the opcode SHORT_BINSTRING"),
        (opcodes(b"cposix\nsystem\n", b"X\x02\x00\x00\x00id", b"\x85R"), "the global posix.system"),
        (opcodes(b"(cposix\nsystem\n", b"X\x02\x00\x00\x00id", b"o"), "the opcode OBJ|the global posix.system"),
        (opcodes(b"(X\x02\x00\x00\x00idiposix\nsystem\n"), "the opcode INST"),
        (opcodes(b"X\x05\x00\x00\x00posix", b"X\x06\x00\x00\x00system", b"\x93"), "the global posix.system"),
        (opcodes(b"Pname\n"), "the opcode PERSID"),
        (opcodes(b"\x82\x01"), "the opcode EXT1"),
        (pickle.dumps(torch.nn.Linear(1, 1)), "more than a list of tensors"),
    ],
    # A pickle holds addresses, and the name of a test must be the same in every process.
    ids=["state", "dict", "short-string", "call", "object", "instance", "global", "reference", "extension", "module"],
)
def test_any_other_opcode_or_global_is_refused(tmp_path, content, words):
    with pytest.raises(StatisticsError, match=words):
        read_tensor_list(write(tmp_path, content))


def test_lists_of_other_things_and_damaged_files(tmp_path):
    for value in ([1, 2], (torch.zeros(1),), torch.zeros(2)):
        with pytest.raises(StatisticsError, match=r"does not contain a list of tensors|more than"):
            read_tensor_list(write(tmp_path, pickle.dumps(value)))
    good = pickle.dumps([torch.rand(30)])
    for content in (b"", b"\x00", good[:-40], good[:200], struct.pack("<Q", 1) * 9):
        with pytest.raises(StatisticsError, match=r"evil\.pkl"):
            read_tensor_list(write(tmp_path, content))
    with pytest.raises(StatisticsError, match=r"missing\.pkl' \(No such file"):
        read_tensor_list(tmp_path / "missing.pkl")


def test_pickles_of_another_model_are_named(folder):
    root, _ = folder
    with pytest.raises(StatisticsError, match="has 2 layers, but other has 1 convolutions"):
        import_pickles(root, nn.Sequential(nn.Conv2d(3, 4, 3)), name="other")
    with pytest.raises(StatisticsError, match=r"shape \(6,\) for layer '1', which has 5 channels in other"):
        import_pickles(root, nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)), name="other")
    path = root / "pickles" / "gap_std.pkl"
    path.write_bytes(pickle.dumps([torch.zeros(4), -torch.ones(6)]))
    with pytest.raises(StatisticsError, match=r"Layer '2' in the pickles does not fit: .std. has values outside"):
        import_pickles(root / "pickles", MODEL, name="tiny")
    (root / "pickles" / "cls_p_values.pkl").write_bytes(pickle.dumps([torch.ones(4, 3) * 2, torch.ones(6, 3)]))
    with pytest.raises(StatisticsError, match=r"outside \[0, 1\] for layer '0'"):
        import_pickles(root, MODEL, name="tiny")


def rebuilt(size, stride, offset=0):
    """A list of one tensor as its pickle calls for it, whether or not its storage is large enough."""
    loaded = Calls(torch.storage._load_from_bytes, torch.rand(6)._typed_storage().__reduce__()[1][0])
    return [Calls(torch._utils._rebuild_tensor_v2, loaded, offset, size, stride, False, OrderedDict())]


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((280_000,), (1,), 0), ((6,), (1,), 1), ((4, 10**12), (0, 0), 0), ((2,), (-1,), 1), ((2, 2), (1,), 0)],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, size, stride, offset):
    content = pickle.dumps(rebuilt(size, stride, offset))
    with pytest.raises(StatisticsError, match=r"a tensor beyond its storage|a tensor of invalid size or stride"):
        read_tensor_list(write(tmp_path, content))
    assert read_tensor_list(write(tmp_path, pickle.dumps(rebuilt((3, 2), (2, 1)))))[0].shape == (3, 2)


def test_huge_memos_and_what_stands_behind_the_end_are_refused(tmp_path):
    good = pickle.dumps([torch.rand(2)])
    with pytest.raises(StatisticsError, match="3 bytes after its end"):
        read_tensor_list(write(tmp_path, good + b"abc"))
    with pytest.raises(StatisticsError, match="a memo of 134217728 entries"):
        read_tensor_list(write(tmp_path, b"\x80\x02]r\x00\x00\x00\x08."))


def test_a_torch_that_executes_pickles_is_refused(folder, monkeypatch):
    root, _ = folder
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1"))
    with pytest.raises(StatisticsError, match=r"torch 2\.9\.1"):
        import_pickles(root, MODEL, name="tiny")
