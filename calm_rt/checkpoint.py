"""Models on disk: loads, writes and converts official folders and our own.

Our own folder is config.json and model.safetensors with the official tensor names: the autoencoder
of a language model inside it as `ae_model.*` and under "autoencoder" in config.json, tied tensors
once. An official folder is pytorch_model.bin with every name that the official classes load, and
beside a language model the folder of its autoencoder. A folder is written beside its files, which
are then replaced.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from calm_rt.atomic import scratch_folder
from calm_rt.hub import local_folder
from calm_rt.model_folder import (
    AUTOENCODER,
    CONFIG,
    DTYPES,
    HEAD,
    HEAD_ALIAS,
    INDEX,
    INNER,
    OFFICIAL_TENSORS,
    SHARDS,
    TENSORS,
    WINDOW,
    ModelFolder,
    copy_tokenizer,
)
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm
from calm_rt.nn.autoencoder import EMBEDDING, EMBEDDING_ALIAS
from calm_rt.nn.plain import is_sharded, uncompiled
from calm_rt.ops.check import check
from calm_rt.options import LAYOUTS
from calm_rt.tensor_files import write_json, write_shards, write_torch

ENERGY = "EnergyTransformer"
GATHER = "get_model_state_dict(..., options=StateDictOptions(full_state_dict=True))"
GATHERED = (
    f"whole tensors: gather those of FSDP2 with torch.distributed.checkpoint.state_dict.{GATHER},"
    " load them into a model of the same configurations and save that (examples/fsdp2.py)"
)
NAMED = 5  # tensors at most, in an error about many


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
    raises: FileNotFoundError, and ValueError naming file and tensor for what does not fit.
    """
    _check_dtype(dtype)
    folder = ModelFolder(local_folder(path, hub))
    model, prefix = folder.model, folder.prefix
    # each a copy, so that the file may go; the largest first, whose mappings come on top
    names = sorted(folder.meta, key=lambda name: -folder.meta[name].nbytes)
    tensors = {name: folder.read(name).to(device, dtype, copy=True) for name in names}
    tensors[prefix + EMBEDDING_ALIAS] = tensors[prefix + EMBEDDING]
    model.load_state_dict(tensors, assign=True)
    autoencoder = model.ae_model if isinstance(model, Calm) else model
    autoencoder.decoder.lm_head_weight = autoencoder.encoder.embed_tokens.weight
    return model.eval()


def save(
    model: Autoencoder | Calm,
    path: str | Path,
    *,
    layout: str = "calm_rt",
    max_shard_bytes: int | None = None,
) -> None:
    """Writes config.json and the tensors into a folder, which is made if needed.

    Each file is replaced whole or not at all.
    layout: "calm_rt": model.safetensors, a tied tensor once; "official": pytorch_model.bin under
        all names that the official classes load, and beside a language model its autoencoder in
        the folder `autoencoder`, to which ae_path points.
    max_shard_bytes: of "calm_rt", of the tensors in a file, of which one is taken at least; None
        for one file of all.
    Of compiled parts the tensors are written, of parametrized ones the weights that they compute in
    evaluation.
    raises: ValueError for a layout that is none, tensors that `load` would refuse, a vocabulary of
        the decoder that is not the encoder's, and a folder in which other files of tensors would be
        read in place of these; then nothing is written.
    """
    model = uncompiled(model)
    kinds = isinstance(model, Autoencoder | Calm)
    check(kinds, "model", "an Autoencoder or a Calm", type(model).__name__)
    folder = Path(path)
    _check_output(folder, layout, max_shard_bytes)
    tensors, inner = _plain_tensors(model), None
    _check_tensors(model, tensors)
    kind = ENERGY if isinstance(model, Calm) else "Autoencoder"
    for name in [name for name in tensors if name.endswith(EMBEDDING_ALIAS)]:
        alias = tensors.pop(name)
        embedding = tensors[name.removesuffix(EMBEDDING_ALIAS) + EMBEDDING]
        one = embedding.data_ptr() == alias.data_ptr() or torch.equal(embedding, alias)
        check(one, "model", f"{name} that is {EMBEDDING}", "another tensor, which no layout holds")
    values = {"architectures": [kind], **model.config.to_dict()}
    if isinstance(model, Calm):
        inner = model.ae_model.config
        values[INNER] = inner.to_dict()
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    _write(folder, layout, max_shard_bytes, values, inner, meta, tensors.__getitem__)


def convert(
    source: str | Path,
    path: str | Path,
    *,
    layout: str = "calm_rt",
    max_shard_bytes: int | None = None,
    dtype: torch.dtype | None = None,
) -> ModelFolder:
    """Writes the model and tokenizer of one folder into another, the model never held in memory.

    Tensors are the same bit for bit unless a type is given (of pytorch_model.bin, the tensors of
    another type are held). Fields of config.json are kept, whether they mean something here or not,
    but for the ae_path of "official".
    source: as of `load`.  layout, max_shard_bytes: as of `save`.  dtype: of all tensors.
    returns: what was read.
    raises: as `load` and `save`.
    """
    _check_dtype(dtype)
    output = Path(path)
    _check_output(output, layout, max_shard_bytes)
    # pytorch_model.bin is written from one mapping of all tensors
    folder = ModelFolder(source, None if layout == "official" else WINDOW)
    values, inner = dict(folder.values), None
    for name in {"dtype", "torch_dtype"} & values.keys() if dtype else ():
        values[name] = str(dtype).removeprefix("torch.")
    if isinstance(folder.model, Calm):
        inner = folder.model.ae_model.config
        derived = AutoencoderConfig.from_dict(folder.derived_autoencoder())
        if layout == "calm_rt":
            values.setdefault(INNER, inner.to_dict())
        elif inner == derived:
            values.pop(INNER, None)  # comes back by itself
    meta = {name: tensor.to(dtype=dtype) for name, tensor in folder.meta.items()}

    def read(name: str) -> Tensor:
        return folder.read(name).to(dtype=dtype)

    _write(output, layout, max_shard_bytes, values, inner, meta, read)
    for target in (output, output / INNER) if layout == "official" and inner else (output,):
        copy_tokenizer(Path(source), target)
    return folder


