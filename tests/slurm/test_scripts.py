"""The job scripts as they are shipped, on a real Slurm of two virtual nodes."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from lorafair.checkpointing.checkpoint import list_checkpoints, load_checkpoint
from lorafair.config.loading import load_config
from lorafair.federation import run_federation
from tests.conftest import TINY, launched
from tests.slurm_cluster import ROOT, Cluster

pytestmark = pytest.mark.slurm

# Long enough to be interrupted within a round, also on a quick machine.
LONG = (
    *TINY, "data.train_images=100", "data.test_images=12", "partition.scheme=iid", "partition.clients=20",
    "client.steps=200", "client.optimizer=sgd", "client.cohort=2", "fabric.devices=null",
)  # fmt: skip
TWO_NODES = ("-N2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1", "--time=10")


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """What the jobs find in their environment."""
    return {
        "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "LOGS": str(tmp_path / "logs"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"), "SBATCH_OUTPUT": str(tmp_path / "%A.out"),
    }  # fmt: skip


def wait_for(variables: dict[str, str], job: str, text: str, times: int = 1, seconds: float = 120) -> str:
    """What rank 0 of the job has printed in all its starts, once some text is in it so many times."""
    end = time.monotonic() + seconds
    while True:
        files = list(Path(variables["LOGS"]).glob(f"*-{job}-rank0.log"))
        log = files[0].read_text() if files else ""
        if log.count(text) >= times:
            return log
        assert time.monotonic() < end, f"{text!r} is not {times} times in:\n{log}"
        time.sleep(0.2)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(list_checkpoints(folder)[-1]).tensors


def test_train_is_signalled_and_ends_with_the_bits_of_one_process(
    slurm: Cluster, variables: dict[str, str], tmp_path: Path
) -> None:
    run_federation(launched(1), load_config([*LONG, "rounds=2", f"run_dir={tmp_path / 'alone'}"]))
    job = slurm.submit(*TWO_NODES, "slurm/train.sbatch", *LONG, "rounds=2", f"run_dir={tmp_path / 'job'}", **variables)
    wait_for(variables, job, "clients: 20")
    time.sleep(1.5)
    slurm.run("scancel", "--signal=USR1", job)
    wait_for(variables, job, "clients: 20", times=2)
    assert slurm.wait(job) == "COMPLETED"
    assert int(slurm.show(job)["Restarts"]) >= 1
    log = wait_for(variables, job, "mean ")
    assert "stopped by SIGUSR1 in round" in log
    assert "Traceback" not in log
    expected, found = state_of(tmp_path / "alone"), state_of(tmp_path / "job")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_compare_runs_an_array_and_skips_what_is_done(
    slurm: Cluster, variables: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "two.yaml"
    file.write_text("compare: {methods: [fedit, flora], seeds: [0]}\n")
    arguments = (*TWO_NODES, "slurm/compare.sbatch", str(file), *LONG, "rounds=1", f"run_dir={tmp_path / 'two'}")
    first = slurm.submit("--array=0", *arguments, **variables)
    assert slurm.wait(f"{first}_0") == "COMPLETED"
    both = slurm.submit("--array=0-1%2", *arguments, **variables)
    assert [slurm.wait(f"{both}_{task}") for task in (0, 1)] == ["COMPLETED"] * 2
    assert "done before" in wait_for(variables, f"{both}_0", "fedit-seed0")
    listed = slurm.run(sys.executable, "train.py", *arguments[6:], "--list", **variables)
    assert listed.count(" done ") == 2


def test_a_run_submitted_by_the_command_from_within_another_step(
    slurm: Cluster, variables: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "a run"
    said = slurm.run(
        "srun", "-n1", "--cpus-per-task=2", sys.executable, "train.py", "slurm", "conf/synthetic.yaml", "rounds=1",
        "fabric.num_nodes=2", "fabric.devices=1", f"run_dir={run_dir}", "--gpus-per-node=1", "--time=10", "--submit",
        "--setup=echo setup done", **variables,
    )  # fmt: skip
    (job,) = re.findall(r"^job (\d+)", said, re.MULTILINE)
    logs = tmp_path / "a run-slurm"
    assert slurm.wait(job) == "COMPLETED", (logs / f"slurm-a run-{job}.out").read_text()
    assert slurm.show(job)["TimeLimit"] == "00:10:00"
    assert (logs / f"slurm-a run-{job}.out").read_text() == "setup done\n"
    assert json.loads((run_dir / "result.json").read_text())["rounds"] == 1
    assert "1 on each of 2 nodes" in (logs / f"a run-{job}-rank0.log").read_text()
    assert (logs / f"a run-{job}-rank1.log").exists()


def test_doctor_examines_both_nodes(slurm: Cluster, variables: dict[str, str], tmp_path: Path) -> None:
    said = slurm.run(
        "srun", *TWO_NODES[:3], sys.executable, "train.py", "doctor", *LONG, f"run_dir={tmp_path / 'run'}",
        check=False, **variables,
    )  # fmt: skip
    assert "cn01" in said
    assert "cn02 resolves to 127.0.0.1, where other nodes do not reach it; set GLOO_SOCKET_IFNAME" in said
    assert "all-gather" in said
    assert "run_dir is not shared" not in said
