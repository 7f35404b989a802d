"""The training losses against the paper's formulas, written out with explicit noise."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from calm_rt import reference
from calm_rt.losses import MASK_ID, autoencoder_loss, energy_loss
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig
from calm_rt.reference import Stream

PATCH, VOCABULARY, LATENT = 2, 40, 4
SEED = torch.tensor(5)
SIZES = {"patch_size": PATCH, "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 16}
AUTOENCODER = AutoencoderConfig(latent_size=LATENT, ae_dropout=0.25, **SIZES)
CALM = CalmConfig(
    latent_size=LATENT,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_mlp_layers=1,
    noise_size=4,
    num_samples=3,
    **SIZES,
)


@pytest.fixture
def autoencoder():
    torch.manual_seed(1)
    return Autoencoder(AUTOENCODER).double()


@pytest.fixture
def model():
    torch.manual_seed(2)
    model = Calm(CALM, AUTOENCODER).double()
    torch.nn.init.normal_(model.generative_head.final_layer.linears[2].weight)
    return model


IDS = torch.randint(4, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
ROWS = torch.arange(12) * 3 + 2**34


def noise(rows, length, stream, distribution="normal"):
    return reference.noise(SEED, rows, 1, length, stream, distribution, torch.float32)[0].double()


def test_autoencoder_loss_is_the_paper_s(autoencoder):
    """K cross-entropy + 1e-3 sum of max(0.5, KL), on masked tokens and a thinned latent vector."""
    p = autoencoder.config.ae_dropout
    patches = IDS.view(-1, PATCH)
    masked = torch.where(noise(ROWS, PATCH, Stream.TOKEN_MASK, "uniform") < p, MASK_ID, patches)
    assert 0 < (masked == MASK_ID).double().mean() < 0.6
    mean, log_std = (v[:, 0] for v in autoencoder.encode(masked))
    latents = torch.distributions.Normal(mean, log_std.exp()).mean
    latents = latents + log_std.exp() * noise(ROWS, LATENT, Stream.LATENT)
    kept = noise(ROWS, LATENT, Stream.DROPOUT, "uniform") >= p
    logits = autoencoder.logits(latents * kept / (1 - p))
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), patches.flatten())
    posterior = torch.distributions.Normal(mean, log_std.exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    expected = PATCH * cross_entropy + 1e-3 * kl.clamp(min=0.5).sum(-1).mean()
    loss, metrics = autoencoder_loss(autoencoder, IDS, seed=5, rows=ROWS)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # its noise is float32
    torch.testing.assert_close(metrics["cross_entropy"], cross_entropy.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics["kl"], kl.detach().sum(-1).mean(), rtol=1e-6, atol=0)


def test_evaluation_masks_nothing(autoencoder):
    ids = torch.arange(4 * PATCH).view(2, 2 * PATCH)
    trained, _ = autoencoder_loss(autoencoder, ids, seed=SEED)
    loss, metrics = autoencoder_loss(autoencoder.eval(), ids, seed=SEED)
    patches, rows = ids.view(-1, PATCH), torch.arange(4)
    mean, log_std = (value.squeeze(1) for value in autoencoder.encode(patches))
    latents = mean + log_std.exp() * noise(rows, LATENT, Stream.LATENT)
    expected = F.cross_entropy(autoencoder.logits(latents).flatten(0, 1), patches.flatten())
    torch.testing.assert_close(metrics["cross_entropy"], expected)
    assert loss != trained


def test_targets_do_not_depend_on_autocast(model):
    model.float().requires_grad_(True)
    seen = []
    encode = model.ae_model.encode
    model.ae_model.encode = lambda ids: seen.append(encode(ids)) or seen[-1]
    ids = torch.arange(4 * PATCH)[None]
    energy_loss(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        energy_loss(model, ids)
    energy_loss(model, ids, precision="bf16")
    assert all(torch.equal(seen[0][0], mean) for mean, _ in seen[1:])


def test_an_ensemble_by_vmap(model):
    ids, others = torch.arange(4 * PATCH)[None], Calm(CALM, AUTOENCODER).double()
    parameters, buffers = torch.func.stack_module_state([model, others])

    def hidden(parameters, buffers):
        return torch.func.functional_call(States(model), (parameters, buffers), ids)

    states = torch.vmap(hidden)(
        {f"model.{name}": value.detach() for name, value in parameters.items()},
        {f"model.{name}": value for name, value in buffers.items()},
    )
    torch.testing.assert_close(states[1], others.hidden_states(ids))


class States(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model.hidden_states(ids)


def test_random_tokens_are_learnt_too(autoencoder):
    """A third of the tokens becomes any token, in input and target alike."""
    options = {"distribution": "uniform"}
    stream = Stream.TOKEN_MASK
    _, chosen, token = reference.noise(SEED, ROWS, 3, PATCH, stream, **options)
    ids = torch.where(chosen < 1 / 3, (token * VOCABULARY).long(), IDS.view(-1, PATCH)).view(3, -1)
    assert 0.2 < (ids != IDS).double().mean() < 0.5
    replaced, _ = autoencoder_loss(autoencoder, IDS, seed=5, rows=ROWS, random_tokens=1 / 3)
    assert replaced == autoencoder_loss(autoencoder, ids, seed=5, rows=ROWS)[0]


def test_energy_loss_is_the_paper_s(model):
    rows = ROWS.view(3, 4)[:, 1:].flatten()
    mean, log_std = model.ae_model.encode(IDS[:, PATCH:])
    hidden = model.hidden_states(IDS)[:, :-1].flatten(0, 1)
    draws = model.sample(hidden, 3, SEED, rows)
    eps = reference.noise(SEED, rows, 7, LATENT, Stream.TARGET, dtype=torch.float64)
    targets = mean.flatten(0, 1) + log_std.flatten(0, 1).exp() * eps
    expected = reference.energy_score_of_targets(draws, targets)
    loss, metrics = energy_loss(model, IDS, seed=5, rows=ROWS, num_targets=7)
    torch.testing.assert_close(loss, -expected.score.mean())
    torch.testing.assert_close(metrics["diversity"], expected.diversity.detach().mean())
    torch.testing.assert_close(loss.detach(), 2 * metrics["fidelity"] - metrics["diversity"])


@pytest.mark.parametrize("loss_function", [autoencoder_loss, energy_loss])
def test_loss_is_the_mean_of_its_parts(loss_function, autoencoder, model):
    """What accumulation and several processes rest on: row ids, not positions, decide the noise."""
    trained = model if loss_function is energy_loss else autoencoder
    whole, _ = loss_function(trained, IDS, seed=5, rows=ROWS)
    rows = ROWS.view(3, 4)
    parts = [
        loss_function(trained, IDS[i : i + 1], seed=5, rows=rows[i].clone())[0] for i in range(3)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    other, _ = loss_function(trained, IDS, seed=5, rows=ROWS + 1)
    assert other != whole


def test_energy_loss_leaves_the_autoencoder_alone(model):
    energy_loss(model, IDS, seed=5)[0].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("ae_model."), name


def test_the_first_patch_is_never_predicted(model):
    with pytest.raises(ValueError, match="at least two patches"):
        energy_loss(model, IDS[:, :PATCH])


@pytest.mark.parametrize("loss_function", [autoencoder_loss, energy_loss])
@pytest.mark.parametrize(
    ("ids", "rows", "precision", "message"),
    [
        (IDS[:, :7], None, "fp32", "whole patches"),
        (IDS[0], None, "fp32", "whole patches"),
        (IDS, ROWS[:5], "fp32", "rows"),
        (IDS, None, "fp8", "precision"),
    ],
)
def test_bad_batches(loss_function, ids, rows, precision, message, autoencoder, model):
    trained = model if loss_function is energy_loss else autoencoder
    with pytest.raises(ValueError, match=message):
        loss_function(trained, ids, rows=rows, precision=precision)


@pytest.mark.parametrize("loss_function", [autoencoder_loss, energy_loss])
def test_bf16_is_near(loss_function, autoencoder, model):
    trained = (model if loss_function is energy_loss else autoencoder).float()
    exact, _ = loss_function(trained, IDS, seed=5)
    rounded, _ = loss_function(trained, IDS, seed=5, precision="bf16")
    rounded.backward()
    assert exact != rounded
    torch.testing.assert_close(exact, rounded.float(), rtol=2**-6, atol=0)


@pytest.mark.parametrize("loss_function", [autoencoder_loss, energy_loss])
def test_losses_compile_for_all_sizes(loss_function, autoencoder, model):
    trained = (model if loss_function is energy_loss else autoencoder).float()

    def loss(ids, seed):
        return loss_function(trained, ids, seed=seed)[0]

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(loss, dynamic=True, fullgraph=True, backend=counter)
    for rows in range(2, 5):  # of fewer tokens than the vocabulary has
        ids = IDS[:1].repeat(rows, 1)
        torch.testing.assert_close(compiled(ids, torch.tensor(5)), loss(ids, 5))
    assert counter.frame_count == 1


@pytest.mark.parametrize("loss_function", [autoencoder_loss, energy_loss])
def test_other_arguments_are_named(loss_function, autoencoder, model):
    trained, other = (autoencoder, model)[:: 1 if loss_function is autoencoder_loss else -1]
    kind = type(trained).__name__
    for wrong in (other, torch.nn.DataParallel(trained)):
        with pytest.raises(ValueError, match=f"model: expected of class {kind}"):
            loss_function(wrong, IDS)
    with pytest.raises(ValueError, match="ids: expected a tensor"):
        loss_function(trained, IDS.tolist())
    with pytest.raises(ValueError, match="rows: expected a tensor"):
        loss_function(trained, IDS, rows=ROWS.tolist())


def test_no_row_has_no_mean(model):
    assert energy_loss(model, IDS[:0])[0].isnan()
