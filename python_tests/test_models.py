"""The models: official names, compilation, gradients, refusals."""

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from calm_rt import ops
from calm_rt.nn import (
    Autoencoder,
    AutoencoderConfig,
    Calm,
    CalmConfig,
    EnergyHead,
)

VOCAB = 61


def configs(patch_size: int = 4, key_heads: int = 4) -> tuple[CalmConfig, AutoencoderConfig]:
    calm = CalmConfig(
        patch_size=patch_size,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        latent_size=10,
        noise_size=6,
        num_mlp_layers=2,
        initializer_range=0.2,
    )
    autoencoder = AutoencoderConfig(
        patch_size=patch_size,
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        latent_size=10,
        initializer_range=0.2,
    )
    return calm, autoencoder


def model(patch_size: int = 4, key_heads: int = 4) -> Calm:
    torch.manual_seed(0)
    made = Calm(*configs(patch_size, key_heads))
    torch.nn.init.normal_(made.generative_head.final_layer.linears[2].weight)  # starts as zero
    return made.eval()


def tokens(batch_size: int, num_patches: int, patch_size: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (batch_size, num_patches * patch_size), generator=generator)


def assert_as_exact(value: Tensor, exact: Tensor, other: Tensor) -> None:
    """value is as near to exact (float64) as other (float32), to a factor and a few eps."""
    bound = 4 * (other - exact).abs().max() + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (value - exact).abs().max() <= bound


def layer_norm(name: str, size: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [size], f"{name}.bias": [size]}


def linear(name: str, outputs: int, inputs: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}


def gated(name: str, hidden: int, intermediate: int) -> dict[str, list[int]]:
    up = {f"{name}.{part}_proj.weight": [intermediate, hidden] for part in ("gate", "up")}
    return {**up, f"{name}.down_proj.weight": [hidden, intermediate]}


def official_autoencoder(k: int, v: int, h: int, i: int, latent: int) -> dict[str, list[int]]:
    names = {"encoder.embed_tokens.weight": [v, h], "decoder.lm_head_weight": [v, h]}
    for part in ("encoder", "decoder"):
        for layer in range(2):
            name = f"{part}.{part}_layers.{layer}"
            names |= {**gated(f"{name}.mlp", h, i), f"{name}.layernorm.weight": [h]}
        names[f"{part}.norm.weight"] = [h]
    names |= linear("encoder.squeeze_layer", h, k * h)
    names |= linear("encoder.hidden_to_latent", 2 * latent, h)
    names |= linear("decoder.latent_to_hidden", h, latent)
    return names | linear("decoder.expand_layer", k * h, h)


def official_head(d: int, n: int, latent: int, blocks: int) -> dict[str, list[int]]:
    names = linear("noise_embd", d, n) | linear("hidden_embd", d, d)
    names |= layer_norm("norm_hidden", d) | layer_norm("norm_noise", d)
    for block in range(blocks):
        name = f"mlp_blocks.{block}"
        names |= layer_norm(f"{name}.in_ln", d) | linear(f"{name}.linears.0", d, 2 * d)
        names |= linear(f"{name}.linears.2", d, d) | linear(f"{name}.linears.4", 2 * d, d)
        names |= linear(f"{name}.down_proj", d, d)
    names |= layer_norm("final_layer.in_ln", d) | linear("final_layer.linears.0", d, d)
    return names | linear("final_layer.linears.2", latent, d)


def official_backbone(v: int, d: int, i: int, layers: int, key: int) -> dict[str, list[int]]:
    names = {"embed_tokens.weight": [v, d], "norm.weight": [d]}
    for layer in range(layers):
        name = f"layers.{layer}"
        names |= {f"{name}.self_attn.{part}_proj.weight": [d, d] for part in "qo"}
        names |= {f"{name}.self_attn.{part}_proj.weight": [key, d] for part in "kv"}
        names |= gated(f"{name}.mlp", d, i)
        names |= {f"{name}.{n}_layernorm.weight": [d] for n in ("input", "post_attention")}
    return names


@pytest.mark.parametrize(("patch_size", "key_heads"), [(4, 4), (3, 2)])
def test_state_dict_is_official(patch_size, key_heads):
    parts = {
        "ae_model": official_autoencoder(patch_size, VOCAB, 24, 40, 10),
        "transformer": official_backbone(VOCAB, 32, 48, 2, 8 * key_heads),
        "generative_head": official_head(32, 6, 10, 2),
        "embed_proj": linear("0", 64, patch_size * 32) | linear("2", 32, 64) | layer_norm("3", 32),
    }
    official = {
        f"{part}.{name}": size for part, names in parts.items() for name, size in names.items()
    }
    ours = model(patch_size, key_heads).state_dict()
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == official


