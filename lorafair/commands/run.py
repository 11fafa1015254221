"""Run a federation: from the command on the processes of a launched Fabric, from Python in place or as a child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafair.checkpointing.lock import check_free
from lorafair.cluster.placement import processes_started, without_launch
from lorafair.cluster.saved import begin_start, continues, note_resume
from lorafair.cluster.signals import INTERRUPTED, Interrupted, handle_only, handling_signals
from lorafair.cluster.watchdog import CALLER, deadline
from lorafair.config.loading import load_config, load_config_of_run, settle, to_yaml
from lorafair.config.schema import Config
from lorafair.console import printing, write_text
from lorafair.errors import ConfigError, LorafairError
from lorafair.launch import in_place, launch, let_idle_threads_sleep, resolve_placement, run_until_stopped
from lorafair.reporting.run_dir import RESULT_FILE, Curve, read_metrics, read_result

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorafair.reporting.callbacks import Callback


@dataclass(frozen=True)
class RunResult:
    """The results in the directory of a finished run.

    Example:
        >>> result = lorafair.RunResult(Path("runs/synthetic/lora_fair-seed0"))
        >>> result.mean_accuracy, result.config.rounds, result.metrics["eval/accuracy"]
    """

    run_dir: Path

    @cached_property
    def _result(self) -> dict[str, Any]:
        return read_result(self.run_dir)

    @property
    def mean_accuracy(self) -> float:
        """Top-1 accuracy, the unweighted mean over domains (and over clients, if each has its own model)."""
        return float(self._result["mean_accuracy"])

    @property
    def accuracy(self) -> dict[str, float]:
        """Top-1 accuracy by domain."""
        return dict(self._result["accuracy"])

    @property
    def epsilon(self) -> float | None:
        """The ε of the run at its δ, the largest of all units; None without privacy (privacy.unit=none).

        `content["privacy"]` has the mechanism, and the ε of each client.
        """
        privacy = self._result.get("privacy")
        return None if privacy is None else float(privacy["epsilon"])

    @property
    def mean_balanced_accuracy(self) -> float:
        """Mean recall of the classes, the unweighted mean over domains."""
        return float(self._value("mean_balanced_accuracy"))

    @property
    def balanced_accuracy(self) -> dict[str, float]:
        """Mean recall of the classes, by domain."""
        return self._by_domain("balanced_accuracy")

    @property
    def worst_domain(self) -> str:
        """The domain where accuracy is lowest."""
        return min(self.accuracy, key=self.accuracy.__getitem__)

    @property
    def mean_macro_f1(self) -> float:
        """Mean F1 of the classes, the unweighted mean over domains."""
        return float(self._value("mean_macro_f1"))

    @property
    def macro_f1(self) -> dict[str, float]:
        """Mean F1 of the classes, by domain."""
        return self._by_domain("macro_f1")

    @property
    def mean_calibration_error(self) -> float:
        """Expected calibration error with 15 bins, the unweighted mean over domains."""
        return float(self._value("mean_calibration_error"))

    @property
    def calibration_error(self) -> dict[str, float]:
        """Expected calibration error with 15 bins, by domain."""
        return self._by_domain("calibration_error")

    @property
    def recall(self) -> dict[str, dict[str, float]]:
        """Fraction of the test images of a class that are classified correctly, by domain and class."""
        return dict(self._value("recall"))

    @property
    def clients(self) -> dict[str, Any]:
        """Accuracy over clients: accuracy (mean), worst_decile, best_decile, standard_deviation, number, accuracies.

        The page "Who is left behind" defines them.
        """
        return dict(self._value("clients"))

    def _by_domain(self, kind: str) -> dict[str, float]:
        self._value(f"mean_{kind}")
        return {domain: float(values[kind]) for domain, values in self._result["domains"].items()}

    def _value(self, key: str) -> Any:
        """LorafairError where the run is of a version that did not record it."""
        if key not in self._result:
            version = self._result["versions"].get("lorafair", "an older version")
            raise LorafairError(
                f"{self.run_dir} has no {key}: lorafair {version} did not record it; "
                f"remove {RESULT_FILE} and run it again, which evaluates the last round anew"
            )
        return self._result[key]

    @property
    def content(self) -> dict[str, Any]:
        """All of result.json: totals of bytes and seconds, settings, versions, checksums of the start."""
        return self._result

    @cached_property
    def metrics(self) -> dict[str, Curve]:
        """Every scalar by its name in metrics.csv, as {round: value}."""
        return read_metrics(self.run_dir)

    @cached_property
    def config(self) -> Config:
        """The complete configuration."""
        return load_config_of_run(self.run_dir)

    def load_model(self) -> nn.Module:
        """The global model of the last round, on the CPU, in evaluation mode.

        Returns:
            A timm model (or the module of a plug-in's backbone) with the adapters merged into its weights and the
            trained head in its place. Its inputs are images normalised as in the run (`model.pretrained_cfg`
            says how, unless model.normalization is set); `transform` makes them.

        Raises:
            LorafairError: The run has no global model, because each client keeps its own.
        """
        from lorafair.commands.export import merged_model

        return merged_model(self.run_dir)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the model's logits."""
        from lorafair.commands.inference import classes_of

        return classes_of(self.run_dir)

    @cached_property
    def transform(self) -> Callable[..., Tensor]:
        """Makes a Pillow image, or the file of an image, the input of the loaded model: float32 (3, S, S).

        Example:
            >>> logits = result.load_model()(result.transform("cat.jpg").unsqueeze(0))
            >>> result.classes[int(logits.argmax())]
        """
        from lorafair.commands.inference import transform_of

        return transform_of(self.run_dir)

    def __repr__(self) -> str:
        accuracy = ", ".join(f"{domain} {100 * value:.1f}" for domain, value in self.accuracy.items())
        return f"RunResult(mean accuracy {100 * self.mean_accuracy:.1f} %: {accuracy}; {self.run_dir})"


def run(
    *arguments: Config | str | Path | Sequence[str], callbacks: Sequence[Callback] = (), **options: Any
) -> RunResult:
    """Run, or continue, a federation and return its result.

    With one process, no process group is opened, and a first Ctrl-C (or "interrupt" in a notebook) stops the
    run once the client in training is done and everything is saved. Several processes (fabric.devices,
    fabric.num_nodes) are started as a child process, whose output is shown.

    Args:
        arguments: A `Config`; or YAML files and `key=value` pairs, as for `load_config`.
        callbacks: Objects whose methods are called during the run; only for one process. Those of plug-ins are
            named by the option of that name: `"callbacks=[best_round]"`.
        options: Further values by key: `rounds=3`, `**{"method.name": "fedit"}`.

    Returns:
        The result. If the run was finished before, nothing is computed again.

    Raises:
        ConfigError: One line that names the key, what was given and what is possible.
        LorafairError: The data, the weights or a checkpoint cannot be used.
        KeyboardInterrupt: The run was interrupted; the same call, with resume=auto, continues it.

    Example:
        >>> result = lorafair.run("conf/synthetic.yaml", "rounds=3")
        >>> result.mean_accuracy, result.accuracy["plain"], result.metrics["train/loss"][3]
    """
    check_called_once("run")
    let_idle_threads_sleep()
    config = _config_of(arguments, options)
    if callbacks:
        _check_callbacks(callbacks)
    with printing():
        if (config.fabric.devices or 1) * (config.fabric.num_nodes or 1) > 1:
            if callbacks:
                raise ConfigError(
                    "callbacks= is for one process; with more, register them in a plug-in (lorafair.register_callback) "
                    "and name them in `callbacks` and `plugins`"
                )
            check_child_can_know(config)
            run_as_child("run", config)
        else:
            _run_in_place(config, callbacks)
    return RunResult(config.folder)


def run_command(config: Config) -> int:
    """Check what needs no images, launch the processes and run the federation on each; returns the exit status."""
    note_resume(config.resume)
    placement = resolve_placement(config.fabric)

    from lorafair.commands.checks import check_data, check_devices, check_run

    with limited_checks(config):
        check_devices(config, placement)
        check_data(config)
        check_run(config)
        check_free(config.folder)

    from lorafair.federation import run_federation

    fabric = launch(config.fabric, placement, f"run directory {config.folder}")
    return run_until_stopped(fabric, config.fabric, placement, lambda: run_federation(fabric, config))


def limited_checks(config: Config) -> AbstractContextManager[None]:
    """A deadline for the checks before processes start: they build models, which may be a plug-in's."""
    minutes = None if config.client.timeout_minutes is None else config.fabric.timeout_minutes
    return deadline("the checks before the start", minutes, "fabric.timeout_minutes")


def check_called_once(command: str) -> None:
    """Raise ConfigError where several processes call lorafair.run or compare, and each would do all of it."""
    processes = processes_started(os.environ)
    if processes > 1:
        raise ConfigError(
            f"lorafair.{command} is called by each of {processes} processes that srun, torchrun or mpirun has started, "
            "and each would do all of it; call it in one process, or have the command started: "
            f"srun lorafair {command} FILE.yaml"
        )


def run_as_child(command: str, config: Config, *more: str) -> None:
    """Run a complete configuration by a subcommand in processes of its own and show their lines.

    Raises LorafairError with the last line where it fails, KeyboardInterrupt where it was interrupted.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{config.folder.parent.name or 'run'}.yaml")
        file.write_text(to_yaml(config), encoding="utf-8")
        show_child([command, str(file), *more])


def show_child(arguments: Sequence[str]) -> None:
    """Run the command in a child process and print its lines as they come. Raises as `run_as_child`."""
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH", "")) if part)
    child = subprocess.Popen(
        [sys.executable, "-m", "lorafair", *arguments],
        env={
            **without_launch(os.environ),
            CALLER: str(os.getpid()),
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches this process alone, which hands it on
    )
    assert child.stdout is not None
    last = ""
    try:
        while True:
            try:
                for line in child.stdout:
                    write_text(sys.stdout, line)
                    last = line.strip() or last
                status = child.wait()
                break
            except KeyboardInterrupt:
                child.send_signal(signal.SIGINT)
    finally:
        child.terminate()  # where this process cannot go on; without effect on a child that has ended
    if status == INTERRUPTED:
        raise KeyboardInterrupt(last)
    if status:
        raise LorafairError(last.removeprefix("error: ") or f"the run has ended with status {status}")


def _config_of(arguments: Sequence[Config | str | Path | Sequence[str]], options: dict[str, Any]) -> Config:
    """The configuration that `run` was given."""
    if not any(isinstance(argument, Config) for argument in arguments):
        return load_config(*arguments, **options)  # type: ignore[arg-type]
    if len(arguments) > 1:
        raise ConfigError("give one Config, or files and key=value pairs, not both")
    (config,) = arguments
    assert isinstance(config, Config)
    if options:
        raise ConfigError(
            f"a Config is complete: change it by dataclasses.replace(config, {next(iter(options))}=...) instead of "
            f"{next(iter(options))}="
        )
    return settle(config)


def _check_callbacks(callbacks: Any) -> None:
    """Raise ConfigError for what is no list of callbacks, before any data is loaded."""
    from lorafair.reporting.callbacks import Callback

    for callback in callbacks if isinstance(callbacks, list | tuple) else [callbacks]:
        if not isinstance(callback, Callback) or callback is callbacks:
            raise ConfigError(
                f"callbacks={callbacks!r} must be a list of objects of classes that extend lorafair.Callback"
            )


def _run_in_place(config: Config, callbacks: Sequence[Callback]) -> None:
    from lorafair.commands.checks import check_data, check_run

    check_data(config)
    check_run(config)

    from lorafair.federation import run_federation

    note_resume(config.resume)
    begin_start()
    with handling_signals(starting=True):
        handle_only(config.fabric.signals)
        try:
            with in_place(config.fabric) as fabric:
                run_federation(fabric, config, callbacks)
        except Interrupted as stop:
            raise KeyboardInterrupt(f"{stop}; {continues('call')}") from None


def check_child_can_know(config: Config) -> None:
    """Raise ConfigError for a name that was registered in this process alone, outside of any plug-in."""
    from lorafair import registry

    for names, name in (
        (registry.METHODS, str(config.method["name"])),
        (registry.SOURCES, config.data.source),
        (registry.PARTITIONS, config.partition.scheme),
        (registry.BACKBONES, config.model.name),
        *((registry.COMPRESSIONS, name) for name in config.compression.names),
        *((registry.METRICS, name) for name in config.evaluation.metrics),
        *((registry.CALLBACKS, name) for name in config.callbacks),
        *((registry.LOGGERS, name) for name in config.loggers),
    ):
        if not names.is_known_to_others(name, config.plugins):
            raise ConfigError(
                f"{names.kind} {name} is registered in this process alone, and fabric.devices={config.fabric.devices} "
                "starts others; put it into a file and name that in `plugins`, or set fabric.devices=1"
            )
