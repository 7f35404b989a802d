"""Every example runs for a few steps, says what it should, and stays short."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch as safetensors
import torch

import calm_rt

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LONGEST = 60  # lines
LOSS = r"loss -?\d+\.\d+"
RUNS = {  # options, packages, and what is printed at the end
    "plain_loop": (["--steps", "3"], [], f'{LOSS} after 3 steps\n"""A CALM in one file'),
    "hf_trainer": (["--steps", "3"], ["transformers", "accelerate"], f"{LOSS} over 3 steps"),
    "lightning_module": (["--steps", "3"], ["lightning"], f"{LOSS} after 3 steps"),
    "forecast_score": (["--steps", "150"], [], r"correlation of parts 0\.[6-9]"),  # 0.86 in truth
    "greedy_decoding": (["--steps", "8"], ["transformers"], "the same as generate: True"),
    "brier_of_causal_lm": ([], ["transformers"], r"Brier-1 to 4 +0\.00\d\d, .*\n[\d,]+ tokens/s"),
    "fsdp2": (
        ["--steps", "3", "--output", "model"],
        [],
        rf"{LOSS}; a process holds 165,080 of 330,160 parameters",
    ),
}
LAUNCH = {"fsdp2": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="not in a checkout")


def test_all_examples_are_run_and_short() -> None:
    files = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert set(files) == {*RUNS, "small_calm"}
    for name, path in files.items():
        assert path.read_text().count("\n") <= LONGEST, name


def run(name: str, folder: Path, *options: str, driver: tuple[str, ...] = ()) -> str:
    """What the example prints."""
    for package in RUNS[name][1]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *LAUNCH.get(name, driver), str(EXAMPLES / f"{name}.py"), *options]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Use `cache` instead" not in result.stderr  # transformers will drop the older name
    return result.stdout


@pytest.mark.parametrize("name", RUNS)
def test_example(name: str, tmp_path: Path) -> None:
    options, _, expected = RUNS[name]
    printed = run(name, tmp_path, *options)
    assert re.search(expected, printed), printed
    if name == "fsdp2":
        norms = calm_rt.load(tmp_path / "model").transformer.norm.weight
        assert not torch.equal(norms, torch.ones(64))  # trained


SEEDS = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
import small_calm
forward = small_calm.CalmForTraining.forward
def noted(self, input_ids, *seed):
    print("seed", *seed, flush=True)  # none in evaluation
    return forward(self, input_ids, *seed)
small_calm.CalmForTraining.forward = noted
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["hf_trainer", "lightning_module"])
def test_microbatches_of_a_step_have_noise_of_their_own(name: str, tmp_path: Path) -> None:
    options = ("--steps", "3", "--accumulate", "4")
    printed = run(name, tmp_path, *options, driver=("-c", SEEDS))
    assert re.findall(r"seed (\d+)", printed) == [str(count) for count in range(12)]


def test_trainer_resumes_from_its_checkpoint_and_evaluates(tmp_path: Path) -> None:
    for steps, first in (("2", 0), ("4", 2)):
        options = ("--steps", steps, "--output", "run")
        printed = run("hf_trainer", tmp_path, *options, driver=("-c", SEEDS))
        seeds = [str(seed) for seed in range(first, int(steps))]
        assert re.findall(r"seed (\d+)", printed) == seeds
        assert (tmp_path / "run" / f"checkpoint-{steps}" / "model.safetensors").is_file()
        assert re.search(r"eval_loss\W+\d", printed) and f"over {steps} steps" in printed


def test_state_dict_of_the_small_model_holds_no_tensor_twice(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    model, other = (importlib.import_module("small_calm").CalmForTraining() for _ in range(2))
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert safetensors.load_model(other, tmp_path / "model.safetensors") == (set(), [])
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    autoencoder = other.calm.ae_model
    assert autoencoder.decoder.lm_head_weight is autoencoder.encoder.embed_tokens.weight


def test_greedy_decoding_of_a_head_with_a_bias(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 1, "pad_token_id": None}  # which 5.0 reads and does not set
    config = transformers.PhiConfig(vocab_size=500, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.bias)  # decides, where a random model's logits are small
    model.save_pretrained(tmp_path)
    printed = run("greedy_decoding", tmp_path, "--model", str(tmp_path), "--steps", "4")
    assert RUNS["greedy_decoding"][2] in printed
