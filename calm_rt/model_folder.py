"""A model's folder, official or our own: its configuration, and its tensors under one name each.

Official folders hold pytorch_model.bin or model.safetensors, whole or in shards, a tied tensor
under either name or both, and the energy head under one name or two. Names, shapes and types of
all tensors are held against the configuration before the first of them is read.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from calm_rt.atomic import replace
from calm_rt.hub import TOKENIZERS
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig
from calm_rt.nn.autoencoder import EMBEDDING, EMBEDDING_ALIAS
from calm_rt.ops.check import check
from calm_rt.tensor_files import StoredTensors, read_json

CONFIG = "config.json"
TENSORS = "model.safetensors"
SHARDS = "model-*-of-*.safetensors"  # that save writes
OFFICIAL_TENSORS = "pytorch_model.bin"
WINDOW = 64 << 20  # bytes of tensors read with one mapping of a file
INDEX = ".index.json"  # behind either name: which shard holds which tensor
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# a name, and the name under which an official file may hold the same tensor again or instead
HEAD, HEAD_ALIAS = "generative_head.", "mlp_generator."  # as EMBEDDING and EMBEDDING_ALIAS
AUTOENCODER = "ae_model."  # what is before the names of the autoencoder inside a language model
INNER = "autoencoder"  # its configuration inside that of a language model; no official field

Config = TypeVar("Config", AutoencoderConfig, CalmConfig)


class ModelFolder:
    """What is in a folder, checked; tensors are read when asked for.

    window: as of StoredTensors.
    raises: FileNotFoundError, and ValueError naming file and tensor for what does not fit.
    """

    def __init__(self, path: str | Path, window: int | None = WINDOW) -> None:
        self.path = Path(path)
        self.values = read_json(self.path / CONFIG)
        self.file, self._stored = _open(self.path, window)
        _refuse_other_heads(self.file, self._stored.meta, self.values)
        is_model = any(name.startswith("transformer.") for name in self._stored.meta)
        self.prefix = AUTOENCODER if is_model else ""  # of the autoencoder's tensors
        self._names: dict[str, list[str]] = {}  # of the same tensor in the file, by its one name
        for name in self._stored.meta:
            self._names.setdefault(official_name(name), []).append(name)
        self.meta = {name: self._stored.meta[twins[0]] for name, twins in self._names.items()}
        self.model = self._build()  # on the meta device, where sizes take no memory
        self._check()

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file; raises ValueError where its twin is another."""
        first, *others = sorted(self._names[name], key=lambda stored: stored != name)
        tensor = self._stored[first]
        for other in others:
            if not _same_bits(tensor, self._stored[other]):
                raise ValueError(f"{self.file}: {other} and {first} must be the same tensor")
        return tensor

    def derived_autoencoder(self) -> dict[str, Any]:
        """The autoencoder's configuration as far as the language model shows it.

        Shared sizes are those of the language model, the rest comes from the tensors; one that is
        absent is reported when names are checked.
        """
        model, tensors = CalmConfig.from_dict(self.values), self.meta
        special = ("pad_token_id", "bos_token_id", "eos_token_id")
        shared = ("patch_size", "vocab_size", "latent_size", *special)
        sizes = {name: getattr(model, name) for name in shared}
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

    def _build(self) -> Autoencoder | Calm:
        try:
            with torch.device("meta"):
                if not self.prefix:
                    config = AutoencoderConfig.from_dict(self.values)
                    return Autoencoder(_believable(config, self.meta))
                config = _believable(CalmConfig.from_dict(self.values), self.meta)
                inner = self.values.get(INNER)
                inner = self.derived_autoencoder() if inner is None else inner
                inner = AutoencoderConfig.from_dict(inner)
                return Calm(config, _believable(inner, self.meta))
        except (ValueError, RuntimeError, OverflowError) as error:  # torch: a size beyond 64 bits
            reason = str(error).splitlines()[0]
            raise ValueError(f"{self.path / CONFIG}: {reason}") from error

    def _check(self) -> None:
        """Raises ValueError unless the tensors are those of the model."""
        file, wanted = self.file, self.model.state_dict()
        del wanted[self.prefix + EMBEDDING_ALIAS]
        missing = sorted(wanted.keys() - self.meta.keys())
        if missing:
            raise ValueError(f"{file}: tensor {missing[0]} is missing ({len(missing)} in all)")
        extra = sorted(self.meta.keys() - wanted.keys())
        if extra:
            raise ValueError(f"{file}: tensor {extra[0]} is unknown ({len(extra)} in all)")
        for name, parameter in wanted.items():
            for twin in self._names[name]:
                tensor, where = self._stored.meta[twin], f"{file}: tensor {twin}"
                if tensor.shape != parameter.shape:
                    expected, got = list(parameter.shape), list(tensor.shape)
                    raise ValueError(f"{where}: expected shape {expected} by {CONFIG}, got {got}")
                if tensor.dtype not in DTYPES:
                    raise ValueError(f"{where}: expected a floating-point type, got {tensor.dtype}")


