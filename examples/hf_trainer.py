"""A CALM under the Trainer of `transformers`.

    python examples/hf_trainer.py --steps 3 --accumulate 2 --output run

With an output folder, a call with more steps goes on from the last checkpoint there. Replace the
random blocks by a dataset of {"input_ids": [T]} in whole patches.
"""

import argparse
import tempfile

import torch
from small_calm import CalmForTraining, random_blocks
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


class CalmTrainer(Trainer):
    step, place = 0, -1  # of a microbatch: each needs noise of its own

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        self.place = self.place + 1 if self.step == self.state.global_step else 0
        self.step = self.state.global_step
        count = self.step * self.args.gradient_accumulation_steps + self.place
        loss = model(inputs["input_ids"], count * self.args.world_size + self.args.process_index)
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # the loss alone, with the same draws (seed 0) at every evaluation
        with torch.no_grad():
            return model(self._prepare_inputs(inputs)["input_ids"]), None, None


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--accumulate", type=int, default=1, help="microbatches of a step")
parser.add_argument("--output", help="folder of checkpoints; without it they are not kept")
options = parser.parse_args()
with tempfile.TemporaryDirectory() as folder:
    folder = options.output or folder
    settings = TrainingArguments(
        folder,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=1e-3,
        logging_steps=1,
        eval_strategy="epoch",
        report_to="none",
        remove_unused_columns=False,
    )
    held_out = random_blocks(8, seed=1)
    trainer = CalmTrainer(CalmForTraining(), settings, None, random_blocks(64), held_out)
    result = trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
print(f"loss {result.training_loss:.3f} over {result.global_step} steps")
