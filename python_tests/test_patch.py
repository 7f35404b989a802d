"""calm_rt.patch on a stand-in with the official structure: same results, nothing left behind."""

import copy
import re
import sys
from pathlib import Path
from types import MethodType, ModuleType

import official_standin
import pytest
import scipy.stats
import torch
from official_standin import AE, DRAWS, assert_same_mean, build, losses, token_ids
from torch import Tensor, nn

import calm_rt
from calm_rt import patching
from calm_rt.official_models import KINDS
from calm_rt.patching import BUGS, SWITCHES

MODELS = KINDS[1:]


def everything(model: nn.Module) -> list[tuple[str, dict]]:
    """Every attribute of every module, but for parameters and submodules, which are dicts."""
    return [(name, dict(vars(module))) for name, module in model.named_modules()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_have_the_same_distribution(kind, training):
    model, ids = build(kind).train(training), token_ids()
    model.num_samples = 4  # or two kinds could not be run unpatched
    torch.manual_seed(0)
    before = losses(model, ids)
    with calm_rt.patch(model) as report:
        assert {"autoencoder_loss", "encoder_target"} & report.replaced.keys()
        assert_same_mean(before, losses(model, ids))
    assert_same_mean(before, losses(model, ids))


@pytest.mark.parametrize("switch", [name for name in SWITCHES if name != "autoencoder_loss"])
def test_each_switch_alone(switch):
    model, ids = build().train(), token_ids()
    before = losses(model, ids)
    off = {name: False for name in SWITCHES if name != switch}
    report = calm_rt.patch(model, **off)
    assert list(report.replaced) == [switch]
    assert set(report.kept) == off.keys() and set(report.kept.values()) == {"switched off"}
    assert_same_mean(before, losses(model, ids))
    model.eval()
    output = model(input_ids=ids, labels=ids)
    assert -1 <= output.brier1 <= 2
    assert model.generate(ids, max_length=20, temperature=0.5).shape == (2, 20)


@pytest.mark.parametrize("kind", ["Autoencoder", "EnergyTransformer"])
def test_gradients_have_the_same_mean(kind):
    model, ids = build(kind).train(), token_ids()

    def directions() -> Tensor:
        """[N, parameters] gradients along one direction of every parameter."""
        rows = []
        for _ in range(DRAWS):
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            parts = [p for p in model.parameters() if p.requires_grad]
            rows.append(
                torch.stack([(p.grad * torch.ones_like(p).cumsum(0).sin()).sum() for p in parts])
            )
        return torch.stack(rows).double()

    torch.manual_seed(3)
    before = directions()
    calm_rt.patch(model)
    assert_same_mean(before, directions())


@pytest.mark.parametrize("kind", KINDS)
def test_unpatch_leaves_nothing_behind(kind):
    model, other = build(kind), build(kind, seed=1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, others = everything(model), everything(other)
    with calm_rt.patch(model, fold_encoder=True):
        assert model.forward.__func__ is not type(model).forward
        assert everything(other) == others
        assert list(model.state_dict()) == list(state)
    assert everything(model) == before
    for name in ("forward", "generate", "temperature_sampling", "eval_brier", "energy_score"):
        if hasattr(model, name):
            assert getattr(model, name).__func__ is getattr(type(model), name)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_patching_twice_and_unpatching_an_official_model_are_refused():
    model = build()
    with pytest.raises(ValueError, match="model: expected a patched one, got EnergyTransformer"):
        calm_rt.unpatch(model)
    with calm_rt.patch(model):
        with pytest.raises(ValueError, match="model: expected one that is not patched"):
            calm_rt.patch(model)
        calm_rt.unpatch(model)
    calm_rt.patch(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "official Autoencoder, .* got Linear"),
        (type("FlowTransformer", (nn.Module,), {})(), "got a FlowTransformer without config"),
        (calm_rt.nn.Autoencoder(build("Autoencoder").config), "got calm_rt's own Autoencoder"),
        (3, "got int"),
    ],
    ids=["other", "name-only", "ours", "no-module"],
)
def test_other_models_are_refused(model, message):
    with pytest.raises(ValueError, match=f"model: expected an instance of the .*{message}"):
        calm_rt.patch(model)


RENAMED = {"Autoencoder": "TextVae", "EnergyTransformer": "PatchModel", "CALM": "Base"}
RENAMED |= {"FlowTransformer": "Stream", "DiffusionTransformer": "Denoiser"}
RENAMED |= {"CustomCausalLMOutput": "ScoredOutput"}


@pytest.fixture
def fork(monkeypatch):
    """The stand-in under other names."""
    source = Path(official_standin.__file__).read_text()
    for name, other in RENAMED.items():
        source = re.sub(rf"\b{name}\b", other, source)
    module = ModuleType("fork")
    monkeypatch.setitem(sys.modules, "fork", module)
    exec(compile(source, "fork.py", "exec"), vars(module))
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_with_other_names_is_known_by_its_parts(fork, kind):
    model, ids = fork.build(RENAMED[kind]), token_ids()
    model.num_samples, plain = 4, build(kind)
    plain.num_samples = 4
    expected, report = calm_rt.patch(plain), calm_rt.patch(model)
    assert report.name == f"{RENAMED[kind]}, by its parts {kind}"
    assert (report.replaced, report.kept) == (expected.replaced, expected.kept)
    assert (report.cured, report.not_cured) == (expected.cured, expected.not_cured)
    torch.manual_seed(2)
    loss = plain.eval()(input_ids=ids, labels=ids).loss
    torch.manual_seed(2)
    assert torch.equal(model.eval()(input_ids=ids, labels=ids).loss, loss)


