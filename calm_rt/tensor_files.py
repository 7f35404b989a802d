"""Files of tensors and of JSON: written whole or not at all, foreign ones read with suspicion.

Nothing is allocated from what a file claims: tensors are mapped from the file and must be as large
as the bytes that are there. What comes back is such a mapping; copy what shall outlive the file.
Models, which may be larger than memory, are read and written one tensor after another.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calm_rt.atomic import replace
from calm_rt.torch_archive import check_archive

# Parts in which small files are read, but none smaller: to map a file anew takes some milliseconds.
WINDOWS, SMALLEST_WINDOW = 16, 4 << 20
FORMAT = {"format": "pt"}  # the metadata that transformers wants to see
DTYPE_NAMES = {  # in the header of a safetensors file
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


class StoredTensors:
    """The tensors of some files by name, each mapped from its file when it is asked for.

    meta: their shapes and types, on the meta device.  files: where each is.
    window: after at most so many bytes a file is mapped anew, for what was read stays in memory
        while the mapping does; None keeps one mapping, for tensors that are needed all at once.
    raises: as read_tensors, and ValueError for a tensor that is in two files.
    """

    def __init__(self, paths: list[Path], window: int | None) -> None:
        self._window = window
        self.meta: dict[str, Tensor] = {}
        self.files: dict[str, Path] = {}
        self._mapped: dict[Path, dict[str, Tensor]] = {}
        self._read = 0
        for path in paths:
            for name, tensor in read_tensors(path).items():
                if name in self.files:
                    raise ValueError(f"{path}: tensor {name} is in {self.files[name].name} too")
                self.meta[name], self.files[name] = tensor.to("meta"), path
        if window is not None:
            whole = sum(tensor.nbytes for tensor in self.meta.values())
            self._window = min(window, max(SMALLEST_WINDOW, whole // WINDOWS))

    def __getitem__(self, name: str) -> Tensor:
        path, expected = self.files[name], self.meta[name]
        if self._window is not None and self._read + expected.nbytes > self._window:
            self._mapped, self._read = {}, 0
        if path not in self._mapped:
            self._mapped[path] = read_tensors(path)
        tensor = self._mapped[path].get(name)
        if tensor is None or (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
            raise ValueError(f"{path}: tensor {name} changed while the file was read")
        self._read += tensor.nbytes
        return tensor


def write_tensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file, whole or not at all; tensors may be on any device and strided."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace(Path(path), lambda temporary: save_file(plain, temporary, metadata))


def stream_tensors(
    path: str | Path,
    meta: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a safetensors file, whole or not at all, asking for one tensor after another.

    The library's writer takes all tensors at once.
    meta: shapes and floating-point types by name.  read: gives the tensor of a name.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    names = sorted(meta, key=lambda name: (-meta[name].itemsize, name))  # all aligned that way
    end = 0
    for name in names:
        start, end = end, end + meta[name].nbytes
        kind, shape = DTYPE_NAMES[meta[name].dtype], list(meta[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                tensor = read(name).detach().to("cpu", meta[name].dtype).contiguous()
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

    replace(Path(path), write)


def write_shards(
    path: Path, meta: Mapping[str, Tensor], read: Callable[[str], Tensor], max_bytes: int | None
) -> None:
    """Writes safetensors files of at most max_bytes, or of one tensor that is larger.

    path: of a single file, model.safetensors; with max_bytes the files are
        model-00001-of-0000N.safetensors and, last, the index model.safetensors.index.json, which
        says what is where.
    meta, read: as of stream_tensors.
    """
    if max_bytes is None:
        stream_tensors(path, meta, read, FORMAT)
        return
    groups: list[list[str]] = [[]]
    held = 0
    for name, tensor in meta.items():
        if groups[-1] and held + tensor.nbytes > max_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += tensor.nbytes
    where = {}
    for number, group in enumerate(groups, 1):
        shard = path.with_stem(f"{path.stem}-{number:05}-of-{len(groups):05}")
        stream_tensors(shard, {name: meta[name] for name in group}, read, FORMAT)
        where |= dict.fromkeys(group, shard.name)
    size = {"total_size": sum(tensor.nbytes for tensor in meta.values())}
    index = path.with_name(f"{path.name}.index.json")
    write_json(index, {"metadata": size, "weight_map": where})


def write_torch(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a torch file of a state dict, whole or not at all; what is tied is stored once."""
    replace(path, lambda temporary: torch.save(tensors, temporary))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file that holds a state dict only.

    raises: FileNotFoundError, and ValueError naming the file where it is damaged or holds anything
    but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _open_safetensors(
            path, lambda file: {name: file.get_tensor(name) for name in file.keys()}
        )
    refused = f"{path}: not a torch file of plain tensors, or damaged"
    try:
        check_archive(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # unpickling foreign bytes raises nearly anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ValueError(f"{refused} ({reason})") from error
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path}: expected a dict of tensors by name, got something else")
    for name, tensor in tensors.items():
        if not _is_stored(tensor):
            raise ValueError(f"{refused} (tensor {name} claims more than the file holds)")
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a .safetensors file; raises as read_tensors does."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return _open_safetensors(path, lambda file: file.metadata() or {})


def write_json(path: str | Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    replace(Path(path), lambda temporary: temporary.write_text(text))


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    raises: FileNotFoundError, and ValueError where the file holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _open_safetensors(path: Path, read: Callable[[Any], Any]) -> Any:
    try:
        with safe_open(path, framework="pt") as file:
            return read(file)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged ({error})") from error


def _is_stored(tensor: Tensor) -> bool:
    """Whether a tensor is plain and its elements are all there, none of them several times."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return plain and tensor.nbytes <= tensor.untyped_storage().nbytes()
