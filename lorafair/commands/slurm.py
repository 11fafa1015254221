"""Batch scripts: slurm/train.sbatch or compare.sbatch with its marked block filled in for one run, and submission."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafair.comparison.plan import Comparison
from lorafair.comparison.section import load_comparison
from lorafair.config.loading import load_config
from lorafair.config.schema import Config, FabricConfig
from lorafair.console import log, write_error, write_text
from lorafair.errors import ConfigError, LorafairError
from lorafair.files.shipped import shipped_folder

SCHEDULER = ("account", "partition", "qos", "constraint", "time", "gpus-per-node", "cpus-per-task", "mem")
# What a job must not inherit from one it is submitted from: sbatch and srun obey it, and cluster/placement.py reads it.
_OF_ANOTHER_JOB = re.compile(
    r"(SLURM_(?!CONF$|JWT$)|SBATCH_|SRUN_|PMI|OMPI_|TORCHELASTIC_).*"  # SLURM_CONF, SLURM_JWT: how to reach Slurm
    r"|MASTER_(ADDR|PORT)|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|NODE_RANK"
)


class SubmissionError(LorafairError):
    """The script cannot be written, or Slurm does not take it."""


@dataclass(frozen=True)
class Options:
    """What was asked for behind `--`."""

    scheduler: Mapping[str, str]  # for sbatch as it is; keys of SCHEDULER
    setup: tuple[str, ...] = ()  # lines of shell, before srun
    throttle: int | None = None  # tasks of an array at a time
    out: Path | None = None
    submit: bool = False


@dataclass(frozen=True)
class Batch:
    """A run or a comparison as its script sees it."""

    words: tuple[str, ...]  # the command line of a process
    folder: Path  # the run's or the comparison's, absolute
    logs: Path  # beside it: resume=never moves the run's folder aside
    fabric: FabricConfig
    arrays: tuple[str, ...]  # values of sbatch --array, each to wait for the one before; none: a single run


def slurm_command(arguments: Sequence[str], options: Options) -> None:
    """Print, write or submit the batch script of a run or comparison, once all of it is known to be right.

    Raises LorafairError.
    """
    for text in (*arguments, *options.scheduler.values(), *options.setup):
        if not text.isprintable():  # a line break would end a directive of the script
            raise ConfigError(f"{text!r}: no line breaks and control characters, in a batch script; leave them out")
    work = load_comparison(arguments) or load_config(arguments)
    batch = batch_of(work, arguments, options)

    from lorafair.commands.checks import check_comparison, check_run

    if isinstance(work, Config):
        check_run(work)
    else:
        check_comparison(work)
    file = options.out or (batch.logs / "job.sbatch" if options.submit else None)
    script = batch_script(batch, options, beside=file.parent if file else Path())
    if file is None:
        if error := write_text(sys.stdout, script):
            raise SubmissionError(f"the script cannot be written to stdout ({error.strerror}); --out=FILE names a file")
        write_error("this is a dry run; --out=FILE writes the script, --submit hands it to sbatch")
        return
    write_script(script, file)
    if not options.submit:
        write_error(f"written: {file}")
        return
    for job in submit(batch, file, os.environ):
        log.info(f"job {job}: {file}; its processes write {batch.logs}/{batch.folder.name}-{job}*-rank<n>.log")
    log.info(f"curves: tensorboard --logdir {batch.folder}")


def called_command() -> tuple[str, ...]:
    """The words with which the command was called, for the job: python -m lorafair, or a script such as train.py."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name.partition(".")[0] == "lorafair":
        return sys.executable, "-m", "lorafair"
    return sys.executable, os.path.abspath(sys.argv[0])


def batch_of(work: Config | Comparison, arguments: Sequence[str], options: Options) -> Batch:
    """What the script has to start for this run or comparison. Raises ConfigError."""
    folder = Path(os.path.abspath(work.folder))
    logs, subcommand = folder.with_name(f"{folder.name}-slurm"), "run" if isinstance(work, Config) else "compare"
    words = (*called_command(), subcommand, *arguments, f"run_dir={folder}")
    if isinstance(work, Config):
        if options.throttle:
            raise ConfigError(f"--throttle={options.throttle} is for a comparison, a YAML file with a compare: section")
        return Batch(words, folder, logs, work.fabric, ())
    tuning, runs = len(work.runs) - len(work.final_runs), len(work.runs)
    limit = f"%{options.throttle}" if options.throttle else ""
    arrays = [f"{first}-{end - 1}{limit}" for first, end in ((0, tuning), (tuning, runs)) if first < end]
    return Batch(words, folder, logs, next(iter(work.configs.values())).fabric, tuple(arrays))


