"""Greedy decoding of any causal LM of `transformers` without logits: linear_argmax.

    python examples/greedy_decoding.py --model FOLDER --steps 20

Without a model a small random one shows that the tokens are those of generate(do_sample=False).
"""

import argparse
import inspect

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from calm_rt import ops

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()
torch.manual_seed(0)
if options.model:
    model = AutoModelForCausalLM.from_pretrained(options.model)
else:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=5000, num_hidden_layers=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
model.eval()
prompt = torch.randint(model.config.vocab_size, (2, 5))
head = model.get_output_embeddings()
vocabulary, bias = head.weight, getattr(head, "bias", None)  # [V, H]; most models have no bias
if bias is not None:  # <h, w> + b = <[h, 1], [w, b]>
    vocabulary = torch.cat([vocabulary, bias[:, None]], 1).detach()

taken = inspect.signature(model.base_model.forward).parameters
name = "cache" if "cache" in taken else "past_key_values"  # in newer and older transformers
ids, cache = prompt, None
with torch.no_grad():
    for _ in range(options.steps):
        new = ids if cache is None else ids[:, -1:]
        out = model.base_model(new, use_cache=True, **{name: cache})
        cache = out[name]
        hidden = out.last_hidden_state[:, -1]
        if bias is not None:
            hidden = F.pad(hidden, (0, 1), value=1.0)
        token = ops.linear_argmax(hidden, vocabulary)  # [B], no [B, V]
        ids = torch.cat([ids, token[:, None]], 1)
    known = model.generate(
        prompt, max_new_tokens=options.steps, min_new_tokens=options.steps, do_sample=False
    )
print(f"{ids[0, 5:].tolist()}: the same as generate: {torch.equal(ids, known)}")
