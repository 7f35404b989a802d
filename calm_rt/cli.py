"""The command line: `calm-rt` and `python -m calm_rt`.

Arguments stand here and in options.py, what the commands do in commands.py, which is imported when
a command runs.
Exit codes: 0 done, 2 an error that one line explains, 130 interrupted, 141 nobody reads on.
"""

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from calm_rt.options import (
    AUTOENCODER_OPTIONS,
    AUTOENCODER_TRAINING,
    DEFAULT_SIZES,
    DTYPES,
    LAYOUTS,
    MODEL_OPTIONS,
    MODEL_TRAINING,
    PLAN_OPTIONS,
    PLAN_SIZES,
    SAMPLING_OPTIONS,
)

# in errors of torch and of the extension that no class tells from others
OUT_OF_MEMORY = ("DefaultCPUAllocator", "not enough memory", "Storage size calculation overflowed")
# errors of modules that are not imported here, so that a broken one of them still gives a message
EXPLAINED = {"NativeUnavailable", "OutOfMemoryError", "SafetensorError", "TrainingDiverged"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    options = build_parser().parse_args(arguments)
    name = f"calm-rt {options.command}"
    try:
        if options.command == "info":
            _info(options.json)
        else:
            from calm_rt import commands

            if getattr(options, "hub", False):
                commands.fetch(options)
            getattr(commands, options.command.replace("-", "_"))(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # else what fails would fail at the end, behind all handlers
    except KeyboardInterrupt as interrupt:
        print(f"\n{name}: interrupted{f'; {interrupt}' if interrupt.args else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read has what it wanted, as of `head`
        _drop_output()
        return 141
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        print(f"{name}: {message}", file=sys.stderr)
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:  # of a full disk: what is left goes nowhere
            _drop_output()
        return 2
    return 0


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="calm-rt",
        description="Continuous autoregressive language models: train, generate, evaluate.",
        epilog="calm-rt COMMAND --help shows the options of a command and an example",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_quickstart(commands)
    _add_info(commands)
    _add_tokenize(commands)
    _add_train_autoencoder(commands)
    _add_train(commands)
    _add_generate(commands)
    _add_evaluate(commands)
    _add_convert(commands)
    _add_bench(commands)
    _add_plan(commands)
    return parser


def _add_quickstart(commands) -> None:
    command = _command(
        commands,
        "quickstart",
        "train an autoencoder and a CALM on real text, evaluate them and write with them",
        "calm-rt quickstart --minutes 5",
    )
    command.add_argument(
        "--corpus",
        nargs="+",
        metavar="PATH",
        help="text files, folders or .jsonl (default: the source of Python's standard library)",
    )
    command.add_argument("--minutes", type=float, default=5.0, help="for everything (default: 5)")
    command.add_argument("--output", default="runs/quickstart", help="default: runs/quickstart")
    command.add_argument("--overwrite", action="store_true", help="replace the model in --output")
    command.add_argument("--seed", type=int, default=0, help="default: 0")
    _add_json(command)


def _add_info(commands) -> None:
    command = _command(
        commands,
        "info",
        "environment, build, and for each op whether it is native or why not",
        "calm-rt info --json",
    )
    _add_json(command)


def _add_tokenize(commands) -> None:
    command = _command(
        commands,
        "tokenize",
        "turn text into a tokenizer and token shards",
        "calm-rt tokenize corpus.txt more.jsonl --output data --vocab-size 4096 --patch-size 4",
    )
    command.add_argument("corpus", nargs="+", help="text files, folders or .jsonl files")
    command.add_argument("--output", required=True, help="folder for shards and tokenizer")
    command.add_argument("--patch-size", type=int, default=4, help="tokens a patch (default: 4)")
    command.add_argument(
        "--vocab-size", type=int, default=4096, help="of a new tokenizer (default: 4096)"
    )
    command.add_argument("--tokenizer", help="use this one instead of training one")
    command.add_argument(
        "--held-out", type=float, default=0.05, help="share of documents kept back (default: 0.05)"
    )
    _add_json(command)


def _add_train_autoencoder(commands) -> None:
    command = _command(
        commands,
        "train-autoencoder",
        "train the autoencoder that turns a patch of tokens into a vector and back",
        "calm-rt train-autoencoder data --output runs/autoencoder --hidden-size 128 --steps 2000",
    )
    command.add_argument("data", help="folder that calm-rt tokenize made")
    _add_training(command, AUTOENCODER_TRAINING)
    _add_options(command, "sizes", AUTOENCODER_OPTIONS)


def _add_train(commands) -> None:
    command = _command(
        commands,
        "train",
        "train a CALM on a trained autoencoder (several processes: torchrun -m calm_rt train ...)",
        "calm-rt train data --autoencoder runs/autoencoder --output runs/calm --hidden-size 256",
    )
    command.add_argument("data", help="folder that calm-rt tokenize made")
    command.add_argument("--autoencoder", help="folder of a trained one (not with --resume)")
    _add_training(command, MODEL_TRAINING)
    _add_options(command, "sizes", MODEL_OPTIONS)


def _add_generate(commands) -> None:
    command = _command(
        commands,
        "generate",
        "continue prompts",
        "calm-rt generate --model runs/quickstart --prompt 'def main(' --temperature 1/3 --stream",
    )
    command.add_argument("--model", required=True, help="folder of a CALM")
    prompts = command.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt",
        nargs="+",
        metavar="TEXT",
        help="default: all of standard input, or an empty text where that is a terminal",
    )
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help='one prompt a line (- for standard input); in a .jsonl file {"prompt": TEXT} a line',
    )
    command.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    command.add_argument("--stop", action="append", default=[], help="text that ends the writing")
    command.add_argument(
        "--constrain",
        action="store_true",
        help="left-over tokens of a prompt begin the first new patch (default: BOS before it)",
    )
    command.add_argument(
        "--max-batch-size", type=int, default=32, help="sequences at once (default: 32)"
    )
    command.add_argument(
        "--batch-invariant", action="store_true", help="a text does not depend on its batch: slower"
    )
    command.add_argument(
        "--steps-per-read",
        type=int,
        help="steps before a look at what was drawn (default: 8 on a GPU, 1 on a CPU)",
    )
    command.add_argument("--tokenizer", help="file or folder (default: the model's folder)")
    command.add_argument("--stream", action="store_true", help="print text as it comes (1 prompt)")
    _add_device(command)
    _add_hub(command)
    command.add_argument("--json", action="store_true", help="one JSON object a line and prompt")
    _add_options(command, "sampling", SAMPLING_OPTIONS)


def _add_evaluate(commands) -> None:
    command = _command(
        commands,
        "evaluate",
        "BrierLM and reconstruction of a CALM, or reconstruction of an autoencoder",
        "calm-rt evaluate runs/quickstart runs/quickstart/data --max-patches 2000",
    )
    command.add_argument("model", help="folder of a CALM or an autoencoder")
    command.add_argument(
        "data", nargs="+", help="a folder of token shards (their held-out documents), or text"
    )
    command.add_argument("--num-draws", type=int, default=8, help="of each patch (default: 8)")
    command.add_argument(
        "--block-size", type=int, help="tokens of a window (default: the model's longest)"
    )
    command.add_argument("--max-patches", type=int, help="stop after so many (default: all)")
    command.add_argument("--seed", type=int, default=0, help="default: 0")
    command.add_argument("--tokenizer", help="for text (default: the model's folder)")
    _add_device(command)
    _add_hub(command)
    _add_json(command)


def _add_convert(commands) -> None:
    command = _command(
        commands,
        "convert",
        "read an official checkpoint and write it as one folder of safetensors, or back",
        "calm-rt convert CALM-M calm-m --dtype bfloat16",
    )
    command.add_argument("source", help="folder with pytorch_model.bin or model.safetensors")
    command.add_argument("output", help="folder to write")
    command.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="calm_rt",
        help="official: pytorch_model.bin and, for a CALM, its autoencoder's own folder",
    )
    command.add_argument("--max-shard-size", type=float, metavar="GB", help="of layout calm_rt")
    command.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    _add_hub(command)
    _add_json(command)


