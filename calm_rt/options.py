"""Options of the command line that stand for fields of a configuration or are many of a kind, and
names that options and arguments of Python share. Imports nothing: --help needs none of it."""

# option, type, what it is; defaults are those of calm_rt.training_config.TrainingConfig
TRAINING_OPTIONS = [
    ("steps", int, "optimizer steps (default: 1000)"),
    (
        "minutes",
        float,
        "end earlier, after this much training; the schedule follows the clock (default: none)",
    ),
    ("batch-size", int, "blocks a step, over all processes (default: 16)"),
    ("block-size", int, "tokens a block, a multiple of the patch size (default: 512)"),
    ("accumulation", int, "parts in which a process computes its share of a batch (default: 1)"),
    ("learning-rate", float, "after warm-up (default: 0.001)"),
    ("warmup-steps", int, "steps of linear warm-up (default: 100)"),
    ("schedule", str, "after warm-up: constant, cosine or linear (default: constant)"),
    ("weight-decay", float, "of matrices (default: 0.1)"),
    ("clip-norm", float, "largest norm of the gradient (default: 1.0)"),
    (
        "precision",
        str,
        "fp32, bf16 or auto, the faster one here, measured once (default: auto)",
    ),
    ("seed", int, "of weights, order and noise (default: 0)"),
    ("log-every", int, "steps between lines of log.jsonl (default: 10)"),
    ("evaluate-every", int, "steps between evaluations on held-out text (default: 200)"),
    ("save-every", int, "steps between checkpoints (default: 500)"),
    ("evaluation-blocks", int, "held-out blocks in an evaluation (default: 16)"),
]
AUTOENCODER_TRAINING = [
    *TRAINING_OPTIONS,
    (
        "random-tokens",
        float,
        "share of tokens made random, so that rare ones are learnt (default: 0.0)",
    ),
    (
        "target-accuracy",
        float,
        "stop when this share of held-out tokens comes back (default: none)",
    ),
]
MODEL_TRAINING = [
    *TRAINING_OPTIONS,
    ("num-targets", int, "target draws of the energy score (default: 100)"),
]
AUTOENCODER_OPTIONS = [
    ("hidden-size", int, "features of a token"),
    ("intermediate-size", int, "features inside a layer"),
    ("latent-size", int, "numbers in the latent vector of a patch"),
    ("num-encoder-layers", int, "half before, half after a patch becomes one vector"),
    ("num-decoder-layers", int, "half before, half after a vector becomes a patch"),
]
MODEL_OPTIONS = [
    ("hidden-size", int, "features of a patch"),
    ("intermediate-size", int, "features inside a layer"),
    ("num-hidden-layers", int, "layers of the backbone"),
    ("num-attention-heads", int, "of the backbone"),
    ("num-key-value-heads", int, "fewer than attention heads: grouped queries"),
    ("noise-size", int, "random numbers that the head turns into a draw"),
    ("num-mlp-layers", int, "blocks of the head"),
    ("num-samples", int, "draws of every next patch in training"),
    ("beta", float, "exponent of the energy score"),
    ("max-position-embeddings", int, "patches in the longest text"),
]
SAMPLING_OPTIONS = [  # defaults are those of calm_rt.sequence.GenerationOptions
    ("temperature", str, "1, 1/2, 1/3, ... or 0; any in (0, 1] with --method exact (default: 1)"),
    ("num-candidates", int, "draws in the pool below temperature 1 (default: 200)"),
    ("method", str, "pool, or exact: draws are rejected until one is right (default: pool)"),
    ("max-draws", int, "of a patch, with --method exact or --constrain (default: 10000)"),
    ("on-budget", str, "what follows when --method exact has made them: raise or pool"),
    ("seed", int, "of all draws (default: 0)"),
]
PLAN_OPTIONS = [
    ("batch-size", 1, "sequences at once, blocks of a training step"),
    ("num-candidates", 200, "draws of a step; 1 for temperature 1"),
    ("prompt-tokens", 128, "of each sequence"),
    ("max-new-tokens", 128, "of each sequence"),
    ("prefill-chunk", 1024, "patches of prompts in one forward pass"),
    ("block-size", 512, "tokens of a block in training"),
    ("num-targets", 100, "target draws of the energy score in training"),
]
# of CalmConfig(), as in configuration_calm.py of the official code
DEFAULT_SIZES = "the official code's sizes, patch 4, vocabulary 32,000, hidden 768, 12 layers"
PLAN_SIZES = [
    ("patch-size", int, "tokens a patch"),
    ("vocab-size", int, "tokens of the vocabulary"),
    ("latent-size", int, "numbers in the latent vector of a patch"),
    *MODEL_OPTIONS,
]
DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("calm_rt", "official")  # of a checkpoint's folder
