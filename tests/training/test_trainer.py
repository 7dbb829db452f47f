"""The training loop: resuming, checkpoints, averages, learning rates, several processes, configs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_likeness.training import checkpoint, config, task_registry, trainer
from comfyui_likeness.training.ema import EMA, list_averaged_tensors
from comfyui_likeness.training.task import init_weights, make_generator
from safetensors import safe_open
from safetensors.torch import load_file
from support import toy_tasks
from torch import nn

TESTS = Path(__file__).resolve().parents[1]
CONFIGS = sorted(TESTS.parent.glob("*/configs/*.toml"))


def train(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Train the line task. Returns the weights of its file."""
    return load_file(
        trainer.run_training(toy_tasks.LineTask, toy_tasks.make_run_config(folder, **changes), {}) / "line.safetensors"
    )


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-6) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=tolerance) for key in a)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, steps=40)
    return folder


def test_a_run_learns_and_writes_samples_and_checkpoints(uninterrupted: Path) -> None:
    losses = toy_tasks.read_logged_values(uninterrupted)
    assert list(losses) == list(range(40)) and losses[39] < 0.5 * losses[0]
    assert [path.name for path in sorted(uninterrupted.glob("step-*"))] == ["step-00000036.pt", "step-00000040.pt"]
    assert len(list((uninterrupted / "samples").glob("line-*.png"))) == 8
    assert list(toy_tasks.read_logged_values(uninterrupted, "middle")) == list(range(4, 40, 5))
    with safe_open(uninterrupted / "model" / "line.safetensors", "pt") as file:
        assert file.metadata() == {"steps": "40", "seed": "0", "batch": "8"}


def test_a_run_of_no_steps_writes_the_initial_weights(tmp_path: Path) -> None:
    assert same(train(tmp_path, steps=0), toy_tasks.LineTask().state_dict(), 0.0)


WORKER = """
import os, sys
here, folder, steps = sys.argv[1:4]
sys.path.insert(0, here)
import conftest
sys.argv = ["toy_tasks.py", folder, steps]
import runpy
runpy.run_path(os.path.join(here, "support", "toy_tasks.py"), run_name="__main__")
"""


def start_worker(folder: Path, *launcher: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, *launcher] if launcher else [sys.executable, "-c", WORKER]
    return subprocess.Popen([*words, str(TESTS), str(folder), "40"], stderr=subprocess.PIPE)


def test_a_killed_run_resumes_to_the_same_losses_and_weights(tmp_path: Path, uninterrupted: Path) -> None:
    process = start_worker(tmp_path)
    end = time.monotonic() + 60
    while checkpoint.find_checkpoint(tmp_path) is None and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, stderr = process.communicate()
    reached = checkpoint.find_checkpoint(tmp_path)
    assert reached is not None, stderr.decode()
    assert not (tmp_path / "model").exists(), "it was killed too late"
    weights = train(tmp_path, steps=40)
    assert same(weights, load_file(uninterrupted / "model" / "line.safetensors"))
    expected, found = toy_tasks.read_logged_values(uninterrupted), toy_tasks.read_logged_values(tmp_path)
    assert found.keys() >= set(range(int(reached.stem.split("-")[1]), 40))
    assert all(found[step] == pytest.approx(expected[step], rel=1e-5) for step in found)


def test_another_seed_gives_other_weights(tmp_path: Path, uninterrupted: Path) -> None:
    other = train(tmp_path, steps=40, seed=1)
    assert not same(other, load_file(uninterrupted / "model" / "line.safetensors"))