def test_what_is_derived_from_a_fork_keeps_its_own(fork):
    class Mine(fork.PatchModel):
        def forward(self, input_ids=None, labels=None, **kwargs):
            return 7

    model = fork.build("PatchModel")
    model.__class__ = Mine
    report = calm_rt.patch(model)
    assert report.kept["encoder_target"] == "Mine has its own forward" and model() == 7
    del model.generative_head, model.mlp_generator
    calm_rt.unpatch(model)
    with pytest.raises(ValueError, match=r"model: expected an instance of the official .*got Mine"):
        calm_rt.patch(model)


def test_unknown_bugs_are_refused():
    with pytest.raises(ValueError, match=r"keep_bugs: expected names among .*, got \['bug'\]"):
        calm_rt.patch(build(), keep_bugs=["bug"])


def test_what_is_not_official_stays():
    class Mine(type(build())):
        def energy_score(self, x, mean, log_std):
            return x.sum((0, 2)) * 0 + 7

    model, ids = build(), token_ids()
    model.__class__ = Mine
    model.generate = lambda *_: "mine"
    report = calm_rt.patch(model)
    assert report.kept["energy_score"] == "Mine has its own energy_score"
    assert "generate is replaced on this instance already" in report.kept["generate"]
    assert model.train()(input_ids=ids, labels=ids).loss == -7 and model.generate() == "mine"
    assert "head_sampling" in report.replaced and "energy_score" in str(report)


def adapter(layer: nn.Linear) -> nn.Linear:
    """A layer with the parameters of a Linear and another arithmetic."""
    layer.__class__ = type("Adapter", (nn.Linear,), {"forward": lambda self, x: x @ self.weight.T})
    return layer


def test_layers_with_other_arithmetic_are_not_replaced():
    model = build()
    adapter(model.generative_head.hidden_embd)
    report = calm_rt.patch(model)
    for name in ("head_sampling", "temperature_sampling", "generate"):
        assert "expected a plain Linear, got Adapter" in report.kept[name]
    assert {"energy_score", "encoder_target", "eval_brier"} <= report.replaced.keys()
    model = build()
    model.ae_model.encoder.embed_tokens.register_parameter("lora", nn.Parameter(torch.ones(1)))
    report = calm_rt.patch(model)
    expected = "encoder.embed_tokens.lora: expected no such parameter, got shape [1]"
    assert report.kept["encoder_target"] == expected
    assert {"energy_score", "head_sampling"} <= report.replaced.keys()


def test_a_wrapper_that_stays_leads_to_the_official_method():
    """As Trainer leaves one behind under mixed precision."""
    model, ids = build().train(), token_ids()
    calm_rt.patch(model)
    ours = model.forward
    model.forward = MethodType(lambda self, *args, **kwargs: ours(*args, **kwargs), model)
    calm_rt.unpatch(model)
    assert "forward" in vars(model) and "energy_score" not in vars(model)
    torch.manual_seed(5)
    wrapped = model(input_ids=ids, labels=ids).loss
    torch.manual_seed(5)
    assert torch.equal(wrapped, type(model).forward(model, input_ids=ids, labels=ids).loss)


def test_copies_are_patched_with_parameters_of_their_own():
    model, ids = build().train(), token_ids()
    calm_rt.patch(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    assert other(input_ids=ids, labels=ids).loss.isfinite()
    assert model(input_ids=ids, labels=ids).loss.isnan()
    calm_rt.unpatch(other)
    assert "forward" in vars(model) and "forward" not in vars(other)


@pytest.mark.parametrize("kind", ["Autoencoder", "EnergyTransformer"])
def test_parameters_are_followed(kind):
    """Views hold no parameters: a change of type or of the parameters themselves is seen."""
    model, ids = build(kind).eval(), token_ids()
    calm_rt.patch(model)
    model.double()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), False)
    assert model(input_ids=ids, labels=ids).loss.dtype == torch.float64


