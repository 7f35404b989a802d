"""Files of tensors and of JSON: written whole or not at all, foreign ones read with suspicion.

Nothing is allocated from what a file claims: tensors are mapped from the file and must be as large
as the bytes that are there. What comes back is such a mapping; copy what shall outlive the file.
"""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calm_rt.atomic import replace


def write_tensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file, whole or not at all; tensors may be on any device and strided."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace(Path(path), lambda temporary: save_file(plain, temporary, metadata))


def write_shards(
    path: Path, tensors: dict[str, Tensor], max_bytes: int, metadata: dict[str, str]
) -> None:
    """Writes tensors into safetensors files of at most max_bytes, or of one tensor that is larger.

    path: as of a single file, model.safetensors; the files are model-00001-of-0000N.safetensors
        and, last, the index model.safetensors.index.json, which says what is where.
    """
    groups: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        held = sum(part.nbytes for part in groups[-1].values())
        if groups[-1] and held + tensor.nbytes > max_bytes:
            groups.append({})
        groups[-1][name] = tensor
    where = {}
    for number, group in enumerate(groups, 1):
        shard = path.with_stem(f"{path.stem}-{number:05}-of-{len(groups):05}")
        write_tensors(shard, group, metadata)
        where |= dict.fromkeys(group, shard.name)
    size = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    index = path.with_name(f"{path.name}.index.json")
    write_json(index, {"metadata": size, "weight_map": where})


def write_torch(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a torch file of a state dict, whole or not at all; what is tied is stored once."""
    replace(path, lambda temporary: torch.save(tensors, temporary))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file that holds a state dict only.

    Raises FileNotFoundError, and ValueError naming the file where it is damaged or holds anything
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
        _check_archive(path)
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

    Raises FileNotFoundError, and ValueError where the file holds something else.
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


def _check_archive(path: Path) -> None:
    """Raises ValueError unless the file is a zip archive whose entries are stored as they are.

    torch allocates what an entry claims to be unpacked; torch before 1.6 wrote no archive, and its
    files are read by allocating what they claim.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError("no zip archive, as torch writes since 1.6")
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            plain = entry.compress_type == zipfile.ZIP_STORED
            if not plain or not entry.file_size == entry.compress_size <= size:
                raise ValueError(f"entry {entry.filename} is packed, or larger than the file")


def _is_stored(tensor: Tensor) -> bool:
    """Whether a tensor is plain and its elements are all there, none of them several times."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return plain and tensor.nbytes <= tensor.untyped_storage().nbytes()
