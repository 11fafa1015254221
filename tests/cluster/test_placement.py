"""Where a process finds itself, from variables as Slurm 22.05 sets them: each case works or names the line to type."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from lorafair.cluster.placement import detect, first_host, port_of, processes_started, tasks_of_nodes, without_launch
from lorafair.cluster.slurm import Job, parse_time_left, requeue, slurm_job
from lorafair.config.schema import FabricConfig
from lorafair.errors import ConfigError

COMMAND = ("python", "train.py", "conf/demo.yaml")
JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NAME": "lorafair",
    "SLURM_JOB_NODELIST": "cn[01-02]",
    "SLURM_JOB_NUM_NODES": "2",
}
BATCH = {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "cn[01-02]"}


def step(
    tasks: str, nodes: str = "cn[01-02]", rank: int = 0, local: int = 0, node: int = 0, **others: str
) -> dict[str, str]:
    """What srun sets for a task of a step with `tasks` (as in 2(x2),1) on these nodes."""
    counts = tasks_of_nodes(tasks)
    return {
        **JOB,
        "SLURM_NODELIST": "cn[01-02]",  # the job's, also where the step has other nodes
        "SLURM_NTASKS": str(sum(counts)),
        "SLURM_TASKS_PER_NODE": tasks,
        "SLURM_STEP_ID": "3",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_NUM_NODES": str(len(counts)),
        "SLURM_STEP_NUM_TASKS": str(sum(counts)),
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
        **others,
    }


@pytest.mark.parametrize("name", ["lorafair", "bash", "interactive"])
@pytest.mark.parametrize("ntasks_per_node", [{}, {"SLURM_NTASKS_PER_NODE": "2"}])
def test_a_step_says_everything_whatever_the_job_is_called(name: str, ntasks_per_node: Mapping[str, str]) -> None:
    environ = step("2(x2)", rank=3, local=1, node=1, SLURM_JOB_NAME=name, **ntasks_per_node)
    found = detect(environ, FabricConfig(), COMMAND)
    assert (found.launcher, found.devices, found.num_nodes) == ("slurm", 2, 2)
    assert (found.rank, found.local_rank, found.node_rank) == (3, 1, 1)
    assert (found.address, found.port) == ("cn01", port_of(12, 3))
    assert found.description == (
        f"Slurm job 12, step 3: srun has started 2 on each of 2 nodes (cn[01-02]); rendezvous at cn01:{found.port}"
    )


def test_a_step_on_part_of_an_allocation_meets_on_a_node_of_its_own() -> None:
    found = detect(step("2", nodes="cn02", SLURM_NTASKS_PER_NODE="4"), FabricConfig(), COMMAND)
    assert (found.address, found.devices, found.num_nodes) == ("cn02", 2, 1)


def test_what_the_user_has_set_stays() -> None:
    environ = step("1(x2)", MASTER_ADDR="cn01-ib", MASTER_PORT="29500")
    found = detect(environ, FabricConfig(devices=1, num_nodes=2), COMMAND)
    assert (found.address, found.port) == ("cn01-ib", 29500)


def test_ports_differ_between_steps_and_jobs_and_stay_below_those_of_outgoing_connections() -> None:
    assert len({port_of(job, number) for job in range(1000, 1020) for number in range(20)}) == 400
    assert port_of(15, 0) != port_of(10015, 0)
    ports = [port_of(job, number) for job in (1, 4711, 67_043_327) for number in (0, 1, 5000)]
    assert all(1024 < port < 32768 for port in ports)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0"},  # started by Lightning
        step("1", nodes="cn01", SLURM_JOB_NAME="bash"),  # srun --pty bash
        {**BATCH, "SLURM_JOB_NUM_NODES": "1", "SLURM_TASKS_PER_NODE": "1"},  # sbatch without a number of tasks
        # sbatch inside of a job, or of a step, of two tasks: their variables are left over
        {**BATCH, "SLURM_JOB_NUM_NODES": "1", "SLURM_TASKS_PER_NODE": "1", "SLURM_NTASKS": "2"},
        {**step("2", nodes="cn01"), "SLURM_JOB_NUM_NODES": "1", "SLURM_TASKS_PER_NODE": "1"},
    ],
    ids=["no Slurm", "child", "srun --pty bash", "batch", "batch in a job", "batch in a step"],
)
def test_alone_on_a_node_it_starts_its_own_processes(environ: Mapping[str, str]) -> None:
    found = detect(environ, FabricConfig(devices=2), COMMAND)
    assert (found.launcher, found.devices, found.num_nodes, found.rank) == (
        "local",
        2,
        1,
        int(environ.get("LOCAL_RANK", "0")),
    )
    assert found.is_child == ("LOCAL_RANK" in environ)


def test_torchrun_goes_before_srun() -> None:
    environ = step("1(x2)", TORCHELASTIC_RUN_ID="x", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
    found = detect(environ, FabricConfig(), COMMAND)
    assert (found.launcher, found.devices, found.num_nodes) == ("torchrun", 2, 2)


SRUN = "srun --kill-on-bad-exit=1 python train.py conf/demo.yaml"


@pytest.mark.parametrize(
    ("environ", "config", "message"),
    [
        (
            {**BATCH, "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_TASKS_PER_NODE": "2(x2)"},
            FabricConfig(),
            "Slurm job 12 has 4 tasks on 2 nodes, and this is its batch script or shell, without srun: nothing would "
            f"start the other processes; type: {SRUN}",
        ),
        (  # the shell of salloc, in a step of its own
            {
                **step("1", nodes="cn01"),
                "SLURM_STEP_ID": "4294967290",
                "SLURM_NTASKS": "4",
                "SLURM_TASKS_PER_NODE": "4",
            },
            FabricConfig(),
            f"4 tasks on 2 nodes, and this is its batch script or shell, without srun.*; type: {SRUN}",
        ),
        ({**JOB, "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "1(x2)"}, FabricConfig(), f"without srun.*{SRUN}"),
        (
            step("2,1"),
            FabricConfig(),
            "Slurm has put 2,1 tasks on 2 nodes, and every node needs as many; type: srun --kill-on-bad-exit=1 "
            "--nodes=2 --ntasks=2 --ntasks-per-node=1 python train.py conf/demo.yaml",
        ),
        (
            step("2", nodes="cn01", CUDA_VISIBLE_DEVICES="1"),
            FabricConfig(),
            "each of the 2 tasks of a node sees 1 GPU.*instead of --gpus-per-task; in this job type: "
            "env -u SLURM_GPUS_PER_TASK srun --kill-on-bad-exit=1 --gpus-per-node=2 python train.py conf/demo.yaml",
        ),
        (
            {},
            FabricConfig(devices=2, num_nodes=2),
            "fabric.num_nodes=2: this is one node without Slurm.*torchrun --nnodes=2 --nproc-per-node=2 .*train.py.*; "
            "or use fabric.num_nodes=1",
        ),
        (
            step("2(x2)"),
            FabricConfig(devices=1),
            "fabric.devices=1, but this Slurm step has 2 processes a node; leave fabric.devices out, or add "
            "fabric.devices=2",
        ),
        (step("2(x2)"), FabricConfig(num_nodes=1), "num_nodes=1, but this Slurm step has 2 nodes.*fabric.num_nodes=2"),
        (
            step("1", nodes="cn01"),
            FabricConfig(num_nodes=2),
            "fabric.num_nodes=2: Slurm job 12, a step of one task, has 1 node.*--nodes=2 --ntasks-per-node=1",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            FabricConfig(devices=4),
            "fabric.devices=4, but torchrun has 2 processes a node",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, FabricConfig(), f"mpirun is not supported; type: {SRUN}"),
    ],
    ids=[
        "batch",
        "salloc step",
        "salloc",
        "uneven",
        "gpus-per-task",
        "nodes without Slurm",
        "devices",
        "nodes",
        "one task",
        "torchrun",
        "mpi",
    ],
)
def test_what_would_wait_for_ever_is_refused_with_the_line_to_type(
    environ: Mapping[str, str], config: FabricConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace("--", r"\-\-")) as caught:
        detect(environ, config, COMMAND)
    assert "\n" not in str(caught.value)


def test_on_the_cpu_no_process_needs_to_see_a_gpu() -> None:
    environ = step("2", nodes="cn01", CUDA_VISIBLE_DEVICES="1")
    assert detect(environ, FabricConfig(accelerator="cpu"), COMMAND).devices == 2


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("cn01", "cn01"),
        ("cn[01-02]", "cn01"),
        ("cn[07,09-12],gpu[1-2]", "cn07"),
        ("a1,b[3-4]", "a1"),
        ("r[1-2]n[5,7]", "r1n5"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_of_nodes_in_short_form() -> None:
    assert tasks_of_nodes("2(x3),1") == [2, 2, 2, 1]


def test_a_task_of_an_array_is_not_taken_for_the_whole_array() -> None:
    array = {"SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "3"}
    assert slurm_job(array) == Job("42_1", restarts=3)
    assert slurm_job({"SLURM_JOB_ID": "42"}) == Job("42", restarts=0)
    assert slurm_job({}) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0:55", 55), ("12:00:01", 43201), ("2-00:00:00", 172800), ("UNLIMITED", None), ("INVALID", None), ("", None)],
)
def test_time_left_as_squeue_writes_it(text: str, seconds: float | None) -> None:
    assert parse_time_left(f"{text}\n") == seconds


def test_a_refused_and_a_missing_scontrol_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "scontrol" in requeue(Job("7", 0))
    script = tmp_path / "scontrol"
    script.write_text("#!/bin/sh\n/bin/kill -TERM $$ && echo Requested operation not supported for $2 && exit 1\n")
    script.chmod(0o755)
    # The signal that Slurm sends to all processes of a job at once does not end the one that reports.
    assert requeue(Job("7", 0)) == "Requested operation not supported for 7"
    script.write_text("#!/bin/sh\nexit 0\n")
    assert requeue(Job("7", 0)) == ""


def test_detection_imports_nothing_heavy() -> None:
    code = "import sys, lorafair.cli; assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("environ", "processes"),
    [
        ({}, 1),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1),  # left behind by a process group of this process
        (step("1(x2)"), 2),
        (step("1", nodes="cn01"), 1),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"}, 4),
    ],
)
def test_how_many_processes_were_started_with_this_one(environ: Mapping[str, str], processes: int) -> None:
    assert processes_started(environ) == processes


def test_a_process_that_starts_others_gets_no_place_among_those_here() -> None:
    assert without_launch({"LOCAL_RANK": "0", "MASTER_PORT": "1", "SLURM_JOB_ID": "7"}) == {"SLURM_JOB_ID": "7"}
