"""The whole path in minutes on a CPU: text, tokenizer, autoencoder, CALM, measures, samples."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calm_rt import evaluation, official, ops
from calm_rt.brier import BrierLM
from calm_rt.curves import CURVES, finite, plot_curves, read_log
from calm_rt.data import (
    Tokenizer,
    TokenShards,
    default_corpus,
    read_documents,
    train_tokenizer,
    write_shards,
)
from calm_rt.generation import Generator
from calm_rt.model_folder import CONFIG
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig
from calm_rt.ops.check import check, check_seed
from calm_rt.tensor_files import write_json
from calm_rt.threads import faster_threads, restored_threads
from calm_rt.training import TrainingConfig, train, train_autoencoder

VOCAB_SIZES = (1024, 512, 320)  # the first that the corpus can give
PATCH_SIZE = 2
BLOCK_SIZE = 256  # tokens
AUTOENCODER_SHARE = 0.3  # of the time, at most
CLOSING_SHARE = 0.1  # of the time, kept for measures and samples
TARGET_ACCURACY = 0.9995  # of held-out tokens; the promise is 0.999
EVALUATION_BLOCKS = 64
FEWEST_DOCUMENTS = 8  # for an interval over documents
DOCUMENT_BLOCKS = 4  # of each held-out document at most, in the Brier scores
TEMPERATURES = ("1", "1/2", "1/3")

# of the models; initial weights of about 1 / sqrt(hidden_size), for 0.02 is made for larger ones
AUTOENCODER_SIZES = {
    "patch_size": PATCH_SIZE,
    "hidden_size": 128,
    "intermediate_size": 320,
    "latent_size": 32,
    "initializer_range": 0.06,
}
CALM_SIZES = {
    "patch_size": PATCH_SIZE,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "latent_size": AUTOENCODER_SIZES["latent_size"],
    "num_mlp_layers": 3,
    "num_samples": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.06,
}
BATCH_SIZES = {"autoencoder": 16, "calm": 8}  # blocks a step
RANDOM_TOKENS = 0.05  # else bytes that only held-out documents have do not come back
SAMPLE_TOKENS = 160


def run_quickstart(
    output: str | Path,
    corpus: Sequence[str | Path] | None = None,
    minutes: float = 5.0,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Trains an autoencoder and a CALM on text, measures them, and prints a table and samples.

    output: gets the model (config.json, model.safetensors, tokenizer.model), log.jsonl, curves.png,
        metrics.json, and the folders data and autoencoder.
    corpus: text files, folders or .jsonl; None for the source of Python's standard library.
    minutes: for everything; the language model trains in what the other stages leave.
    overwrite: whether to replace a model in output, whose config.json goes with its tokenizer.
    returns: what metrics.json holds.
    raises: ValueError and OSError for a corpus or a folder that cannot be used, KeyboardInterrupt.
    """
    check(0 < minutes < float("inf"), "minutes", "a positive number", minutes)
    seed, output = check_seed(seed), Path(output)
    model_there = (output / CONFIG).exists()
    free = "a folder without a model (or overwrite, to replace it)"
    check(overwrite or not model_there, "output", free, output)
    start = time.perf_counter()

    def stage(name: str) -> None:
        print(f"[{time.perf_counter() - start:5.1f} s] {name}", flush=True)

    stage("tokenizer and token shards")
    tokenizer, shards = prepare_data(default_corpus() if corpus is None else list(corpus), output)
    documents = shards.header.num_documents
    stage(f"autoencoder, on {shards.num_tokens:,} tokens in {documents:,} documents")
    folder = output / "autoencoder"
    autoencoder = prepare_autoencoder(tokenizer, shards, folder, AUTOENCODER_SHARE * minutes, seed)
    spent = (time.perf_counter() - start) / 60
    stage("language model")
    budget = max((1 - CLOSING_SHARE) * minutes - spent, 0.05 * minutes)
    model = _train_model(autoencoder, shards, output, budget, seed)
    stage("measures")
    metrics, milliseconds = _speedup(model, shards, seed)
    with restored_threads() as threads:
        [ids] = shards.held_out_batches(4, _common(shards, seed)["block_size"], limit=1)
        faster_threads(lambda: model.hidden_states(ids), threads)
        more, scores = _measure(model, shards, output, seed)
        metrics |= more
        plot_curves({"Autoencoder": output / "autoencoder", "Calm": output}, output / CURVES)
        _print_table(metrics, scores, milliseconds)
        stage("samples")
        _print_samples(model, tokenizer, shards, seed)
    metrics["seconds"] = time.perf_counter() - start
    write_json(output / "metrics.json", finite(metrics))
    stage(f"done; the model is in {output}: calm-rt generate --model {output} --prompt 'The '")
    return metrics