def batch_script(batch: Batch, options: Options, beside: Path) -> str:
    """The text of the script; what Slurm itself prints goes into the folder `beside`. Raises LorafairError."""
    template = shipped_folder("slurm") / f"{'compare' if batch.arrays else 'train'}.sbatch"
    text = template.read_text(encoding="utf-8") if template.is_file() else ""
    parts = re.fullmatch(r"(.*\n)(# -+ edit this block -+\n).*?(\n# -{20,}\n.*)", text, re.DOTALL)
    if parts is None:
        raise SubmissionError(f"the marked block of {template} is filled in, and there is none; install lorafair anew")
    head, marker, tail = parts.groups()
    output = Path(os.path.abspath(beside), f"slurm-%x-{'%A_%a' if batch.arrays else '%j'}.out")
    if set("%\\") & set(folders := f"{output.parent} {batch.logs}"):
        raise ConfigError(f"{folders}: Slurm would replace % and \\ in them; choose another --out or run_dir")
    devices = str(batch.fabric.devices or 1)
    directives = {
        "job-name": batch.folder.name, "nodes": str(batch.fabric.num_nodes or 1), "ntasks-per-node": devices,
        "gpus-per-node": "" if batch.fabric.accelerator == "cpu" else devices,
        "cpus-per-task": str(batch.fabric.threads or ""), "time": "04:00:00", **options.scheduler,
        "array": "".join(batch.arrays[:1]), "output": str(output),
    }  # fmt: skip
    return "\n".join([
        "#!/bin/bash", f"# {shlex.join(batch.words)}",
        *(f"# After the job of this script: sbatch --array={array} --dependency=afterany:<its id> <this script>"
          for array in batch.arrays[1:]),
        *(line for line in head.splitlines() if line.startswith("#SBATCH")), "",
        marker.rstrip(), *(f"#SBATCH --{name}={shlex.quote(value)}" for name, value in directives.items() if value),
        *options.setup, f"FOLDER={shlex.quote(os.getcwd())}", f"LOGS={shlex.quote(str(batch.logs))}",
        f"MAX_REQUEUES={batch.fabric.max_requeues}", "COMMAND=(", *(f"  {shlex.quote(word)}" for word in batch.words),
        '  "fabric.devices=$SLURM_NTASKS_PER_NODE" "fabric.num_nodes=$SLURM_JOB_NUM_NODES"', ")",
    ]) + tail  # fmt: skip


def write_script(text: str, file: Path) -> None:
    """Write the script, making its folder. Raises SubmissionError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SubmissionError(f"--out={file}: {error.strerror}; choose another place") from error


def submit(batch: Batch, script: Path, environ: Mapping[str, str]) -> list[str]:
    """Hand the script to sbatch, a comparison's tuning before the rest; returns the job ids. Raises SubmissionError."""
    own = {name: value for name, value in environ.items() if not _OF_ANOTHER_JOB.fullmatch(name)}
    jobs: list[str] = []
    for array in batch.arrays or ("",):
        later = [f"--array={array}", f"--dependency=afterany:{jobs[0]}"] if jobs else []  # the first is in the script
        so_far = f"; job {jobs[-1]}, which tunes, is submitted" if jobs else ""
        try:
            done = subprocess.run(["sbatch", "--parsable", *later, str(script)], env=own, capture_output=True)
        except OSError as error:
            raise SubmissionError(f"sbatch cannot be run ({error}); submit {script} where Slurm is{so_far}") from error
        if done.returncode or not done.stdout.strip():
            said = " ".join(done.stderr.decode(errors="replace").split())
            raise SubmissionError(f"sbatch does not take {script}: {said}{so_far}")
        jobs.append(done.stdout.decode().split()[-1].partition(";")[0])
    return jobs
