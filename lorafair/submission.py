"""`train.py slurm`: slurm/train.sbatch or compare.sbatch with its marked block filled in for one run; submission."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafair.comparison import Comparison
from lorafair.config import Config, ConfigError, FabricConfig
from lorafair.errors import LorafairError

CHECKOUT = Path(__file__).parent.parent
SCHEDULER = ("account", "partition", "qos", "constraint", "time", "gpus-per-node", "cpus-per-task", "mem")
OPTIONS = (*(f"--{name}=" for name in (*SCHEDULER, "throttle", "setup", "out")), "--submit")
# What a job must not inherit from one it is submitted from: sbatch and srun obey it, and `cluster.detect` reads it.
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
    throttle: str = ""  # tasks of an array at a time
    out: str = ""
    submit: bool = False


@dataclass(frozen=True)
class Batch:
    """A run or a comparison as its script sees it."""

    arguments: tuple[str, ...]  # of train.py
    folder: Path  # the run's or the comparison's, absolute
    logs: Path  # beside it: resume=never moves the run's folder aside
    fabric: FabricConfig
    arrays: tuple[str, ...]  # values of sbatch --array, each to wait for the one before; none: a single run


def take_options(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """The options, and the YAML files and pairs among the arguments. Raises ConfigError."""
    given: dict[str, list[str]] = {flag: [] for flag in OPTIONS}
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if not argument.isprintable():  # a line break would end a directive of the script
            raise ConfigError(f"{argument!r}: no line breaks and control characters, in a batch script; leave them out")
        if not flag.startswith("-"):
            continue
        if flag + equals not in OPTIONS or (equals and not value.strip()):
            near = "".join(f"did you mean {name}? " for name in difflib.get_close_matches(flag, OPTIONS, n=1))
            raise ConfigError(f"{argument} is no option of train.py slurm; {near}possible: {' '.join(OPTIONS)}")
        if given[flag + equals] and flag != "--setup":
            raise ConfigError(f"{flag} is given twice; give it once")
        given[flag + equals].append(value)
    throttle, out = "".join(given["--throttle="]), "".join(given["--out="])
    if throttle and not re.fullmatch("[1-9][0-9]*", throttle):
        raise ConfigError(f"--throttle={throttle}: give how many tasks of the array may run at a time, 1 or more")
    scheduler = {name: given[f"--{name}="][0] for name in SCHEDULER if given[f"--{name}="]}
    options = Options(scheduler, tuple(given["--setup="]), throttle, out, submit=bool(given["--submit"]))
    return options, [argument for argument in arguments if not argument.startswith("-")]


def batch_of(work: Config | Comparison, arguments: Sequence[str], options: Options) -> Batch:
    """What the script has to start for this run or comparison. Raises ConfigError."""
    folder = Path(os.path.abspath(work.folder))
    logs, arguments = folder.with_name(f"{folder.name}-slurm"), (*arguments, f"run_dir={folder}")
    if isinstance(work, Config):
        if options.throttle:
            raise ConfigError(f"--throttle={options.throttle} is for a comparison, a YAML file with a compare: section")
        return Batch(arguments, folder, logs, work.fabric, ())
    tuning, runs = len(work.runs) - len(work.final_runs), len(work.runs)
    limit = f"%{options.throttle}" if options.throttle else ""
    arrays = [f"{first}-{end - 1}{limit}" for first, end in ((0, tuning), (tuning, runs)) if first < end]
    return Batch(arguments, folder, logs, next(iter(work.configs.values())).fabric, tuple(arrays))


def batch_script(batch: Batch, options: Options, beside: Path) -> str:
    """The text of the script; what Slurm itself prints goes into the folder `beside`. Raises LorafairError."""
    template = CHECKOUT / "slurm" / f"{'compare' if batch.arrays else 'train'}.sbatch"
    text = template.read_text() if template.is_file() else ""
    parts = re.fullmatch(r"(.*\n)(# -+ edit this block -+\n).*?(\n# -{20,}\n.*)", text, re.DOTALL)
    if parts is None:
        raise SubmissionError(f"train.py slurm fills in the marked block of {template}, and there is none; clone anew")
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
    words = (sys.executable, str(CHECKOUT / "train.py"), *batch.arguments)
    return "\n".join([
        "#!/bin/bash", f"# {shlex.join(['train.py', *batch.arguments])}",
        *(f"# After the job of this script: sbatch --array={array} --dependency=afterany:<its id> <this script>"
          for array in batch.arrays[1:]),
        *(line for line in head.splitlines() if line.startswith("#SBATCH")), "",
        marker.rstrip(), *(f"#SBATCH --{name}={shlex.quote(value)}" for name, value in directives.items() if value),
        *options.setup, f"FOLDER={shlex.quote(os.getcwd())}", f"LOGS={shlex.quote(str(batch.logs))}",
        f"MAX_REQUEUES={batch.fabric.max_requeues}", "COMMAND=(", *(f"  {shlex.quote(word)}" for word in words),
        '  "fabric.devices=$SLURM_NTASKS_PER_NODE" "fabric.num_nodes=$SLURM_JOB_NUM_NODES"', ")",
    ]) + tail  # fmt: skip


def write_script(text: str, file: Path) -> None:
    """Write the script, making its folder. Raises SubmissionError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
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
