"""`lorafair.run`: in place as in a notebook, and with more processes as a child whose lines are shown."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch.nn import functional as F

import lorafair
from lorafair.aggregation.fedit import FedIT
from lorafair.checkpointing.checkpoint import list_checkpoints, load_checkpoint
from lorafair.cluster.saved import note_saved
from lorafair.cluster.signals import Interrupted
from lorafair.commands import run as run_module
from lorafair.commands.run import RunResult
from lorafair.config.loading import load_config, to_yaml
from lorafair.config.schema import Config
from lorafair.console import write_text
from lorafair.data.images import resize
from lorafair.data.resizing import resize_without_antialias
from lorafair.data.sources import load_images
from lorafair.errors import ConfigError, LorafairError
from lorafair.evaluation import Evaluation
from lorafair.registry import CALLBACKS, METHODS, METRICS
from lorafair.seeding import seeded_numpy
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
TWO = ("fabric.devices=2", "rounds=3")
PLUGIN = """
import lorafair

@lorafair.register_callback("of_a_file")
class OfAFile(lorafair.Callback):
    def on_round_end(self, round, scalars):
        print(f"the callback heard of round {round}")
"""
# Runs something as a user's script does, and compares what it has found with what it leaves.
NOTHING_LEFT = """
import logging, os, random, signal, sys, threading
import numpy, torch
import lorafair, lorafair.federation, lightning.fabric