def test_a_seed_repeats_everything():
    model, ids = build(), token_ids()
    calm_rt.patch(model)

    def results() -> list[Tensor]:
        torch.manual_seed(7)
        outputs = [model.train(mode)(input_ids=ids, labels=ids).loss for mode in (True, False)]
        return [*outputs, model.generate(ids, max_new_tokens=8, num_samples=20)]

    for first, second in zip(results(), results(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_graph(kind):
    model, ids = build(kind).train(), token_ids()
    calm_rt.patch(model)
    eager = losses(model, ids)
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        assert_same_mean(eager, losses(compiled, ids))
    calm_rt.unpatch(compiled)
    assert "forward" not in vars(model)


def test_compiled_code_weighs_masked_labels():
    model, ids = build().train(), token_ids()
    labels = ids.clone()
    labels[0, 5] = labels[1, 9:] = -100
    calm_rt.patch(model)
    eager = losses(model, ids, labels)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_mean(eager, losses(compiled, ids, labels))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel(tmp_path):
    model, ids = build().train(), token_ids()
    before = losses(model, ids)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        report = calm_rt.patch(parallel)
        assert report.name == "EnergyTransformer" and "forward" in vars(model)
        parallel(input_ids=ids, labels=ids).loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(grad is not None for grad in grads)
        assert_same_mean(before, losses(parallel, ids))
        calm_rt.unpatch(parallel)
        assert "forward" not in vars(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["EnergyTransformer", "FlowTransformer"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_temperature_sampling_has_the_same_distribution(kind, temperature):
    """First tokens of 600 patches, with few candidates so that the cascade reaches every level."""
    model = build(kind, vocab_size=8)
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(2)).repeat(600, 1)

    def counts() -> Tensor:
        patches = model.temperature_sampling(hidden[:, None], temperature, num_samples=4)
        assert patches.shape == (600, 1, 4)
        return torch.bincount(patches[:, 0, 0], minlength=8)

    before = counts()
    calm_rt.patch(model)
    table = torch.stack([before, counts()])
    table = table[:, table.sum(0) >= 10]
    assert table.shape[1] >= 2
    assert scipy.stats.chi2_contingency(table.numpy()).pvalue > 1e-6


def test_brier_uses_all_pairs():
    """Same expectation as one pair, and the spread of six pairs of four draws."""
    model, ids = build(vocab_size=8).eval(), token_ids(patches=8) % 8

    def scores() -> Tensor:
        outputs = [model(input_ids=ids, labels=ids) for _ in range(DRAWS)]
        return torch.stack([torch.stack([o.brier1, o.brier2]) for o in outputs]).double()

    before = scores()
    calm_rt.patch(model)
    after = scores()
    assert_same_mean(before, after)
    assert (after.var(0) < before.var(0)).all()
    calm_rt.unpatch(model)
    report = calm_rt.patch(model, keep_bugs=["one_pair_of_draws"])
    assert report.not_cured["one_pair_of_draws"] == "in keep_bugs"
    kept = scores()
    assert_same_mean(before, kept)
    assert (kept.var(0) > after.var(0)).all()


@pytest.mark.parametrize("kind", ["EnergyTransformer", "FlowTransformer"])
def test_brier_of_small_patches(kind):
    model = build(kind, patch_size=2, vocab_size=6, pad_token_id=None).eval()
    ids = token_ids(patches=8, patch_size=2) % 6
    report = calm_rt.patch(model)
    assert "eval_brier" in report.replaced
    output = model(input_ids=ids, labels=ids)
    expected = calm_rt.brier_lm(model._calm_rt_patch.model, ids, num_draws=400).brier
    scores = [model(input_ids=ids, labels=ids) for _ in range(30)]
    mean = torch.stack([torch.stack([o.brier1, o.brier4]) for o in scores]).double()
    reference = torch.tensor([[expected[0], expected[3]]]).expand(2, 2)
    assert_same_mean(mean, reference)
    assert output.brier1.ndim == 0


def test_generate():
    model = build()
    prompt = token_ids(batch=2, patches=2)[:, :7]  # the last patch is not whole
    prompt[1, 5:] = AE["pad_token_id"]
    calm_rt.patch(model)
    ids = model.generate(prompt, max_new_tokens=10, temperature=1.0, seed=3)
    assert torch.equal(ids[0, :7], prompt[0]) and torch.equal(ids[1, :5], prompt[1, :5])
    assert ids.shape[1] <= 17
    again = model.generate(prompt, max_new_tokens=10, temperature=1.0, seed=3)
    assert torch.equal(ids, again)
    alone = model.generate(prompt[:1], max_length=17, temperature=1.0, seed=3)
    assert torch.equal(alone[0], ids[0, : alone.shape[1]])
    eos = model.eos_token_id
    for row, start in zip(ids.tolist(), (7, 5), strict=True):
        new = row[start : start + 10]
        if eos in new:
            assert set(row[start + new.index(eos) + 1 :]) <= {AE["pad_token_id"]}
    calm_rt.unpatch(model)
    report = calm_rt.patch(model, keep_bugs=["prompt_padding"])
    assert report.not_cured["prompt_padding"] == "in keep_bugs"
    assert model.generate(prompt, max_new_tokens=4, temperature=1.0).shape[1] <= 11


def test_the_report_reads():
    report = calm_rt.patch(build("FlowTransformer"))
    text = str(report)
    assert text.startswith("calm_rt.patch: FlowTransformer\n  replaced\n")
    assert "FlowTransformer has no energy head" in text and "num_samples was never set" in text
    assert report.replaced.keys() | report.kept.keys() == SWITCHES.keys()
    assert report.cured.keys() | report.not_cured.keys() <= BUGS.keys()
    assert patching.PatchReport("x").__str__() == "calm_rt.patch: x"
