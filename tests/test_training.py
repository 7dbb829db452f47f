"""The training loop: a run that is broken off goes on as if nothing had happened; averages; settings; the lot."""

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
import trainings
from comfyui_likeness.training import checkpoint, config, loop, tasks
from comfyui_likeness.training.ema import Ema, averaged
from comfyui_likeness.training.task import chance, start
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "training" / "configs"


def train(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Train the line; the weights of the file it makes."""
    return load_file(loop.train(trainings.Line, trainings.run(folder, **changes), {}) / "line.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-6) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=tolerance) for key in a)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    train(folder, steps=40)
    return folder


def test_a_run_learns_draws_and_keeps_what_it_should(unbroken: Path) -> None:
    losses = trainings.values(unbroken)
    assert list(losses) == list(range(40)) and losses[39] < 0.5 * losses[0]
    assert [path.name for path in sorted(unbroken.glob("step-*"))] == ["step-00000036.pt", "step-00000040.pt"]
    assert len(list((unbroken / "drawn").glob("line-*.png"))) == 8
    assert list(trainings.values(unbroken, "middle")) == list(range(4, 40, 5))
    with safe_open(unbroken / "model" / "line.safetensors", "pt") as file:
        assert file.metadata() == {"steps": "40", "seed": "0", "batch": "8"}


def test_a_run_of_no_steps_writes_the_first_weights(tmp_path: Path) -> None:
    assert same(train(tmp_path, steps=0), trainings.Line().state_dict(), 0.0)


WORKER = """
import os, sys
here, folder, steps = sys.argv[1:4]
sys.path.insert(0, here)
import conftest
sys.argv = ["trainings.py", folder, steps]
import runpy
runpy.run_path(os.path.join(here, "trainings.py"), run_name="__main__")
"""


def worker(folder: Path, *launcher: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, *launcher] if launcher else [sys.executable, "-c", WORKER]
    return subprocess.Popen([*words, str(HERE), str(folder), "40"], stderr=subprocess.PIPE)


def test_a_killed_run_goes_on_to_the_same_losses_and_weights(tmp_path: Path, unbroken: Path) -> None:
    process = worker(tmp_path)
    end = time.monotonic() + 60
    while checkpoint.find(tmp_path) is None and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    reached = checkpoint.find(tmp_path)
    assert reached is not None, said.decode()
    assert not (tmp_path / "model").exists(), "it was killed too late to show anything"
    weights = train(tmp_path, steps=40)
    assert same(weights, load_file(unbroken / "model" / "line.safetensors"))
    expected, found = trainings.values(unbroken), trainings.values(tmp_path)
    assert found.keys() >= set(range(int(reached.stem.split("-")[1]), 40))
    assert all(found[step] == pytest.approx(expected[step], rel=1e-5) for step in found)


def test_without_its_checkpoint_it_would_not(tmp_path: Path, unbroken: Path) -> None:
    other = train(tmp_path, steps=40, seed=1)
    assert not same(other, load_file(unbroken / "model" / "line.safetensors"))


@pytest.mark.parametrize("part", ["task", "optimiser", "ema"])
def test_every_part_of_a_checkpoint_matters(tmp_path: Path, unbroken: Path, part: str) -> None:
    first = torch.load(unbroken / "step-00000036.pt", weights_only=True)
    fresh = loop.Trainer(loop.Accelerator(), trainings.Line(), trainings.run(tmp_path, steps=40), {})
    spoilt = {"task": fresh.task.state_dict(), "optimiser": fresh.optimiser.state_dict(), "ema": fresh.ema.average}
    torch.save(first, tmp_path / "step-00000036.pt")
    assert same(train(tmp_path, steps=40), load_file(unbroken / "model" / "line.safetensors"))
    for file in tmp_path.glob("step-*"):
        file.unlink()
    torch.save({**first, part: spoilt[part]}, tmp_path / "step-00000036.pt")
    assert not same(train(tmp_path, steps=40), load_file(unbroken / "model" / "line.safetensors"))


def test_drawing_and_workers_change_nothing(tmp_path: Path, unbroken: Path) -> None:
    weights = train(tmp_path, steps=40, draw_every=1000, workers=1)
    assert same(weights, load_file(unbroken / "model" / "line.safetensors"))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ValueError, match=r"rate = 0.01 instead of 0.02.*another folder"):
        train(tmp_path, rate=0.02)
    assert train(tmp_path, log_every=3)  # which does not change what is learnt


def test_a_broken_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "step-00000004.pt").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="step-00000004.pt.*remove it"):
        train(tmp_path)


def test_a_checkpoint_appears_whole(tmp_path: Path) -> None:
    class Unsaveable:
        def __reduce__(self) -> Any:
            raise RuntimeError("the disk is full")

    checkpoint.write(tmp_path, 1, {"x": torch.zeros(1)}, keep=2)
    with pytest.raises(RuntimeError, match="full"):
        checkpoint.write(tmp_path, 2, {"x": Unsaveable()}, keep=2)
    found = checkpoint.find(tmp_path)
    assert found is not None and found.name == "step-00000001.pt"


def test_several_processes_train_as_one(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29571"]
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, str(script), str(HERE), str(tmp_path / "run"), "8"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "run" / "step-00000008.pt", weights_only=True)
    assert state["settings"]["processes"] == 2
    found, both, one = (
        told(weights) for weights in (state["task"], by_hand(tmp_path, (1, 0)), by_hand(tmp_path, (0,)))
    )
    assert same(found, both, 1e-3) and not same(found, one, 1e-3)


def told(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those weights that have a gradient: of a bias ahead of a norm it is mere rounding, of which AdamW makes much."""
    return {key: value for key, value in weights.items() if key not in ("net.0.bias", "net.1.running_mean")}


def by_hand(folder: Path, processes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The weights after the mean of all processes' gradients, each with the norm's statistics of its own batch."""
    run, task = trainings.run(folder, steps=8), trainings.Line()
    optimiser = torch.optim.AdamW(loop.groups(task, run.decay), lr=run.rate)
    for step in range(8):
        for process in processes:  # the first process's statistics are those that stay
            kept = {key: value.clone() for key, value in task.named_buffers()}
            (task(task.batch(chance(0, step, process), 8))["square"] / len(processes)).backward()
            for key, value in task.named_buffers() if process else ():
                value.copy_(kept[key])
        nn.utils.clip_grad_norm_(task.parameters(), run.clip)
        for group in optimiser.param_groups:
            group["lr"] = loop.rate(run, step)
        optimiser.step()
        optimiser.zero_grad()
    return task.state_dict()


def test_the_average_is_the_weighted_sum_of_all_weights() -> None:
    module = nn.Linear(1, 1, bias=False)
    history = [2.0, 4.0, -1.0]
    with torch.no_grad():
        module.weight.fill_(history[0])
        ema = Ema(module, 0.5)
        expected = history[0]
        for step, value in enumerate(history[1:]):
            module.weight.fill_(value)
            ema.update(module, step)
            decay = min(0.5, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * value
    assert float(ema.average["weight"]) == pytest.approx(expected)
    module.train()
    with ema.applied(module):
        assert module.weight.item() == pytest.approx(expected) and not module.training
    assert module.weight.item() == history[-1] and module.training
    with pytest.raises(RuntimeError), ema.applied(module):
        raise RuntimeError
    assert module.weight.item() == history[-1]


def test_frozen_weights_have_no_average() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    assert set(averaged(module)) == {"1.running_mean", "1.running_var"}


def test_the_rate_rises_and_falls(tmp_path: Path) -> None:
    run = trainings.run(tmp_path, steps=100, warmup=10, rate=1.0)
    rates = [loop.rate(run, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and loop.LEAST <= rates[-1] < 0.02


def test_parameters_learn_at_their_share_of_the_rate(tmp_path: Path) -> None:
    class Held(trainings.Line):
        def share(self, name: str) -> float:
            return 0.0 if name == "net.3.weight" else 1.0

    loop.train(Held, trainings.run(tmp_path, steps=4, ema=0.0), {})
    made, first = load_file(tmp_path / "model" / "line.safetensors"), trainings.Line().state_dict()
    names = [name for name, _ in trainings.Line().named_parameters()]
    assert [name for name in names if torch.equal(made[name], first[name])] == ["net.3.weight"]


def test_chance_is_of_its_numbers_alone() -> None:
    def draw(*numbers: int) -> float:
        return float(torch.rand(1, generator=chance(*numbers)))

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(*numbers) for numbers in [(1, 2, 3), (1, 3, 2), (12, 3), (1, 23), (0, 2, 3)]}) == 5


def test_first_weights_are_defined_and_silent_ones_zero() -> None:
    module = nn.Sequential(nn.Conv2d(3, 64, 3), nn.GroupNorm(1, 64), nn.Linear(64, 64))
    for value in module.parameters():
        nn.init.constant_(value, float("nan"))
    start(module, 1, silent=("2.weight",))
    assert module[0].weight.std().item() == pytest.approx(27**-0.5, rel=0.1)
    assert bool((module[1].weight == 1).all()) and not module[2].weight.any() and not module[0].bias.any()


GOOD = """
[run]
folder = "out"
steps = 10
batch = 2
rate = 1
[task]
side = 64
"""


@pytest.mark.parametrize(
    ("change", "what", "message"),
    [
        (("side = 64", "size = 64"), "vae", r"got size in \[task\]; expected none but side, crop, noise"),
        (("batch = 2", "batches = 2"), "vae", r"got batches in \[run\]; expected none but folder, steps, batch"),
        (("batch = 2", ""), "vae", r"got no batch in \[run\]"),
        (("steps = 10", 'steps = "10"'), "vae", r"got '10' for steps in \[run\]; expected int"),
        (("steps = 10", "steps = true"), "vae", r"got True for steps"),
        (("steps = 10", "steps = -1"), "vae", r"got steps = -1 in \[run\]; expected more"),
        (("batch = 2", "batch = 0"), "vae", r"got batch = 0 in \[run\]; expected more"),
        (("steps = 10", "steps = 10\nema = 1.0"), "vae", "got ema = 1.0"),
        (("steps = 10", 'steps = 10\nprecision = "int8"'), "vae", "'int8'.*expected no or bf16 or fp16"),
        (("[task]", "[tsk]"), "vae", r"got tsk in .*; expected the tables \[run\] and \[task\]"),
        (("[task]\nside = 64", ""), "vae", r"without \[task\].*; add"),
        (("[task]", "[task"), "vae", "cannot be read"),
        (("side = 64", 'network = "deep"'), "recogniser", "'deep'.*residual or separable"),
        (("side = 64", 'vae = "v"\ntext = "t"\nlevels = [1, 2]'), "unet", "2 levels and 4 depths"),
        (("side = 64", 'vae = "v"\ntext = "t"\nlevels = [1, "2"]'), "unet", "got '2' for levels"),
        (("", ""), "nothing", "got 'nothing'; expected one of vae, clip, unet, recogniser"),
    ],
)
def test_what_a_config_gets_wrong_is_said(tmp_path: Path, change: tuple[str, str], what: str, message: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(GOOD)
    assert tasks.settings("vae", file)[0] == config.Run(folder="out", steps=10, batch=2, rate=1.0)
    file.write_text(GOOD.replace(*change))
    with pytest.raises(ValueError, match=message):
        tasks.settings(what, file)


def test_a_config_like_another_tells_what_differs(tmp_path: Path) -> None:
    other, file = tmp_path / "other.toml", tmp_path / "config.toml"
    other.write_text(GOOD)
    file.write_text('like = "other.toml"\n[run]\nfolder = "mine"\n[task]\ncrop = 32')
    run, about = tasks.settings("vae", file)
    assert run == config.Run(folder="mine", steps=10, batch=2, rate=1.0) and (about.side, about.crop) == (64, 32)
    for text, message in (
        ('like = "other.toml"\n[task]\ncrop = 32', "no folder in .*other.toml trains in its own"),
        ('like = "none.toml"', "like = 'none.toml'.*the name of a config in"),
        ("like = 5", "like = 5.*the name of a config"),
        ('like = "config.toml"\n[run]\nfolder = "mine"', "like config.toml itself"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            tasks.settings("vae", file)


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.toml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_configs_are_read(file: Path) -> None:
    named = [name for name in tasks.TASKS if file.stem.startswith(name)]
    others = {"judge": "recogniser", "omni_adapter": "decoupled"}
    what = next((what for begin, what in others.items() if file.stem.startswith(begin)), None) or named[0]
    run, about = tasks.settings(what, file)
    assert (run.steps > 0 or file.stem == "omni_masked_flow") and asdict(about)
    assert run.folder == f"artifacts/training/{file.parent.name}/{file.stem}"