def prepare_data(paths: list[str | Path], output: Path) -> tuple[Tokenizer, TokenShards]:
    """The first stage: a tokenizer of the text, in output, and its tokens, in output/data."""
    tokenizer = _train_tokenizer(paths, output)
    (output / CONFIG).unlink(missing_ok=True)  # of a model that another tokenizer is for
    return tokenizer, write_shards(read_documents(paths), tokenizer, output / "data", PATCH_SIZE)


def _train_tokenizer(paths: list[str | Path], output: Path) -> Tokenizer:
    for size in VOCAB_SIZES[:-1]:
        try:
            return train_tokenizer(paths, size, output)
        except ValueError as error:
            if not str(error).startswith("vocab_size"):
                raise
    return train_tokenizer(paths, VOCAB_SIZES[-1], output)


def prepare_autoencoder(
    tokenizer: Tokenizer, shards: TokenShards, output: Path, minutes: float, seed: int
) -> Autoencoder:
    """The second stage: an autoencoder trained to TARGET_ACCURACY, or for so many minutes."""
    config = AutoencoderConfig(
        vocab_size=tokenizer.vocab_size,
        **AUTOENCODER_SIZES,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    training = TrainingConfig(
        steps=100_000,
        minutes=minutes,
        batch_size=BATCH_SIZES["autoencoder"],
        learning_rate=4e-3,
        warmup_steps=50,
        evaluate_every=50,
        evaluation_blocks=EVALUATION_BLOCKS,
        target_accuracy=TARGET_ACCURACY,
        random_tokens=RANDOM_TOKENS,
        **_common(shards, seed),
    )
    return train_autoencoder(config, shards, output, training, overwrite=True)


def _train_model(
    autoencoder: Autoencoder, shards: TokenShards, output: Path, minutes: float, seed: int
) -> Calm:
    config = CalmConfig(
        vocab_size=autoencoder.config.vocab_size,
        **CALM_SIZES,
        pad_token_id=autoencoder.config.pad_token_id,
        bos_token_id=autoencoder.config.bos_token_id,
        eos_token_id=autoencoder.config.eos_token_id,
    )
    training = TrainingConfig(
        steps=1_000_000,
        minutes=minutes,
        batch_size=BATCH_SIZES["calm"],
        learning_rate=1e-3,
        warmup_steps=50,
        evaluate_every=250,
        evaluation_blocks=24,
        **_common(shards, seed),
    )
    return train(config, autoencoder, shards, output, training, overwrite=True)


def _common(shards: TokenShards, seed: int) -> dict[str, Any]:
    """Settings of both stages; a tiny corpus gets shorter blocks."""
    smallest = min(
        shards.header.num_train_tokens, shards.num_tokens - shards.header.num_train_tokens
    )
    block_size = min(BLOCK_SIZE, smallest // PATCH_SIZE * PATCH_SIZE)
    return {
        "block_size": block_size,
        "schedule": "cosine",
        "save_every": 1_000_000,
        "seed": seed,
    }


def _measure(
    model: Calm, shards: TokenShards, output: Path, seed: int
) -> tuple[dict[str, Any], dict[str, BrierLM]]:
    """The metrics, and the Brier scores of the model and of a unigram and a bigram sampler."""
    block_size = _common(shards, seed)["block_size"]
    blocks = list(shards.held_out_batches(EVALUATION_BLOCKS, block_size, limit=4))
    documents = [ids[: DOCUMENT_BLOCKS * block_size] for ids in shards.held_out_documents()]
    if len(documents) < FEWEST_DOCUMENTS:  # too few to resample: blocks stand for documents
        documents = list(torch.cat(blocks))
    window = {"block_size": block_size}
    scores = {"CALM": evaluation.brier_lm(model, documents, num_draws=4, seed=seed, **window)}
    for name in ("unigram", "bigram"):
        sampler = getattr(evaluation, f"{name}_brier")
        scores[name] = sampler(shards.train_tokens, documents, PATCH_SIZE, **window)
    gap, interval = evaluation.conditioning_gap(model, blocks[0], seed=seed)
    accuracy = evaluation.reconstruction_accuracy
    rates = [line["tokens_per_second"] for line in read_log(output) if "loss" in line]
    metrics: dict[str, Any] = {
        "autoencoder_accuracy": accuracy(model.ae_model, blocks),
        "autoencoder_accuracy_sigma_0.3": accuracy(model.ae_model, blocks, noise_std=0.3),
        "conditioning_gap": gap,
        "conditioning_gap_interval": interval,
        "brier_lm": scores["CALM"].score,
        "brier_lm_interval": scores["CALM"].interval,
        "tokens_per_second": statistics.median(rates),
    }
    for name, score in scores.items():
        prefix = "" if name == "CALM" else f"{name}_"
        metrics |= {f"{prefix}brier_{n}": 100 * value for n, value in enumerate(score.brier, 1)}
        metrics[f"{prefix}brier_lm"] = score.score
    return metrics, scores


def _speedup(
    model: Calm, shards: TokenShards, seed: int
) -> tuple[dict[str, Any], tuple[float, float]]:
    """How much faster the energy score runs here than the official eager formula, forward and
    backward on the shapes just trained; and the milliseconds of both."""
    settings = _common(shards, seed)
    ids, _ = shards.train_batch(0, 4, settings["block_size"], seed)
    with torch.no_grad():
        mean, log_std = (v.flatten(0, 1) for v in model.ae_model.encode(ids))
        hidden = model.hidden_states(ids).flatten(0, 1)
        draws = model.sample(hidden, model.config.num_samples, seed)
    draws.requires_grad_()
    arguments = (draws, mean, log_std)
    eager = _milliseconds(lambda: official.energy_score(*arguments, num_targets=100), draws)
    native = _milliseconds(lambda: ops.energy_score(*arguments, seed=seed), draws)
    return {"speedup_native": eager / native}, (eager, native)


def _milliseconds(function: Callable[[], Tensor], leaf: Tensor) -> float:
    """Median time of forward and backward."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        torch.autograd.grad(function().sum(), leaf)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def _print_table(
    metrics: dict[str, Any], scores: dict[str, BrierLM], milliseconds: tuple[float, float]
) -> None:
    low, high = metrics["conditioning_gap_interval"]
    speedup = metrics["speedup_native"]
    print(f"""
autoencoder, held-out tokens right     {metrics["autoencoder_accuracy"]:9.2%}
  with noise 0.3 on the latent vector  {metrics["autoencoder_accuracy_sigma_0.3"]:9.2%}
conditioning gap                       {metrics["conditioning_gap"]:9.3f}  ({low:.3f} to {high:.3f})
training speed, tokens a second        {metrics["tokens_per_second"]:9,.0f}
energy score, official eager           {milliseconds[0]:9.2f} ms
energy score, here                     {milliseconds[1]:9.2f} ms  ({speedup:.0f} x)

held-out text   BrierLM  (95 % interval)    Brier-1  Brier-2  Brier-3  Brier-4""")
    for name, score in scores.items():
        low, high = score.interval
        brier = "".join(f"{100 * value:9.2f}" for value in score.brier)
        print(f"{name:15} {score.score:7.2f}  ({low:5.2f} to {high:5.2f}){brier}")
    print(flush=True)


def _print_samples(model: Calm, tokenizer: Tokenizer, shards: TokenShards, seed: int) -> None:
    """Continuations of the beginning of the longest held-out document, at each temperature."""
    document = max(shards.held_out_documents(), key=len)[:200].tolist()
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    prompt = [token for token in document if token not in special][:40]
    generator = Generator(model, tokenizer)
    print(f"prompt: {tokenizer.decode(prompt)!r}")
    for temperature in TEMPERATURES:
        options = {"temperature": temperature, "seed": seed}
        [sample] = generator.generate([prompt], max_new_tokens=SAMPLE_TOKENS, **options)
        speed = len(sample.ids) / sample.seconds
        print(f"--- temperature {temperature} ({speed:.0f} tokens a second)\n{sample.text}")
