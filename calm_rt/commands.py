"""What each command of the command line does; cli.py holds the arguments."""

import json
import os
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calm_rt import checkpoint, evaluation, training
from calm_rt.cli import AUTOENCODER_OPTIONS, MODEL_OPTIONS, TRAINING_OPTIONS
from calm_rt.curves import finite, read_log
from calm_rt.data import (
    Tokenizer,
    TokenShards,
    load_tokenizer,
    read_documents,
    train_tokenizer,
    write_shards,
)
from calm_rt.generation import Generator
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig
from calm_rt.ops.check import check
from calm_rt.training import TrainingConfig
from calm_rt.training_state import TrainingState, copy_tokenizer


def quickstart(options: Namespace) -> None:
    from calm_rt.quickstart import run_quickstart

    metrics = run_quickstart(options.output, options.corpus, options.minutes, options.seed)
    if options.json:
        _print_json(metrics)


def tokenize(options: Namespace) -> None:
    output = Path(options.output)
    check(options.patch_size >= 1, "patch_size", "at least 1", options.patch_size)
    check(0 <= options.held_out < 1, "held_out", "a share in [0, 1)", options.held_out)
    if options.tokenizer is None:
        tokenizer = train_tokenizer(options.corpus, options.vocab_size, output)
    else:
        tokenizer = load_tokenizer(options.tokenizer)
    documents = read_documents(options.corpus)
    shards = write_shards(documents, tokenizer, output, options.patch_size, options.held_out)
    copy_tokenizer(tokenizer.path.parent, output)
    target = output / f"tokenizer{tokenizer.path.suffix}"
    if tokenizer.path.resolve() != target.resolve():  # under any name
        shutil.copyfile(tokenizer.path, target)
    header = shards.header
    if options.json:
        _print_json({"folder": str(output), **vars(header)})
    else:
        print(
            f"{output}: {header.num_tokens:,} tokens of {header.vocab_size} in "
            f"{header.num_documents:,} documents, patches of {header.patch_size}, "
            f"{header.num_documents - header.num_train_documents} documents held out"
        )


def train_autoencoder(options: Namespace) -> None:
    shards, config, settings = _run(options, AutoencoderConfig, AUTOENCODER_OPTIONS)
    training.train_autoencoder(config, shards, options.output, settings, **_switches(options))
    _report_run(options)


def train(options: Namespace) -> None:
    given, sizes = options.autoencoder is not None, {}
    expected = "none with --resume" if options.resume else "the folder of a trained one"
    check(given != options.resume, "autoencoder", expected, options.autoencoder)
    autoencoder = _load(options.autoencoder, Autoencoder, "cpu") if given else None
    if autoencoder:
        sizes["latent_size"] = autoencoder.config.latent_size
    shards, config, settings = _run(options, CalmConfig, MODEL_OPTIONS, **sizes)
    switches = _switches(options)
    training.train(config, autoencoder, shards, options.output, settings, **switches)
    _report_run(options)


def generate(options: Namespace) -> None:
    generator = Generator(_load(options.model, Calm, _device(options)), _tokenizer(options))
    prompts = options.prompt
    if not prompts:
        prompts = [""] if sys.stdin is None or sys.stdin.isatty() else [sys.stdin.read()]
    arguments = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "num_candidates": options.num_candidates,
        "seed": options.seed,
        "stop": options.stop,
    }
    if options.stream:
        check(len(prompts) == 1, "stream", "one prompt", len(prompts))
        check(not options.json, "stream", "no --json", "both")
        print(prompts[0], end="", flush=True)
        for piece in generator.stream(prompts[0], **arguments):
            print(piece, end="", flush=True)
        print()
        return
    results = generator.generate(prompts, **arguments)
    if options.json:
        pairs = zip(prompts, results, strict=True)
        _print_json([{"prompt": prompt, **vars(result)} for prompt, result in pairs])
        return
    for number, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        if len(prompts) > 1:
            print(f"--- {number + 1}")
        print(prompt + result.text)


def evaluate(options: Namespace) -> None:
    device = _device(options)
    model = _load(options.model, (Calm, Autoencoder), device)
    patch_size = model.config.patch_size
    documents, train_tokens = _documents(options, model.config.vocab_size, patch_size)
    autoencoder = model.ae_model if isinstance(model, Calm) else model
    batches = [ids[None] for ids in documents]
    noisy = {"noise_std": 0.3, "seed": options.seed}
    report: dict[str, Any] = {
        "autoencoder_accuracy": evaluation.reconstruction_accuracy(autoencoder, batches),
        "autoencoder_accuracy_sigma_0.3": evaluation.reconstruction_accuracy(
            autoencoder, batches, **noisy
        ),
    }
    if isinstance(model, Calm):
        longest = model.config.max_position_embeddings * patch_size
        window = {"block_size": options.block_size or longest, "max_patches": options.max_patches}
        scores = {
            "model": evaluation.brier_lm(
                model, documents, num_draws=options.num_draws, seed=options.seed, **window
            )
        }
        if train_tokens is not None:
            for name in ("unigram", "bigram"):
                sampler = getattr(evaluation, f"{name}_brier")
                scores[name] = sampler(train_tokens, documents, patch_size, **window)
        for name, score in scores.items():
            prefix = "" if name == "model" else f"{name}_"
            report[f"{prefix}brier_lm"] = score.score
            report[f"{prefix}brier_lm_interval"] = score.interval
            report |= {f"{prefix}brier_{n}": 100 * b for n, b in enumerate(score.brier, 1)}
        report["num_patches"] = scores["model"].num_patches
    if options.json:
        _print_json(report)
        return
    width = max(map(len, report))
    for name, value in report.items():
        print(f"{name:{width}}  {_in_one_line(value)}")


