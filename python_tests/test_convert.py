"""Folders from the official layout to ours and back, in shards, from the hub, without a network."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import ALIAS, EMBEDDING, GOLDEN, assert_same, assert_whole, needs_golden

import calm_rt
from calm_rt import checkpoint, cli, tensor_files
from calm_rt import hub as hub_module
from calm_rt.data import train_tokenizer
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig

SIZES = {"patch_size": 2, "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24}
INDEX = f"{checkpoint.TENSORS}.index.json"


@pytest.fixture
def autoencoder(tmp_path):
    model = Autoencoder(AutoencoderConfig(**SIZES, latent_size=8)).eval()
    model.save(tmp_path / "autoencoder")
    return model


def convert(*arguments: object) -> None:
    assert cli.main(["convert", *map(str, arguments)]) == 0


def tensors_of(folder):
    return torch.load(folder / checkpoint.OFFICIAL_TENSORS, weights_only=True)


def config_of(folder):
    return json.loads((folder / checkpoint.CONFIG).read_text())


@needs_golden
@pytest.mark.parametrize("part", ["autoencoder", "calm_energy"])
@pytest.mark.parametrize("version", ["official_k4", "official_k3"])
def test_official_there_and_back_loses_nothing(version, part, tmp_path):
    source, ours, back = GOLDEN / version / part, tmp_path / "ours", tmp_path / "back"
    convert(source, ours)
    convert(ours, back, "--layout", "official")
    before, after = tensors_of(source), tensors_of(back)
    assert before.keys() <= after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert set(after) - set(before) <= {n for n in after if n.startswith("generative_head.")}
    kept = config_of(back)
    for name, value in config_of(source).items():
        assert name == "ae_path" or kept[name] == value, name
    assert kept.keys() - {"ae_path"} == config_of(source).keys() - {"ae_path"}
    assert_same(checkpoint.load(source), checkpoint.load(back))
    if part == "calm_energy":  # which the official class loads the autoencoder from
        assert kept["ae_path"] == str(back / "autoencoder")
        assert_same(checkpoint.load(kept["ae_path"]), checkpoint.load(source).ae_model)
    # what is tied is stored once: no larger than the original by more than the second head's names
    size = (back / checkpoint.OFFICIAL_TENSORS).stat().st_size
    assert size < 1.05 * (source / checkpoint.OFFICIAL_TENSORS).stat().st_size


@needs_golden
def test_every_official_layout_becomes_the_same_folder(tmp_path):
    source = GOLDEN / "official_k4" / "calm_energy"
    tensors = tensors_of(source)
    tensors |= {n.replace("mlp_generator", "generative_head"): t for n, t in tensors.items()}
    layouts = {
        "both": (),
        "one embedding": (f"ae_model.{EMBEDDING}",),
        "other embedding": (f"ae_model.{ALIAS}",),
        "old head": ("generative_head.",),
        "new head": ("mlp_generator.",),
    }
    convert(source, tmp_path / "expected")
    expected = (tmp_path / "expected" / checkpoint.TENSORS).read_bytes()
    for layout, dropped in layouts.items():
        kept = {n: t.clone() for n, t in tensors.items() if not n.startswith(dropped or "-")}
        for file in (checkpoint.TENSORS, checkpoint.OFFICIAL_TENSORS):
            folder = tmp_path / f"{layout} {file}"
            folder.mkdir()
            (folder / checkpoint.CONFIG).write_bytes((source / checkpoint.CONFIG).read_bytes())
            (save_file if file == checkpoint.TENSORS else torch.save)(kept, folder / file)
            convert(folder, tmp_path / "out")
            assert (tmp_path / "out" / checkpoint.TENSORS).read_bytes() == expected, folder


def test_ours_there_and_back_loses_nothing(autoencoder, tmp_path):
    """Also what no official language model says of its autoencoder."""
    inner = AutoencoderConfig(**SIZES, latent_size=8, ae_dropout=0.25)
    model = Calm(CalmConfig(**SIZES | {"hidden_size": 24}, latent_size=8), inner).eval()
    model.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "official", "--layout", "official")
    convert(tmp_path / "official", tmp_path / "back")
    assert_same(model, checkpoint.load(tmp_path / "back"))
    assert checkpoint.load(tmp_path / "back").ae_model.config == inner
    checkpoint.save(model, tmp_path / "saved", layout="official")
    assert checkpoint.load(tmp_path / "saved").ae_model.config == inner
    assert_same(model.ae_model, checkpoint.load(tmp_path / "official" / "autoencoder"))
    before, after = (tmp_path / name / checkpoint.TENSORS for name in ("ours", "back"))
    assert before.read_bytes() == after.read_bytes()


def test_the_tokenizer_goes_with_the_model(folder, tmp_path):
    """In Python as on the command line, and to the autoencoder's own folder too."""
    tokenizer = (folder / "calm" / "tokenizer.model").read_bytes()
    for layout, parts in {"official": ("", "autoencoder"), "calm_rt": ("",)}.items():
        ours, other = tmp_path / layout, tmp_path / f"{layout} by command"
        checkpoint.convert(folder / "calm", ours, layout=layout)
        convert(folder / "calm", other, "--layout", layout)
        for part in parts:
            assert (ours / part / "tokenizer.model").read_bytes() == tokenizer
        files = [{str(p.relative_to(top)) for p in top.rglob("*")} for top in (ours, other)]
        assert files[0] == files[1]
    checkpoint.convert(tmp_path / "official", tmp_path / "official")  # onto itself


