"""Runs on a real Slurm of two virtual nodes. Importing torch dominates, so there are few jobs with many checks each."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorafair import __version__
from lorafair.checkpointing.checkpoint import list_checkpoints, load_checkpoint
from lorafair.cli import main
from tests.slurm_cluster import ROOT, Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cache")]

# Eight clients that take about half a second each: time enough to stop within a round, also on a quick machine.
RUN = (
    "conf/synthetic.yaml", "partition.scheme=iid", "partition.clients=8", "client.steps=450", "rounds=3",
    "data.test_images=24",
)  # fmt: skip
TRAINING = r"tokens of the \d+ frozen blocks"  # the line before the first round


@dataclass
class Submitted:
    """A job with what it has printed so far."""

    cluster: Cluster
    id: str
    log: Path

    def wait_for(self, pattern: str, starts: int = 1, seconds: float = 120) -> str:
        """The log once the pattern is in it, in the part after this many starts of the script."""
        end = time.monotonic() + seconds
        while True:
            text = self.log.read_text() if self.log.exists() else ""
            parts = text.split("script starts\n")
            if len(parts) > starts and re.search(pattern, parts[starts]):
                return text
            assert time.monotonic() < end, f"no {pattern!r} after start {starts} of job {self.id}:\n{text}"
            time.sleep(0.2)

    def ends(self, state: str, seconds: float = 150) -> str:
        """The log of the job, which must end in this state."""
        found = self.cluster.wait(self.id, seconds=seconds)
        assert found == state, self.log.read_text()
        return self.log.read_text()


@pytest.fixture
def submit(slurm: Cluster, tmp_path: Path) -> Callable[..., Submitted]:
    """Submit a batch script of these lines; $TRAIN is the command."""

    def submit(lines: str, *options: str) -> Submitted:
        script = tmp_path / f"job{len(list(tmp_path.iterdir()))}.sbatch"
        log = tmp_path / f"{script.stem}.log"
        script.write_text(
            "#!/bin/bash\n#SBATCH --requeue --open-mode=append\n"
            f"cd {ROOT}\necho script starts\n"
            f"TRAIN={shlex.quote(f'{sys.executable} train.py')}\n{lines}\n"
        )
        job = slurm.submit(
            "--output", log, *options, script,
            PYTHONPATH=str(ROOT), XDG_CACHE_HOME=os.environ["XDG_CACHE_HOME"], TMP_FOLDER=str(tmp_path),
        )  # fmt: skip
        return Submitted(slurm, job, log)

    return submit


def sum_of(folder: Path) -> str:
    """sha256 of the adapter that a run ended with."""
    newest = list_checkpoints(folder)[-1]
    assert newest.name == "round_000003"
    return hashlib.sha256(load_checkpoint(newest).tensors["adapter"].numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sum of the undisturbed run in one process, without Slurm."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert main([*RUN, "fabric.devices=1", f"run_dir={folder / 'run'}"]) == 0
    return sum_of(folder / "run")


def test_two_nodes_give_the_bits_of_one_process_and_bad_placements_are_refused_at_once(
    slurm: Cluster, submit: Callable[..., Submitted], tmp_path: Path, expected: str
) -> None:
    run = f"{' '.join(RUN)} fabric.devices=1"
    job = submit(
        f"""
        SECONDS=0
        $TRAIN {run}; echo "without srun: exit $?"
        srun --ntasks=3 $TRAIN {run}; echo "uneven: exit $?"
        srun $TRAIN {run} fabric.devices=3; echo "devices: exit $?"
        srun --gpus-per-task=1 $TRAIN {run} fabric.accelerator=auto fabric.devices=2; echo "gpus: exit $?"
        echo "refused in $SECONDS s"
        srun --job-name=bash --nodes=1 --ntasks=1 --nodelist=cn02 $TRAIN {run} rounds=1 run_dir=$TMP_FOLDER/part &
        srun --job-name=interactive --nodes=2 --ntasks=2 --ntasks-per-node=1 --overlap \\
            --kill-on-bad-exit=1 $TRAIN {run} run_dir=$TMP_FOLDER/run
        echo "two nodes: exit $?"; wait %1; echo "part: exit $?"
        """,
        "--nodes=2", "--ntasks-per-node=2", "--job-name=bash", "--gpus-per-node=2",
    )  # fmt: skip
    log = job.ends("COMPLETED")
    srun = rf"type: srun --kill-on-bad-exit=1 .*{sys.executable} train.py conf/synthetic.yaml"
    assert re.search(rf"has 4 tasks on 2 nodes, .* without srun.*{srun}.*\nwithout srun: exit 2", log)
    assert re.search(rf"has put 2,1 tasks on 2 nodes.*{srun}", log)
    assert "uneven: exit 2" in log
    assert "fabric.devices=3, but this Slurm step has 2 processes a node; leave fabric.devices out" in log
    assert "devices: exit 2" in log
    assert "gpus: exit 2" in log
    assert int(re.findall(r"refused in (\d+) s", log)[0]) < 60
    assert re.search(r"step \d: srun has started 1 on each of 2 nodes \(cn\[01-02\]\); rendezvous at cn01:\d+\n", log)
    assert f"lorafair {__version__}: 2 processes on cpu" in log
    assert "two nodes: exit 0\npart: exit 0" in log
    assert sum_of(tmp_path / "run") == expected


def test_a_job_that_is_signalled_preempted_requeued_and_loses_a_node_ends_with_the_same_bits(
    slurm: Cluster, submit: Callable[..., Submitted], tmp_path: Path, expected: str
) -> None:
    job = submit(
        f"srun --kill-on-bad-exit=1 $TRAIN {' '.join(RUN)} fabric.devices=1 resume=never run_dir=$TMP_FOLDER/run",
        "--nodes=2", "--ntasks-per-node=1", "--partition=low", "--exclusive",
    )  # fmt: skip
    job.wait_for(TRAINING)
    time.sleep(1)
    slurm.run("scancel", "--signal=USR1", job.id)
    log = job.wait_for("is requeued")
    found = re.findall(r"stopped by SIGUSR1 in round (\d) of 3, with (\d) of its 8 clients done", log)
    round_, done = map(int, found[0])
    job.wait_for(rf"round {round_}: {done} clients? done before" if done else TRAINING, starts=2)

    job.wait_for(rf"round {round_}/3 ", starts=2)
    slurm.run("srun", "--partition=high", "--nodes=2", "--exclusive", "true")
    job.wait_for("stopped by SIGTERM in round", starts=2)

    job.wait_for(TRAINING, starts=3)
    slurm.run("scontrol", "update", "nodename=cn02", "state=down", "reason=test")

    job.wait_for(TRAINING, starts=4)
    slurm.run("scontrol", "requeue", job.id)
    log = job.ends("COMPLETED")
    assert job.cluster.show(job.id)["Restarts"] == "4"
    assert log.count("script starts") == 5
    assert sum_of(tmp_path / "run") == expected


def test_a_killed_rank_fails_the_job_and_the_next_one_continues(
    slurm: Cluster, submit: Callable[..., Submitted], tmp_path: Path, expected: str
) -> None:
    lines = f"""
        srun --kill-on-bad-exit=1 bash -c '
            if [ $SLURM_PROCID = 1 ]; then
                (while [ ! -e $TMP_FOLDER/kill ]; do sleep 0.1; done; rm $TMP_FOLDER/kill; kill -KILL $$) &
            fi
            exec {sys.executable} train.py "$@"' x {" ".join(RUN)} fabric.devices=1 run_dir=$TMP_FOLDER/run
        """
    first = submit(lines, "--nodes=2", "--ntasks-per-node=1")
    first.wait_for("round 1/3 ")
    (tmp_path / "kill").touch()
    first.ends("FAILED", seconds=40)
    assert "1" not in {path.name for path in list_checkpoints(tmp_path / "run")}
    second = submit(lines, "--nodes=2", "--ntasks-per-node=1")
    assert re.search(r"continuing after round [1-2] of 3", second.ends("COMPLETED"))
    assert sum_of(tmp_path / "run") == expected


def test_one_task_of_an_array_is_requeued_and_the_other_is_left_alone(
    slurm: Cluster, submit: Callable[..., Submitted], tmp_path: Path
) -> None:
    file = tmp_path / "two.yaml"
    file.write_text("compare: {methods: [fedit, lora_fair], seeds: [0]}\n")
    job = submit(
        f"srun $TRAIN {' '.join(RUN)} {file} fabric.devices=1 run_dir=$TMP_FOLDER/runs --index $SLURM_ARRAY_TASK_ID",
        "--array=0-1", "--ntasks=1", f"--output={tmp_path}/%a.log",
    )  # fmt: skip
    tasks = [Submitted(slurm, f"{job.id}_{number}", tmp_path / f"{number}.log") for number in (0, 1)]
    tasks[1].wait_for("round 1/3 ")
    slurm.run("scancel", "--signal=USR1", tasks[1].id)
    assert f"job {job.id}_1 is requeued" in tasks[1].wait_for("is requeued")
    assert tasks[0].ends("COMPLETED").count("script starts") == 1
    assert tasks[1].ends("COMPLETED").count("script starts") == 2
    assert [slurm.show(task.id)["Restarts"] for task in tasks] == ["0", "1"]
    for method in ("fedit", "lora_fair"):
        assert (tmp_path / "runs" / "default" / f"{method}-seed0" / "result.json").exists()
