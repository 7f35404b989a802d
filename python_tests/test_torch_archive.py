"""Torch files: state dicts load as torch wrote them; what would allocate more is not unpickled."""

import collections
import io
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from calm_rt import tensor_files

LARGE = 1 << 40  # bytes or elements, which no machine has


class Calls:
    """Pickled as a call of a function with arguments."""

    def __init__(self, function, *arguments, state=None):
        self.made_by = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.made_by


def with_pickle(path: Path, data: bytes) -> None:
    """A torch file whose pickle is replaced."""
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            is_pickle = name.endswith("/data.pkl")
            target.writestr(name, data if is_pickle else source.read(name))


SIZE = b"\x8a\x06" + LARGE.to_bytes(6, "little")  # LONG1
NAMED = b"\x80\x02}X\x01\x00\x00\x00x"  # {"x": what follows
PICKLES = {
    "bytearray": NAMED + b"cbuiltins\nbytearray\n" + SIZE + b"\x85Rs.",
    "old name": NAMED + b"c__builtin__\nbytearray\n" + SIZE + b"\x85Rs.",
    "tensor": NAMED + b"ctorch\nTensor\n" + SIZE + b"\x85Rs.",
    "storage": NAMED + b"ctorch\nFloatStorage\n" + SIZE + b"\x85Rs.",
    "remembered": NAMED + b"ctorch\nFloatStorage\nq\x000h\x00" + SIZE + b"\x85Rs.",
    "new object": NAMED + b"ctorch\nFloatStorage\n" + SIZE + b"\x85\x81s.",
    "class on the stack": b"\x80\x02X\x05\x00\x00\x00torchX\x06\x00\x00\x00Tensor\x93"
    + SIZE
    + b"\x85R.",
    "hidden below": b"\x80\x02ccollections\nOrderedDict\nctorch\nByteStorage\n" + SIZE + b"\x85R.",
    "no end": NAMED,
    "nothing there": b"\x80\x02R.",
    "unknown": b"\x80\x02h\x07.",
}


@pytest.fixture
def not_loaded(monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was asked"))


@pytest.mark.parametrize("how", PICKLES)
def test_pickles_that_are_no_state_dict(how, tmp_path, not_loaded):
    with_pickle(tmp_path / "x.bin", PICKLES[how])
    with pytest.raises(ValueError, match=r"x\.bin: not a torch file of plain tensors, or damaged"):
        tensor_files.read_tensors(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Calls(bytearray, LARGE), r"builtin.*\.bytearray is no part of a state dict"),
        (Calls(torch.Tensor, LARGE), r"torch\.Tensor is no part"),
        (Calls(torch.FloatStorage, LARGE), r"a call of torch\.FloatStorage"),
        (Calls(collections.Counter, "ab"), r"collections\.Counter is no part"),
        (
            Calls(
                torch._utils._rebuild_tensor_v2,
                torch.zeros(1)._typed_storage(),
                0,
                (1,),
                (1,),
                False,
                collections.OrderedDict(),
                state=(torch.zeros(1)._typed_storage(), 0, (LARGE,), (1,)),
            ),
            r"state for torch\._utils\._rebuild_tensor_v2\(\)",
        ),
    ],
    ids=["bytearray", "tensor", "storage", "counter", "resized"],
)
def test_values_that_allocate(value, message, tmp_path, not_loaded):
    torch.save({"a": torch.zeros(3), "x": value}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=message):
        tensor_files.read_tensors(tmp_path / "x.bin")


def test_the_entry_that_torch_reads_is_looked_at(tmp_path, not_loaded):
    """Its names are not told apart by case."""
    with_pickle(tmp_path / "x.bin", PICKLES["bytearray"])
    with zipfile.ZipFile(tmp_path / "x.bin") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("data.pkl", "DATA.PKL"), content)
    with pytest.raises(ValueError, match=r"bytearray is no part of a state dict"):
        tensor_files.read_tensors(tmp_path / "x.bin")


def test_a_second_directory_is_not_believed(tmp_path, not_loaded):
    """Python finds a zip file's directory by its size, torch by its offset: here one of entries as
    they are, there one of packed entries."""
    parts = []
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", kind) as archive:
            archive.writestr("x/data.pkl", b"\x80\x02}.".ljust(1000, b"0"))
            archive.writestr("x/version", b"3\n")
            archive.writestr("x/data/0", torch.randint(256, (5000,)).byte().numpy().tobytes())
        data, offset = buffer.getvalue(), archive.start_dir
        parts.append((data[:offset], data[offset:-22], data[-22:]))
    (packed, directory, end), (_, other, _) = parts
    assert len(directory) == len(other)
    path = tmp_path / "x.bin"
    path.write_bytes(packed + directory + other + end)
    assert all(e.compress_type == zipfile.ZIP_STORED for e in zipfile.ZipFile(path).infolist())
    assert len(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")) == 1000
    with pytest.raises(ValueError, match=r"\(a directory that is not at the end\)"):
        tensor_files.read_tensors(path)


def test_claims_of_a_tensor_are_bounded_by_its_file(tmp_path):
    storage, options = torch.zeros(4)._typed_storage(), (False, collections.OrderedDict())
    for offset, size in ((0, LARGE), (LARGE, 1), (3, 2)):
        value = Calls(torch._utils._rebuild_tensor_v2, storage, offset, (size,), (1,), *options)
        torch.save({"x": value}, tmp_path / "x.bin")
        with pytest.raises(ValueError, match="not a torch file of plain tensors, or damaged"):
            tensor_files.read_tensors(tmp_path / "x.bin")
    torch.save({"x": torch.zeros(4)}, tmp_path / "y.bin")
    with zipfile.ZipFile(tmp_path / "y.bin") as archive:
        data = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    claim = data.replace(b"K\x04t", b"J\x00\x00\x00\x40t", 1)  # elements of the storage
    assert claim != data
    with_pickle(tmp_path / "x.bin", claim)
    tensor = tensor_files.read_tensors(tmp_path / "x.bin")["x"]
    assert tensor.untyped_storage().nbytes() <= (tmp_path / "x.bin").stat().st_size


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
DTYPES += (torch.int16, torch.int8, torch.uint8, torch.bool)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 3")
@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("kind", ["module", "plain", "parameters", "types", "many", "tied", "none"])
def test_state_dicts_load(kind, protocol, tmp_path):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    shared = torch.arange(12.0).view(3, 4)
    tensors = {
        "module": module.state_dict(),  # an OrderedDict with _metadata
        "plain": dict(module.state_dict()),
        "parameters": module.state_dict(keep_vars=True),
        "types": {str(dtype): torch.ones(2, dtype=dtype) for dtype in DTYPES},
        "many": {f"wäre{i}": torch.full((2,), i) for i in range(400)},  # more than a byte counts
        "tied": {"a": shared, "b": shared, "row": shared[1], "turned": shared.T},
        "none": {},
    }[kind]
    torch.save(tensors, tmp_path / "x.bin", pickle_protocol=protocol)
    loaded = tensor_files.read_tensors(tmp_path / "x.bin")
    assert list(loaded) == list(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_newer_protocols_are_named(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.bin", pickle_protocol=4)
    with pytest.raises(ValueError, match=r"\(pickle protocol 4; torch\.save's own is 2\)"):
        tensor_files.read_tensors(tmp_path / "x.bin")