@torch.no_grad()
def _plain_tensors(model: Autoencoder | Calm) -> dict[str, Tensor]:
    """The state dict as of a model whose parts are neither compiled nor parametrized."""
    tensors = model.state_dict()
    for path, module in model.named_modules(remove_duplicate=False):
        if not is_parametrized(module):
            continue
        prefix = f"{path}." if path else ""
        for name in [n for n in tensors if n.startswith(f"{prefix}parametrizations.")]:
            del tensors[name]
        chains: Any = module.parametrizations
        for name, chain in chains.items():
            training = chain.training
            chain.eval()  # in training a spectral norm changes its state at every look
            tensors[prefix + name] = getattr(module, name)
            chain.train(training)
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}


def _check_tensors(model: Autoencoder | Calm, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError unless `load` takes these tensors for a model of these configurations."""
    with torch.device("meta"):
        if isinstance(model, Calm):
            fresh = Calm(model.config, model.ae_model.config)
        else:
            fresh = Autoencoder(model.config)
    wanted = fresh.state_dict()
    expected = "the tensors of its configurations, which load takes"
    for found, names in (
        ("also", tensors.keys() - wanted.keys()),
        ("all but", wanted.keys() - tensors.keys()),
    ):
        few = ", ".join(sorted(names)[:NAMED])
        check(not names, "model", expected, f"{found} {few} ({len(names)} in all)")
    for name, tensor in tensors.items():
        shape, dtype = list(wanted[name].shape), tensor.dtype
        expected = f"{name} of shape {shape} and a floating-point type"
        check(not is_sharded(tensor), "model", GATHERED, f"a DTensor, {name}")
        fits = list(tensor.shape) == shape and dtype in DTYPES
        check(fits, "model", expected, f"{list(tensor.shape)} {dtype}")


def _check_dtype(dtype: torch.dtype | None) -> None:
    check(dtype is None or dtype in DTYPES, "dtype", "a floating-point type or None", dtype)


def _check_output(folder: Path, layout: str, most: int | None) -> None:
    """Raises ValueError for bad settings, and files that `load` would prefer to those to come."""
    check(layout in LAYOUTS, "layout", f"one of {', '.join(LAYOUTS)}", repr(layout))
    official = layout == "official"
    check(most is None or most > 0, "max_shard_bytes", "None or at least 1", most)
    check(not official or most is None, "max_shard_bytes", 'None in layout "official"', most)
    written = [folder, folder / INNER] if official else [folder]
    preferred = [TENSORS, f"{TENSORS}{INDEX}"] if official else [TENSORS] if most else []
    for target in written:
        for name in preferred:
            found = (target / name).exists()
            check(not found, "path", f"a folder without {name}, which would be read first", target)


def _write(
    output: Path,
    layout: str,
    max_shard_bytes: int | None,
    values: dict[str, Any],
    inner: AutoencoderConfig | None,
    meta: dict[str, Tensor],
    read: Callable[[str], Tensor],
) -> None:
    """Writes a folder; the files of tensors are there before the config.json that needs them."""
    with scratch_folder(output, "path") as scratch:
        if layout == "official":
            tensors = _official_names({name: read(name) for name in meta})
            write_torch(scratch / OFFICIAL_TENSORS, tensors)
            if inner:
                values = values | {"ae_path": str((output / INNER).absolute())}
                own = {n: t for n, t in tensors.items() if n.startswith(AUTOENCODER)}
                (scratch / INNER).mkdir()
                write_torch(
                    scratch / INNER / OFFICIAL_TENSORS,
                    {name.removeprefix(AUTOENCODER): tensor for name, tensor in own.items()},
                )
                config = {"architectures": ["Autoencoder"], **inner.to_dict()}
                write_json(scratch / INNER / CONFIG, config)
                (output / INNER).mkdir(exist_ok=True)
        else:
            write_shards(scratch / TENSORS, meta, read, max_shard_bytes)
        write_json(scratch / CONFIG, values)
        files = [path.relative_to(scratch) for path in scratch.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda file: (file.name == CONFIG, file.suffix == ".json")):
            os.replace(scratch / file, output / file)
        if layout == "calm_rt":
            for old in [output / f"{TENSORS}{INDEX}", *output.glob(SHARDS)]:
                if old.relative_to(output) not in files:  # of the model that was here before
                    old.unlink(missing_ok=True)


def _official_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under all names that the official classes load."""
    named = dict(tensors)
    for name, tensor in tensors.items():
        if name.startswith(HEAD):
            named[HEAD_ALIAS + name.removeprefix(HEAD)] = tensor
        if name in (EMBEDDING, AUTOENCODER + EMBEDDING):
            named[name.removesuffix(EMBEDDING) + EMBEDDING_ALIAS] = tensor
    return named
