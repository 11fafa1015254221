"""The command: YAML files and key=value pairs in, a run directory out.

    train.py [FILE.yaml ...] [key=value ...]      run, or continue, a federation
    train.py [FILE.yaml ...] [key=value ...]      the same where a file has a compare: section: run, or continue, a
                                                  comparison of methods and report it (README.md, "Compare methods")
        --list       all its runs with index, options and state, and nothing else
        --index N    only run N (for a job array); no report
        --tune       only the tuning runs
        --report     only the report, from what is done
    train.py prepare [FILE.yaml ...] [key=value ...]    only fetch and build what a run, or all runs of a comparison,
                                                  need; for a login node with network
    train.py --doctor [FILE.yaml ...] [key=value ...]   what the processes find on their nodes, how fast their
                                                  collectives are and what would go wrong; under srun
    train.py slurm [FILE.yaml ...] [key=value ...]      the batch script for exactly this run or comparison on Slurm: on
                                                  the console, with --out=FILE there, or with --submit handed to sbatch;
        --account= --partition= --qos= --constraint= --time= --gpus-per-node= --cpus-per-task= --mem= as sbatch has,
        --throttle=N tasks of a comparison at a time, --setup='module load x' (may be repeated) before it starts
    train.py export RUN_DIR OUT_DIR [--peft]      the trained model for timm alone, or as a PEFT adapter
    train.py --help                               every option with its default

Nothing heavy is imported before the configuration is known to be right.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any, NoReturn

from lorafair import __version__
from lorafair.cluster import Job, Placement, detect, requeue, seconds_left, slurm_job, state_of_job
from lorafair.comparison import Comparison, list_runs, load_comparison
from lorafair.config import Config, ConfigError, FabricConfig, describe_options, load_config
from lorafair.errors import LorafairError
from lorafair.interruption import (
    FAILED,
    INTERRUPTED,
    SAVED,
    SCHEDULER_SIGNALS,
    Interrupted,
    expect_end_in,
    listen_only_to,
    listening,
)
from lorafair.submission import batch_of, batch_script, submit, take_options, write_script
from lorafair.watchdog import CONTINUES, start_watch, stop_watch

SECONDS_UNTIL_KILLED = 120.0
SECONDS_FOR_THE_REASON = 1.0  # srun -K ends all processes of a step once one has left with an error
PARTS = ("--list", "--index", "--tune", "--report")


@dataclass(frozen=True)
class Part:
    """Which part of a comparison to do."""

    flag: str = ""  # one of PARTS; empty: all of it
    index: int | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status.

    0: done. 2: a mistake of the user's, or an end that is no accident. 75: stopped by the scheduler with all that is
    done saved, the same command continues. 130: stopped by Ctrl-C. 1: anything else.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
    try:
        return command(arguments)
    except LorafairError as error:
        if os.environ.get("SLURM_PROCID", "0") != "0":  # mostly process 0 finds the same, and once is enough
            time.sleep(SECONDS_FOR_THE_REASON)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues after the last checkpoint", file=sys.stderr, flush=True)
        return INTERRUPTED
    except Exception as error:  # only here: whoever fails says so in one last line
        return fail(error)
    finally:
        stop_watch()


def entry() -> NoReturn:
    """The process of the command: `main`, and its exit status."""
    status = main()
    for name in SCHEDULER_SIGNALS:  # a signal that comes while Python takes itself down must not fail what is done
        signal.signal(signal.Signals[f"SIG{name}"], signal.SIG_IGN)
    # A collective that a lost process has left open, or a worker process that hangs, keeps Python from ending.
    if status in (FAILED, INTERRUPTED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def fail(error: Exception) -> int:
    """Say what has ended this process: that another one is gone in a line, all else with its traceback."""
    from lorafair.exchange import is_loss

    what = " ".join(f"{type(error).__name__}: {error}".split())
    if is_loss(error):
        time.sleep(SECONDS_FOR_THE_REASON)  # until the process that has failed is known to be gone
        lost = stop_watch() or "another process of the run is gone or has not answered for fabric.timeout_minutes"
        what = f"{lost} ({what[:200]})"
    else:
        traceback.print_exception(error)
    print(f"error: {who()}: {what}; {CONTINUES}", file=sys.stderr, flush=True)
    return FAILED


def who() -> str:
    """This process, for messages."""
    rank = next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0")
    return f"process {rank} on {socket.gethostname()}"


def command(arguments: list[str]) -> int:
    """Do what the arguments say; returns the exit status. Raises LorafairError."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print_help()
        return 0
    if arguments[:1] == ["export"]:
        export(arguments[1:])
        return 0
    if arguments[:1] == ["prepare"]:
        prepare(arguments[1:])
        return 0
    if arguments[:1] == ["slurm"]:
        slurm(arguments[1:])
        return 0
    if "--doctor" in arguments:
        return doctor([argument for argument in arguments if argument != "--doctor"])
    part, arguments = take_part(arguments)
    with listening() if part.flag not in ("--list", "--report") else nullcontext():
        comparison = load_comparison(arguments)
        if comparison is not None:
            return compare(comparison, part)
        if part.flag:
            raise ConfigError(f"{part.flag} is for a comparison, and none of the files has a compare: section")
        return train(load_config(arguments))


