"""`calm-rt generate`: prompts from everywhere, lines of JSON, streaming, and what interrupts it."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import lines_of, output_of

from calm_rt import checkpoint, cli
from calm_rt.data import load_tokenizer
from calm_rt.generation import Generator
from calm_rt.sequence import TokenSequence


def test_generate(folder, capsys):
    command = ["generate", "--model", folder / "calm", "--max-new-tokens", 9]
    both = [*command, "--prompt", "The cat", "A dog"]
    results = lines_of(capsys, *both, "--temperature", "1/2", "--json")
    assert [(r["index"], r["prompt"]) for r in results] == [(0, "The cat"), (1, "A dog")]
    assert all(
        len(r["ids"]) <= 9 and 8 * r["steps"] <= r["draws"] <= 208 * r["steps"] for r in results
    )
    again = lines_of(capsys, *both, "--temperature", "0.5", "--json", "--max-batch-size", 1)
    assert [r["ids"] for r in again] == [r["ids"] for r in results]
    plain = output_of(capsys, *both, "--temperature", "1/2")
    assert all(r["prompt"] + r["text"] in plain for r in results)
    options = ["--temperature", "0.9", "--method", "exact", "--max-draws", 50, "--json"]
    exact = lines_of(capsys, *both, *options, "--on-budget", "pool")
    assert all(0 <= r["acceptance"] <= 1 and r["calls"] > r["spared"] >= 0 for r in exact)
    assert all(r["acceptance"] is None for r in results)
    [first] = lines_of(capsys, *command, "--prompt", "The cat", "--json")
    streamed = output_of(capsys, *command, "--prompt", "The cat", "--stream")
    assert streamed == first["prompt"] + first["text"] + "\n"


def test_generate_from_files(folder, tmp_path, capsys, monkeypatch):
    command = ["generate", "--model", folder / "calm", "--max-new-tokens", 3, "--json"]
    expected = lines_of(capsys, *command, "--prompt", "The cat", "", "A dog")
    (tmp_path / "prompts.txt").write_text("The cat\n\nA dog\n")
    assert untimed(lines_of(capsys, *command, "--prompts", tmp_path / "prompts.txt")) == untimed(
        expected
    )
    own = tmp_path / "prompts.jsonl"  # what the command writes it can read
    own.write_text("".join(json.dumps(line) + "\n" for line in expected))
    assert untimed(lines_of(capsys, *command, "--prompts", own)) == untimed(expected)
    monkeypatch.setattr("sys.stdin", io.StringIO("The cat\n\nA dog\n"))
    assert untimed(lines_of(capsys, *command, "--prompts", "-")) == untimed(expected)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\nprompt"))
    [whole] = lines_of(capsys, *command)
    assert whole["prompt"] == "one\nprompt"


def test_lines_end_at_newlines_alone(folder, tmp_path, capsys, monkeypatch):
    """Other characters that Python splits lines at are part of a prompt."""
    prompts = ["a\u2028b", "c\x85d", "e\x0cf", "g"]
    command = ["generate", "--model", folder / "calm", "--max-new-tokens", 1, "--json", "--prompts"]
    own = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    own.write_bytes("\n".join(lines).encode())
    (tmp_path / "prompts.txt").write_bytes(("\r\n".join(prompts) + "\r\n").encode())
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*prompts, ""])))
    for source in (own, tmp_path / "prompts.txt", "-"):
        assert [line["prompt"] for line in lines_of(capsys, *command, source)] == prompts


def untimed(lines):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_bad_prompt_files(folder, fails, tmp_path, monkeypatch):
    generate = ["generate", "--model", folder / "calm", "--prompts"]
    fails([*generate, tmp_path / "absent"], "absent")
    for name in ("latin.txt", "latin.jsonl"):
        (tmp_path / name).write_bytes("caf\xe9\n".encode("latin-1"))
        fails([*generate, tmp_path / name], "prompts: expected UTF-8", str(tmp_path / name))
    (tmp_path / "empty.txt").write_bytes(b"")
    assert (
        cli.main([*map(str, generate), str(tmp_path / "empty.txt"), "--max-new-tokens", "1"]) == 0
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8"))
    fails([*generate, "-"], "prompts: expected text", "standard input")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "half \\ud83d"}')
    for half in (["--prompts", file], ["--prompt", "half \ud83d"]):
        fails([*generate[:-1], *half], r"prompts: expected text of whole characters", "half")
    for wrong in ("no json", '"text"', '{"text": "x"}', '{"prompt": 3}'):
        file.write_text(f'{{"prompt": "x"}}\n{wrong}\n')
        fails([*generate, file], "prompts", "line 2", wrong)


def test_ctrl_c_while_streaming(folder, capsys, monkeypatch, ctrl_c):
    """The text so far stays on the screen."""
    command = ["generate", "--model", folder / "calm", "--prompt", "The cat", "--stream"]
    command += ["--max-new-tokens", 40]
    whole, extend, steps = output_of(capsys, *command), TokenSequence.extend, []

    def press(self, *drawn):
        extend(self, *drawn)
        steps.append(self.result().text)
        if len(steps) == 12:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TokenSequence, "extend", press)
    assert cli.main([str(argument) for argument in command]) == 130
    output = capsys.readouterr()
    assert "interrupted" in output.err and output.out.endswith("\n")
    kept = output.out.removesuffix("\n")
    assert steps[10] and kept == "The cat" + steps[10] and whole.startswith(kept)


def test_what_fails_is_named_and_the_rest_printed(folder, tmp_path, capsys):
    shutil.copytree(folder / "calm", tmp_path / "model")
    model = checkpoint.load(tmp_path / "model")
    [token] = load_tokenizer(tmp_path / "model").encode("?")
    model.transformer.embed_tokens.weight.data[token] = torch.nan
    model.save(tmp_path / "model")
    command = ["generate", "--model", tmp_path / "model", "--prompt", "?", "The cat", "--json"]
    assert cli.main([str(argument) for argument in [*command, "--max-new-tokens", 4]]) == 2
    output = capsys.readouterr()
    damaged, whole = map(json.loads, output.out.splitlines())
    assert damaged["ids"] == [] and whole["error"] is None and whole["ids"]
    assert output.err.startswith("calm-rt generate: sequence 0, step 0: hidden states are NaN")


def test_steps_per_read(folder, capsys, fails):
    command = ["generate", "--model", folder / "calm", "--max-new-tokens", 9, "--prompt", "The cat"]
    single = lines_of(capsys, *command, "--json")
    several = lines_of(capsys, *command, "--json", "--steps-per-read", 3)
    assert [line["ids"] for line in several] == [line["ids"] for line in single]
    fails([*command, "--steps-per-read", 0], "steps_per_read: expected at least 1, got 0")


def test_a_reader_that_leaves_is_no_error(tmp_path):
    """As of `calm-rt info | head -1`."""
    read, write = os.pipe()
    os.close(read)
    result = run_info(write)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


def run_info(output) -> subprocess.CompletedProcess:
    """`calm-rt info`, whose output is held back until its end, as output into a file or pipe is."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "calm_rt", "info"]
    return subprocess.run(
        command, stdout=output, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_does_not_fit():
    with open("/dev/full", "w") as full:
        result = run_info(full)
    assert result.returncode == 2
    assert (
        result.stderr.startswith("calm-rt info: the disk is full")
        and "\n" not in result.stderr[:-1]
    )


@pytest.mark.parametrize("ending", ["ndjson", "JSONL"])
def test_prompts_in_json_lines_of_any_ending(ending, folder, tmp_path, capsys):
    file = tmp_path / f"prompts.{ending}"
    file.write_text('{"prompt": "The cat"}\n')
    command = ["generate", "--model", folder / "calm", "--max-new-tokens", 2, "--prompts", file]
    [line] = lines_of(capsys, *command, "--json")
    assert line["prompt"] == "The cat"


def test_no_memory_is_explained(folder, capsys, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Generator, "results", full)
    assert cli.main(["generate", "--model", str(folder / "calm"), "--prompt", "a"]) == 2
    assert "not enough memory; lower num_candidates" in capsys.readouterr().err
