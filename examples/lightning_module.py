"""A CALM as a LightningModule.

python examples/lightning_module.py --steps 3 --accumulate 2
"""

import argparse

import lightning
import torch
from small_calm import CalmForTraining, random_blocks
from torch.utils.data import DataLoader


class LightningCalm(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = CalmForTraining()

    def training_step(self, batch, _):
        count = self.trainer.fit_loop.total_batch_idx  # of microbatches: each has noise of its own
        loss = self.model(batch["input_ids"], count * self.trainer.world_size + self.global_rank)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]  # the autoencoder is frozen
        return torch.optim.AdamW(trained, lr=1e-3)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--accumulate", type=int, default=1, help="microbatches of a step")
options = parser.parse_args()
trainer = lightning.Trainer(
    max_steps=options.steps,
    accumulate_grad_batches=options.accumulate,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(LightningCalm(), DataLoader(random_blocks(256), batch_size=4))
print(f"loss {trainer.callback_metrics['loss']:.3f} after {trainer.global_step} steps")