def _add_bench(commands) -> None:
    command = _command(
        commands,
        "bench",
        "time every op and whole steps against the official code, torch.compile and torch's own",
        "calm-rt bench --ops energy_score noise --report runs/bench",
    )
    command.add_argument("--ops", nargs="+", metavar="OP", help="default: all that have a kernel")
    command.add_argument(
        "--report",
        "--output",
        dest="report",
        metavar="DIR",
        default="runs/bench",
        help="gets report.md, results.json and pictures (default: runs/bench)",
    )
    command.add_argument(
        "--quick",
        action="store_true",
        help="fewer rounds, without torch.compile, memory and the longest cases",
    )
    command.add_argument(
        "--steps",
        action="store_true",
        help="training steps and the choice of a patch too where --quick or --ops leave them out",
    )
    command.add_argument(
        "--sweep", action="store_true", help="also time each op from one row to many"
    )
    command.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="measure nothing: compare two folders that this command wrote",
    )
    _add_device(command)
    _add_json(command)


def _add_plan(commands) -> None:
    command = _command(
        commands,
        "plan",
        "predict memory and arithmetic of generation and training, without a run",
        "calm-rt plan --model runs/quickstart --batch-size 8 --num-candidates 200",
    )
    sizes = command.add_mutually_exclusive_group()
    sizes.add_argument("--model", help=f"folder of a CALM (default: {DEFAULT_SIZES})")
    sizes.add_argument("--config", metavar="FILE", help="a config.json alone")
    for name, default, summary in PLAN_OPTIONS:
        summary = f"{summary} (default: {default})"
        command.add_argument(f"--{name}", type=int, default=default, help=summary)
    command.add_argument("--dtype", choices=DTYPES, help="of generation (default: as stored)")
    command.add_argument(
        "--gemm-rate", type=float, help="FLOP a second (default: measured here in a moment)"
    )
    _add_hub(command)
    _add_json(command)
    _add_options(command, "sizes that replace those of the model", PLAN_SIZES)


