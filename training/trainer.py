"""The training loop: from a run's newest checkpoint to its last step, on all devices that accelerate finds.

The random numbers of a step follow from (seed, step, process) and the learning rate from the step, so a checkpoint
holds only weights, averages and the optimizer's and gradient scaler's state.
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
from .config import RunConfig
from .ema import EMA
from .task import Batch, Task, make_generator

MIN_LEARNING_RATE_SCALE = 0.01  # of the learning rate, at the last step
SAMPLING_STEP = -1  # seeds the samples in place of a step, so that all of a run start from the same noise
SAMPLES_FOLDER = "samples"
# Settings that may differ when a run resumes.
CHANGEABLE_SETTINGS = ("folder", "num_workers", "log_every", "sample_every", "save_every", "keep_checkpoints")


class StepDataset(Dataset[Batch]):
    """The batches of one process, by step."""

    def __init__(self, task: Task, run: RunConfig, process_index: int) -> None:
        self.task, self.run, self.process_index = task, run, process_index

    def __len__(self) -> int:
        return self.run.steps

    def __getitem__(self, step: int) -> Batch:
        return self.task.make_batch(make_generator(self.run.seed, step, self.process_index), self.run.batch_size)


def compute_learning_rate(run: RunConfig, step: int) -> float:
    """The learning rate of a step, counted from 0: linear warmup, then a cosine or constant with a linear end."""
    if step < run.warmup_steps:
        return run.learning_rate * (step + 1) / run.warmup_steps
    progress = (step - run.warmup_steps) / max(1, run.steps - run.warmup_steps)
    if run.decay_share:
        share = min(1.0, (1 - progress) / run.decay_share)
    else:
        share = (1 + math.cos(math.pi * progress)) / 2
    return run.learning_rate * (MIN_LEARNING_RATE_SCALE + (1 - MIN_LEARNING_RATE_SCALE) * share)


def make_parameter_groups(
    module: nn.Module, weight_decay: float, learning_rate_scale: Callable[[str], float] = lambda name: 1.0
) -> list[dict[str, Any]]:
    """The trained parameters for an optimizer, by learning rate scale. Norms and biases have no weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, value in module.named_parameters():
        if value.requires_grad:
            groups.setdefault((learning_rate_scale(name), weight_decay if value.ndim > 1 else 0.0), []).append(value)
    return [
        {"params": params, "weight_decay": decay, "learning_rate_scale": scale}
        for (scale, decay), params in groups.items()
    ]


def run_training(
    make_task: Callable[[], Task],
    run: RunConfig,
    task_settings: Mapping[str, Any],
    on_step: Callable[[int], None] | None = None,
) -> Path:
    """Train until `run.steps` and write the task's files into `<folder>/model`, which is returned.

    `on_step` gets the number of finished steps, in place of a progress bar. Raises ValueError if the folder holds a run
    of other settings, `task_settings` included.
    """
    # Without a device accelerate would not see the other processes of this machine.
    accelerator = Accelerator(mixed_precision=run.mixed_precision, cpu=not torch.accelerator.is_available())
    torch.manual_seed(run.seed)
    trainer = Trainer(accelerator, make_task(), run, task_settings)
    trainer.run_steps(trainer.resume(), on_step)
    model_folder = trainer.folder / "model"
    if accelerator.is_main_process:
        model_folder.mkdir(parents=True, exist_ok=True)
        notes = {"steps": run.steps, "seed": run.seed, "batch": run.batch_size * trainer.num_processes}
        with trainer.ema.average_parameters(trainer.task):
            trainer.task.save_model(model_folder, notes)
    accelerator.end_training()
    return model_folder


