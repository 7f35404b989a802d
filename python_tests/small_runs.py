"""Commands on a small corpus, shared by the tests of the command line."""

import json
from pathlib import Path

from calm_rt import cli

SHORT = [
    "--batch-size",
    "4",
    "--block-size",
    "32",
    "--evaluation-blocks",
    "2",
    "--warmup-steps",
    "2",
]
SIZES = ["--hidden-size", "16", "--intermediate-size", "32"]
SENTENCES = "The cat sat on the mat. A dog ran to the door! Who is there? It was the wind.\n"


def make_runs(folder: Path) -> None:
    """A corpus, its shards, an autoencoder and a CALM of a few steps."""
    lines = [json.dumps({"text": SENTENCES[i % 40 :] * (i % 5 + 1)}) for i in range(60)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    data, autoencoder, calm = (str(folder / name) for name in ("data", "autoencoder", "calm"))
    options = ["--vocab-size", "300", "--patch-size", "2", "--held-out", "0.3"]
    assert cli.main(["tokenize", str(folder / "corpus.jsonl"), "--output", data, *options]) == 0
    options = [*SIZES, "--latent-size", "8", "--steps", "4", *SHORT]
    assert cli.main(["train-autoencoder", data, "--output", autoencoder, *options]) == 0
    options = [
        *SIZES,
        "--num-hidden-layers",
        "1",
        "--num-attention-heads",
        "2",
        "--noise-size",
        "4",
    ]
    options += ["--num-mlp-layers", "1", "--num-samples", "2", "--steps", "4", *SHORT]
    options += ["--max-position-embeddings", "64", "--autoencoder", autoencoder]
    assert cli.main(["train", data, "--output", calm, *options]) == 0


def output_of(capsys, *arguments):
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def lines_of(capsys, *arguments):
    return [json.loads(line) for line in output_of(capsys, *arguments).splitlines()]
