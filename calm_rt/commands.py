"""What each command of the command line does; cli.py holds the arguments."""

import json
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from calm_rt import checkpoint, evaluation, training
from calm_rt.arguments import (
    device_of,
    documents_of,
    given_options,
    load_model,
    prompts_of,
    run_settings,
    sizes_of,
    switches_of,
    tokenizer_of,
)
from calm_rt.atomic import scratch_folder
from calm_rt.curves import finite, read_log
from calm_rt.data import (
    load_tokenizer,
    read_documents,
    train_tokenizer,
    write_shards,
)
from calm_rt.generation import Generation, Generator
from calm_rt.hub import BESIDE_TOKENIZERS, local_folder
from calm_rt.model_folder import copy_file, copy_tokenizer, drop_tokenizers
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig
from calm_rt.ops.check import check, check_int
from calm_rt.options import AUTOENCODER_OPTIONS, MODEL_OPTIONS, SAMPLING_OPTIONS
from calm_rt.training_state import TrainingState


def fetch(options: Namespace) -> None:
    """Puts the folders of repositories of the hub in place of their names."""
    for name in ("model", "tokenizer", "source"):
        value = getattr(options, name, None)
        if value is not None:
            folder = local_folder(value, hub=True, tokenizer=name == "tokenizer")
            setattr(options, name, str(folder))


def quickstart(options: Namespace) -> None:
    from calm_rt.quickstart import run_quickstart

    metrics = run_quickstart(
        options.output, options.corpus, options.minutes, options.seed, options.overwrite
    )
    if options.json:
        _print_json(metrics)


def tokenize(options: Namespace) -> None:
    output = Path(options.output)
    check(options.patch_size >= 1, "patch_size", "at least 1", options.patch_size)
    check(0 <= options.held_out < 1, "held_out", "a share in [0, 1)", options.held_out)
    with scratch_folder(output, "output") as scratch:  # the old tokenizer stays with its shards
        if options.tokenizer is None:
            tokenizer = train_tokenizer(options.corpus, options.vocab_size, scratch)
        else:
            tokenizer = load_tokenizer(options.tokenizer)
        documents = read_documents(options.corpus)
        shards = write_shards(documents, tokenizer, output, options.patch_size, options.held_out)
        copy_tokenizer(tokenizer.path.parent, output)
        target = output / f"tokenizer{tokenizer.path.suffix}"
        if tokenizer.path.resolve() != target.resolve():  # under any name
            copy_file(tokenizer.path, target)
    drop_tokenizers(output, [target.name, *BESIDE_TOKENIZERS])
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
    shards, config, settings = run_settings(options, AutoencoderConfig, AUTOENCODER_OPTIONS)
    training.train_autoencoder(config, shards, options.output, settings, **switches_of(options))
    _report_run(options)


def train(options: Namespace) -> None:
    given, sizes = options.autoencoder is not None, {}
    expected = "none with --resume" if options.resume else "the folder of a trained one"
    check(given != options.resume, "autoencoder", expected, options.autoencoder)
    autoencoder = load_model(options.autoencoder, Autoencoder, "cpu") if given else None
    if autoencoder:
        sizes["latent_size"] = autoencoder.config.latent_size
    shards, config, settings = run_settings(options, CalmConfig, MODEL_OPTIONS, **sizes)
    switches = switches_of(options)
    training.train(config, autoencoder, shards, options.output, settings, **switches)
    _report_run(options)


def generate(options: Namespace) -> None:
    model, tokenizer = load_model(options.model, Calm, device_of(options)), tokenizer_of(options)
    generator = Generator(
        model,
        tokenizer,
        max_batch_size=options.max_batch_size,
        batch_invariant=options.batch_invariant,
        steps_per_read=options.steps_per_read,
    )
    prompts = prompts_of(options)
    arguments = {
        "max_new_tokens": options.max_new_tokens,
        "stop": options.stop,
        "prompt": "constrain" if options.constrain else "align",
        **given_options(options, SAMPLING_OPTIONS),
    }
    if options.stream:
        check(len(prompts) == 1, "stream", "one prompt", len(prompts))
        check(not options.json, "stream", "no --json", "both")
        pieces = generator.stream(prompts[0], **arguments)
        print(prompts[0], end="", flush=True)
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        finally:
            print(flush=True)
        return
    errors = []
    for index, result in _in_order(generator.results(prompts, **arguments)):
        if result.error:
            errors.append(result.error)
        if options.json:
            line = {"index": index, "prompt": prompts[index], **vars(result)}
            print(json.dumps(line), flush=True)
            continue
        if len(prompts) > 1:
            print(f"--- {index + 1}")
        print(prompts[index] + result.text, flush=True)
    if errors:
        raise ValueError(f"{errors[0]} ({len(errors)} of {len(prompts)} prompts)")


