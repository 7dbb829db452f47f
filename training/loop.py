"""The loop: steps from where a run's folder left off to its end, on as many devices as accelerate finds.

The chance of a step follows from (seed, step, process) and the learning rate from the step, so weights, averages and
the optimiser's moments are all that a checkpoint holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from . import checkpoint
from .config import Run
from .ema import Ema
from .task import Batch, Task, chance

LEAST = 0.01  # of the learning rate, at the end
DRAWING = -1  # in the place of a step: the same pictures every time
# What a run may change when it goes on.
FREE = ("folder", "workers", "log_every", "draw_every", "save_every", "keep")


class Steps(Dataset[Batch]):
    """The batches of a run by step, for one process."""

    def __init__(self, task: Task, run: Run, process: int) -> None:
        self.task, self.run, self.process = task, run, process

    def __len__(self) -> int:
        return self.run.steps

    def __getitem__(self, step: int) -> Batch:
        return self.task.batch(chance(self.run.seed, step, self.process), self.run.batch)


def rate(run: Run, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    if step < run.warmup:
        return run.rate * (step + 1) / run.warmup
    done = (step - run.warmup) / max(1, run.steps - run.warmup)
    return run.rate * (LEAST + (1 - LEAST) * (1 + math.cos(math.pi * done)) / 2)


def groups(module: nn.Module, decay: float, share: Callable[[str], float] = lambda name: 1.0) -> list[dict[str, Any]]:
    """The trained parameters, by their share of the rate: matrices and kernels decay, norms and biases do not."""
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, value in module.named_parameters():
        if value.requires_grad:
            found.setdefault((share(name), decay if value.ndim > 1 else 0.0), []).append(value)
    return [{"params": params, "weight_decay": amount, "share": share} for (share, amount), params in found.items()]


def train(make: Callable[[], Task], run: Run, about: Mapping[str, Any]) -> Path:
    """Train until `run.steps` and write the task's files into `<folder>/model`; `about` are the task's settings.

    Raises ValueError where the folder holds a run of other settings.
    """
    # Without a device accelerate would not see the other processes of this machine.
    accelerator = Accelerator(mixed_precision=run.precision, cpu=not torch.accelerator.is_available())
    torch.manual_seed(run.seed)
    trainer = Trainer(accelerator, make(), run, about)
    first = trainer.resume()
    trainer.go(first)
    model = trainer.folder / "model"
    if accelerator.is_main_process:
        model.mkdir(parents=True, exist_ok=True)
        with trainer.ema.applied(trainer.task):
            trainer.task.save(model, {"steps": run.steps, "seed": run.seed, "batch": run.batch * trainer.processes})
    accelerator.end_training()
    return model


class Trainer:
    """One process of a run."""

    def __init__(self, accelerator: Accelerator, task: Task, run: Run, about: Mapping[str, Any]) -> None:
        self.accelerator, self.task, self.run = accelerator, task, run
        self.processes = accelerator.num_processes
        self.folder = Path(run.folder)
        settings = {**asdict(run), **{f"task.{key}": value for key, value in about.items()}}
        settings |= {"processes": self.processes}
        self.settings = json.loads(json.dumps({key: value for key, value in settings.items() if key not in FREE}))
        optimiser = torch.optim.AdamW(groups(task, run.decay, task.share), lr=run.rate)
        self.module, self.optimiser = accelerator.prepare(task, optimiser)
        self.ema = Ema(task, run.ema)

    def resume(self) -> int:
        """Put the newest checkpoint back; the step to begin with."""
        newest = checkpoint.find(self.folder)
        if newest is None:
            return 0
        state = checkpoint.read(newest, self.settings)
        with torch.no_grad():
            for key, value in self.task.state_dict().items():
                value.copy_(state["task"][key])  # in place, as the optimiser knows these very tensors
        self.optimiser.load_state_dict(state["optimiser"])
        for key, value in state["ema"].items():
            self.ema.average[key].copy_(value)
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return state["step"]

    def keep(self, step: int) -> None:
        """Write a checkpoint of what `step` steps made."""
        scaler = self.accelerator.scaler
        state = {
            "task": self.task.state_dict(), "optimiser": self.optimiser.state_dict(), "ema": self.ema.average,
            "scaler": scaler.state_dict() if scaler is not None else {}, "settings": self.settings,
        }  # fmt: skip
        checkpoint.write(self.folder, step, state, self.run.keep)

    def go(self, first: int) -> None:
        """All steps from `first`, logged, drawn and kept as they go."""
        run, main = self.run, self.accelerator.is_main_process
        log = SummaryWriter(str(self.folder / "log"), purge_step=first) if main else None
        data = Steps(self.task, run, self.accelerator.process_index)
        batches = DataLoader(data, batch_size=None, sampler=range(first, run.steps), num_workers=run.workers)
        bar = tqdm(batches, initial=first, total=run.steps, disable=not main)
        for step, batch in enumerate(bar, first):
            losses = self.step(step, batch)
            done = step + 1
            if log is not None and (done % run.log_every == 0 or done == run.steps):
                told = {name: float(value.detach()) for name, value in losses.items()}
                bar.set_postfix({name: f"{value:.4f}" for name, value in told.items()})
                for name, value in {**told, "rate": rate(run, step)}.items():
                    log.add_scalar(name, value, step)
            if log is not None and (done % run.draw_every == 0 or done == run.steps):
                self.draw(log, step)
            if main and (done % run.save_every == 0 or done == run.steps):
                self.keep(done)
        self.accelerator.wait_for_everyone()
        if log is not None:
            log.close()

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """One step of the optimiser; its losses, with their sum as `loss`."""
        self.module.train()
        losses = self.module(send_to_device(batch, self.accelerator.device))
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.module.parameters(), self.run.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = rate(self.run, step) * group["share"]
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.ema.update(self.task, step)
        return {"loss": loss, **losses}

    def draw(self, log: SummaryWriter, step: int) -> None:
        """What the task shows with its averaged weights, into the log, and its pictures into `<folder>/drawn` too."""
        from torchvision.utils import save_image

        with torch.no_grad(), self.ema.applied(self.task):
            drawn = self.task.draw(chance(self.run.seed, DRAWING))
        for name, value in drawn.items():
            if value.ndim == 0:
                log.add_scalar(name, float(value), step)
                continue
            picture = value.detach().float().cpu().clamp(0, 1).movedim(-1, 0)
            log.add_image(name, picture, step)
            (self.folder / "drawn").mkdir(exist_ok=True)
            save_image(picture, self.folder / "drawn" / f"{name}-{step + 1:08d}.png")