def convert(options: Namespace) -> None:
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    model = checkpoint.load(options.source, dtype=dtype)
    model.save(options.output)
    copy_tokenizer(Path(options.source), Path(options.output))
    count = sum(parameter.numel() for parameter in model.parameters())
    report = {"model": type(model).__name__, "parameters": count, "folder": options.output}
    if options.json:
        _print_json(report)
    else:
        print(f"{options.output}: {type(model).__name__} with {count:,} parameters")


def bench(options: Namespace) -> None:
    from calm_rt import benchmark, report, scaling

    if options.compare:
        text, slower = report.compare(*map(report.read_results, options.compare))
        if options.json:
            _print_json({"slower": slower})
        else:
            print(text)
        return
    device, folder = _device(options), Path(options.output)
    cases = benchmark.benchmark_cases(options.ops)
    results: dict[str, Any] = {"machine": benchmark.machine(device), "rows": [], "sweep": []}
    results |= {"finished": False, "limits": benchmark.limits(device)}
    report.write_results(results, folder)  # an --output that cannot be written fails here
    try:
        for rows in benchmark.measure_all(cases, device, options.quick):
            results["rows"] += rows
            report.write_results(results, folder)
        for points in scaling.measure_sweeps(options.ops, device) if options.sweep else ():
            results["sweep"] += points
            report.write_results(results, folder)
        results["finished"] = True
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the finished rows are in {folder}") from None
    finally:
        report.write_report(results, folder)
    if options.json:
        _print_json(results)
        return
    print(report.times_table(results["rows"]))
    if options.sweep:
        print(f"\n{report.scaling_text(results['sweep'])}")
    print("\n".join(["", *report.warnings_of(results), str(folder / report.REPORT)]))


def _run(
    options: Namespace, kind: type, names: list[tuple[str, type, str]], **sizes: Any
) -> tuple[TokenShards, AutoencoderConfig | CalmConfig | None, TrainingConfig]:
    """Data, model sizes and settings of a training run; a resumed one has its sizes already."""
    shards = TokenShards(options.data)
    fields = TrainingConfig.__dataclass_fields__
    overrides = {n: v for n, v in _given(options, TRAINING_OPTIONS + names).items() if n in fields}
    given = {n: v for n, v in _given(options, names).items() if n not in fields}
    if options.resume:
        for name, value in given.items():
            check(False, name, "none with --resume (the run has its sizes)", value)
        stored = TrainingState.load(Path(options.output)).training
        return shards, None, TrainingConfig(**(stored | overrides))
    header, tokenizer = shards.header, load_tokenizer(options.data)
    special = {"pad": header.pad_id, "bos": tokenizer.bos_id, "eos": header.eos_id}
    config = kind(
        patch_size=shards.patch_size,
        vocab_size=shards.vocab_size,
        **{f"{name}_token_id": value for name, value in special.items()},
        **sizes,
        **given,
    )
    return shards, config, TrainingConfig(**overrides)


def _switches(options: Namespace) -> dict[str, Any]:
    return {
        "resume": options.resume,
        "overwrite": options.overwrite,
        "device": _device(options),
    }


def _report_run(options: Namespace) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    state = TrainingState.load(Path(options.output))
    metrics = {"step": state.step, "seconds": state.seconds, "precision": state.precision}
    for line in read_log(Path(options.output)):
        metrics |= line
    if options.json:
        _print_json({"folder": options.output, **metrics})
    else:
        seconds = round(state.seconds)
        print(f"{options.output}: {state.step} steps in {seconds} s of training; curves.png")


def _given(options: Namespace, names: list[tuple[str, type, str]]) -> dict[str, Any]:
    """The options that stand on the command line, by the names of the configuration's fields."""
    fields = [name.replace("-", "_") for name, _, _ in names]
    return {name: getattr(options, name) for name in fields if hasattr(options, name)}


def _load(path: str, kind: type | tuple[type, ...], device: str) -> Autoencoder | Calm:
    model = checkpoint.load(path, device=device)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(k.__name__ for k in kinds)
    check(isinstance(model, kinds), path, f"a folder of {expected}", type(model).__name__)
    return model


def _tokenizer(options: Namespace) -> Tokenizer:
    return load_tokenizer(options.tokenizer or options.model)


def _device(options: Namespace) -> str:
    if options.device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device: expected cpu or cuda, got {options.device} ({reason})"
        ) from error
    return options.device


def _documents(
    options: Namespace, vocab_size: int, patch_size: int
) -> tuple[list[Tensor], np.ndarray | None]:
    """Documents to evaluate on, and with token shards also the training tokens."""
    if len(options.data) == 1 and (Path(options.data[0]) / "shards.json").is_file():
        shards = TokenShards(options.data[0])
        expected = f"shards for patch_size {patch_size}"
        check(shards.patch_size == patch_size, "data", expected, shards.patch_size)
        expected = f"token ids below vocab_size {vocab_size}"
        check(shards.vocab_size <= vocab_size, "data", expected, shards.vocab_size)
        return shards.held_out_documents(), shards.train_tokens
    tokenizer = _tokenizer(options)
    expected = f"the model's of {vocab_size} tokens"
    check(tokenizer.vocab_size <= vocab_size, "tokenizer", expected, tokenizer.vocab_size)
    documents = []
    for text in read_documents(options.data):
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        padding = -len(ids) % patch_size
        documents.append(torch.tensor(ids + [tokenizer.pad_id] * padding))
    return documents, None


def _print_json(value: Any) -> None:
    print(json.dumps(finite(value), indent=2))


def _in_one_line(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, tuple):
        return " to ".join(map(_in_one_line, value))
    return ", ".join(map(_in_one_line, value)) if isinstance(value, list) else str(value)