@pytest.mark.parametrize("part", ["task", "optimizer", "ema"])
def test_every_part_of_a_checkpoint_matters(tmp_path: Path, uninterrupted: Path, part: str) -> None:
    first = torch.load(uninterrupted / "step-00000036.pt", weights_only=True)
    fresh = trainer.Trainer(
        trainer.Accelerator(), toy_tasks.LineTask(), toy_tasks.make_run_config(tmp_path, steps=40), {}
    )
    fresh_state = {"task": fresh.task.state_dict(), "optimizer": fresh.optimizer.state_dict(), "ema": fresh.ema.average}
    torch.save(first, tmp_path / "step-00000036.pt")
    assert same(train(tmp_path, steps=40), load_file(uninterrupted / "model" / "line.safetensors"))
    for file in tmp_path.glob("step-*"):
        file.unlink()
    torch.save({**first, part: fresh_state[part]}, tmp_path / "step-00000036.pt")
    assert not same(train(tmp_path, steps=40), load_file(uninterrupted / "model" / "line.safetensors"))


def test_samples_and_workers_do_not_change_the_weights(tmp_path: Path, uninterrupted: Path) -> None:
    weights = train(tmp_path, steps=40, sample_every=1000, num_workers=1)
    assert same(weights, load_file(uninterrupted / "model" / "line.safetensors"))


def test_a_folder_of_another_run_is_rejected(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate = 0.01 instead of 0.02.*another folder"):
        train(tmp_path, learning_rate=0.02)
    assert train(tmp_path, log_every=3)  # which does not change the training


def test_a_broken_checkpoint_is_reported(tmp_path: Path) -> None:
    (tmp_path / "step-00000004.pt").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="step-00000004.pt.*remove it"):
        train(tmp_path)


def test_checkpoints_are_written_atomically(tmp_path: Path) -> None:
    class Unsaveable:
        def __reduce__(self) -> Any:
            raise RuntimeError("the disk is full")

    checkpoint.write_checkpoint(tmp_path, 1, {"x": torch.zeros(1)}, keep_newest=2)
    with pytest.raises(RuntimeError, match="full"):
        checkpoint.write_checkpoint(tmp_path, 2, {"x": Unsaveable()}, keep_newest=2)
    found = checkpoint.find_checkpoint(tmp_path)
    assert found is not None and found.name == "step-00000001.pt"


def test_several_processes_train_as_one(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29571"]
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, str(script), str(TESTS), str(tmp_path / "run"), "8"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "run" / "step-00000008.pt", weights_only=True)
    assert state["settings"]["processes"] == 2
    found, both, one = (
        select_comparable(weights)
        for weights in (state["task"], train_by_hand(tmp_path, (1, 0)), train_by_hand(tmp_path, (0,)))
    )
    assert same(found, both, 1e-3) and not same(found, one, 1e-3)