def test_a_conversion_that_fails_leaves_what_was_there(autoencoder, tmp_path, monkeypatch):
    source, target = tmp_path / "autoencoder", tmp_path / "shards"
    checkpoint.save(autoencoder, target, max_shard_bytes=8000)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    seen, write = [], tensor_files.stream_tensors

    def full(*arguments):
        seen.append(arguments)
        if len(seen) > 2:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(tensor_files, "stream_tensors", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.convert(source, target, max_shard_bytes=8000, dtype=torch.bfloat16)
    assert before == {path.name: path.read_bytes() for path in target.iterdir()}


def test_dtype_is_said_where_it_was(autoencoder, tmp_path):
    source, target = tmp_path / "autoencoder", tmp_path / "out"
    values = config_of(source) | {"torch_dtype": "float32", "made_by": "me"}
    (source / checkpoint.CONFIG).write_text(json.dumps(values))
    convert(source, target, "--dtype", "bfloat16")
    assert config_of(target)["torch_dtype"] == "bfloat16"
    assert config_of(target)["made_by"] == "me" and "dtype" not in config_of(target)


def test_shards(autoencoder, tmp_path):
    target = tmp_path / "shards"
    checkpoint.save(autoencoder, target, max_shard_bytes=8000)
    assert_same(autoencoder, checkpoint.load(target))
    assert_whole(checkpoint.load(target))
    where = json.loads((target / INDEX).read_text())
    files = sorted(target.glob("*.safetensors"))
    assert len(files) > 3 and {f.name for f in files} == set(where["weight_map"].values())
    tensors = [load_file(file) for file in files]
    for part in tensors:
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= 8000
    total = sum(t.nbytes for part in tensors for t in part.values())
    assert where["metadata"]["total_size"] == total
    checkpoint.save(autoencoder, target, max_shard_bytes=30_000)  # in their place
    where = json.loads((target / INDEX).read_text())
    left = {file.name for file in target.glob("*.safetensors")}
    assert left == set(where["weight_map"].values()) and len(left) < len(files)
    checkpoint.save(autoencoder, target)
    assert [file.name for file in target.glob("*.safetensors*")] == ["model.safetensors"]
    assert_same(autoencoder, checkpoint.load(target))


def test_shards_must_be_what_the_index_says(autoencoder, tmp_path):
    checkpoint.save(autoencoder, tmp_path / "x", max_shard_bytes=8000)
    index = tmp_path / "x" / INDEX
    where = json.loads(index.read_text())["weight_map"]
    files = list(where.values())
    name = next(name for name, file in where.items() if files.count(file) > 1)
    other = next(file for file in where.values() if file != where[name])
    cases = [
        (where | {"extra": other}, f"{INDEX}: expected extra in {other}, got nowhere"),
        (where | {name: other}, f"{INDEX}: expected {name} in {other}, got {where[name]}"),
        (
            {n: f for n, f in where.items() if n != name},
            f"expected {name} in no shard, got {where[name]}",
        ),
        (where | {name: "gone.safetensors"}, r"gone\.safetensors: no such file"),
        *[(where | {name: bad}, "shards in the same folder") for bad in ("..", "", "/etc/passwd")],
    ]
    for change, message in cases:
        index.write_text(json.dumps({"weight_map": change}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            checkpoint.load(tmp_path / "x")
    twice = tmp_path / "x" / other
    save_file(load_file(twice) | {name: torch.ones(1)}, twice)
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match=f"tensor {name} is in .* too"):
        checkpoint.load(tmp_path / "x")


def test_files_that_would_hide_the_new_ones_are_named(autoencoder, tmp_path):
    source = tmp_path / "autoencoder"
    for options in (["--layout", "official"], ["--max-shard-size", "0.1"]):
        assert cli.main(["convert", str(source), str(source), *options]) == 2
        assert_same(autoencoder, checkpoint.load(source))
    with pytest.raises(ValueError, match=r"path: expected a folder without model\.safetensors"):
        checkpoint.save(autoencoder, source, layout="official")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "other"}, "layout: expected one of calm_rt, official, got 'other'"),
        ({"max_shard_bytes": 0}, "max_shard_bytes: expected None or at least 1, got 0"),
        ({"layout": "official", "max_shard_bytes": 9}, "max_shard_bytes: expected None in layout"),
    ],
)
def test_bad_settings(autoencoder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.save(autoencoder, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


CONVERT = """
import resource
from pathlib import Path
from calm_rt import checkpoint
from calm_rt.benchmark import _resident

checkpoint.convert("tiny", "ours")
checkpoint.convert("ours", "official", layout="official")
checkpoint.load("ours")
before = _resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
checkpoint.convert("big", "ours")
print(_resident("VmHWM") - before)
before = _resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
checkpoint.load("ours")
print(_resident("VmHWM") - before)
size = Path("ours/model.safetensors").stat().st_size
# a mapping counts here as all of the file
limit = _resident("VmData") + size + size // 4
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
checkpoint.convert("ours", "official", layout="official")
"""


def test_a_model_is_never_in_memory(tmp_path):
    """300 MB: on the way to ours a window of the file, back a mapping of it and no copy; where it
    is loaded, the model and little more.

    What is mapped of a file leaves memory whenever that is needed.
    """
    sizes = {"tiny": {}, "big": {"hidden_size": 1024, "intermediate_size": 4096}}
    for name, changes in sizes.items():
        config = AutoencoderConfig(**SIZES | changes, latent_size=8, num_encoder_layers=4)
        with torch.device("meta"):
            model = Autoencoder(config)
        model = model.to_empty(device="cpu").eval()
        model.decoder.lm_head_weight = model.encoder.embed_tokens.weight
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + number)
        checkpoint.save(model, tmp_path / name, layout="official")
    size = (tmp_path / "big" / checkpoint.OFFICIAL_TENSORS).stat().st_size
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CONVERT]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    convert_peak, load_peak = map(int, run.stdout.split())
    assert size > 300e6 and convert_peak < size / 2 and load_peak < 1.1 * size
    tensors = tensors_of(tmp_path / "official")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