@pytest.mark.parametrize(
    ("layers", "hidden_size", "intermediate_size", "published"),
    [
        (16, 1024, 2752, 371_732_608),
        (16, 1536, 4096, 735_332_480),
        (16, 2560, 6880, 1_829_795_968),
    ],
    ids=["CALM-M", "CALM-L", "CALM-XL"],
)
def test_published_sizes(layers, hidden_size, intermediate_size, published):
    """Parameters of the official models, counted without the autoencoder as in the paper."""
    config = CalmConfig(
        vocab_size=128257,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=16,
    )
    with torch.device("meta"):
        net = Calm(config, AutoencoderConfig(vocab_size=128257))
    assert sum(parameter.numel() for parameter in net.ae_model.parameters()) == 75_832_064
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == published


def test_embedding_is_one_parameter():
    autoencoder = Autoencoder(configs()[1])
    for twin in (autoencoder, copy.deepcopy(autoencoder), copy.deepcopy(autoencoder).double()):
        assert twin.decoder.lm_head_weight is twin.encoder.embed_tokens.weight
        assert sum(p.shape == (VOCAB, 24) for p in twin.parameters()) == 1


def test_untrained_head_draws_zero():
    head = EnergyHead(configs()[0])
    drawn = ops.sample_latents(torch.randn(3, 32), head.weights(), num_samples=2, seed=0)
    assert torch.equal(drawn, torch.zeros(2, 3, 10))


@pytest.mark.parametrize("name", ["hidden_states", "encode", "decode", "logits", "sample"])
@torch.no_grad()
def test_compiles_whole_and_once(name):
    """fullgraph, without a second compilation for another seed or other ids."""
    net = model(3, 2)
    double = copy.deepcopy(net).double()
    latents, hidden, rows = torch.randn(4, 10), torch.randn(4, 32), torch.arange(4)
    inputs = [
        (tokens(2, 4, 3, seed), latents + seed, hidden, torch.tensor(seed)) for seed in (1, 2)
    ]

    def run(of: Calm, ids: Tensor, latents: Tensor, hidden: Tensor, seed: Tensor) -> Tensor:
        return {
            "hidden_states": lambda: of.hidden_states(ids),
            "encode": lambda: torch.cat(of.ae_model.encode(ids)),
            "decode": lambda: of.ae_model.decode(latents),
            "logits": lambda: of.ae_model.logits(latents),
            "sample": lambda: of.sample(hidden, 3, seed, rows),
        }[name]()

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for ids, latents, hidden, seed in inputs:
        got, eager = compiled(net, ids, latents, hidden, seed), run(net, ids, latents, hidden, seed)
        if name == "decode":
            assert torch.equal(got, eager)
        else:
            assert_as_exact(got, run(double, ids, latents.double(), hidden.double(), seed), eager)
    assert counter.frame_count == 1


def test_autocast_leaves_frozen_targets_exact():
    net, ids = model(), tokens(2, 3, 4)
    plain = net.ae_model.encode(ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, net.ae_model.encode(ids), plain))
        assert net.hidden_states(ids).dtype == torch.float32
        assert net.sample(net.hidden_states(ids).flatten(0, 1), 2, 0).dtype == torch.bfloat16
        trained = Autoencoder(configs()[1])
        assert trained.encode(ids)[0].dtype == torch.bfloat16


def test_gradients_reach_all_but_the_autoencoder():
    net = model().train()
    assert not net.ae_model.training and net.transformer.training
    ids = tokens(2, 4, 4)
    hidden = net.hidden_states(ids)[:, :-1].flatten(0, 1)
    mean, log_std = (part[:, 1:].flatten(0, 1) for part in net.ae_model.encode(ids))
    drawn = net.sample(hidden, 3, seed=0)
    (-ops.energy_score(drawn, mean, log_std, num_targets=5)).mean().backward()
    for name, parameter in net.named_parameters():
        frozen = name.startswith("ae_model.")
        assert (parameter.grad is None) == frozen, name
        assert frozen or parameter.grad.abs().sum() > 0, name


