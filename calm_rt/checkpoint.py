"""Models on disk: loads and writes official folders and our own.

Our own folder is config.json and model.safetensors with the official tensor names: the autoencoder
of a language model inside it as `ae_model.*` and under "autoencoder" in config.json, tied tensors
once. Official folders hold pytorch_model.bin or model.safetensors; both may be in shards. Every
file is written beside its destination and renamed.
"""

import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from calm_rt.hub import local_folder
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig
from calm_rt.ops.check import check
from calm_rt.options import LAYOUTS
from calm_rt.tensor_files import (
    read_json,
    read_tensors,
    write_json,
    write_shards,
    write_tensors,
    write_torch,
)

CONFIG = "config.json"
TENSORS = "model.safetensors"
OFFICIAL_TENSORS = "pytorch_model.bin"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# a name, and the name under which an official file may hold the same tensor again or instead
ENERGY = "EnergyTransformer"
EMBEDDING, HEAD = "encoder.embed_tokens.weight", "generative_head."
EMBEDDING_ALIAS, HEAD_ALIAS = "decoder.lm_head_weight", "mlp_generator."
AUTOENCODER = "ae_model."

Config = TypeVar("Config", AutoencoderConfig, CalmConfig)


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    hub: bool = False,
) -> Autoencoder | Calm:
    """The model in a folder, in evaluation mode.

    path: an official folder or one that `save` wrote. The autoencoder of a language model comes
        from the folder itself; an official config's ae_path is not looked at.
    dtype: of the parameters; None keeps what is stored.
    hub: take "owner/name" for a repository of the Hugging Face hub, see hub.local_folder.
    Raises FileNotFoundError, and ValueError naming file and tensor for what does not fit.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected a floating-point type or None, got {dtype}")
    folder = local_folder(path, hub)
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


def save(
    model: Autoencoder | Calm,
    path: str | Path,
    *,
    layout: str = "calm_rt",
    max_shard_bytes: int | None = None,
    fields: dict[str, Any] | None = None,
) -> None:
    """Writes config.json and the tensors into a folder, which is made if needed.

    Each file is replaced whole or not at all.
    layout: "calm_rt": model.safetensors, a tied tensor once; "official": pytorch_model.bin under
        all names that the official classes load, and beside a language model its autoencoder in
        the folder `autoencoder`, to which ae_path points.
    max_shard_bytes: of "calm_rt", of the tensors in a file, of which one is taken at least; None
        for one file of all.
    fields: of a config.json, kept where they mean nothing here.
    raises: ValueError for a layout that is none, and for a folder in which other files of tensors
        would be read in place of these.
    """
    check(layout in LAYOUTS, "layout", f"one of {', '.join(LAYOUTS)}", repr(layout))
    official = layout == "official"
    most = max_shard_bytes
    check(most is None or most > 0, "max_shard_bytes", "None or at least 1", most)
    check(not official or most is None, "max_shard_bytes", 'None in layout "official"', most)
    folder, kind = Path(path), "Autoencoder" if isinstance(model, Autoencoder) else ENERGY
    _check_overwrites(folder, official, most is not None)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model.state_dict()
    values = {"architectures": [kind], **(fields or {}), **model.config.to_dict()}
    values.pop("autoencoder", None)
    for name in {"dtype", "torch_dtype"} & values.keys():
        values[name] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    if official and kind == ENERGY:
        inner = folder / "autoencoder"
        save(model.ae_model, inner, layout=layout)
        values["ae_path"] = str(inner)
    elif kind == ENERGY:
        values["autoencoder"] = model.ae_model.config.to_dict()
    if official:
        heads = [name for name in tensors if name.startswith(HEAD)]
        tensors |= {HEAD_ALIAS + name.removeprefix(HEAD): tensors[name] for name in heads}
        write_torch(folder / OFFICIAL_TENSORS, tensors)
    else:
        tensors = {n: t for n, t in tensors.items() if not n.endswith(EMBEDDING_ALIAS)}
        if most is None:
            write_tensors(folder / TENSORS, tensors, {"format": "pt"})
        else:
            write_shards(folder / TENSORS, tensors, most, {"format": "pt"})
    write_json(folder / CONFIG, values)


def _check_overwrites(folder: Path, official: bool, sharded: bool) -> None:
    """Raises ValueError for files that `load` would prefer to those that are to be written."""
    preferred = [TENSORS, f"{TENSORS}.index.json"] if official else [TENSORS] if sharded else []
    for name in preferred:
        found = (folder / name).exists()
        check(not found, "path", f"a folder without {name}, which would be read first", folder)


def _read_folder(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file that names the tensors, and the tensors."""
    for name in (TENSORS, OFFICIAL_TENSORS):
        file, index = folder / name, folder / f"{name}.index.json"
        if file.is_file():
            return file, read_tensors(file)
        if index.is_file():
            where = read_json(index).get("weight_map")
            named = isinstance(where, dict) and all(isinstance(v, str) for v in where.values())
            if not named:
                raise ValueError(f"{index}: expected a weight_map of file names, got {where!r:.80}")
            tensors = {}
            for shard in sorted(set(where.values())):
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
    """The model on the meta device, where sizes take no memory."""
    try:
        if not prefix:
            return Autoencoder(_believable(AutoencoderConfig.from_dict(values), tensors))
        config = _believable(CalmConfig.from_dict(values), tensors)
        inner = values.get("autoencoder")
        if inner is None:
            inner = _autoencoder_sizes(values, tensors)
        return Calm(config, _believable(AutoencoderConfig.from_dict(inner), tensors))
    except (ValueError, RuntimeError, OverflowError) as error:  # torch: a size beyond 64 bits
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder / CONFIG}: {reason}") from error


def _believable(config: Config, tensors: dict[str, Tensor]) -> Config:
    """The configuration, unless it names more layers than there are tensors: each is a module."""
    for name, value in config.to_dict().items():
        if name.startswith("num_") and name.endswith("_layers"):
            check(value <= len(tensors), f"config {name}", "layers that are in the file", value)
    return config


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
