"""What keep_bugs keeps is really there, as in the official code; without it, it is not."""

import random
from collections.abc import Callable

import pytest
import torch
from official_standin import AE, LM, assert_same_mean, build, token_ids
from test_patch_copies import untie
from torch import Tensor, nn

import calm_rt
from calm_rt import patched
from calm_rt.official_bugs import BUGS, CONTINUED
from calm_rt.official_models import KINDS
from calm_rt.patching import SWITCHES

PAD, EOS, BOS = AE["pad_token_id"], 2, 1
WITH_PADS = [[5, 6, 7, 4, 5], [5, PAD, 6, PAD, PAD]]  # two whole patches with the pads at the end


def standin(keep: str | None, **changes) -> nn.Module:
    """keep: a bug to keep in a patched model, "" for none, or None for an unpatched model."""
    model = build(vocab_size=8, **changes)
    if keep is not None:
        report = calm_rt.patch(model, keep_bugs=[keep] if keep else [])
        assert (keep in report.not_cured) if keep else not report.not_cured
    return model


def read_by(model: nn.Module) -> list[Tensor]:
    """The tokens that the backbone gets, call by call."""
    seen = []
    patched = getattr(model, "_calm_rt_patch", None)
    backbone = (patched.model if patched else model).transformer
    backbone.embed_tokens.register_forward_hook(lambda _, ids, __: seen.append(ids[0]))
    return seen


@pytest.mark.parametrize("keep", [None, "prompt_padding", ""])
def test_prompt_padding(keep):
    model = standin(keep)
    seen = read_by(model)
    torch.manual_seed(0)
    rows = model.generate(torch.tensor(WITH_PADS), max_length=12, temperature=1.0).tolist()
    if keep == "":
        assert seen[0].tolist() == [[BOS, BOS, BOS, *WITH_PADS[0]], [BOS, 5, PAD, 6, 0, 0, 0, 0]]
        assert rows[1][:3] == [5, PAD, 6]
    else:
        assert seen[0].tolist() == [row + [PAD] * 3 for row in WITH_PADS]
        assert rows[1][:2] == [5, 6]
        assert all(PAD not in row[: row.index(PAD)] for row in rows if PAD in row)


@pytest.mark.parametrize("keep", [None, "overshot_length", ""])
@pytest.mark.parametrize(("length", "new"), [(13, 8), (11, 4), (3, 4)])
def test_overshot_length(keep, length, new):
    """Of a prompt of 5 tokens, of which two patches are made."""
    model = standin(keep, eos_token_id=None)
    model.eos_token_id = -1  # that of the unpatched loop
    rows = model.generate(torch.tensor(WITH_PADS[:1]), max_length=length, temperature=1.0)
    pads = 3 if keep is None else 0
    assert rows.shape[1] == pads + (5 + new if keep != "" else max(5, length))


@pytest.mark.parametrize("keep", [None, "tokens_after_eos", ""])
def test_tokens_after_eos(keep):
    model, behind = standin(keep), 0
    prompt = torch.tensor([[5, 6, 7, 4]] * 20)
    for _ in range(3):
        for row in model.generate(prompt, max_length=24, temperature=1.0).tolist():
            new = [token for token in row[4:] if token != PAD]
            behind += EOS in new and new.index(EOS) < len(new) - 1
    assert (behind > 0) == (keep != "")


@pytest.mark.parametrize("keep", [None, "python_random", ""])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_python_random(keep, temperature):
    """Whether Python's random has a part in what torch's seed does not repeat."""
    model = standin(keep)
    hidden = torch.randn(50, LM["hidden_size"], generator=torch.Generator().manual_seed(1))
    prompt = torch.tensor([[5, 6, 7, 4]] * 20)

    def texts(seed: int) -> list[Tensor]:
        torch.manual_seed(3)
        random.seed(seed)
        patches = model.temperature_sampling(hidden, temperature, num_samples=8)
        text = model.generate(prompt, max_length=16, temperature=temperature)
        return [patches.flatten(), text.flatten()]

    for first, again, other in zip(texts(0), texts(0), texts(1), strict=True):
        assert torch.equal(first, again)
        assert torch.equal(first, other) == (keep == "" or temperature == 1.0)


@pytest.mark.parametrize("keep", [None, "strict_temperature", ""])
def test_strict_temperature(keep):
    model = standin(keep)
    hidden, prompt = torch.randn(2, LM["hidden_size"]), torch.tensor([[5, 6, 7, 4]])
    for temperature in (0.3333333, 0.0):
        for call in (
            lambda t: model.temperature_sampling(hidden, t),
            lambda t: model.generate(prompt, max_length=8, temperature=t),
        ):
            call(1 / 3)
            if keep == "":
                call(temperature)
                continue
            with pytest.raises(ValueError, match="temperature"):
                call(temperature)


@pytest.mark.parametrize("keep", [None, "missing_pad_id", ""])
def test_missing_pad_id(keep):
    model = standin(keep, pad_token_id=None)
    if keep == "":
        assert model.generate(torch.tensor(WITH_PADS[:1]), max_length=12, temperature=1.0).numel()
    else:
        with pytest.raises(TypeError):
            model.generate(torch.tensor(WITH_PADS[:1]), max_length=12, temperature=1.0)


@pytest.mark.parametrize("keep", [None, "nan_gradients", ""])
def test_nan_gradients(keep):
    model, ids = standin(keep).train(), token_ids() % 8
    model.beta = 0.5
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.embed_proj[0].weight.grad.isnan().any() == (keep != "")