def test_autoencoder_gradients_reach_everything():
    autoencoder, ids = Autoencoder(configs()[1]), tokens(2, 4, 4)
    mean, log_std = autoencoder.encode(ids)
    logits = autoencoder.logits(mean + log_std.exp())
    torch.nn.functional.cross_entropy(logits.flatten(0, -2), ids.flatten()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in autoencoder.parameters())


def test_zero_rows():
    net = model()
    assert net.hidden_states(tokens(0, 3, 4)).shape == (0, 3, 32)
    assert net.ae_model.decode(torch.zeros(0, 10)).shape == (0, 4)
    assert net.sample(torch.zeros(0, 32), 2, 0).shape == (2, 0, 10)
    assert net.ae_model.encode(tokens(0, 3, 4))[0].shape == (0, 3, 10)


@pytest.mark.parametrize("method", ["hidden_states", "encode"])
def test_wrong_tokens_are_named(method):
    net = model()
    function = net.hidden_states if method == "hidden_states" else net.ae_model.encode
    with pytest.raises(
        ValueError, match=r"ids: expected whole patches, shape \[B, P x 4\], got \[1, 6\]"
    ):
        function(torch.zeros(1, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="ids: expected an int64 tensor"):
        function(torch.zeros(1, 4))
    for wrong in (VOCAB, -1):
        with pytest.raises(IndexError, match=rf"\[0, {VOCAB}\), got {wrong}"):
            function(torch.tensor([[0, wrong, 0, 0]]))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (AutoencoderConfig, "num_encoder_layers", 3),
        (AutoencoderConfig, "num_decoder_layers", 1),
        (AutoencoderConfig, "patch_size", 0),
        (AutoencoderConfig, "ae_dropout", 1.0),
        (AutoencoderConfig, "hidden_act", "gelu"),
        (AutoencoderConfig, "mlp_bias", True),
        (AutoencoderConfig, "eos_token_id", 32000),
        (CalmConfig, "hidden_size", "768"),
        (CalmConfig, "num_attention_heads", 5),
        (CalmConfig, "num_key_value_heads", 5),
        (CalmConfig, "beta", 2.5),
        (CalmConfig, "beta", 0),
        (CalmConfig, "num_samples", 1),
        (CalmConfig, "rms_norm_eps", float("nan")),
        (CalmConfig, "rope_scaling", {"type": "linear", "factor": 2.0}),
        (CalmConfig, "rope_parameters", {"rope_type": "yarn"}),
        (CalmConfig, "head_dim", 128),
        (CalmConfig, "attention_bias", True),
    ],
)
def test_bad_configurations_name_the_field(kind, field, value):
    with pytest.raises(ValueError, match=f"config {field}: expected .*got"):
        kind.from_dict({field: value})


def test_configurations_round_trip_and_ignore_the_unknown():
    for config in configs():
        values = config.to_dict()
        assert type(config).from_dict(values | {"transformers_version": "4.43.0"}) == config
    newer = CalmConfig.from_dict({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert newer.rope_theta == 5e5
    assert CalmConfig.from_dict({"num_attention_heads": 6}).num_key_value_heads == 6


@pytest.mark.parametrize("field", ["patch_size", "latent_size", "vocab_size"])
def test_autoencoder_must_fit(field):
    calm, autoencoder = configs()
    setattr(autoencoder, field, 7)
    with pytest.raises(ValueError, match=f"autoencoder_config.{field}: expected .* got 7"):
        Calm(calm, autoencoder)


@pytest.mark.parametrize("assign", [False, True])
def test_embedding_stays_one_parameter(assign, tmp_path):
    """Made on meta and given memory, loaded under one of its names, moved."""
    whole = Autoencoder(configs()[1])
    with torch.device("meta"):
        made = Autoencoder(configs()[1])
    made.to_empty(device="cpu")
    state = whole.state_dict()
    for name in ("encoder.embed_tokens.weight", "decoder.lm_head_weight"):
        made.load_state_dict({k: v for k, v in state.items() if k != name}, assign=assign)
        assert torch.equal(made.encoder.embed_tokens.weight, whole.encoder.embed_tokens.weight)
        assert made.double().decoder.lm_head_weight is made.encoder.embed_tokens.weight
    made.decoder.lm_head_weight = torch.nn.Parameter(made.decoder.lm_head_weight + 1)
    with pytest.raises(ValueError, match="lm_head_weight that is encoder"):
        made.save(tmp_path)
    assert not list(tmp_path.iterdir())
