"""A real Slurm of two virtual nodes for tests, where its scripts lie beside the checkout and root may start them."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT.parent / "shared" / "slurm-test-cluster"
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
)


@dataclass(frozen=True)
class Cluster:
    """A running cluster with the nodes cn01 and cn02; partitions main, low (preempted by the others) and high."""

    environment: Mapping[str, str]

    def run(self, *command: str | Path, check: bool = True, seconds: float = 120, **variables: str) -> str:
        """The output of a Slurm client, both streams together."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def submit(self, *arguments: str | Path, **variables: str) -> str:
        """sbatch; returns the job id."""
        return self.run("sbatch", "--parsable", *arguments, **variables).strip().partition(";")[0].splitlines()[-1]

    def state(self, job: str) -> str:
        """The job's state, e.g. RUNNING."""
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def wait(self, job: str, states: Sequence[str] = ENDED, seconds: float = 120) -> str:
        """Wait until the job is in one of these states and return it; fails with what the job was doing instead."""
        end = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < end, f"job {job} is {state} after {seconds} s, not {' or '.join(states)}"
            time.sleep(0.5)
        return state

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by key: Restarts, ExitCode, ..."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster, started for the session; a test that cannot have it is skipped with the reason."""
    if not (SCRIPTS / "start").exists():
        pytest.skip(f"needs the test cluster's scripts in {SCRIPTS}")
    if os.geteuid() != 0 and not os.environ.get("CI"):
        pytest.skip("needs root to start Slurm's daemons")
    folder = Path(f"/tmp/lorafair-slurm-{os.getpid()}")
    ours = {**os.environ, "SLURM_TEST_DIR": str(folder)}
    with (tmp_path_factory.getbasetemp().parent / "slurm-start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one start at a time installs Slurm's packages
        started = subprocess.run(
            [SCRIPTS / "start"], env=ours, capture_output=True, text=True, timeout=400, check=False
        )
    assert started.returncode == 0, f"the test cluster did not start:\n{started.stderr}"
    script = f". {folder}/env.sh && env -0"
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    environment = dict(pair.split("=", 1) for pair in found.split("\0") if "=" in pair)
    # The rendezvous port of a job follows from its id, and all clusters of this machine share one network:
    # the ids of each pytest process's cluster lie apart.
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    with (folder / "slurm.conf").open("a") as settings:
        settings.write(f"\nFirstJobId={1000 * worker + 1}\n")
    subprocess.run(["scontrol", "reconfigure"], env=environment, check=True, timeout=60)
    yield Cluster({**environment, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})
    subprocess.run([SCRIPTS / "stop", "--clean"], env=ours, capture_output=True, timeout=120, check=True)
