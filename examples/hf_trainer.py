"""A CALM under the Trainer of `transformers`.

    python examples/hf_trainer.py --steps 3 --accumulate 2

Replace the random blocks by a dataset of {"input_ids": [T]} in whole patches.
"""

import argparse
import tempfile

from small_calm import CalmForTraining, random_blocks
from transformers import Trainer, TrainingArguments


class CalmTrainer(Trainer):
    step, place = 0, -1  # of a microbatch: each needs noise of its own

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        self.place = self.place + 1 if self.step == self.state.global_step else 0
        self.step = self.state.global_step
        count = self.step * self.args.gradient_accumulation_steps + self.place
        loss = model(inputs["input_ids"], count * self.args.world_size + self.args.process_index)
        return (loss, {}) if return_outputs else loss


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--accumulate", type=int, default=1, help="microbatches of a step")
options = parser.parse_args()
with tempfile.TemporaryDirectory() as folder:
    settings = TrainingArguments(
        folder,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    )
    trainer = CalmTrainer(CalmForTraining(), settings, train_dataset=random_blocks(64))
    result = trainer.train()
print(f"loss {result.training_loss:.3f} over {result.global_step} steps")
