"""Models on disk: official layouts, our own folder, damage, atomic writing."""

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calm_rt import checkpoint, tensor_files
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
EMBEDDING, ALIAS = "encoder.embed_tokens.weight", "decoder.lm_head_weight"
SIZES = {"patch_size": 3, "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden models at {GOLDEN}")


@pytest.fixture
def autoencoder() -> Autoencoder:
    return Autoencoder(AutoencoderConfig(**SIZES, latent_size=8, num_encoder_layers=4)).eval()


@pytest.fixture
def calm(autoencoder) -> Calm:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Calm(
        CalmConfig(**SIZES, **sizes, latent_size=8, num_mlp_layers=1), autoencoder.config
    ).eval()


@pytest.fixture(params=["official_k4", "official_k3"])
def official(request) -> Path:
    return GOLDEN / request.param


def assert_same(first: torch.nn.Module, second: torch.nn.Module) -> None:
    assert type(first) is type(second) and first.config == second.config
    ours, others = first.state_dict(), second.state_dict()
    assert ours.keys() == others.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


def assert_whole(model: Autoencoder | Calm) -> None:
    """Tied, frozen inside a language model, in evaluation mode, every parameter with values."""
    inner = model.ae_model if isinstance(model, Calm) else model
    assert inner.decoder.lm_head_weight is inner.encoder.embed_tokens.weight
    assert not any(module.training for module in model.modules())
    assert not any(parameter.is_meta for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith("ae_model."), name


def edit(folder: Path, **changes: object) -> None:
    """Changes tensors of model.safetensors: a tensor replaces, None removes."""
    tensors = load_file(folder / checkpoint.TENSORS)
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / checkpoint.TENSORS)


def official_folder(source: Path, folder: Path, tensors: dict[str, Tensor], file: str) -> Path:
    """A folder with an official configuration and these tensors."""
    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file)
    return folder


@pytest.mark.parametrize("kind", ["autoencoder", "calm"])
def test_round_trip(kind, request, tmp_path):
    model = request.getfixturevalue(kind)
    model.save(str(tmp_path / "new" / "model"))
    loaded = checkpoint.load(str(tmp_path / "new" / "model"))
    assert_same(model, loaded)
    assert_whole(loaded)
    stored = load_file(tmp_path / "new" / "model" / checkpoint.TENSORS)
    assert not any(name.endswith(ALIAS) or name.startswith("mlp_generator") for name in stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(calm, tmp_path, dtype):
    calm.save(tmp_path)
    loaded = checkpoint.load(tmp_path, dtype)
    assert_same(calm.to(dtype), loaded)
    loaded.save(tmp_path)
    assert_same(loaded, checkpoint.load(tmp_path))
    with pytest.raises(ValueError, match="dtype: expected a floating-point type"):
        checkpoint.load(tmp_path, torch.int8)


def test_loaded_model_does_not_follow_the_file(calm, tmp_path):
    calm.save(tmp_path)
    loaded, file = checkpoint.load(tmp_path), tmp_path / checkpoint.TENSORS
    file.write_bytes(bytes(file.stat().st_size))  # in place: what a mapping of the file would show
    assert_same(calm, loaded)


@needs_golden
@pytest.mark.parametrize("part", ["autoencoder", "calm_energy"])
def test_official_folders(official, tmp_path, part):
    """As it came; with either name of a tied tensor or both; in both formats; in our own folder."""
    source = official / part
    original = checkpoint.load(source)
    assert_whole(original)
    tensors = torch.load(source / checkpoint.OFFICIAL_TENSORS, weights_only=True)
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, tensors[name])
    prefix = "" if part == "autoencoder" else "ae_model."
    layouts = {
        "one": {n: t for n, t in tensors.items() if n != prefix + EMBEDDING},
        "other": {n: t for n, t in tensors.items() if n != prefix + ALIAS},
        "both": tensors,
        "old head": {n: t for n, t in tensors.items() if not n.startswith("generative_head.")},
        "new head": {n: t for n, t in tensors.items() if not n.startswith("mlp_generator.")},
    }
    for layout, kept in layouts.items():
        for file in (checkpoint.TENSORS, checkpoint.OFFICIAL_TENSORS):
            folder = official_folder(source, tmp_path / f"{layout} {file}", kept, file)
            loaded = checkpoint.load(folder)
            assert_same(original, loaded)
            assert_whole(loaded)
    original.save(tmp_path / "own")
    assert_same(original, checkpoint.load(tmp_path / "own"))


