"""Every example runs for a few steps, says what it should, and stays short."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LONGEST = 60  # lines
LOSS = r"loss -?\d+\.\d+"
RUNS = {  # options, packages, and what is printed at the end
    "plain_loop": (["--steps", "3"], [], f"language model: {LOSS} after 3 steps"),
    "hf_trainer": (["--steps", "3"], ["transformers", "accelerate"], f"{LOSS} over 3 steps"),
    "lightning_module": (["--steps", "3"], ["lightning"], f"{LOSS} after 3 steps"),
    "forecast_score": (["--steps", "150"], [], r"correlation of parts 0\.[6-9]"),  # 0.86 in truth
    "greedy_decoding": (["--steps", "8"], ["transformers"], "the same as generate: True"),
    "brier_of_causal_lm": ([], ["transformers"], r"Brier-1 to 4 +0\.00\d\d, .*\n[\d,]+ tokens/s"),
    "fsdp2": (["--steps", "3"], [], rf"{LOSS}; a process holds 165,080 of 330,160 parameters"),
}
LAUNCH = {"fsdp2": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="not in a checkout")


def test_all_examples_are_run_and_short() -> None:
    files = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert set(files) == {*RUNS, "small_calm"}
    for name, path in files.items():
        assert path.read_text().count("\n") <= LONGEST, name


@pytest.mark.parametrize("name", RUNS)
def test_example(name: str, tmp_path: Path) -> None:
    options, packages, expected = RUNS[name]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *LAUNCH.get(name, []), str(EXAMPLES / f"{name}.py"), *options]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.search(expected, run.stdout), run.stdout