def select_comparable(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out the bias before a norm: its gradient is rounding error, which AdamW amplifies."""
    return {key: value for key, value in weights.items() if key not in ("net.0.bias", "net.1.running_mean")}


def train_by_hand(folder: Path, processes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Train with the mean of all processes' gradients, each with the batch norm statistics of its own batch."""
    run, task = toy_tasks.make_run_config(folder, steps=8), toy_tasks.LineTask()
    optimizer = torch.optim.AdamW(trainer.make_parameter_groups(task, run.weight_decay), lr=run.learning_rate)
    for step in range(8):
        for process in processes:  # the statistics of process 0 are kept
            kept = {key: value.clone() for key, value in task.named_buffers()}
            (task(task.make_batch(make_generator(0, step, process), 8))["square"] / len(processes)).backward()
            for key, value in task.named_buffers() if process else ():
                value.copy_(kept[key])
        nn.utils.clip_grad_norm_(task.parameters(), run.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = trainer.compute_learning_rate(run, step)
        optimizer.step()
        optimizer.zero_grad()
    return task.state_dict()


def test_the_average_is_the_weighted_sum_of_all_weights() -> None:
    module = nn.Linear(1, 1, bias=False)
    history = [2.0, 4.0, -1.0]
    with torch.no_grad():
        module.weight.fill_(history[0])
        ema = EMA(module, 0.5)
        expected = history[0]
        for step, value in enumerate(history[1:]):
            module.weight.fill_(value)
            ema.update(module, step)
            decay = min(0.5, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * value
    assert float(ema.average["weight"]) == pytest.approx(expected)
    module.train()
    with ema.average_parameters(module):
        assert module.weight.item() == pytest.approx(expected) and not module.training
    assert module.weight.item() == history[-1] and module.training
    with pytest.raises(RuntimeError), ema.average_parameters(module):
        raise RuntimeError
    assert module.weight.item() == history[-1]


def test_frozen_weights_have_no_average() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    assert set(list_averaged_tensors(module)) == {"1.running_mean", "1.running_var"}


def test_the_learning_rate_rises_and_falls(tmp_path: Path) -> None:
    run = toy_tasks.make_run_config(tmp_path, steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [trainer.compute_learning_rate(run, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and trainer.MIN_LEARNING_RATE_SCALE <= rates[-1] < 0.02


def test_the_learning_rate_is_constant_until_the_decay_share(tmp_path: Path) -> None:
    run = toy_tasks.make_run_config(tmp_path, steps=110, warmup_steps=10, learning_rate=1.0, decay_share=0.25)
    rates = [trainer.compute_learning_rate(run, step) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)]) and rates[10:86] == pytest.approx([1.0] * 76)
    falls = [before - after for before, after in zip(rates[85:], rates[86:], strict=False)]
    assert falls == pytest.approx([0.99 / 25] * 24) and rates[-1] == pytest.approx(0.01 + 0.99 / 25)


def test_parameters_have_learning_rate_scales(tmp_path: Path) -> None:
    class PartlyFrozenTask(toy_tasks.LineTask):
        def learning_rate_scale(self, name: str) -> float:
            return 0.0 if name == "net.3.weight" else 1.0

    trainer.run_training(PartlyFrozenTask, toy_tasks.make_run_config(tmp_path, steps=4, ema_decay=0.0), {})
    trained, first = load_file(tmp_path / "model" / "line.safetensors"), toy_tasks.LineTask().state_dict()
    names = [name for name, _ in toy_tasks.LineTask().named_parameters()]
    assert [name for name in names if torch.equal(trained[name], first[name])] == ["net.3.weight"]


def test_generators_depend_on_their_numbers_alone() -> None:
    def draw(*numbers: int) -> float:
        return float(torch.rand(1, generator=make_generator(*numbers)))

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(*numbers) for numbers in [(1, 2, 3), (1, 3, 2), (12, 3), (1, 23), (0, 2, 3)]}) == 5


def test_initial_weights() -> None:
    module = nn.Sequential(nn.Conv2d(3, 64, 3), nn.GroupNorm(1, 64), nn.Linear(64, 64))
    for value in module.parameters():
        nn.init.constant_(value, float("nan"))
    init_weights(module, 1, zero_init=("2.weight",))
    assert module[0].weight.std().item() == pytest.approx(27**-0.5, rel=0.1)
    assert bool((module[1].weight == 1).all()) and not module[2].weight.any() and not module[0].bias.any()


GOOD = """
[run]
folder = "out"
steps = 10
batch_size = 2
learning_rate = 1
[task]
resolution = 64
"""


@pytest.mark.parametrize(
    ("change", "what", "message"),
    [
        (
            ("resolution = 64", "size = 64"),
            "vae",
            r"got size in \[task\]; expected only channels, widths, num_res_blocks, resolution, crop_size",
        ),
        (("batch_size", "batches"), "vae", r"got batches in \[run\]; expected only folder, steps, batch_size"),
        (("batch_size = 2", ""), "vae", r"got no batch_size in \[run\]; add it"),
        (("steps = 10", 'steps = "10"'), "vae", r"got steps = '10' in \[run\]; it must be a valid integer"),
        (("steps = 10", "steps = true"), "vae", r"got steps = True in \[run\]; it must be a valid integer"),
        (
            ("steps = 10", "steps = 1979-05-27"),
            "vae",
            r"got steps = '1979-05-27' in \[run\]; it must be a valid integer",
        ),
        (("steps = 10", "steps = -1"), "vae", r"got steps = -1 in \[run\]; it must be greater than or equal to 0"),
        (("batch_size = 2", "batch_size = 0"), "vae", r"got batch_size = 0 in \[run\]; it must be greater than 0"),
        (
            ("steps = 10", "steps = 10\nema_decay = 1.0"),
            "vae",
            r"got ema_decay = 1.0 in \[run\]; it must be less than 1",
        ),
        (
            ("steps = 10", "steps = 10\ndecay_share = 1.5"),
            "vae",
            r"got decay_share = 1.5 .*must be less than or equal to 1",
        ),
        (("resolution = 64", "channels = 4"), "vae", r"got channels = 4 .* in \[task\]; .*not 4"),
        (("steps = 10", 'steps = 10\nmixed_precision = "int8"'), "vae", "'int8'.*it must be 'no', 'bf16' or 'fp16'"),
        (("[task]", "[tsk]"), "vae", r"got tsk in .*; expected the tables \[run\] and \[task\]"),
        (("[task]\nresolution = 64", ""), "vae", r"without \[task\].*; add"),
        (("[task]", "[task"), "vae", "cannot be read"),
        (("resolution = 64", 'network = "deep"'), "recogniser", "'deep'.*residual or separable"),
        (
            ("resolution = 64", 'vae = "v"\ntext = "t"\nchannel_mult = [1, 2]'),
            "unet",
            "2 channel_mult and 4 transformer",
        ),
        (("resolution = 64", 'vae = "v"\ntext = "t"\nchannel_mult = [1, "2"]'), "unet", "got channel_mult.1 = '2'"),
        (("", ""), "nothing", "got 'nothing'; expected one of vae, clip, unet, recogniser"),
    ],
)
def test_wrong_configs_are_reported(tmp_path: Path, change: tuple[str, str], what: str, message: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(GOOD)
    assert task_registry.read_task_config("vae", file)[0] == config.RunConfig(
        folder="out", steps=10, batch_size=2, learning_rate=1.0
    )
    file.write_text(GOOD.replace(*change))
    with pytest.raises(ValueError, match=message):
        task_registry.read_task_config(what, file)


def test_a_config_can_extend_another(tmp_path: Path) -> None:
    other, file = tmp_path / "other.toml", tmp_path / "config.toml"
    other.write_text(GOOD)
    file.write_text('extends = "other.toml"\n[run]\nfolder = "mine"\n[task]\ncrop_size = 32')
    run, about = task_registry.read_task_config("vae", file)
    assert run == config.RunConfig(folder="mine", steps=10, batch_size=2, learning_rate=1.0) and (
        about.resolution,
        about.crop_size,
    ) == (64, 32)
    for text, message in (
        ('extends = "other.toml"\n[task]\ncrop_size = 32', "no folder in .*other than that of other.toml"),
        ('extends = "none.toml"', "extends = 'none.toml'.*the name of a config in"),
        ("extends = 5", "extends = 5.*the name of a config"),
        ('extends = "config.toml"\n[run]\nfolder = "mine"', "extends config.toml itself"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            task_registry.read_task_config("vae", file)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: f"{path.parts[-3]}/{path.stem}")
def test_the_configs_are_read(file: Path) -> None:
    others = {"judge": "recogniser", "omni_adapter": "decoupled"}
    named = [name for name in (*others, *task_registry.TASKS) if file.stem.startswith(name)]
    task_name = max(named, key=len)
    run, task_config = task_registry.read_task_config(others.get(task_name, task_name), file)
    assert (run.steps > 0 or file.stem == "omni_masked_flow") and asdict(task_config)
    assert run.folder == f"artifacts/{file.parts[-3]}/{file.stem}"