def state():
    logger = logging.getLogger("lorafair")
    return {
        "threads of torch": torch.get_num_threads(),
        "environment": dict(os.environ),
        "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "logging": (logger.level, logger.propagate, list(logger.handlers), list(logging.getLogger().handlers)),
        "threads": {thread.name for thread in threading.enumerate()},
        "process group": torch.distributed.is_initialized(),
        "random": (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "folder": os.getcwd(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "7"
class Failing(lorafair.Callback):
    def on_round_start(self, round):
        raise OSError("no place")

before = state()
arguments = sys.argv[1:]
failing = {"rounds": 2, "callbacks": [lorafair.Callback(), Failing()]}
for options in ({"rounds": 1}, {"rounds": 1}, {"rounds": 0}, failing):
    try:
        print(lorafair.run(*arguments, fabric={"threads": 2}, **options))
    except lorafair.LorafairError as error:
        print(error)
    after = state()
    assert after == before, [(key, before[key], after[key]) for key in before if after[key] != before[key]]
"""


def adapter(run_dir: Path) -> torch.Tensor:
    return load_checkpoint(list_checkpoints(run_dir)[-1]).tensors["adapter"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Three rounds in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        return lorafair.run(TINY, "rounds=3", run_dir=tmp_path_factory.mktemp("runs") / "finished")


# In place


def test_a_result_has_everything_that_the_run_has_left(finished: RunResult) -> None:
    content = finished.content
    assert finished.mean_accuracy == content["mean_accuracy"]
    assert list(finished.accuracy) == ["plain", "noisy", "inverted"]
    assert finished.mean_accuracy == pytest.approx(sum(finished.accuracy.values()) / 3)
    assert list(finished.metrics["train/loss"]) == [1, 2, 3]
    assert finished.metrics["eval/accuracy"][3] == pytest.approx(finished.mean_accuracy)
    assert content["processes"] == 1
    assert content["totals"]["bytes"] > 0
    assert content["versions"]["lorafair"] == lorafair.__version__
    assert finished.config == load_config(TINY, "rounds=3", run_dir=finished.run_dir)
    mean = f"{100 * finished.mean_accuracy:.1f}"
    assert re.fullmatch(
        rf"RunResult\(mean accuracy {mean} %: plain \d+\.\d, noisy \S+, inverted \S+; \S+\)", repr(finished)
    )


def test_the_loaded_model_does_what_the_run_has_evaluated(finished: RunResult) -> None:
    model, config = finished.load_model(), finished.config
    data = load_images(config.data, config.seed)
    pixels = torch.from_numpy(data.test.images.read_many(np.arange(len(data.test)), 32)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert not model.training
    with torch.inference_mode():
        logits = model((pixels / 255 - mean) / std)
    labels, domains = torch.from_numpy(data.test.labels), torch.from_numpy(data.test.domains)
    for index, domain in enumerate(data.domains):
        of_domain = domains == index
        found = finished.content["domains"][domain]
        loss = F.cross_entropy(logits[of_domain].double(), labels[of_domain])
        assert float(loss) == pytest.approx(found["loss"], abs=1e-5)
        right = (logits[of_domain].argmax(1) == labels[of_domain]).double().mean()
        assert float(right) == pytest.approx(found["accuracy"], abs=1e-9)


def test_classes_and_transform_are_those_of_the_run(finished: RunResult, tmp_path: Path) -> None:
    """What they make of each test image, the model answers as it did in the run."""
    model, config = finished.load_model(), finished.config
    data = load_images(config.data, config.seed)
    pictures = [Image.fromarray(data.test.images.read(index, 32)) for index in range(len(data.test))]
    inputs = torch.stack([finished.transform(picture) for picture in pictures])
    with torch.inference_mode():
        right = (model(inputs).argmax(1).numpy() == data.test.labels).mean()
    assert finished.mean_accuracy == pytest.approx(right)
    assert finished.classes == data.classes
    pictures[0].save(tmp_path / "picture.png")
    assert torch.equal(finished.transform(tmp_path / "picture.png"), inputs[0])
    with pytest.raises(LorafairError, match=r"no_picture\.png is no image that can be read"):
        finished.transform(str(tmp_path / "no_picture.png"))
    with pytest.raises(LorafairError, match="is no run directory with a checkpoint"):
        _ = RunResult(tmp_path).classes


@pytest.mark.parametrize("antialias", [True, False])
def test_the_transform_of_other_settings(tmp_path: Path, antialias: bool) -> None:
    """A named normalisation, images that are made smaller, with and without a filter; grey becomes RGB."""
    config = load_config(TINY, **{"model.normalization": "clip", "data.antialias": antialias})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    picture = Image.fromarray(seeded_numpy(0, "picture").integers(0, 256, (80, 64), np.uint8))
    shrunk = (resize if antialias else resize_without_antialias)(picture.convert("RGB"), 32) / 255
    made = RunResult(tmp_path).transform(picture).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(made * OPENAI_CLIP_STD + OPENAI_CLIP_MEAN, shrunk, atol=1e-6)


def test_a_run_without_a_global_model_says_so(tmp_path: Path) -> None:
    result = lorafair.run(TINY, "rounds=1", "method.name=local_only", run_dir=tmp_path / "run")
    assert len(result.accuracy) == 3
    with pytest.raises(LorafairError, match="has no global model"):
        result.load_model()


@pytest.mark.slow
def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """No process group, thread, variable, handler or logging; also after an error of the configuration, or of a run."""
    arguments = [*TINY, f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-c", NOTHING_LEFT, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith("RunResult(")]) == 2
    assert "rounds=0 is out of range: it must be at least 1" in lines
    assert any(line.startswith("callback ") and " failed: " in line for line in lines)
    assert any(line.startswith("round 1/1  loss ") for line in lines), "its lines are shown"


def test_a_configuration_from_python_gives_the_same_run(finished: RunResult, tmp_path: Path) -> None:
    made = dataclasses.replace(load_config(TINY), rounds=3, run_dir=tmp_path / "run")
    assert torch.equal(adapter(lorafair.run(made).run_dir), adapter(finished.run_dir))


def test_a_finished_run_is_not_computed_again(finished: RunResult, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished.run_dir / "result.json").stat().st_mtime_ns
    again = lorafair.run(TINY, "rounds=3", run_dir=finished.run_dir)
    assert again.accuracy == finished.accuracy
    assert (finished.run_dir / "result.json").stat().st_mtime_ns == before
    assert "this run was finished before, with 3 rounds" in capsys.readouterr().out


@pytest.mark.slow
def test_a_damaged_result_is_written_again(finished: RunResult, tmp_path: Path) -> None:
    shutil.copytree(finished.run_dir, tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text('{"rounds": 3')
    again = lorafair.run(TINY, "rounds=3", run_dir=tmp_path / "run")
    assert again.accuracy == finished.accuracy


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (Config(),),
            {"rounds": 3},
            r"^a Config is complete: change it by dataclasses\.replace\(config, rounds=\.\.\.\)",
        ),
        ((Config(), "rounds=3"), {}, r"^give one Config, or files and key=value pairs, not both$"),
        ((TINY, Config()), {}, r"^give one Config, or files and key=value pairs, not both$"),
        ((Config(rounds=0),), {}, r"^rounds=0 is out of range"),
        ((TINY, "lr=3"), {}, r"^there is no option lr; did you mean client\.learning_rate=3\?"),
        ((3,), {}, r"^3 \(int\) is neither a YAML file, nor a key=value pair, nor a list of them; values by key are"),
        (({"rounds": 3},), {}, r"^\{'rounds': 3\} \(dict\) is neither a YAML file"),
        (
            (TINY,),
            {"callbacks": 3},
            r"^callbacks=3 must be a list of objects of classes that extend lorafair\.Callback$",
        ),
        ((TINY,), {"callbacks": [lorafair.Callback]}, r"^callbacks=\[<class .* must be a list of objects"),
        ((TINY,), {"model": {"lora": {"rank": 1000}}}, r"^model\.lora\.rank=1000 is larger than layer "),
        ((TINY,), {"data.domains": ("plain", "colourful")}, r"^data\.domains: synthetic has no domain colourful"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    arguments: tuple[Any, ...],
    options: Mapping[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        lorafair.run(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_in_another_thread_is_left_alone_by_signals(tmp_path: Path) -> None:
    results: list[RunResult] = []
    thread = threading.Thread(target=lambda: results.append(lorafair.run(TINY, "rounds=1", run_dir=tmp_path / "run")))
    thread.start()
    thread.join(timeout=120)
    assert len(results[0].accuracy) == 3


# Callbacks


class Listener(lorafair.Callback):
    """Writes down what it hears."""

    def __init__(self, name: str, heard: list[tuple[Any, ...]]) -> None:
        self.name, self.heard = name, heard

    def on_round_start(self, round: int) -> None:
        self.heard.append((self.name, "start", round))

    def on_round_end(self, round: int, scalars: Mapping[str, float]) -> None:
        assert scalars["train/loss"] > 0
        self.heard.append((self.name, "end", round))

    def on_evaluation(self, round: int, evaluation: Evaluation) -> None:
        assert evaluation.accuracy.shape == (1, 3)
        self.heard.append((self.name, "evaluation", round))

    def on_stop(self, completed_rounds: int, reason: str) -> None:
        self.heard.append((self.name, "stop", completed_rounds, reason))


class Asking(lorafair.Callback):
    """Sends this process a signal so many times at the start of round 2."""

    def __init__(self, number: int, times: int = 1) -> None:
        self.number, self.times = number, times

    def on_round_start(self, round: int) -> None:
        for _ in range(self.times if round == 2 else 0):
            os.kill(os.getpid(), self.number)


class Broken(lorafair.Callback):
    """Fails after round 2."""

    def on_round_end(self, round: int, scalars: Mapping[str, float]) -> None:
        if round == 2:
            raise ValueError("no")


@pytest.mark.slow
def test_callbacks_are_called_in_order_and_change_nothing(finished: RunResult, tmp_path: Path) -> None:
    heard: list[tuple[Any, ...]] = []
    callbacks = [Listener("first", heard), Listener("second", heard)]
    result = lorafair.run(TINY, "rounds=3", "evaluation.every=2", run_dir=tmp_path / "run", callbacks=callbacks)
    moments = [
        ("start", 1), ("end", 1), ("start", 2), ("evaluation", 2), ("end", 2), ("start", 3), ("evaluation", 3),
        ("end", 3), ("stop", 3, "finished"),
    ]  # fmt: skip
    assert heard == [(name, *moment) for moment in moments for name in ("first", "second")]
    assert torch.equal(adapter(result.run_dir), adapter(finished.run_dir))


@pytest.mark.slow
def test_a_callback_that_fails_ends_the_run_with_its_name(finished: RunResult, tmp_path: Path) -> None:
    heard: list[tuple[Any, ...]] = []
    arguments = (*TINY, "rounds=3", f"run_dir={tmp_path / 'run'}")
    line = inspect.getsourcelines(Broken.on_round_end)[1] + 2
    message = f"callback Broken.on_round_end failed: ValueError: no (test_run.py, line {line})"
    with pytest.raises(LorafairError, match=f"^{re.escape(message)}$"):
        lorafair.run(arguments, callbacks=[Broken(), Listener("", heard)])
    assert heard[-1] == ("", "stop", 2, message)
    assert torch.equal(adapter(lorafair.run(arguments).run_dir), adapter(finished.run_dir)), "the same call continues"


# Ctrl-C


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_an_interrupted_run_raises_keyboard_interrupt_and_the_same_call_continues(
    number: int, times: int, finished: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first signal waits for the client in training, a second Ctrl-C for nothing."""
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    arguments = (*TINY, "rounds=3", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(KeyboardInterrupt) as caught:
        lorafair.run(arguments, callbacks=[Asking(number, times)])
    if times == 1:
        name = signal.Signals(number).name
        assert re.match(rf"stopped by {name} in round 2 of 3, .*; the same call continues$", str(caught.value))
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert not (tmp_path / "run" / "result.json").exists()
    assert not dist.is_initialized()
    result = lorafair.run(arguments)
    assert "continuing after round 1 of 3" in capsys.readouterr().out
    assert torch.equal(adapter(result.run_dir), adapter(finished.run_dir))
    assert list(result.metrics["train/loss"]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("resume", "is_saved", "outlook"),
    [
        ("auto", True, "the same call continues"),
        ("never", True, "the same call with resume=auto continues"),
        ("never", False, "nothing was saved yet, and the same call begins anew"),
    ],
)
def test_an_interrupted_run_says_what_continues_it(
    resume: str, is_saved: bool, outlook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        if is_saved:
            note_saved()
        raise Interrupted(signal.SIGINT, "in round 1")

    monkeypatch.setattr("lorafair.federation.run_federation", interrupted)
    with pytest.raises(KeyboardInterrupt, match=f"in round 1; {outlook}$"):
        lorafair.run(*TINY, f"resume={resume}", f"run_dir={tmp_path / 'run'}")


# A child


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A plug-in in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PLUGIN)
    yield tmp_path / "mine.py"
    CALLBACKS.remove("of_a_file")


@pytest.mark.slow
def test_two_processes_give_the_same_bits_and_their_lines_are_shown(
    finished: RunResult, plugin: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)  # as a process group of this process leaves them behind
    result = lorafair.run(TINY, *TWO, plugins=["./mine.py"], run_dir="two")
    said = capsys.readouterr().out
    assert f"lorafair {lorafair.__version__}: 2 processes on cpu" in said
    assert [int(number) for number in re.findall(r"^round (\d)/3 ", said, re.MULTILINE)] == [1, 2, 3]
    assert torch.equal(adapter(result.run_dir), adapter(finished.run_dir))
    assert result.accuracy == finished.accuracy
    assert result.content["processes"] == 2
    assert result.config.plugins == (str(plugin),)
    assert not dist.is_initialized()


@pytest.mark.parametrize("call", [lorafair.run, lorafair.compare])
def test_a_call_by_each_of_several_processes_is_refused(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        lorafair.ConfigError, match=r"called by each of 4 processes that srun, torchrun or mpirun has started"
    ):
        call("synthetic.yaml")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT does what Ctrl-C does; a shell has its background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c")
def test_a_child_that_is_interrupted_raises_keyboard_interrupt_and_the_same_call_continues(
    plugin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*TINY, "rounds=16", f"plugins=[{plugin}]")
    in_child = (*arguments, "callbacks=[of_a_file]", "fabric.devices=2", f"run_dir={tmp_path / 'run'}")

    def interrupting(stream: Any, line: str) -> None:
        write_text(stream, line)
        if line.startswith("the callback heard of round 2"):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_text", interrupting)
        with pytest.raises(KeyboardInterrupt):
            lorafair.run(in_child)
    said = capsys.readouterr().out
    assert "stopping once the clients in training are done" in said
    assert re.search(r"stopped by SIGINT in round \d+ of 16, .*; the same command continues", said)
    assert said.count("the callback heard of round 1\n") == 1, "callbacks of a plug-in are called on rank 0"
    assert not (tmp_path / "run" / "result.json").exists()
    result = lorafair.run(in_child)
    assert re.search(r"continuing after round \d+ of 16", capsys.readouterr().out)
    alone = lorafair.run(arguments, run_dir=tmp_path / "alone")
    assert torch.equal(adapter(result.run_dir), adapter(alone.run_dir))


@pytest.mark.slow
def test_a_child_whose_caller_is_gone_stops_with_everything_saved(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = [*TINY, "rounds=5000", "checkpoint.every=auto", "fabric.devices=2", f"run_dir={run_dir}"]
    script = f"import lorafair; lorafair.run({arguments!r})"

    def of_run() -> list[str]:
        found = subprocess.run(["pgrep", "-f", f"{tmp_path.name}.yaml"], capture_output=True, text=True, check=False)
        return found.stdout.split()

    log = (tmp_path / "log").open("w+")
    caller = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=log, stderr=log)
    end = time.monotonic() + 90
    while not (run_dir / "metrics.csv").exists() or "train/loss" not in (run_dir / "metrics.csv").read_text():
        assert time.monotonic() < end, (tmp_path / "log").read_text()
        assert caller.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.2)
    assert of_run(), "it trains"
    caller.kill()
    caller.wait()
    while of_run():
        assert time.monotonic() < end, f"processes {of_run()} still train"
        time.sleep(0.2)
    assert list_checkpoints(run_dir)
    assert not (run_dir / "result.json").exists()


@pytest.mark.slow
def test_signals_that_are_not_asked_for_keep_their_effect_in_place(tmp_path: Path) -> None:
    """fabric.signals=[TERM]: USR2 is none of the scheduler's, and ends the process as it always does."""
    script = f"""
import os, signal, lorafair
class Signalled(lorafair.Callback):
    def on_round_end(self, round, scalars):
        os.kill(os.getpid(), signal.SIGUSR2)
lorafair.run({[*TINY, "fabric.signals=[TERM]", f"run_dir={tmp_path / 'run'}"]!r}, callbacks=[Signalled()])
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGUSR2, ended.stderr


@pytest.mark.slow
def test_the_last_line_of_a_child_that_fails_is_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LorafairError, match=r"^fabric\.devices=500: this node has ") as caught:
        lorafair.run(TINY, "fabric.devices=500", run_dir=tmp_path / "run")
    assert f"error: {caught.value}" in capsys.readouterr().out


@pytest.fixture
def registered() -> Iterator[None]:
    """A method and a metric that only this process knows."""
    lorafair.register_method("here_alone")(dataclasses.dataclass(frozen=True)(type("Here", (FedIT,), {})))
    lorafair.register_metric("here_too")(lambda classes: None)  # type: ignore[arg-type, return-value]
    yield
    METHODS.remove("here_alone")
    METRICS.remove("here_too")


@pytest.mark.parametrize(
    ("pair", "what"),
    [("method.name=here_alone", "method here_alone"), ("evaluation.metrics=[here_too]", "metric here_too")],
)
def test_a_name_of_this_process_alone_is_refused_for_a_child(
    pair: str, what: str, registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "show_child", forbidden)
    message = rf"^{what} is registered in this process alone, and fabric\.devices=2 starts others; put it into a file"
    with pytest.raises(ConfigError, match=message) as caught:
        lorafair.run(TINY, *TWO, pair, run_dir=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_callbacks_of_this_process_are_refused_for_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "show_child", forbidden)
    with pytest.raises(ConfigError, match=r"^callbacks= is for one process; .* \(lorafair\.register_callback\)"):
        lorafair.run(TINY, *TWO, run_dir=tmp_path / "run", callbacks=[lorafair.Callback()])


def forbidden(arguments: Any) -> None:
    raise AssertionError("a child was started")


@pytest.mark.slow
def test_a_method_of_this_process_runs_in_place(registered: None, tmp_path: Path) -> None:
    mine, its_parent = (
        lorafair.run(TINY, f"method.name={name}", run_dir=tmp_path / name) for name in ("here_alone", "fedit")
    )
    assert torch.equal(adapter(mine.run_dir), adapter(its_parent.run_dir))
