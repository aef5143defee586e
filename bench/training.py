"""One training run: a method on a task from a seed, as a generator that can be stopped, saved and resumed."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from spectral_ops.bench.methods import Method
from spectral_ops.bench.tasks import Digits, Text, evaluate, loss

WARMUP = 20


def cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: linear over the first `WARMUP` steps, then a cosine to zero."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def configure(device: str, threads: int | None) -> None:
    """Settings of the whole process. One thread on a CPU: at these sizes more are slower, and results then depend on them."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA GPU")
    if threads is not None or device == "cpu":
        torch.set_num_threads(threads or 1)
    torch.set_flush_denormal(True)


@dataclass
class Curve:
    """What a run leaves behind: `loss[i]` is the evaluation loss after `steps[i]` steps and `seconds[i]` of training.

    `optimizer_seconds` of the last `seconds` were spent inside optimizers.
    """

    method: str
    seed: int
    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    optimizer_seconds: float = 0.0
    state_bytes_per_parameter: float = 0.0

    def reach(self, target: float) -> tuple[float, float] | None:
        """Steps and seconds after which the loss first stood at `target`, by a straight line between evaluations."""
        i = next((i for i, value in enumerate(self.loss) if value <= target), None)
        if i is None:
            return None
        if i == 0:
            return self.steps[0], self.seconds[0]
        share = (self.loss[i - 1] - target) / (self.loss[i - 1] - self.loss[i])
        before, after = (self.steps[i - 1], self.seconds[i - 1]), (self.steps[i], self.seconds[i])
        return before[0] + share * (after[0] - before[0]), before[1] + share * (after[1] - before[1])


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors that an optimizer holds beside parameters and gradients, wherever it keeps them: some do so in attributes
    or in objects of their own. Storage that is shared counts once."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    seen = {x.untyped_storage().data_ptr() for p in params for x in (p, p.grad) if x is not None}
    pending: list[Any] = [vars(optimizer)]
    visited: set[int] = set()
    total = 0
    while pending:
        value = pending.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set):
            pending += value
        elif type(value).__module__.startswith(STATEFUL) and hasattr(value, "__dict__"):
            pending.append(vars(value))
    return total


STATEFUL = ("singd.", "sirfshampoo.", "spectral_ops.factors")  # where optimizers have classes for their matrices from


class Run:
    """A training run that is an iterator of steps; `state_dict` and `load_state_dict` stop and continue it exactly."""

    def __init__(self, task: Text | Digits, method: Method, seed: int = 0, steps: int | None = None, evaluations: int = 50):
        self.task, self.steps = task, steps or task.preset.steps
        self.every = max(1, self.steps // evaluations)
        torch.manual_seed(seed)
        self.model = task.model()
        self.optimizers = method.build(self.model)
        self.schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: cosine(t, self.steps)) for o in self.optimizers]
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.curve = Curve(method.name, seed)
        self.step, self.seconds, self.optimizer_seconds = 0, 0.0, 0.0

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the training loss of each step that remains; as a tensor, since reading it makes a GPU wait."""
        while self.step < self.steps:
            start = self._clock()
            value = loss(self.model, self.task.batch(self.generator))
            value.backward()
            middle = self._clock()
            for optimizer in self.optimizers:
                optimizer.step()
            end = self._clock()
            for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
                optimizer.zero_grad()
                scheduler.step()
            self.step += 1
            self.seconds += end - start
            self.optimizer_seconds += end - middle
            if self.step % self.every == 0 or self.step == self.steps:
                self._evaluate()
            yield value.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the remaining steps depend on, as tensors and plain values."""
        return {
            "curve": asdict(self.curve),
            "step": self.step,
            "seconds": self.seconds,
            "optimizer_seconds": self.optimizer_seconds,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "batches": self.generator.get_state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if self.task.device == "cuda" else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curve = Curve(**state["curve"])
        self.step, self.seconds, self.optimizer_seconds = state["step"], state["seconds"], state["optimizer_seconds"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        self.generator.set_state(state["batches"])
        torch.set_rng_state(state["random"])
        torch.cuda.set_rng_state_all(state["random_cuda"])

    def _clock(self) -> float:
        if self.task.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _evaluate(self) -> None:
        self.curve.steps.append(self.step)
        self.curve.loss.append(evaluate(self.model, self.task))
        self.curve.seconds.append(self.seconds)
        self.curve.optimizer_seconds = self.optimizer_seconds
        parameters = sum(p.numel() for p in self.model.parameters())
        self.curve.state_bytes_per_parameter = sum(map(state_bytes, self.optimizers)) / parameters