def _command(commands, name: str, summary: str, example: str) -> Parser:
    return commands.add_parser(
        name, help=summary, description=summary, epilog=f"example: {example}"
    )


def _add_training(command: Parser, settings: list[tuple[str, type, str]]) -> None:
    command.add_argument("--output", required=True, help="folder for model, state, log and curves")
    command.add_argument(
        "--resume", action="store_true", help="continue the run in --output with its settings"
    )
    command.add_argument("--overwrite", action="store_true", help="replace the run in --output")
    _add_device(command)
    _add_json(command)
    _add_options(command, "training", settings)


def _add_options(command: Parser, title: str, options: list[tuple[str, type, str]]) -> None:
    """Options without defaults: absent ones come from the configuration or the resumed run."""
    group = command.add_argument_group(title)
    for name, kind, summary in options:
        group.add_argument(f"--{name}", type=kind, help=summary, default=argparse.SUPPRESS)


def _add_device(command: Parser) -> None:
    command.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")


def _add_hub(command: Parser) -> None:
    command.add_argument(
        "--hub",
        action="store_true",
        help="take OWNER/NAME for a repository of the Hugging Face hub where no such folder is",
    )


def _add_json(command: Parser) -> None:
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def _info(as_json: bool) -> None:
    """Stands here and imports no more than it needs, for it is what a broken installation runs."""
    from calm_rt import info

    report = info()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for name, value in report.items():
        if not isinstance(value, dict):
            print(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
            continue
        print(f"{name}:")
        width = max(map(len, value), default=0)
        for key, entry in value.items():
            routes = [entry] if isinstance(entry, str) else [f"{k}: {v}" for k, v in entry.items()]
            for number, route in enumerate(routes):
                print(f"  {'' if number else key:{width}}  {route}")


def _explain(error: Exception) -> str | None:
    """An error that the user can do something about, in one line; None for a defect of ours."""
    text = " ".join(str(error).split())
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
    if full:
        return f"the disk is full ({text}); free some space or write elsewhere"
    if isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY):
        return f"not enough memory; lower num_candidates, num_draws or batch sizes ({text[:200]})"
    if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
        return f"{text}; choose a folder that you can write"
    if isinstance(error, ValueError | IndexError | OSError | ImportError | MemoryError):
        return text or type(error).__name__
    return text if type(error).__name__ in EXPLAINED else None