@pytest.mark.parametrize("keep", [None, "noise_levels", ""])
@pytest.mark.parametrize("patch_size", [4, 2])
def test_noise_levels(keep, patch_size, monkeypatch):
    """Draws of one context from a single noise number each, in bfloat16."""
    monkeypatch.setitem(LM, "noise_size", 1)
    model = standin(keep, patch_size=patch_size).bfloat16()
    hidden = torch.ones(1, LM["hidden_size"], dtype=torch.bfloat16)
    with torch.no_grad():  # one by one, for products of more rows may round each in its own way
        draws = torch.cat([model.generative_head.sample(hidden) for _ in range(1500)])
    most = 384  # of torch.rand - 0.5 in bfloat16 on a CPU
    assert (len(draws.unique(dim=0)) <= most) == (keep != "")


def watch(monkeypatch, module: nn.Module, see: Callable) -> None:
    """Shows every call of the module's class, without a hook: those end a patch."""
    forward = type(module).forward

    def seen(self, *arguments, **options):
        see(self, options)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(module), "forward", seen)


@pytest.mark.parametrize("keep", [None, "bf16_embeddings", ""])
@pytest.mark.parametrize("kind", ["Autoencoder", "EnergyTransformer"])
def test_bf16_embeddings(kind, keep, monkeypatch):
    """Whether the official encoder runs, in the mode in which it rounds."""
    model, ids = build(kind).train(), token_ids()
    if keep is not None:
        calm_rt.patch(model, keep_bugs=[keep] if keep else [])
    seen = []
    inner = model if kind == "Autoencoder" else model.ae_model
    watch(monkeypatch, inner.encoder, lambda encoder, _: seen.append(encoder.training))
    assert model(input_ids=ids, labels=ids).loss.isfinite()
    assert seen == ([] if keep == "" else [True])


@pytest.mark.parametrize("keep", [None, "label_masks", ""])
def test_label_masks(keep, monkeypatch):
    """The official code shifts targets behind such labels, and cannot evaluate rows with them."""
    model, ids = build(vocab_size=8), token_ids(patches=6) % 8
    labels, seen = ids.clone(), []
    labels[0, 9:13] = -100  # parts of two patches
    if keep is not None:
        calm_rt.patch(model, encoder_target=False, keep_bugs=[keep] if keep else [])
    watch(monkeypatch, model.ae_model.encoder, lambda _, options: seen.append(options["input_ids"]))
    assert model.train()(input_ids=ids, labels=labels).loss.isfinite()
    first = [ids[0, 4:8], ids[0, 16:]] if keep == "" else [ids[0, 4:9], ids[0, 13:]]
    assert seen[0].flatten().tolist() == torch.cat([*first, ids[1, 4:]]).tolist()
    if keep == "":
        assert model.eval()(input_ids=ids, labels=labels).brier1.isfinite()
        return
    with pytest.raises(RuntimeError, match="shape"):
        model.eval()(input_ids=ids, labels=labels)


def test_last_start(monkeypatch):
    ids = token_ids(patches=8, patch_size=2) % 8
    rows = {}
    score = patched.brier_lm
    for keep in ("last_start", ""):
        model = standin(keep, patch_size=2).eval()

        def recording(model, ids, keep=keep, **options):
            rows[keep] = score(model, ids, **options)
            return rows[keep]

        monkeypatch.setattr(patched, "brier_lm", recording)
        model(input_ids=ids, labels=ids)
    per_row = {keep: result.num_patches / len(ids) for keep, result in rows.items()}
    assert per_row == {"last_start": 5, "": 6}  # the official range is that of 7 targets less 2


def test_a_name_alone_is_no_list():
    with pytest.raises(ValueError, match=r"keep_bugs: expected a list .*write \['last_start'\]"):
        calm_rt.patch(build(), keep_bugs="last_start")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patch_size", [4, 2])
@pytest.mark.parametrize("name", BUGS)
def test_each_bug_is_cured_or_kept_as_the_report_says(name, kind, patch_size):
    model = build(kind, patch_size=patch_size, pad_token_id=None)
    untie(model)
    with calm_rt.patch(model) as report:
        has, replaced = name in report.cured, set(report.replaced)
        assert name not in report.not_cured
    untie(model)
    with calm_rt.patch(model, keep_bugs=[name]) as report:
        off = replaced - report.replaced.keys()
        assert name not in report.cured
        assert {report.kept[switch] for switch in off} <= {f"keep_bugs has {name}"}
        if has:
            text = report.not_cured[name]
            assert text == "in keep_bugs" + (
                f"; {' and '.join(s for s in SWITCHES if s in off)} off" if off else ""
            )
        else:
            assert name not in report.not_cured and not off
    if not BUGS[name].switches or not has:
        return
    switches = [s.split(" ")[0] for s in BUGS[name].switches if patch_size < 4 or s != CONTINUED]
    with calm_rt.patch(model, **dict.fromkeys(switches, False)) as report:
        assert report.not_cured[name].startswith("needs ")


def test_scores_with_kept_bugs_have_the_same_mean():
    model, ids = build(vocab_size=8, patch_size=2).eval(), token_ids(patches=8, patch_size=2) % 8

    def scores() -> Tensor:
        outputs = [model(input_ids=ids, labels=ids) for _ in range(100)]
        return torch.stack([o.brier1 for o in outputs]).double()

    with calm_rt.patch(model, keep_bugs=["last_start"]):
        many = scores()
    with calm_rt.patch(model, keep_bugs=["last_start", "one_pair_of_draws"]):
        pair = scores()
    assert_same_mean(many, pair)
    assert pair.var() > many.var()
