"""Everything a user sees of a run while it goes on and when it ends. Rank 0 only."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lorafair import __version__
from lorafair.communication.agreement import same_error_on_all_ranks
from lorafair.config.layers import VERSION_LINE
from lorafair.config.loading import to_yaml
from lorafair.config.schema import Config
from lorafair.console import clock_text, format_count, log
from lorafair.errors import LorafairError
from lorafair.evaluation import Evaluation
from lorafair.experiment import Experiment
from lorafair.files.writing import write_atomically
from lorafair.privacy.measures import Watch, unmoved_parts
from lorafair.reporting.callbacks import Callback, Callbacks, make_callback
from lorafair.reporting.introduction import introduce
from lorafair.reporting.loggers import open_loggers
from lorafair.reporting.metrics import RoundSummary, evaluation_scalars, factor_norms, round_scalars
from lorafair.reporting.pictures import LARGEST, confusion_picture
from lorafair.reporting.results import clients_text, result_text, write_result
from lorafair.reporting.run_dir import CONFIG_FILE, METRICS_FILE, RESULT_FILE, read_result, version_of
from lorafair.reporting.tags import CONFUSION
from lorafair.reporting.tracker import Tracker
from lorafair.virtual_time.record import WorkFile


class Report:
    """The lines on the console and the files in the run directory."""

    def __init__(self, experiment: Experiment, completed_rounds: int, callbacks: Sequence[Callback] = ()) -> None:
        self._experiment, config = experiment, experiment.config
        config.folder.mkdir(exist_ok=True)  # resume=never has put an earlier run aside
        write_config(config, continued=completed_rounds > 0)
        self._callbacks = Callbacks([*callbacks, *(make_callback(name) for name in config.callbacks)])
        settings, loggers = dataclasses.asdict(config), open_loggers(config)
        self._tracker = Tracker(config.folder, completed_rounds, settings, loggers, config.tensorboard)
        self._work = WorkFile(config.folder, completed_rounds)
        introduce(experiment, self._tracker.board)
        self._tracker.recall()
        self._completed = completed_rounds
        self._began: float | None = None  # of the first whole round, on the monotonic clock
        self._whole_rounds = 0
        self._watch = Watch()
        if completed_rounds:
            log.info(f"continuing after round {completed_rounds} of {config.rounds}")

    def round_started(self, round: int, *, is_whole: bool) -> None:
        """A round begins; not a whole one where some of its clients were done before."""
        if is_whole and self._began is None:
            self._began = time.monotonic()
        self._callbacks.call("on_round_start", round)

    def round_ended(self, summary: RoundSummary, totals: Mapping[str, float]) -> None:
        """Record one round and print its line; `totals` since round 1 give the pace while no whole round is done."""
        scalars = round_scalars(self._experiment, summary)
        self._tracker.scalars(scalars, summary.round)
        if summary.work is not None:
            self._work.write(summary.work)
        if self._experiment.config.tensorboard.histograms:
            for tag, norms in factor_norms(self._experiment.layout, summary.adapter).items():
                self._tracker.board.histogram(tag, norms, summary.round)
        self._completed = summary.round
        parts = [f"loss {summary.train_loss:.3f}" if summary.results.clients else "no client"]
        if summary.evaluation is not None:
            parts.append(f"accuracy {100 * summary.evaluation.mean_accuracy:.1f} %")
        parts.append(f"{sum(summary.seconds.values()):.1f} s")
        rounds = self._experiment.config.rounds
        left = clock_text(self._pace(totals) * (rounds - summary.round))
        log.info(f"round {summary.round:>{len(str(rounds))}}/{rounds}  {'  '.join(parts)}  ETA {left}")
        if summary.results.measures is not None:
            trained = self._experiment.aggregator.trains(summary.round - 1)
            still = unmoved_parts(summary.results.measures, trained, self._experiment.layout)
            for line in self._watch.lines(scalars, still):
                log.warning(line)
        for client in summary.results.dropped:
            name = self._experiment.clients[client].name
            log.warning(f"client {name} returned NaN or infinity; this round goes without it")
        if summary.evaluation is not None:
            self._callbacks.call("on_evaluation", summary.round, summary.evaluation)
        self._callbacks.call("on_round_end", summary.round, scalars)

    def finished(self, evaluation: Evaluation, totals: Mapping[str, float]) -> None:
        """Write result.json and confusion matrices; print the final table."""
        experiment, config = self._experiment, self._experiment.config
        classes = experiment.data.classes
        board = self._tracker.board
        board.draw(config.rounds)
        for index, domain in enumerate(experiment.data.domains):
            picture = confusion_picture(evaluation.confusion[index], classes, domain)
            if picture is not None:
                board.picture(CONFUSION.replace("<domain>", domain), picture, config.rounds)
        if len(classes) > LARGEST:
            log.info(
                f"no pictures of confusion matrices: {len(classes)} classes; pictures are drawn for at most {LARGEST}"
            )
        scalars = evaluation_scalars(experiment, evaluation)
        self._tracker.final({"final/accuracy": scalars["eval/accuracy"]})
        print_result(config, write_result(experiment, evaluation, totals))

    def close(self, reason: str) -> None:
        """The run ends: `reason` is "finished", or what has ended it."""
        self._tracker.close("success" if reason == "finished" else "failed")
        self._work.close()
        try:
            self._callbacks.call("on_stop", self._completed, reason)
        except LorafairError as error:  # the run is done, or another error is being raised
            log.warning(str(error))

    def _pace(self, totals: Mapping[str, float]) -> float:
        """Seconds a round takes, with all that belongs to it."""
        if self._began is None:  # only the rest of an interrupted round is done
            return totals.get("seconds", 0.0) / self._completed
        self._whole_rounds += 1
        return (time.monotonic() - self._began) / self._whole_rounds


@contextmanager
def open_report(
    experiment: Experiment, completed_rounds: int, callbacks: Sequence[Callback] = ()
) -> Iterator[Report | None]:
    """The report on rank 0, None elsewhere; callbacks get the reason of its end. Call on every rank.

    Raises LorafairError on all ranks where a logger or a callback cannot be made.
    """
    report = None
    with same_error_on_all_ranks(experiment.fabric):
        if experiment.fabric.is_global_zero:
            report = Report(experiment, completed_rounds, callbacks)
    if report is None:
        yield None
        return
    try:
        yield report
    except BaseException as error:
        try:
            report.close(str(error) or type(error).__name__)
        except Exception as closing:  # the first error is the one to raise
            if str(closing) != str(error):  # a full disk fails again
                log.warning(f"the report could not be closed: {type(closing).__name__}: {closing}")
        raise
    report.close("finished")


def write_config(config: Config, *, continued: bool) -> None:
    """Write config.yaml: every option, and the version that trained the first rounds."""
    version = (version_of(config.folder) if continued else None) or __version__
    # Atomically: jobs of a comparison read each other's.
    write_atomically(config.folder / CONFIG_FILE, f"{VERSION_LINE}{version}\n{to_yaml(config)}")


def report_finished_before(config: Config) -> None:
    """Print that a run was done before, and its table again."""
    log.info(
        f"this run was finished before, with {format_count(config.rounds, 'round')}: nothing is computed again "
        "(more rounds continue it, resume=never starts it anew)"
    )
    print_result(config, read_result(config.folder))


def print_result(config: Config, result: Mapping[str, Any]) -> None:
    """Print the final table and where everything is."""
    log.info(f"\n{result_text(result)}\n")
    if clients := clients_text(result):
        log.info(f"clients:  {clients}")
    log.info(f"results:  {config.folder / RESULT_FILE}, {config.folder / METRICS_FILE}")
    log.info(f"curves:   tensorboard --logdir {config.folder.parent}")
