"""Models on disk: loads official folders and our own, writes our own.

Our own folder is config.json and model.safetensors with the official tensor names: the autoencoder
of a language model inside it as `ae_model.*` and under "autoencoder" in config.json, tied tensors
once. Official folders hold pytorch_model.bin or model.safetensors, whole or in shards. Every file
is written beside its destination and renamed.
"""

import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig

CONFIG = "config.json"
TENSORS = "model.safetensors"
OFFICIAL_TENSORS = "pytorch_model.bin"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# a name, and the name under which an official file may hold the same tensor again or instead
EMBEDDING, HEAD = "encoder.embed_tokens.weight", "generative_head."
EMBEDDING_ALIAS, HEAD_ALIAS = "decoder.lm_head_weight", "mlp_generator."
AUTOENCODER = "ae_model."


def load(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Autoencoder | Calm:
    """The model in a folder, in evaluation mode.

    path: an official folder or one that `save` wrote. The autoencoder of a language model comes
        from the folder itself; an official config's ae_path is not looked at.
    dtype: of the parameters; None keeps what is stored.
    Raises FileNotFoundError, and ValueError naming file and tensor for what does not fit.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected a floating-point type or None, got {dtype}")
    folder = Path(path)
    values = read_json(folder / CONFIG)
    file, tensors = _read_folder(folder)
    _refuse_other_heads(file, tensors, values)
    prefix = AUTOENCODER if any(name.startswith("transformer.") for name in tensors) else ""
    _merge(file, tensors, prefix + EMBEDDING, prefix + EMBEDDING_ALIAS)
    for name in [name for name in tensors if name.startswith(HEAD_ALIAS)]:
        _merge(file, tensors, HEAD + name.removeprefix(HEAD_ALIAS), name)
    with torch.device("meta"):
        model = _build(folder, values, tensors, prefix)
    _fill(model, file, tensors, prefix, dtype, torch.device(device))
    return model.eval()


def save(model: Autoencoder | Calm, path: str | Path) -> None:
    """Writes config.json and model.safetensors into a folder, which is made if needed.

    Each file is replaced whole or not at all; a tied tensor is stored once.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, Calm):
        values = {"architectures": ["EnergyTransformer"], **model.config.to_dict()}
        values["autoencoder"] = model.ae_model.config.to_dict()
    else:
        values = {"architectures": ["Autoencoder"], **model.config.to_dict()}
    tensors = model.state_dict()
    for name in [name for name in tensors if name.endswith(EMBEDDING_ALIAS)]:
        del tensors[name]
    write_tensors(folder / TENSORS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, values)


def write_tensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file, whole or not at all; tensors may be on any device and strided."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _replace(Path(path), lambda temporary: save_file(plain, temporary, metadata))


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
    try:
        tensors = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except OSError:
        raise
    except Exception as error:  # unpickling foreign bytes raises nearly anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        message = f"{path}: not a torch file of plain tensors, or damaged ({reason})"
        raise ValueError(message) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path}: expected a dict of tensors by name, got something else")
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
    _replace(Path(path), lambda temporary: temporary.write_text(text))


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises FileNotFoundError, and ValueError where the file holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors writes files that only their owner can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a crash may leave the new name on empty contents
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _open_safetensors(path: Path, read: Callable[[Any], Any]) -> Any:
    try:
        with safe_open(path, framework="pt") as file:
            return read(file)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged ({error})") from error