@needs_golden
def test_official_autoencoder_inside(official):
    """The language model's own copy, whose sizes no configuration states, is the autoencoder."""
    inner = checkpoint.load(official / "calm_energy").ae_model
    assert_same(inner, checkpoint.load(official / "autoencoder"))


@needs_golden
def test_shards(official, tmp_path):
    source = official / "calm_energy"
    tensors = torch.load(source / checkpoint.OFFICIAL_TENSORS, weights_only=True)
    names = sorted(tensors)
    files = ("pytorch_model-1.bin", "pytorch_model-2.bin")
    where = {name: files[index % 2] for index, name in enumerate(names)}
    folder = official_folder(
        source, tmp_path / "shards", {n: tensors[n] for n in names[::2]}, files[0]
    )
    torch.save({n: tensors[n] for n in names[1::2]}, folder / files[1])
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert_same(checkpoint.load(source), checkpoint.load(folder))
    index.write_text(json.dumps({"weight_map": where | {"extra": "../elsewhere.bin"}}))
    with pytest.raises(ValueError, match="shards in the same folder"):
        checkpoint.load(folder)


@needs_golden
@pytest.mark.parametrize("head", ["flow", "diffusion"])
def test_other_heads_are_refused(official, head, tmp_path):
    folder, message = official / f"calm_{head}", f"the {head} head is not supported yet"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(folder)
    for layout in ("calm_rt", "official"):
        with pytest.raises(ValueError, match=message):
            checkpoint.convert(folder, tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


@needs_golden
@pytest.mark.parametrize("name", ["mlp_generator.noise_embd.weight", f"ae_model.{ALIAS}"])
def test_twins_must_be_equal(official, tmp_path, name):
    tensors = torch.load(official / "calm_energy" / checkpoint.OFFICIAL_TENSORS, weights_only=True)
    tensors[name] = tensors[name] + 1
    folder = official_folder(official / "calm_energy", tmp_path / "x", tensors, "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"{name} and .* must be the same tensor"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.norm.weight": None}, "tensor transformer.norm.weight is missing"),
        ({f"ae_model.{EMBEDDING}": None}, f"tensor ae_model.{EMBEDDING} is missing"),
        ({"transformer.mean": torch.ones(3)}, "tensor transformer.mean is unknown"),
        ({"transformer.norm.weight": torch.ones(17)}, r"expected shape \[16\] .*got \[17\]"),
        ({"transformer.norm.weight": torch.ones(16).int()}, "floating-point type, got torch.int32"),
        (
            {"ae_model.encoder.squeeze_layer.weight": torch.ones(16, 64)},
            r"expected shape \[16, 48\]",
        ),
    ],
    ids=["missing", "missing-tied", "extra", "shape", "type", "patch-size"],
)
def test_tensors_that_do_not_fit_are_named(calm, tmp_path, change, message):
    calm.save(tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(ValueError, match=f"{checkpoint.TENSORS}: .*{message}") as raised:
        checkpoint.load(tmp_path)
    assert "\n" not in str(raised.value)


@needs_golden
@pytest.mark.parametrize("keep", [0, 7, 1000, 100_000])
@pytest.mark.parametrize("file", [checkpoint.TENSORS, checkpoint.OFFICIAL_TENSORS])
def test_truncated_files(official, tmp_path, file, keep):
    tensors = torch.load(official / "autoencoder/pytorch_model.bin", weights_only=True)
    folder = official_folder(official / "autoencoder", tmp_path / "x", tensors, file)
    (folder / file).write_bytes((folder / file).read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{file}: not a .* or damaged") as raised:
        checkpoint.load(folder)
    assert "\n" not in str(raised.value)


class Hostile:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_foreign_pickles_are_refused_and_not_run(autoencoder, tmp_path, writer):
    autoencoder.save(tmp_path)
    (tmp_path / checkpoint.TENSORS).unlink()
    buffer, content = io.BytesIO(), {EMBEDDING: Hostile(tmp_path / "run")}
    torch.save(content, buffer) if writer == "torch" else pickle.dump(content, buffer, protocol=2)
    (tmp_path / checkpoint.OFFICIAL_TENSORS).write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="not a torch file of plain tensors"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "run").exists()


def hostile_archive(autoencoder: Autoencoder, path: Path, how: str) -> None:
    """A torch file that claims terabytes."""
    tensors = dict(autoencoder.state_dict())
    if how == "repeated":
        tensors[EMBEDDING] = torch.zeros(1).expand(2**30, 2**10)
    torch.save(tensors, path)
    if how == "packed":
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
    if how == "old":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("how", ["repeated", "packed", "old"])
def test_torch_files_that_claim_more_than_they_hold(autoencoder, tmp_path, how):
    autoencoder.save(tmp_path)
    (tmp_path / checkpoint.TENSORS).unlink()
    hostile_archive(autoencoder, tmp_path / checkpoint.OFFICIAL_TENSORS, how)
    with pytest.raises(ValueError, match="not a torch file of plain tensors, or damaged"):
        checkpoint.load(tmp_path)


def test_safetensors_that_claim_more_than_they_hold(autoencoder, tmp_path):
    autoencoder.save(tmp_path)
    claim = {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    header = json.dumps(claim).encode()
    for length in (len(header), 2**62):
        content = length.to_bytes(8, "little") + header
        (tmp_path / checkpoint.TENSORS).write_bytes(content)
        with pytest.raises(ValueError, match="not a safetensors file, or damaged"):
            checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_encoder_layers": 10**9}, "config num_encoder_layers: expected layers that are in"),
        ({"hidden_size": 2**40}, "tensor .* expected shape|overflow"),
        ({"vocab_size": 2**62}, "tensor .* expected shape|overflow"),
    ],
)
def test_configurations_that_claim_more_than_the_file_holds(autoencoder, tmp_path, change, message):
    autoencoder.save(tmp_path)
    config = tmp_path / checkpoint.CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("text", ['{"weight_map": 3}', '{"weight_map": {"x": 3}}', "{}"])