class Trainer:
    """One process of a run."""

    def __init__(self, accelerator: Accelerator, task: Task, run: RunConfig, task_settings: Mapping[str, Any]) -> None:
        self.accelerator, self.task, self.run = accelerator, task, run
        self.num_processes = accelerator.num_processes
        self.folder = Path(run.folder)
        settings = {**asdict(run), **{f"task.{key}": value for key, value in task_settings.items()}}
        settings |= {"processes": self.num_processes}
        self.settings = json.loads(
            json.dumps({key: value for key, value in settings.items() if key not in CHANGEABLE_SETTINGS})
        )
        optimizer = torch.optim.AdamW(
            make_parameter_groups(task, run.weight_decay, task.learning_rate_scale), lr=run.learning_rate
        )
        self.module, self.optimizer = accelerator.prepare(task, optimizer)
        self.ema = EMA(task, run.ema_decay)

    def resume(self) -> int:
        """Restore the newest checkpoint, if there is one. Returns the first step to train."""
        newest = checkpoint.find_checkpoint(self.folder)
        if newest is None:
            return 0
        state = checkpoint.read_checkpoint(newest, self.settings)
        with torch.no_grad():
            for key, value in self.task.state_dict().items():
                value.copy_(state["task"][key])  # in place, as the optimizer holds these tensors
        self.optimizer.load_state_dict(state["optimizer"])
        for key, value in state["ema"].items():
            self.ema.average[key].copy_(value)
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return state["step"]

    def save_checkpoint(self, step: int) -> None:
        """Write a checkpoint after `step` steps."""
        scaler = self.accelerator.scaler
        state = {
            "task": self.task.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema.average,
            "scaler": scaler.state_dict() if scaler is not None else {}, "settings": self.settings,
        }  # fmt: skip
        checkpoint.write_checkpoint(self.folder, step, state, self.run.keep_checkpoints)

    def run_steps(self, first_step: int, on_step: Callable[[int], None] | None = None) -> None:
        """Train from `first_step` to the end, with logs, samples and checkpoints."""
        run, is_main = self.run, self.accelerator.is_main_process
        writer = SummaryWriter(str(self.folder / "log"), purge_step=first_step) if is_main else None
        dataset = StepDataset(self.task, run, self.accelerator.process_index)
        steps = range(first_step, run.steps)
        batches = DataLoader(dataset, batch_size=None, sampler=steps, num_workers=run.num_workers)
        bar = tqdm(batches, initial=first_step, total=run.steps, disable=not is_main or on_step is not None)
        for step, batch in enumerate(bar, first_step):
            losses = self.train_step(step, batch)
            done = step + 1
            if on_step is not None:
                on_step(done)
            if writer is not None and (done % run.log_every == 0 or done == run.steps):
                values = {name: float(value.detach()) for name, value in losses.items()}
                bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
                for name, value in {**values, "learning_rate": compute_learning_rate(run, step)}.items():
                    writer.add_scalar(name, value, step)
            if writer is not None and (done % run.sample_every == 0 or done == run.steps):
                self.log_samples(writer, step)
            if is_main and (done % run.save_every == 0 or done == run.steps):
                self.save_checkpoint(done)
        self.accelerator.wait_for_everyone()
        if writer is not None:
            writer.close()

    def train_step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step. Returns its losses, with their sum as `loss`."""
        self.module.train()
        losses = self.module(send_to_device(batch, self.accelerator.device))
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.module.parameters(), self.run.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = compute_learning_rate(self.run, step) * group["learning_rate_scale"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.task, step)
        return {"loss": loss, **losses}

    def log_samples(self, writer: SummaryWriter, step: int) -> None:
        """Log the task's samples with averaged weights; the images are written to `<folder>/samples` too."""
        from torchvision.utils import save_image

        with torch.no_grad(), self.ema.average_parameters(self.task):
            samples = self.task.make_samples(make_generator(self.run.seed, SAMPLING_STEP))
        for name, value in samples.items():
            if value.ndim == 0:
                writer.add_scalar(name, float(value), step)
                continue
            image = value.detach().float().cpu().clamp(0, 1).movedim(-1, 0)
            writer.add_image(name, image, step)
            (self.folder / SAMPLES_FOLDER).mkdir(exist_ok=True)
            save_image(image, self.folder / SAMPLES_FOLDER / f"{name}-{step + 1:08d}.png")