def train(config: Config) -> int:
    """Check what can be checked without data, launch the processes and run the federation on each."""
    placement = place(config.fabric)
    check(config)

    from lorafair.federation import run_federation

    fabric = launch(config.fabric, placement, f"run directory {config.folder}")
    return until_stopped(fabric, config.fabric, placement, lambda: run_federation(fabric, config))


def check(config: Config) -> None:
    """Find the mistakes in a run's method and model. Raises ConfigError."""
    from lorafair.aggregation import method_of

    method_of(config)

    from lorafair.models import check_model

    check_model(config.model)


def take_part(arguments: Sequence[str]) -> tuple[Part, list[str]]:
    """The part of a comparison that is asked for, and the other arguments. Raises ConfigError."""
    parts, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if flag not in PARTS:
            rest.append(argument)
        elif flag == "--index":
            text = value if equals else next(remaining, "")
            if not (text.isascii() and text.isdecimal()):
                raise ConfigError(f"--index {text}: give the number of a run, as --list shows them")
            parts.append(Part(flag, int(text)))
        elif equals:
            raise ConfigError(f"{argument}: {flag} takes no value")
        else:
            parts.append(Part(flag))
    if len(parts) > 1:
        raise ConfigError(f"{' and '.join(part.flag for part in parts)}: give one of them")
    return (parts[0] if parts else Part()), rest


def compare(comparison: Comparison, part: Part) -> int:
    """Do the part of a comparison that is asked for, or all of it; returns the exit status."""
    if part.index is not None and part.index >= len(comparison.runs):
        raise ConfigError(f"--index {part.index}: the runs are 0 to {len(comparison.runs) - 1}; --list shows them")
    if part.flag == "--tune" and comparison.tuning is None:
        raise ConfigError("--tune: there is no compare.tune in the file, so there is nothing to tune")
    if part.flag == "--list":
        print(list_runs(comparison))
        return 0
    if part.flag == "--report":
        from lorafair.comparison_report import write_report

        write_report(comparison)
        return 0
    fabric_config = next(iter(comparison.configs.values())).fabric
    placement = place(fabric_config)

    from lorafair.comparison_run import check_runs, run_comparison

    check_runs(comparison)
    what = f"{len(comparison.runs)} runs" if part.index is None else f"run {part.index} of {len(comparison.runs)}"
    fabric = launch(fabric_config, placement, f"{what} in {comparison.folder}")
    only_tuning = part.flag == "--tune"
    return until_stopped(
        fabric,
        fabric_config,
        placement,
        lambda: run_comparison(fabric, comparison, index=part.index, only_tuning=only_tuning),
    )


def place(config: FabricConfig) -> Placement:
    """Find out where this process runs and say so, before anything heavy is imported. Raises ConfigError."""
    listen_only_to(config.signals)
    placement = detect(os.environ, config, [sys.executable, *sys.argv])
    if placement.rank == 0 and not is_child(placement):
        print(f"lorafair {__version__}: {placement.what}", flush=True)
    return placement


def is_child(placement: Placement) -> bool:
    """Whether another process of ours has started this one."""
    return placement.launcher == "own" and os.environ.get("LOCAL_RANK", "0") != "0"


def launch(config: FabricConfig, placement: Placement, what: str) -> Any:
    """Start the processes, say on what they run, and return their Fabric."""
    from lorafair.exchange import children_of, keep_freed_memory, make_fabric, meet, set_threads
    from lorafair.tracking import say

    fabric = make_fabric(config, placement)
    threads = set_threads(fabric, config.threads)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    meet(fabric, config, start_watch(who(), children_of(fabric), is_child=is_child(placement)))
    job, left = slurm_job(os.environ), None
    if fabric.is_global_zero:
        say(
            f"lorafair {__version__}: {fabric.world_size} processes on {fabric.device.type}, {threads} threads each, "
            f"{config.precision}; {what}"
        )
        left = seconds_left(job) if job is not None else None
    expect_end_in(fabric.broadcast(left))
    return fabric


def until_stopped(fabric: Any, config: FabricConfig, placement: Placement, work: Callable[[], None]) -> int:
    """Do the work; if it was stopped, see to it that the job runs again; returns the exit status, on every rank."""
    from lorafair.exchange import close

    try:
        work()
        close(fabric)
    except Interrupted as stop:
        status = None
        if fabric.is_global_zero:
            status, line = after_stop(stop, slurm_job(os.environ), config.max_requeues)
            print(f"{stop}; {line}", flush=True)
        status = fabric.broadcast(status)  # the others stay: srun ends all processes once one has left with an error
        close(fabric)
        # The process that has started this one tells; to it this one has not failed.
        return 0 if is_child(placement) else int(status)
    except SystemExit:  # rank 0 tells why
        if is_child(placement):
            return 0
        time.sleep(SECONDS_FOR_THE_REASON)
        raise
    return 0