def evaluate(options: Namespace) -> None:
    device = device_of(options)
    check_int("num_draws", options.num_draws, 2)
    if options.max_patches is not None:
        check_int("max_patches", options.max_patches, 1)
    model = load_model(options.model, (Calm, Autoencoder), device)
    for name in ("block_size", "max_patches") if isinstance(model, Autoencoder) else ():
        got = getattr(options, name)
        check(got is None, name, "none for an autoencoder, which is measured by document", got)
    patch_size = model.config.patch_size
    window = _window_of(options, model.config) if isinstance(model, Calm) else {}
    documents, train_tokens = documents_of(options, model.config.vocab_size, patch_size)
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
    source, output = Path(options.source), Path(options.output)
    size = options.max_shard_size
    fits = size is None or 0 < size < float("inf")
    check(fits, "max_shard_size", "a positive number of GB", size)
    shard = None if size is None else max(1, int(size * 1e9))
    settings = {"layout": options.layout, "max_shard_bytes": shard, "dtype": dtype}
    converted = checkpoint.convert(source, output, **settings)
    kind = type(converted.model).__name__
    count = sum(tensor.numel() for tensor in converted.meta.values())
    report = {"model": kind, "parameters": count, "folder": options.output}
    if options.json:
        _print_json(report)
    else:
        print(f"{options.output}: {kind} with {count:,} parameters")


def bench(options: Namespace) -> None:
    from calm_rt import benchmark, report, scaling, steps

    if options.compare:
        for name in ("ops", "quick", "steps", "sweep", "device"):
            given = getattr(options, name)
            check(not given, name, "none with --compare, which measures nothing", given)
        comparison = report.compare(*map(report.read_results, options.compare))
        if options.json:
            _print_json(comparison)
        else:
            print(report.comparison_text(comparison))
        return
    device, folder = device_of(options), Path(options.report)
    cases = benchmark.benchmark_cases(options.ops)
    results: dict[str, Any] = {"machine": benchmark.machine(device), "rows": [], "sweep": []}
    results |= {"finished": False, "limits": benchmark.limits(device)}
    report.write_results(results, folder)  # a --report that cannot be written fails here
    try:
        for rows in benchmark.measure_all(cases, device, options.quick):
            results["rows"] += rows
            report.write_results(results, folder)
        with_steps = options.steps or not (options.quick or options.ops)
        for rows in steps.measure_steps(device, options.quick) if with_steps else ():
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


def plan(options: Namespace) -> None:
    from calm_rt import planning

    config, autoencoder_config, dtype = sizes_of(options)
    if options.dtype:
        dtype = getattr(torch, options.dtype)
    texts = ("batch_size", "prompt_tokens", "max_new_tokens", "num_candidates", "prefill_chunk")
    rate = options.gemm_rate
    check(rate is None or 0 < rate < float("inf"), "gemm_rate", "a positive number", rate)
    generation = planning.plan_generation(
        config,
        autoencoder_config,
        dtype=dtype,
        **{name: getattr(options, name) for name in texts},
    )
    training = planning.plan_training(
        config,
        autoencoder_config,
        batch_size=options.batch_size,
        block_size=options.block_size,
        num_targets=options.num_targets,
    )
    rate = planning.gemm_rate(dtype) if rate is None else rate
    report = {"gemm_rate": rate, "generation": generation, "training": training}
    if options.json:
        _print_json(report)
    else:
        print(planning.plan_table(report))


def _window_of(options: Namespace, config: CalmConfig) -> dict[str, int | None]:
    size = config.patch_size
    longest = config.max_position_embeddings * size
    block_size = longest if options.block_size is None else options.block_size
    fits = 0 < block_size <= longest and block_size % size == 0
    expected = f"a multiple of patch_size {size}, at most the model's longest {longest}"
    check(fits, "block_size", expected, block_size)
    return {"block_size": block_size, "max_patches": options.max_patches}


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


def _in_order(results: Iterator[tuple[int, Generation]]) -> Iterator[tuple[int, Generation]]:
    """Results by index, each as soon as those before it are there; none is lost at an error."""
    waiting, following = {}, 0
    try:
        for index, result in results:
            waiting[index] = result
            while following in waiting:
                yield following, waiting.pop(following)
                following += 1
    except (Exception, KeyboardInterrupt):
        yield from sorted(waiting.items())
        raise


def _print_json(value: Any) -> None:
    print(json.dumps(finite(value), indent=2))


def _in_one_line(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, tuple):
        return " to ".join(map(_in_one_line, value))
    return ", ".join(map(_in_one_line, value)) if isinstance(value, list) else str(value)
