"""BrierLM of any causal LM of `transformers`, beside its cross-entropy.

    python examples/brier_of_causal_lm.py --model FOLDER --text FILE --max-patches 200

Without a model a small random one reads bytes. A CALM has no cross-entropy; BrierLM compares both.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import calm_rt

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model")
parser.add_argument("--text", default=__file__)
parser.add_argument("--max-patches", type=int, default=50)
options = parser.parse_args()
text = Path(options.text).read_text()
if options.model:
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    ids = AutoTokenizer.from_pretrained(options.model)(text, return_tensors="pt").input_ids[0]
else:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor(list(text.encode()))
documents = [part for part in ids.split(100) if len(part) >= 8]  # intervals are over documents
with torch.no_grad():
    losses = [model(d[None], labels=d[None]).loss for d in documents]
print(f"cross-entropy  {torch.stack(losses).mean():.3f} nats a token")

result = calm_rt.brier_lm(model, documents, max_patches=options.max_patches)
low, high = result.interval
print(f"BrierLM        {result.score:.3f}, 95 % interval {low:.3f} to {high:.3f}")
print(f"Brier-1 to 4   {', '.join(f'{b:.4f}' for b in result.brier)}")
print(f"{result.tokens_per_second:,.0f} tokens/s, in windows of at most {result.block_size}")