def after_stop(stop: Interrupted, job: Job | None, max_requeues: int) -> tuple[int, str]:
    """Have the job requeued where that is due; returns the exit status and what to say."""
    if stop.reason == SIGINT:
        return INTERRUPTED, "the same command continues"
    if job is None:
        return SAVED, "the same command continues"
    state, why = state_of_job(job)
    # A job that was cancelled, and one that Slurm requeues by itself, are COMPLETING, too: a requeue would revive it.
    if state and state != "RUNNING" and (state, why) != ("COMPLETING", "TimeLimit"):
        return SAVED, f"Slurm ends job {job.name} ({state}) by itself; the same command continues"
    if job.restarts >= max_requeues:
        return FAILED, (
            f"job {job.name} was requeued {job.restarts} times, and fabric.max_requeues={max_requeues} ends that; the "
            "same command continues"
        )
    problem = requeue(job)
    if not problem:
        return SAVED, f"job {job.name} is requeued and continues"
    if stop.reason == SIGTERM:  # Slurm is about to end the job; only a preempted one that lasts until then is requeued
        print(f"{stop}; scontrol cannot requeue job {job.name} ({problem}); waiting for Slurm to end it", flush=True)
        time.sleep(SECONDS_UNTIL_KILLED)
    return SAVED, f"job {job.name} could not be requeued ({problem}); the same command continues"


def prepare(arguments: Sequence[str]) -> None:
    """Fetch and build what the run, or all runs of a comparison, need."""
    comparison = load_comparison(arguments)
    configs = [load_config(arguments)] if comparison is None else list(comparison.configs.values())

    from lorafair import preparation

    preparation.prepare(configs)


def slurm(arguments: Sequence[str]) -> None:
    """Print, write or submit the batch script of the run or comparison, once all of it is known to be right."""
    options, arguments = take_options(arguments)
    work = load_comparison(arguments) or load_config(arguments)
    batch = batch_of(work, arguments, options)
    if isinstance(work, Config):
        check(work)
    else:
        from lorafair.comparison_run import check_runs

        check_runs(work)
    file = Path(options.out) if options.out else batch.logs / "job.sbatch" if options.submit else None
    script = batch_script(batch, options, beside=file.parent if file else Path())
    if file is None:
        print(script, end="")
        print("this is a dry run; --out=FILE writes the script, --submit hands it to sbatch", file=sys.stderr)
        return
    write_script(script, file)
    if not options.submit:
        print(f"written: {file}", file=sys.stderr)
        return
    for job in submit(batch, file, os.environ):
        print(f"job {job}: {file}; its processes write {batch.logs}/{batch.folder.name}-{job}*-rank<n>.log")
    print(f"curves: tensorboard --logdir {batch.folder}")


def doctor(arguments: Sequence[str]) -> int:
    """Examine the processes as a run would start them; returns 0, or 1 if a run would not work."""
    comparison = load_comparison(arguments)
    config = load_config(arguments) if comparison is None else next(iter(comparison.configs.values()))
    placement = place(config.fabric)

    from lorafair.doctor import examine
    from lorafair.exchange import close

    fabric = launch(config.fabric, placement, "examination")
    healthy = examine(fabric, config)
    close(fabric)
    return 0 if healthy or is_child(placement) else 1


def export(arguments: Sequence[str]) -> None:
    """Write the trained model of a run into a folder and print how to load it."""
    folders = [argument for argument in arguments if argument != "--peft"]
    if len(folders) != 2 or any(folder.startswith("-") for folder in folders):
        raise LorafairError("usage: train.py export RUN_DIR OUT_DIR [--peft]")

    from lorafair.export import export_run

    print(export_run(Path(folders[0]), Path(folders[1]), peft="--peft" in arguments))


def print_help() -> None:
    """Print every option with its default and meaning."""
    from lorafair.aggregation import AGGREGATORS

    print(__doc__)
    print("Options (give them as key=value, or nested in a YAML file); an empty default means: see the text\n")
    for key, default, text in describe_options():
        _print_option(key, default, text)
    for name, aggregator in AGGREGATORS.items():
        print(f"Options of method.name={name}: {(aggregator.__doc__ or '').strip().splitlines()[0]}\n")
        for field, default, text in describe_options(aggregator, "method."):
            _print_option(field, default, text)


def _print_option(key: str, default: str, text: str) -> None:
    print(f"  {key}={default}")
    print(textwrap.fill(text, 110, initial_indent="      ", subsequent_indent="      "))
    print()


if __name__ == "__main__":
    entry()