# ---- the hub ----


class FakeHub(SimpleNamespace):
    """What of huggingface_hub is used: repositories are folders here."""

    def __init__(self, root):
        constants = SimpleNamespace(HF_HUB_OFFLINE=False)
        super().__init__(root=root, fetched=[], constants=constants)

    def list_repo_files(self, name):
        if not (self.root / name).is_dir():
            raise OSError(f"404, no {name}\nmore")
        return [path.name for path in (self.root / name).iterdir()]

    def snapshot_download(self, name, allow_patterns):
        self.fetched.append((name, allow_patterns))
        return str(self.root / name)


@pytest.fixture
def hub(autoencoder, tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "owner" / "model"
    autoencoder.save(folder)
    train_tokenizer(__file__, 300, folder)
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_a_repository_is_fetched_where_that_is_asked_for(hub, autoencoder, tmp_path):
    assert_same(autoencoder, calm_rt.load("owner/model", hub=True))
    assert calm_rt.load_tokenizer("owner/model", hub=True).vocab_size == 300
    [patterns, tokenizers] = [patterns for _, patterns in hub.fetched]
    assert "model*.safetensors*" in patterns and "pytorch_model*" not in patterns
    assert set(tokenizers) == set(hub_module.TOKENIZERS)
    output = str(tmp_path / "out")
    assert cli.main(["convert", "owner/model", output, "--hub"]) == 0
    assert_same(autoencoder, calm_rt.load(output))
    assert_same(autoencoder, calm_rt.load(tmp_path / "autoencoder", hub=True))  # a folder is one
    assert len(hub.fetched) == 3


def test_offline_the_files_that_are_there_are_taken(hub, autoencoder):
    hub.constants.HF_HUB_OFFLINE, hub.list_repo_files = True, None  # which asks the network
    assert_same(autoencoder, calm_rt.load("owner/model", hub=True))
    [(_, patterns)] = hub.fetched
    assert {"model*.safetensors*", "pytorch_model*"} <= set(patterns)


def test_nothing_is_fetched_otherwise(hub, capsys):
    with pytest.raises(FileNotFoundError, match=r"owner/model: no such folder; hub=True \(--hub\)"):
        calm_rt.load("owner/model")
    with pytest.raises(FileNotFoundError, match="hub=True"):
        calm_rt.load_tokenizer("owner/model")
    assert cli.main(["generate", "--model", "owner/model"]) == 2
    assert "--hub" in capsys.readouterr().err and not hub.fetched


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("owner/none", r"hub: cannot fetch owner/none \(404, no owner/none\)"),
        ("none", "path: expected a folder or owner/name, got none"),
        ("a/b/c", "path: expected a folder or owner/name"),
    ],
)
def test_repositories_that_are_not_there(hub, path, message):
    with pytest.raises(ValueError, match=message):
        calm_rt.load(path, hub=True)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="hub: fetching owner/name needs: pip install hugg"):
        calm_rt.load("owner/name", hub=True)