def _read_folder(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file that names the tensors, and the tensors."""
    for name in (TENSORS, OFFICIAL_TENSORS):
        file, index = folder / name, folder / f"{name}.index.json"
        if file.is_file():
            return file, read_tensors(file)
        if index.is_file():
            shards = set(read_json(index).get("weight_map", {}).values())
            tensors = {}
            for shard in sorted(shards):
                if Path(shard).name != shard:
                    raise ValueError(f"{index}: expected shards in the same folder, got {shard!r}")
                tensors |= read_tensors(folder / shard)
            return index, tensors
    raise FileNotFoundError(f"{folder}: expected {TENSORS} or {OFFICIAL_TENSORS}, found neither")


def _refuse_other_heads(file: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Official configurations lose their model_type, so the tensors tell the heads apart."""
    output = tensors.get(f"{HEAD}net.final_layer.linear.weight")
    if output is not None:
        head = "flow" if output.shape[0] == values.get("latent_size") else "diffusion"
        raise ValueError(f"{file}: the {head} head is not supported yet, only the energy head")


def _merge(file: Path, tensors: dict[str, Tensor], name: str, alias: str) -> None:
    """Keeps one of two names of a tensor."""
    if alias not in tensors:
        return
    other = tensors.pop(alias)
    tensor = tensors.setdefault(name, other)
    if tensor.shape != other.shape or not torch.equal(tensor, other):
        raise ValueError(f"{file}: {alias} and {name} must be the same tensor, but differ")


def _build(
    folder: Path, values: dict[str, Any], tensors: dict[str, Tensor], prefix: str
) -> Autoencoder | Calm:
    try:
        if not prefix:
            return Autoencoder(AutoencoderConfig.from_dict(values))
        config = CalmConfig.from_dict(values)
        inner = values.get("autoencoder")
        if inner is None:
            inner = _autoencoder_sizes(values, tensors)
        return Calm(config, AutoencoderConfig.from_dict(inner))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def _autoencoder_sizes(values: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The autoencoder's sizes: shared ones from the language model, the rest from its tensors.

    A tensor that is absent here is reported when the model is filled.
    """
    model = CalmConfig.from_dict(values)
    special = ("pad_token_id", "bos_token_id", "eos_token_id")
    sizes = {n: getattr(model, n) for n in ("patch_size", "vocab_size", "latent_size", *special)}
    embedding = tensors.get(AUTOENCODER + EMBEDDING)
    if embedding is not None:
        sizes["hidden_size"] = embedding.shape[-1]
    gate = tensors.get(f"{AUTOENCODER}encoder.encoder_layers.0.mlp.gate_proj.weight")
    if gate is not None:
        sizes["intermediate_size"] = gate.shape[0]
    for part in ("encoder", "decoder"):
        pattern = re.compile(rf"{re.escape(AUTOENCODER)}{part}\.{part}_layers\.(\d+)\.")
        indices = [int(match[1]) for match in map(pattern.match, tensors) if match]
        sizes[f"num_{part}_layers"] = max(indices, default=-1) + 1
    return sizes


def _fill(
    model: Autoencoder | Calm,
    file: Path,
    tensors: dict[str, Tensor],
    prefix: str,
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Gives a model on the meta device its parameters, each a copy, so that the file may go."""
    wanted = model.state_dict()
    del wanted[prefix + EMBEDDING_ALIAS]
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{file}: tensor {missing[0]} is missing ({len(missing)} in all)")
    extra = sorted(tensors.keys() - wanted.keys())
    if extra:
        raise ValueError(f"{file}: tensor {extra[0]} is unknown ({len(extra)} in all)")
    for name, parameter in wanted.items():
        tensor, where = tensors[name], f"{file}: tensor {name}"
        if tensor.shape != parameter.shape:
            expected, got = list(parameter.shape), list(tensor.shape)
            raise ValueError(f"{where}: expected shape {expected} by {CONFIG}, got {got}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{where}: expected a floating-point type, got {tensor.dtype}")
        tensors[name] = tensor.to(device, dtype, copy=True)
    tensors[prefix + EMBEDDING_ALIAS] = tensors[prefix + EMBEDDING]
    model.load_state_dict(tensors, assign=True)
    autoencoder = model.ae_model if isinstance(model, Calm) else model
    autoencoder.decoder.lm_head_weight = autoencoder.encoder.embed_tokens.weight
