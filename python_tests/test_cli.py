"""Every command on a small corpus, and what each says to bad input: one line and exit code 2."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import SENTENCES, SHORT, SIZES, output_of

from calm_rt import checkpoint, cli
from calm_rt.data import TokenShards, load_tokenizer
from calm_rt.nn import CalmConfig
from calm_rt.options import DEFAULT_SIZES, PLAN_OPTIONS
from calm_rt.training_config import TrainingConfig
from calm_rt.training_state import STATE

COMMANDS = [
    "quickstart",
    "info",
    "tokenize",
    "train-autoencoder",
    "train",
    "generate",
    "evaluate",
    "convert",
    "bench",
    "plan",
]
GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "official_k4"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"example: calm-rt {command}" in " ".join(capsys.readouterr().out.split())


def test_help_names_the_defaults_of_training(capsys):
    fields, shown = TrainingConfig.__dataclass_fields__, set()
    for command in ("train", "train-autoencoder"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        training, _, sizes = text.partition(" training: ")[2].partition(" sizes: ")
        assert "--hidden-size" in sizes and "default" not in sizes
        found = re.findall(r"--([\w-]+) [A-Z_]+ [^(]*\(default: (\S+)\)", training)
        assert len(found) == training.count("--")
        for option, default in found:
            value = fields[option.replace("-", "_")].default
            assert default == ("none" if value is None else str(value)), option
        shown |= {option.replace("-", "_") for option, _ in found}
    assert fields.keys() - shown == {"betas", "fold_encoder"}  # for Python alone


def test_help_names_the_sizes_of_a_plan():
    config = CalmConfig()
    sizes = f"patch {config.patch_size}, vocabulary {config.vocab_size:,}, hidden "
    sizes += f"{config.hidden_size}, {config.num_hidden_layers} layers"
    assert f"the official code's sizes, {sizes}" == DEFAULT_SIZES
    targets = next(default for name, default, _ in PLAN_OPTIONS if name == "num-targets")
    assert targets == TrainingConfig().num_targets


def test_examples_parse():
    for command in COMMANDS:
        subparsers = cli.build_parser()._subparsers._group_actions[0].choices
        example = subparsers[command].epilog.removeprefix("example: calm-rt ")
        import shlex

        cli.build_parser().parse_args(shlex.split(example))


def test_info(capsys):
    report = json.loads(output_of(capsys, "info", "--json"))
    assert "energy_score" in report["ops"]
    assert "energy_score" in output_of(capsys, "info")


def test_module_is_the_command():
    command = [sys.executable, "-m", "calm_rt", "info", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ops" in json.loads(result.stdout)


# ---- the commands ----


def test_tokenize(folder, tmp_path, capsys):
    arguments = ["tokenize", folder / "corpus.jsonl", "--output", tmp_path, "--patch-size", 3]
    options = ["--tokenizer", folder / "data" / "tokenizer.model"]
    report = json.loads(output_of(capsys, *arguments, *options, "--json"))
    assert report["patch_size"] == 3 and report["vocab_size"] == 300
    assert TokenShards(tmp_path).num_tokens == report["num_tokens"]
    assert (tmp_path / "tokenizer.model").is_file()


def test_tokenize_that_fails_leaves_what_was_there(folder, fails, tmp_path):
    output, one = tmp_path / "data", tmp_path / "one.txt"
    shutil.copytree(folder / "data", output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    one.write_text("a line of text that is a single document\n" * 40)
    fails(["tokenize", one, "--output", output, "--vocab-size", 280], "none can be held out")
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_tokenize_does_not_read_what_it_wrote(folder, tmp_path, capsys):
    shutil.copy(folder / "corpus.jsonl", tmp_path)
    command = ["tokenize", tmp_path, "--output", tmp_path / "data", "--vocab-size", 300, "--json"]
    first, second = (json.loads(output_of(capsys, *command)) for _ in range(2))
    assert first == second


def test_tokenize_again_with_another_tokenizer(folder, tmp_path):
    """The one before would be read first."""
    tokenizers = pytest.importorskip("tokenizers")
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    vocabulary = {"<s>": 0, "</s>": 1, "[PAD]": 2, "a": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.save(str(source / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}
    (source / "special_tokens_map.json").write_text(json.dumps(special))
    shutil.copytree(folder / "data", output)
    command = ["tokenize", folder / "corpus.jsonl", "--output", output, "--tokenizer"]
    assert cli.main([*map(str, command), str(source / "tokenizer.json")]) == 0
    assert TokenShards(output, load_tokenizer(output)).header.vocab_size == 4
    assert not (output / "tokenizer.model").exists()
    assert (output / "special_tokens_map.json").is_file()


def test_train_resume(folder, tmp_path, capsys):
    shutil.copytree(folder / "autoencoder", tmp_path / "run")
    options = ["--output", tmp_path / "run", "--resume", "--steps", 6, "--json"]
    report = json.loads(output_of(capsys, "train-autoencoder", folder / "data", *options))
    assert report["step"] == 6 and 0 <= report["accuracy"] <= 1


def test_evaluate(folder, capsys):
    command = ["evaluate", folder / "calm", folder / "data", "--num-draws", 2, "--json"]
    report = json.loads(output_of(capsys, *command))
    assert {"brier_lm", "brier_1", "unigram_brier_1", "autoencoder_accuracy"} < set(report)
    text = output_of(capsys, "evaluate", folder / "calm", folder / "corpus.jsonl", "--num-draws", 2)
    assert "brier_lm" in text
    command = ["evaluate", folder / "autoencoder", folder / "data", "--json"]
    assert set(json.loads(output_of(capsys, *command))) == {
        "autoencoder_accuracy",
        "autoencoder_accuracy_sigma_0.3",
    }


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs the official folders in ../shared")
def test_convert(tmp_path, capsys):
    source = GOLDEN / "calm_energy"
    options = ["--dtype", "bfloat16", "--json"]
    report = json.loads(output_of(capsys, "convert", source, tmp_path, *options))
    assert report["model"] == "Calm"
    converted = checkpoint.load(tmp_path).state_dict()
    original = checkpoint.load(source).state_dict()
    assert all((original[n].bfloat16() == t).all() for n, t in converted.items())


def test_quickstart(tmp_path, capsys):
    """In the least time: everything is there, though nothing is learnt."""
    lines = [SENTENCES.replace("cat", f"cat {i % 7}") * (i % 9 + 3) for i in range(200)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in lines))
    run = tmp_path / "run"
    command = ["quickstart", "--corpus", tmp_path / "corpus.jsonl", "--output", run]
    text = output_of(capsys, *command, "--minutes", 0.1)
    metrics = json.loads((run / "metrics.json").read_text())
    wanted = {
        "autoencoder_accuracy",
        "autoencoder_accuracy_sigma_0.3",
        "conditioning_gap",
        "conditioning_gap_interval",
        "brier_1",
        "unigram_brier_1",
        "brier_lm",
        "brier_lm_interval",
        "tokens_per_second",
        "speedup_native",
        "seconds",
    }
    assert wanted <= set(metrics)
    assert (run / "curves.png").is_file()
    assert "BrierLM" in text and "temperature 1/3" in text
    command = ["generate", "--model", run, "--prompt", "The", "--max-new-tokens", 8]
    assert output_of(capsys, *command).startswith("The")


def test_quickstart_replaces_a_model_when_asked(folder, fails, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(folder / "calm", run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = ["quickstart", "--corpus", folder / "corpus.jsonl", "--output", run]
    fails(command, "output: expected a folder without a model", "overwrite")
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("calm_rt.quickstart.write_shards", interrupted)
    assert cli.main([*map(str, command), "--overwrite"]) == 130
    monkeypatch.undo()
    fails(["generate", "--model", run, "--prompt", "x"], "config.json")  # not of two runs


# ---- bad input ----


def test_usage(fails):
    fails([], "COMMAND", "--help")
    fails(["fly"], "fly")
    fails(["train", "data", "--output", "x", "--steps", "many"], "--steps", "calm-rt train --help")


def test_bad_corpus(folder, fails, tmp_path):
    empty, binary, short = (tmp_path / name for name in ("empty.txt", "binary.bin", "short.txt"))
    empty.write_text("")
    binary.write_bytes(os.urandom(5000))
    short.write_text("Too short.")
    output = ["--output", tmp_path / "out"]
    for command in (["tokenize"], ["quickstart", "--corpus"]):
        fails([*command, empty, *output], "corpus", "no text")
        fails([*command, binary, *output], "binary.bin", "utf-8")
        fails([*command, tmp_path / "absent", *output], "absent", "does not exist")
    fails(["tokenize", short, *output], "vocab_size")
    assert not (tmp_path / "out" / "shards.json").exists()
    corpus = folder / "corpus.jsonl"
    fails(["tokenize", corpus, *output, "--vocab-size", 5000], "vocab_size", "at most")
    fails(["tokenize", corpus, *output, "--vocab-size", 10], "vocab_size")
    fails(["tokenize", corpus, *output, "--patch-size", 0], "patch_size")
    fails(["tokenize", corpus, *output, "--held-out", 2], "held_out")
    fails(["tokenize", corpus, *output, "--tokenizer", tmp_path], "tokenizer")
    fails(["quickstart", "--corpus", corpus, *output, "--minutes", 0], "minutes")
    fails(["evaluate", folder / "calm", empty], "no text")


def test_bad_training_settings(folder, fails, tmp_path):
    data = folder / "data"
    start = ["train-autoencoder", data, "--output", tmp_path / "run", "--steps", 2]
    fails([*start, *SHORT, "--block-size", 100_000], "block_size", "lower it or give more text")
    fails([*start, *SHORT, "--block-size", 31], "block_size", "multiple")
    fails([*start, *SHORT, "--num-encoder-layers", 3], "num_encoder_layers", "even")
    fails([*start, *SHORT, "--learning-rate", "nan"], "learning_rate")
    fails([*start, *SHORT, "--device", "abacus"], "device", "abacus")
    fails([*start, *SHORT, "--device", "meta"], "device: expected cpu or cuda, got meta")
    fails([*start, *SHORT, "--target-accuracy", 99.9], "target_accuracy", "a share")
    fails([*start, *SHORT, "--seed", 2**64], "seed")
    fails([*start, *SHORT, "--resume", "--overwrite"], "overwrite", "--resume")
    fails(["train-autoencoder", tmp_path, "--output", tmp_path / "run"], "calm-rt tokenize")
    fails(["train-autoencoder", data, "--output", tmp_path, "--resume"], "start it without resume")
    fails(["train", data, "--output", tmp_path / "run"], "autoencoder")
    calm = ["train", data, "--output", tmp_path / "run", *SHORT, "--autoencoder"]
    fails([*calm, tmp_path], "config.json")
    fails([*calm, folder / "calm"], "a folder of Autoencoder", "Calm")
    fails([*calm, folder / "autoencoder", "--num-attention-heads", 5], "num_attention_heads")
    fails([*start[:3], folder / "autoencoder", *SHORT], "already holds a run", "resume")
    resume = ["train-autoencoder", data, "--output", folder / "autoencoder", "--resume"]
    fails([*resume, "--hidden-size", 32], "hidden_size", "--resume")
    fails([*resume, "--seed", 9], "seed")
    assert not (tmp_path / "run" / STATE).exists()


def test_bad_checkpoints(folder, fails, tmp_path):
    for damage in ("truncated", "foreign"):
        broken = tmp_path / damage
        shutil.copytree(folder / "calm", broken)
        file = broken / "model.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"PK" * 500)
        fails(["generate", "--model", broken, "--prompt", "x"], "model.safetensors", "damaged")
        fails(["evaluate", broken, folder / "data"], "damaged")
        fails(["convert", broken, tmp_path / "out"], "damaged")
        (broken / STATE).write_bytes(whole[:100])
        run = ["train", folder / "data", "--output", broken, "--resume"]
        fails(run, STATE)
    fails(["generate", "--model", tmp_path / "absent", "--prompt", "x"], "absent")
    fails(
        ["generate", "--model", folder / "autoencoder", "--prompt", "x"],
        "a folder of Calm",
        "Autoencoder",
    )
    shutil.copytree(folder / "calm", tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.model").unlink()
    fails(["generate", "--model", tmp_path / "mute", "--prompt", "x"], "tokenizer")


def test_bad_requests(folder, fails):
    generate = ["generate", "--model", folder / "calm", "--prompt", "x"]
    fails([*generate, "--temperature", "0.7"], "temperature", "1/2 and 1")
    fails([*generate, "--temperature", "2"], "temperature")
    fails([*generate, "--temperature", "nan"], "temperature")
    fails([*generate, "--num-candidates", 0], "num_candidates")
    fails([*generate, "--max-new-tokens", -1], "max_new_tokens")
    fails([*generate, "--max-new-tokens", 1000], "max_position_embeddings")
    fails([*generate, "y", "--stream"], "stream")
    fails([*generate, "--prompts", "-"], "not allowed with", "--prompt")
    fails([*generate, "--method", "best"], "method")
    fails([*generate, "--max-batch-size", 0], "max_batch_size")
    prompts = ["generate", "--model", folder / "calm", "--prompts"]
    for path in (folder / "absent", folder):
        fails([*prompts, path], "prompts: expected a file that can be read", str(path))
    for size in ("inf", "nan", -1):
        convert = ["convert", folder / "calm", folder / "out", "--max-shard-size", size]
        fails(convert, "max_shard_size: expected a positive number of GB")
    fails(["plan", "--prompt-tokens", -5], "prompt_tokens")
    evaluate = ["evaluate", folder / "calm", folder / "data"]
    fails([*evaluate, "--num-draws", 1], "num_draws")
    for size in (0, 3, 10**8):
        fails([*evaluate, "--block-size", size], "block_size")
    fails([*evaluate, "--max-patches", 0], "max_patches")
    fails(
        [*evaluate, folder / "corpus.jsonl"], "data: expected one folder of token shards, or text"
    )


def test_unwritable_folder(folder, fails, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    target = blocked / "out"
    fails(["tokenize", folder / "corpus.jsonl", "--output", target, "--vocab-size", 300], "write")
    start = ["train-autoencoder", folder / "data", *SHORT, *SIZES, "--steps", 1]
    fails([*start, "--output", target], "write")
    fails(["convert", folder / "calm", target], "write")
    fails(["quickstart", "--corpus", folder / "corpus.jsonl", "--output", target], "write")


def test_full_disk(folder, fails, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for writer in ("save_file", "stream_tensors"):
        monkeypatch.setattr(f"calm_rt.tensor_files.{writer}", full)
    start = ["train-autoencoder", folder / "data", *SHORT, *SIZES, "--steps", 2]
    fails([*start, "--output", tmp_path], "the disk is full", "elsewhere")
    fails(["convert", folder / "calm", tmp_path / "out"], "the disk is full")


def test_ctrl_c_in_training(folder, tmp_path, capsys, monkeypatch):
    seen = TokenShards.train_batch

    def press(self, step, *arguments, **options):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return seen(self, step, *arguments, **options)

    monkeypatch.setattr(TokenShards, "train_batch", press)
    start = ["train-autoencoder", str(folder / "data"), "--output", str(tmp_path), *SHORT, *SIZES]
    assert cli.main([*start, "--steps", "50"]) == 130
    assert "resume" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    command = ["train-autoencoder", folder / "data", "--output", tmp_path, "--resume"]
    report = json.loads(output_of(capsys, *command, "--steps", 6, "--json"))
    assert report["step"] == 6


def test_ctrl_c_elsewhere(capsys, monkeypatch):
    def press(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", press)
    assert cli.main(["info"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_defects_are_not_hidden(monkeypatch):
    def crash(_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli, "_info", crash)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["info"])