def test_no_network_is_used(folder):
    """Loading, tokenizing and generating with every connection refused."""
    program = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.socket.connect_ex = refuse\n"
        "socket.getaddrinfo = socket.create_connection = refuse\n"
        "import calm_rt\n"
        "folder = sys.argv[1]\n"
        "tokenizer = calm_rt.load_tokenizer(folder)\n"
        "assert tokenizer.encode('def main')\n"
        "generator = calm_rt.Generator(calm_rt.load(folder), tokenizer)\n"
        "assert generator.generate(['def main'], max_new_tokens=4)[0].ids\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, folder / "calm"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@needs_golden
def test_single_names_in_safetensors(tmp_path):
    """As the hub's converter leaves an official folder: the alphabetically first of twins."""
    tensors = tensors_of(GOLDEN / "official_k4" / "autoencoder")
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / checkpoint.CONFIG).write_text(
        (GOLDEN / "official_k4" / "autoencoder" / checkpoint.CONFIG).read_text()
    )
    first = {name: tensor for name, tensor in tensors.items() if name != EMBEDDING}
    save_file(first, folder / checkpoint.TENSORS, {"format": "pt", EMBEDDING: ALIAS})
    convert(folder, tmp_path / "out", "--layout", "official")
    assert tensors_of(tmp_path / "out").keys() == tensors.keys()
