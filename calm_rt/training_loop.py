"""The training loop: steps, log, held-out metrics, checkpoints and their interruption."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from calm_rt.curves import CURVES, TrainingLog, plot_curves
from calm_rt.data import TokenShards
from calm_rt.losses import PRECISIONS
from calm_rt.model_folder import copy_tokenizer
from calm_rt.nn import Autoencoder, Calm
from calm_rt.threads import faster_threads, restored_threads
from calm_rt.training_config import TrainingConfig
from calm_rt.training_state import STATE, Interrupt, TrainingState, World, trainable

THREADS_EVERY = 100  # steps between choices of the number of threads
PLOT_SECONDS = 60  # at least between two pictures of the curves in a run
BF16_GAIN = 0.9  # of float32's time: below it bfloat16 is worth its rounding

Model = Autoencoder | Calm
Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
Metrics = dict[str, float | list[float]]


class TrainingDiverged(RuntimeError):
    """The loss or its gradient stopped being finite; the last checkpoint was kept."""


class TrainingLoop:
    """One run in progress: model, data, optimizer and the state they are in."""

    def __init__(
        self,
        model: Model,
        loss_function: Loss,
        evaluate: Callable[[str], Metrics],
        data: TokenShards,
        output: Path,
        training: TrainingConfig,
        world: World,
        optimizer: torch.optim.AdamW,
        state: TrainingState,
    ) -> None:
        self.model, self.loss_function, self.evaluate = model, loss_function, evaluate
        self.data, self.output, self.training, self.world = data, output, training, world
        self.optimizer, self.state = optimizer, state
        self.parameters = list(trainable(model).values())
        self.leads = world.rank == 0
        self.saved_step = state.step or None
        self.step_seconds = 0.0  # of the last step
        self.sums: dict[str, float] = {}
        self.plotted = time.perf_counter()
        self.threads = torch.get_num_threads()

    def run(self) -> None:
        """Trains to the end of the steps or the minutes, to the target accuracy, or to Ctrl-C."""
        training, state = self.training, self.state
        if self.leads and self.saved_step is None:
            self._begin()
        log = TrainingLog(self.output, state.step) if self.leads else None
        reached, interrupted = self._reached(), False
        with Interrupt() as interrupt, self._progress_bar() as bar, restored_threads():
            while not (reached or interrupted or self._progress() >= 1):
                if state.step % THREADS_EVERY == 0:
                    self._choose_threads()
                if state.precision is None:
                    state.precision = self.world.agree(self._choose_precision())
                values = self._step(interrupt.requested)
                interrupted = values.pop("interrupted") > 0
                self._add(values)
                ended = self._progress() >= 1
                last = interrupted or ended
                bar.update(self._position() - bar.n)
                if (state.step % training.log_every == 0 or last) and self.leads:
                    line = self._means()
                    log.write(state.step, line)
                    speed = f"{line['tokens_per_second']:,} tokens/s"
                    bar.set_postfix_str(f"loss {line['loss']:.3f}, {speed}")
                if state.step % training.evaluate_every == 0 or ended:
                    metrics = self.world.agree(self._evaluate() if self.leads else None)
                    if self.leads:
                        log.write(state.step, metrics)
                        bar.write(f"step {state.step}: {_in_words(metrics)}", file=sys.stderr)
                    state.accuracy = metrics.get("accuracy")
                    reached = self._reached()
                ends = last or reached
                if (state.step % training.save_every == 0 or ends) and self.leads:
                    self._save(plot=ends or time.perf_counter() > self.plotted + PLOT_SECONDS)
        if interrupted:
            where = f"step {state.step} is saved in {self.output}"
            raise KeyboardInterrupt(f"{where}; resume continues there")

    def _reached(self) -> bool:
        target, accuracy = self.training.target_accuracy, self.state.accuracy
        return target is not None and accuracy is not None and accuracy >= target

    def _progress(self) -> float:
        return self.training.progress(self.state.step, self.state.seconds)

    def _progress_bar(self) -> tqdm:
        """Counts steps, or percent of the time where that ends the run."""
        total, unit = self.training.steps, "step"
        if self.training.minutes is not None:
            total, unit = 100, "%"
        disable = None if self.leads else True  # None: shown on a terminal only
        start = self._position()
        return tqdm(total=total, initial=start, unit=unit, disable=disable, leave=False)

    def _position(self) -> int:
        if self.training.minutes is None:
            return self.state.step
        return min(100, int(100 * self._progress()))

    def _step(self, interrupt: bool) -> dict[str, float]:
        """One optimizer step; returns loss, metrics and gradient norm, averaged over all parts."""
        start = time.perf_counter()
        training, state = self.training, self.state
        totals: dict[str, Tensor] = {}
        for part in range(training.accumulation):
            loss, metrics = self._loss(part, state.precision)
            (loss / training.accumulation).backward()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                totals[name] = totals.get(name, 0) + value.float() / training.accumulation
        clock = torch.tensor([self.step_seconds, float(interrupt)], device=self.world.device)
        self.world.average([p.grad for p in self.parameters] + list(totals.values()) + [clock])
        totals["gradient_norm"] = torch.nn.utils.clip_grad_norm_(
            self.parameters, training.clip_norm
        )
        values = dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True))
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            raise TrainingDiverged(self._divergence(values["loss"]))
        rate = training.rate(state.step, state.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.step += 1
        state.seconds += clock[0].item()
        self.step_seconds = time.perf_counter() - start
        return values | {
            "learning_rate": rate,
            "interrupted": clock[1].item(),
            "step_seconds": self.step_seconds,
        }

    def _loss(self, part: int, precision: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one part of this process's share of the batch."""
        training, world = self.training, self.world
        ids, rows = self.data.train_batch(
            self.state.step,
            training.batch_size,
            training.block_size,
            training.seed,
            rank=world.rank * training.accumulation + part,
            world_size=world.size * training.accumulation,
        )
        ids, rows = ids.to(world.device), rows.to(world.device).flatten()
        return self.loss_function(
            self.model, ids, seed=training.seed, rows=rows, precision=precision
        )

    def _choose_precision(self) -> str:
        """The precision asked for; for "auto" the faster one on the first batch."""
        if self.training.precision != "auto":
            return self.training.precision
        if self.world.device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
        seconds = {precision: math.inf for precision in PRECISIONS}
        for _ in range(3):
            for precision in seconds:
                start = time.perf_counter()
                self._loss(0, precision)[0].backward()
                seconds[precision] = min(seconds[precision], time.perf_counter() - start)
        self.optimizer.zero_grad()
        return "bf16" if seconds["bf16"] < BF16_GAIN * seconds["fp32"] else "fp32"

    def _choose_threads(self) -> None:
        """Fewer threads where others use the CPU: only in a run that follows the clock, for the
        number of threads changes the rounding."""
        alone = self.world.size == 1 and self.world.device.type == "cpu"
        if self.training.minutes is None or not alone or self.threads == 1:
            return
        precision = self.state.precision or PRECISIONS[0]
        start = time.perf_counter()
        faster_threads(lambda: self._loss(0, precision)[0].backward(), self.threads)
        self.optimizer.zero_grad()
        self.state.seconds += time.perf_counter() - start

    def _evaluate(self) -> Metrics:
        self.model.eval()
        with torch.no_grad():
            metrics = self.evaluate(self.state.precision)
        self.model.train()
        return metrics

    def _begin(self) -> None:
        """Nothing of an earlier run may be resumed as this one: its state goes first, and what a
        state does not hold, sizes and frozen parameters, is there before the first is."""
        (self.output / STATE).unlink(missing_ok=True)
        self.model.save(self.output)

    def _save(self, plot: bool) -> None:
        """The state first: resuming takes from it all that trains."""
        self.state.save(self.output, self.model, self.optimizer)
        self.saved_step = self.state.step
        self.model.save(self.output)
        copy_tokenizer(self.data.folder, self.output)
        if plot:
            plot_curves({type(self.model).__name__: self.output}, self.output / CURVES)
            self.plotted = time.perf_counter()

    def _add(self, values: dict[str, float]) -> None:
        """Adds a step to the sums that the next line of the log averages."""
        for name, value in {**values, "count": 1}.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def _means(self) -> dict[str, float]:
        """A line of the log, from the steps since the last one."""
        count, seconds = self.sums.pop("count"), self.sums.pop("step_seconds")
        means = {name: total / count for name, total in self.sums.items()}
        self.sums = {}
        tokens = count * self.training.batch_size * self.training.block_size
        return means | {
            "tokens_per_second": round(tokens / seconds),
            "seconds": self.state.seconds,
        }

    def _divergence(self, loss: float) -> str:
        kept = "no checkpoint was written yet"
        if self.saved_step is not None:
            kept = f"the checkpoint of step {self.saved_step} in {self.output} is kept"
        rate, precision = self.training.learning_rate, self.state.precision
        return (
            f"training: loss {loss} or its gradient is not finite at step {self.state.step}; "
            f"{kept}; lower learning_rate (now {rate}) or take precision fp32 (now {precision})"
        )


def _in_words(metrics: Metrics) -> str:
    """Metrics in one line."""
    words = []
    for name, value in metrics.items():
        numbers = value if isinstance(value, list) else [value]
        words.append(f"{name} {' to '.join(f'{number:.4g}' for number in numbers)}")
    return ", ".join(words)
