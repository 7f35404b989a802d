"""What the arguments of a command stand for: models, devices, data, prompts, sizes."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calm_rt import checkpoint, tensor_files
from calm_rt.data import Tokenizer, TokenShards, load_tokenizer, read_documents
from calm_rt.documents import JSON_LINES, SHARDS
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig
from calm_rt.ops.check import check
from calm_rt.options import AUTOENCODER_TRAINING, MODEL_TRAINING, PLAN_SIZES
from calm_rt.training import TrainingConfig
from calm_rt.training_state import TrainingState


def run_settings(
    options: Namespace, kind: type, names: list[tuple[str, type, str]], **sizes: Any
) -> tuple[TokenShards, AutoencoderConfig | CalmConfig | None, TrainingConfig]:
    """Data, model sizes and settings of a training run; a resumed one has its sizes already."""
    either = not (options.resume and options.overwrite)
    check(either, "overwrite", "none with --resume (which keeps the run)", options.overwrite)
    shards = TokenShards(options.data)
    overrides = given_options(options, AUTOENCODER_TRAINING + MODEL_TRAINING)
    given = given_options(options, names)
    if options.resume:
        for name, value in given.items():
            check(False, name, "none with --resume (the run has its sizes)", value)
        stored = TrainingState.load(Path(options.output)).training
        return shards, None, TrainingConfig(**(stored | overrides))
    header, tokenizer = shards.header, load_tokenizer(options.data)
    TokenShards(options.data, tokenizer)  # the one that these tokens are of
    special = {"pad": header.pad_id, "bos": tokenizer.bos_id, "eos": header.eos_id}
    config = kind(
        patch_size=shards.patch_size,
        vocab_size=shards.vocab_size,
        **{f"{name}_token_id": value for name, value in special.items()},
        **sizes,
        **given,
    )
    return shards, config, TrainingConfig(**overrides)


def switches_of(options: Namespace) -> dict[str, Any]:
    return {
        "resume": options.resume,
        "overwrite": options.overwrite,
        "device": device_of(options),
    }


def given_options(options: Namespace, names: list[tuple[str, type, str]]) -> dict[str, Any]:
    """The options that stand on the command line, by the names of the configuration's fields."""
    fields = [name.replace("-", "_") for name, _, _ in names]
    return {name: getattr(options, name) for name in fields if hasattr(options, name)}


def load_model(path: str, kind: type | tuple[type, ...], device: str) -> Autoencoder | Calm:
    model = checkpoint.load(path, device=device)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(k.__name__ for k in kinds)
    check(isinstance(model, kinds), path, f"a folder of {expected}", type(model).__name__)
    return model


def tokenizer_of(options: Namespace) -> Tokenizer:
    return load_tokenizer(options.tokenizer or options.model)


def device_of(options: Namespace) -> str:
    if options.device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.empty(0, device=options.device).device.type
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device: expected cpu or cuda, got {options.device} ({reason})"
        ) from error
    check(kind in ("cpu", "cuda"), "device", "cpu or cuda", options.device)
    return options.device


def documents_of(
    options: Namespace, vocab_size: int, patch_size: int
) -> tuple[list[Tensor], np.ndarray | None]:
    """Documents to evaluate on, and with token shards also the training tokens."""
    if len(options.data) == 1 and (Path(options.data[0]) / SHARDS).is_file():
        shards = TokenShards(options.data[0])
        expected = f"shards for patch_size {patch_size}"
        check(shards.patch_size == patch_size, "data", expected, shards.patch_size)
        expected = f"token ids below vocab_size {vocab_size}"
        check(shards.vocab_size <= vocab_size, "data", expected, shards.vocab_size)
        return shards.held_out_documents(), shards.train_tokens
    for path in options.data:
        shards = (Path(path) / SHARDS).is_file()
        check(not shards, "data", "one folder of token shards, or text", options.data)
    tokenizer = tokenizer_of(options)
    expected = f"the model's of {vocab_size} tokens"
    check(tokenizer.vocab_size <= vocab_size, "tokenizer", expected, tokenizer.vocab_size)
    documents = []
    for text in read_documents(options.data):
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        padding = -len(ids) % patch_size
        documents.append(torch.tensor(ids + [tokenizer.pad_id] * padding))
    return documents, None


def prompts_of(options: Namespace) -> list[str]:
    """From the command line, a file or standard input."""
    if options.prompt:
        return options.prompt
    if options.prompts is None:
        return [""] if sys.stdin is None or sys.stdin.isatty() else [_standard_input()]
    if options.prompts == "-":
        return _lines(_standard_input())
    path = Path(options.prompts)
    try:
        lines = _lines(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: expected UTF-8 text, got {path}: {error}") from error
    except OSError as error:
        reason = f"{path} ({error.strerror})"
        raise ValueError(f"prompts: expected a file that can be read, got {reason}") from error
    if path.suffix.lower() not in JSON_LINES:
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        expected = '{"prompt": TEXT} in every line'
        check(isinstance(prompt, str), "prompts", expected, f"{line[:80]!r} in line {number}")
        prompts.append(prompt)
    return prompts


def _standard_input() -> str:
    check(sys.stdin is not None, "prompts", "a standard input", "none")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: expected text, got standard input: {error}") from error


def _lines(text: str) -> list[str]:
    """Lines end where a newline stands, and nowhere else: U+2028 and others are part of a text."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def sizes_of(options: Namespace) -> tuple[CalmConfig, AutoencoderConfig, torch.dtype]:
    """The configurations of a model folder, a config.json or neither, with changes."""
    dtype, values, inner = torch.float32, {}, {}
    if options.model:
        model = load_model(options.model, Calm, "meta")
        dtype = next(model.parameters()).dtype
        values, inner = model.config.to_dict(), model.ae_model.config.to_dict()
    elif options.config:
        values = tensor_files.read_json(options.config)
        check("hidden_size" in values, "config", "a language model's config.json", options.config)
        inner = values.get("autoencoder", {})
    changes = given_options(options, PLAN_SIZES)
    config = CalmConfig.from_dict(values | changes)
    shared = ("patch_size", "vocab_size", "latent_size")
    inner = inner | {name: getattr(config, name) for name in shared}
    return config, AutoencoderConfig.from_dict(inner), dtype
