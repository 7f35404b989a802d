"""What a training run stands on: its processes, its interruption, and its state on disk."""

import atexit
import dataclasses
import importlib
import json
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calm_rt import tensor_files
from calm_rt.ops.check import check
from calm_rt.training_config import TrainingConfig

STATE = "training_state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


class World:
    """The processes that share a run: those of torchrun, or this one alone."""

    def __init__(self, device: str) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if device == "cuda" and self.size > 1:
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        self.device = torch.device(device)
        if self.size > 1 and not dist.is_initialized():
            # What this imports has the group as a default argument, if there is one already, and
            # would keep it and gloo's threads beyond destroy_process_group: a thread that still
            # frees a tensor when the interpreter ends aborts the process.
            importlib.import_module("torch._dynamo")
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        elif self.size > 1:
            dist.barrier()  # as at a start: nobody writes while another still looks at the folder

    def average(self, tensors: list[Tensor]) -> None:
        """Replaces tensors of one dtype by their averages over the processes, in one collective."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = (flat / self.size).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def agree(self, value: Any) -> Any:
        """The first process's value."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a flag for the end of the step, so that no step is half done.

    A second signal interrupts at once. Outside the main thread Python delivers no signals, and
    nothing is changed.
    """

    def __enter__(self) -> "Interrupt":
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                self._previous[name] = signal.signal(name, self._request)
        return self

    def __exit__(self, *_: Any) -> None:
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@dataclasses.dataclass
class TrainingState:
    """Where a run stands after `step` steps; random numbers and data positions follow from it."""

    step: int = 0
    seconds: float = 0.0  # of training, over all interruptions
    precision: str | None = None  # decided at the first start, kept by every resume
    training: dict[str, Any] = dataclasses.field(default_factory=dict)  # the TrainingConfig
    accuracy: float | None = None  # of an autoencoder, at the last evaluation
    # what tells the shards from others
    data: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Writes parameters, moments and this state as one file, whole or not at all."""
        tensors = {}
        for name, parameter in trainable(model).items():
            tensors[f"model.{name}"] = parameter
            tensors |= {f"{m}.{name}": optimizer.state[parameter][m] for m in MOMENTS}
        metadata = {"state": json.dumps(dataclasses.asdict(self))}
        tensor_files.write_tensors(folder / STATE, tensors, metadata)

    @classmethod
    def load(cls, folder: Path) -> "TrainingState":
        """The numbers of the state in a folder."""
        path = folder / STATE
        check(
            path.is_file(), "resume", f"a run in {folder} (start it without resume)", f"no {STATE}"
        )
        try:
            state = cls(**json.loads(tensor_files.read_metadata(path)["state"]))
            unknown = sorted(state.training.keys() - TrainingConfig.__dataclass_fields__.keys())
            if unknown:
                raise ValueError(f"unknown settings {', '.join(unknown)}")
            return state
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: not a training state that this version wrote ({error})"
            ) from error

    def restore(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Puts the saved parameters and moments into the model and its optimizer."""
        path = folder / STATE
        tensors = tensor_files.read_tensors(path)
        parameters = trainable(model)
        wanted = {f"{kind}.{name}" for kind in ("model", *MOMENTS) for name in parameters}
        odd = sorted(wanted ^ tensors.keys())
        check(
            not odd,
            str(path),
            "the tensors of this model",
            f"missing or extra {', '.join(odd[:3])}",
        )
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"model.{name}"])
            step = torch.tensor(float(self.step), device=parameter.device)
            moments = {m: tensors[f"{m}.{name}"].to(parameter.device) for m in MOMENTS}
            optimizer.state[parameter] = {"step": step, **moments}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; a tied one once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def build_optimizer(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW that decays matrices only: not embeddings, norms and biases."""
    parameters = trainable(model)
    decayed = [p for name, p in parameters.items() if p.ndim >= 2 and "embed_tokens" not in name]
    others = [p for name, p in parameters.items() if p.ndim < 2 or "embed_tokens" in name]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=True)
