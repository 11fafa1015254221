"""Fabric's loggers beside TensorBoard and metrics.csv: those shipped here, and those that plug-ins register."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Mapping
from csv import DictReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafair.config.schema import Config
from lorafair.errors import ConfigError, LorafairError, one_line
from lorafair.files.writing import write_atomically
from lorafair.registry import LOGGERS

if TYPE_CHECKING:
    from lightning.fabric.loggers.logger import Logger


def register_logger(name: str) -> Callable[[Callable[..., Logger]], Callable[..., Logger]]:
    """Make a logger a key of `loggers`.

    Args:
        name: The key; its value holds the options of the logger.

    Returns:
        A decorator for a function of the run's directory and the options, by name, that returns a
        lightning.fabric.loggers.Logger. Its `log_metrics` gets the scalars of each round by their names in
        metrics.csv, and at the end numbers of the whole run with step=None.

    Raises:
        ConfigError: The name is taken.

    Example:
        >>> @lorafair.register_logger("mine")
        ... def mine(run_dir, path="log.txt"):
        ...     return MyLogger(run_dir / path)
    """

    def register(make: Callable[..., Logger]) -> Callable[..., Logger]:
        LOGGERS.add(name, make)
        return make

    return register


def open_loggers(config: Config) -> list[Logger]:
    """The loggers of a run. Raises LorafairError for one that cannot be made."""
    if not config.loggers:
        return []
    from lightning.fabric.loggers.logger import Logger

    loggers: list[Logger] = []
    for name, options in config.loggers.items():
        make = LOGGERS[name]
        try:
            logger = make(config.folder, **(options or {}))
        except TypeError as error:
            raise ConfigError(f"loggers.{name}: {error}") from error
        except ModuleNotFoundError as error:
            hint = "" if LOGGERS.is_from_plugin(name) else f"; pip install {name}"
            raise LorafairError(
                f"loggers.{name} needs a package that is not installed: {one_line(error)}{hint}"
            ) from error
        except LorafairError:
            raise
        except Exception as error:  # raised by the logger: no account, no server, no space
            raise LorafairError(f"loggers.{name} cannot be opened: {one_line(error)}") from error
        if not isinstance(logger, Logger):
            raise ConfigError(f"loggers.{name} is a {type(logger).__name__}, and must be a Logger of lightning.fabric")
        loggers.append(logger)
    return loggers


def csv(run_dir: Path, **options: Any) -> Logger:
    """Lightning's CSVLogger: a column for each scalar, a line for each round, in run_dir/csv/metrics.csv."""
    from lightning.fabric.loggers.csv_logs import CSVLogger

    class ContinuedCSVLogger(CSVLogger):
        """Keeps the lines of earlier rounds when a run is continued: Lightning deletes a file that is there."""

        _is_open = False

        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            if step is None:  # of the whole run: no line of this table
                return
            if not self._is_open:
                self._is_open = True
                for earlier, row in _take_rows(Path(self.log_dir, "metrics.csv")):
                    if earlier < step:
                        super().log_metrics(row, earlier)
            super().log_metrics(metrics, step)

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            """They are in config.yaml; Lightning raises an error here."""

    # One file for a run, whole after each round.
    given = {"root_dir": str(run_dir), "name": "csv", "version": "", "flush_logs_every_n_steps": 1}
    return ContinuedCSVLogger(**{**given, **options})


def wandb(run_dir: Path, **options: Any) -> Logger:
    """Lightning's WandbLogger (pip install wandb); `offline: true` keeps the run on the disk.

    A continued run goes on in the same run there, and one that starts anew begins another.
    """
    import wandb as client
    from lightning.pytorch.loggers import WandbLogger

    is_ours = client.run is None  # else one that a notebook has begun, which Lightning takes
    prefix = f"{options['prefix']}-" if options.get("prefix") else ""

    class EndedWandbLogger(WandbLogger):
        """Ends its run with ours, where Lightning leaves it to the next one of this process, and counts in rounds."""

        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            # With its own steps each part of a continued run would begin at 0 again, and be dropped when it is synced.
            rounds = {} if step is None else {"trainer/global_step": step}
            self.experiment.log({**{f"{prefix}{name}": value for name, value in metrics.items()}, **rounds}, step=step)

        def finalize(self, status: str) -> None:
            super().finalize(status)
            if is_ours:
                self.experiment.finish(exit_code=int(status != "success"))

    if options.pop("offline", False):  # Lightning would set a variable for all runs of this process
        options = {"mode": "offline", **options}
    run_id = _known_run(run_dir, "wandb") or uuid.uuid4().hex[:16]
    project = os.environ.get("WANDB_PROJECT", run_dir.resolve().parent.name)
    given: Mapping[str, Any] = {"save_dir": str(run_dir), "name": run_dir.name, "id": run_id, "project": project}
    logger = EndedWandbLogger(**{**given, **options})
    _remember_run(run_dir, "wandb", logger.experiment.id)  # opened now: no account is an error before the first round
    return logger


def mlflow(run_dir: Path, **options: Any) -> Logger:
    """Lightning's MLFlowLogger (pip install mlflow), to run_dir/mlflow.db unless `tracking_uri` names another place.

    A continued run goes on in the same run there, and one that starts anew begins another.
    """
    from lightning.pytorch.loggers import MLFlowLogger

    class ContinuedMLFlowLogger(MLFlowLogger):
        """Takes the settings of a continued run: MLflow has no parameter twice, and Lightning asks for it."""

        def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
            known = self.experiment.get_run(self.run_id).data.params
            super().log_hyperparams({key: value for key, value in params.items() if key not in known})
            for key, value in params.items():
                if known.get(key, str(value)) != str(value):  # more rounds, for example
                    self.experiment.set_tag(self.run_id, f"continued.{key}", str(value))

    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)  # it warns of each new experiment
    folder = run_dir.resolve()
    given = {
        "experiment_name": folder.parent.name,
        "run_name": folder.name,
        "tracking_uri": f"sqlite:///{folder / 'mlflow.db'}",
        "artifact_location": str(folder / "mlflow"),
        "run_id": _known_run(run_dir, "mlflow"),
    }
    logger = ContinuedMLFlowLogger(**{**given, **options})
    _remember_run(run_dir, "mlflow", str(logger.run_id))
    logger.experiment.update_run(logger.run_id, "RUNNING")  # again, where it is continued
    return logger


def _known_run(run_dir: Path, logger: str) -> str | None:
    """What a logger called the run before it was interrupted."""
    file = run_dir / f"{logger}_run"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _remember_run(run_dir: Path, logger: str, run_id: str) -> None:
    """In the run's folder, which resume=never puts aside."""
    write_atomically(run_dir / f"{logger}_run", f"{run_id}\n")


def _take_rows(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """The lines of a table by step; the file is removed."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [{name: value for name, value in row.items() if name and value} for row in DictReader(lines)]
    file.unlink()
    return [
        (int(row.pop("step")), {name: float(value) for name, value in row.items()}) for row in rows if "step" in row
    ]