def test_shard_indices_that_name_no_files(autoencoder, tmp_path, text):
    autoencoder.save(tmp_path)
    (tmp_path / checkpoint.TENSORS).unlink()
    index = tmp_path / f"{checkpoint.TENSORS}.index.json"
    index.write_text(text)
    with pytest.raises(ValueError, match="expected a weight_map of file names"):
        checkpoint.load(tmp_path)
    index.write_text("[" * 10**6)
    with pytest.raises(ValueError, match="not JSON"):
        checkpoint.load(tmp_path)


def test_files_that_are_something_else(autoencoder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        checkpoint.load(tmp_path)
    autoencoder.save(tmp_path)
    config, tensors = tmp_path / checkpoint.CONFIG, tmp_path / checkpoint.TENSORS
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match="found neither"):
        checkpoint.load(tmp_path)
    torch.save([1, 2], tmp_path / checkpoint.OFFICIAL_TENSORS)
    with pytest.raises(ValueError, match="expected a dict of tensors"):
        checkpoint.load(tmp_path)
    autoencoder.save(tmp_path)
    config.write_text(json.dumps(autoencoder.config.to_dict() | {"num_encoder_layers": 3}))
    with pytest.raises(ValueError, match="config num_encoder_layers: expected an even"):
        checkpoint.load(tmp_path)
    for text, message in [("{", "not JSON"), ("[]", "expected a JSON object")]:
        config.write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json: {message}"):
            checkpoint.load(tmp_path)


@pytest.mark.parametrize("step", ["write", "replace"])
@pytest.mark.parametrize("kind", ["tensors", "json"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, kind, step):
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    def write(value: int) -> None:
        if kind == "tensors":
            tensor_files.write_tensors(tmp_path / "file", {"x": torch.tensor([value])}, {"v": "1"})
        else:
            tensor_files.write_json(tmp_path / "file", {"x": value})

    write(1)
    before = (tmp_path / "file").read_bytes()
    if step == "replace":
        monkeypatch.setattr(os, "replace", fail)
    elif kind == "tensors":
        monkeypatch.setattr(tensor_files, "save_file", fail)
    else:
        monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        write(2)
    assert (tmp_path / "file").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_written_files_follow_the_umask_and_hold_what_was_given(tmp_path):
    path = tmp_path / "state.safetensors"
    strided = torch.arange(6.0).reshape(2, 3).T
    tensor_files.write_tensors(path, {"a": strided, "b": torch.ones(0)}, {"step": "7"})
    assert tensor_files.read_metadata(path) == {"step": "7"}
    read = tensor_files.read_tensors(path)
    assert torch.equal(read["a"], strided) and read["b"].shape == (0,)
    tensor_files.write_json(tmp_path / "x.json", {})
    assert path.stat().st_mode == (tmp_path / "x.json").stat().st_mode