def official_name(name: str) -> str:
    """The one of a tensor's names that is ours."""
    if name.startswith(HEAD_ALIAS):
        return HEAD + name.removeprefix(HEAD_ALIAS)
    if name in (EMBEDDING_ALIAS, AUTOENCODER + EMBEDDING_ALIAS):
        return name.removesuffix(EMBEDDING_ALIAS) + EMBEDDING
    return name


def _open(folder: Path, window: int | None) -> tuple[Path, StoredTensors]:
    """The file that names the tensors, and the tensors."""
    for name in (TENSORS, OFFICIAL_TENSORS):
        file, index = folder / name, folder / f"{name}{INDEX}"
        if file.is_file():
            return file, StoredTensors([file], window)
        if index.is_file():
            return index, _open_shards(index, window)
    raise FileNotFoundError(f"{folder}: expected {TENSORS} or {OFFICIAL_TENSORS}, found neither")


def _open_shards(index: Path, window: int | None) -> StoredTensors:
    where = read_json(index).get("weight_map")
    named = isinstance(where, dict) and all(isinstance(v, str) for v in where.values())
    if not named:
        raise ValueError(f"{index}: expected a weight_map of file names, got {where!r:.80}")
    shards = sorted(set(where.values()))
    for shard in shards:
        if shard in ("", "..") or Path(shard).name != shard:
            raise ValueError(f"{index}: expected shards in the same folder, got {shard!r}")
    stored = StoredTensors([index.parent / shard for shard in shards], window)
    for name in sorted(where.keys() | stored.meta.keys()):
        found = stored.files[name].name if name in stored.meta else "nowhere"
        named = where.get(name, "no shard")
        check(found == named, str(index), f"{name} in {named}", found)
    return stored


def _refuse_other_heads(file: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Official configurations lose their model_type, so the tensors tell the heads apart."""
    output = tensors.get(f"{HEAD}net.final_layer.linear.weight")
    if output is not None:
        head = "flow" if output.shape[0] == values.get("latent_size") else "diffusion"
        raise ValueError(f"{file}: the {head} head is not supported yet, only the energy head")


def _believable(config: Config, tensors: dict[str, Tensor]) -> Config:
    """The configuration, unless it names more layers than there are tensors: each is a module."""
    for name, value in config.to_dict().items():
        if name.startswith("num_") and name.endswith("_layers"):
            check(value <= len(tensors), f"config {name}", "layers that are in the file", value)
    return config


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the files of a tokenizer from one folder to another, in place of what is there.

    Nothing changes where the source has none.
    """
    names = [name for name in TOKENIZERS if (source / name).is_file()]
    if not names or source.resolve() == target.resolve():
        return
    for name in names:
        copy_file(source / name, target / name)
    drop_tokenizers(target, names)


def drop_tokenizers(folder: Path, kept: Sequence[str]) -> None:
    """Deletes the files of other tokenizers, one of which might be read in place of `kept`."""
    for name in TOKENIZERS:
        if name not in kept:
            (folder / name).unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file, whole or not at all; what a link points to stays as it is."""
    replace(target, lambda temporary: shutil.copyfile(source, temporary))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Also where they are NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))
