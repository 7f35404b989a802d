"""calm_rt.patch on a stand-in with the official structure: same results, nothing left behind."""

import copy
from types import MethodType

import pytest
import scipy.stats
import torch
from official_standin import AE, build
from torch import Tensor, nn

import calm_rt
from calm_rt import patching
from calm_rt.official_models import KINDS
from calm_rt.patching import BUGS, SWITCHES

MODELS = KINDS[1:]
DRAWS = 200  # of a loss, to compare two means
SIGMAS = 5.0  # two means of the same distribution differ by more once in two million times


def token_ids(batch: int = 2, patches: int = 4, patch_size: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, AE["vocab_size"], (batch, patches * patch_size), generator=generator)


def losses(model: nn.Module, ids: Tensor, labels: Tensor | None = None) -> Tensor:
    """[DRAWS] losses with new noise each."""
    labels = ids if labels is None else labels
    with torch.no_grad():
        return torch.stack(
            [model(input_ids=ids, labels=labels).loss for _ in range(DRAWS)]
        ).double()


def assert_same_mean(first: Tensor, second: Tensor) -> None:
    """first, second: [N, ...] draws of what should be one distribution."""
    spread = (first.var(0) / len(first) + second.var(0) / len(second)).sqrt()
    error = (first.mean(0) - second.mean(0)).abs()
    assert (error <= SIGMAS * spread).all(), (error / spread).max()


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


def test_brier_of_small_patches():
    model = build(patch_size=2, vocab_size=6, pad_token_id=None).eval()
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


def test_labels_inside_a_patch():
    """A label of -100 makes its patch no target, and leaves all others what they are."""
    ids = token_ids(batch=2, patches=6)
    labels = ids.clone()
    labels[0, 9], labels[1, 14:18] = -100, -100  # 1 and 2 patches
    model = build().train()
    with calm_rt.patch(model, encoder_target=True) as report:
        assert "label_masks" in report.cured
        hidden = torch.zeros(2, 5, 1)
        hidden, patches, weight = patched_targets(model, hidden, labels)
        assert len(hidden) == len(patches) == 10 - 3 and weight is None
        wanted = [p for p in ids.view(-1, 4)[[1, 3, 4, 5, 7, 8, 11]]]
        assert torch.equal(patches, torch.stack(wanted))
        assert model.eval()(input_ids=ids, labels=labels).brier1.isfinite()
    labels[0, 9], labels[1, 14:18] = ids[0, 9], ids[1, 14:18]
    labels[:, :12] = -100  # whole patches: as the official code does it
    before = losses(model.train(), ids, labels)
    calm_rt.patch(model)
    assert_same_mean(before, losses(model, ids, labels))


def patched_targets(model: nn.Module, hidden: Tensor, labels: Tensor):
    from calm_rt.patched import _targets_of

    return _targets_of(model._calm_rt_patch, hidden, labels, model.patch_size)


@pytest.mark.parametrize("kept", [False, True])
def test_bugs_that_need_no_switch(kept):
    keep_bugs = ["tied_embedding", "missing_num_samples"] if kept else []
    model, ids = build("DiffusionTransformer").train(), token_ids()
    inner = model.ae_model
    inner.decoder.lm_head_weight = nn.Parameter(inner.encoder.embed_tokens.weight.detach().clone())
    separate = inner.decoder.lm_head_weight
    report = calm_rt.patch(model, keep_bugs=keep_bugs)
    names = {"tied_embedding", "missing_num_samples"}
    assert "diffusion_device" in report.not_cured
    assert names <= (report.not_cured if kept else report.cured).keys()
    assert (inner.decoder.lm_head_weight is separate) == kept
    if kept:
        with pytest.raises(AttributeError, match="num_samples"):
            model(input_ids=ids, labels=ids)
    else:
        model(input_ids=ids, labels=ids).loss.backward()
    calm_rt.unpatch(model)
    assert inner.decoder.lm_head_weight is separate and not hasattr(model, "num_samples")


def test_an_untied_head_that_was_not_loaded_is_named():
    model = build("Autoencoder")
    model.decoder.lm_head_weight = nn.Parameter(torch.zeros(50, 16))
    report = calm_rt.patch(model)
    assert "was not loaded" in report.not_cured["tied_embedding"]


def test_targets_do_not_depend_on_training():
    """The official encoder rounds its embeddings to bfloat16 in training mode."""
    model, patches = build(), token_ids()
    exact = model.ae_model.eval().encoder(input_ids=patches)
    assert not torch.equal(model.ae_model.train().encoder(input_ids=patches), exact)
    report = calm_rt.patch(model.train())
    assert "bf16_embeddings" in report.cured
    got = torch.cat(model._calm_rt_patch.autoencoder.encode(patches), -1)
    assert (got - exact).abs().max() <= 64 * torch.finfo(torch.float32).eps * exact.abs().max()
    calm_rt.unpatch(model)
    report = calm_rt.patch(model, keep_bugs=["bf16_embeddings"])
    assert report.kept["encoder_target"] == "keep_bugs has bf16_embeddings"


def test_folded_targets_go_when_weights_are_loaded():
    model, ids = build().train(), token_ids()
    before = losses(model.eval(), ids)
    model.train()
    report = calm_rt.patch(model, fold_encoder=True)
    encoder = model._calm_rt_patch.autoencoder.encoder
    assert "bytes" in report.replaced["fold_encoder"] and encoder.tables is not None
    assert_same_mean(before, losses(model, ids))
    model.load_state_dict(model.state_dict())
    assert encoder.tables is None
    calm_rt.unpatch(model)
    model.ae_model.requires_grad_(True)
    report = calm_rt.patch(model, fold_encoder=True)
    assert "a frozen autoencoder" in report.kept["fold_encoder"]


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
    names = SWITCHES.keys() | BUGS.keys()
    assert report.replaced.keys() | report.kept.keys() == SWITCHES.keys()
    assert (report.cured.keys() | report.not_cured.keys()) <= names | {
        f"(by {switch})" for switch in SWITCHES
    }
    assert patching.PatchReport("x").__str__() == "calm_rt.patch: x"
