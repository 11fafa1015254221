"""Variables of another launcher: dropped where one process meets nobody, else refused with the line to type."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import pytest

from lorafair.cluster import leftovers
from lorafair.cluster.leftovers import without_leftovers
from lorafair.cluster.placement import detect, processes_started, without_launch
from lorafair.config.schema import FabricConfig
from lorafair.errors import ConfigError
from tests.cluster.test_placement import BATCH, COMMAND, step

ALONE, TWO = FabricConfig(devices=1, accelerator="cpu"), FabricConfig(devices=2, accelerator="cpu")
LEFT = {"MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "29500"}
OF_TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
}


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "has_ended", lambda job: False)


def cleaned(environ: Mapping[str, str], config: FabricConfig) -> dict[str, str]:
    return without_leftovers({"HOME": "/root", **environ}, config, COMMAND)


EACH: list[dict[str, str]] = [
    {"MASTER_ADDR": "10.255.255.1"},
    {"MASTER_PORT": "29500"},
    {"NODE_RANK": "1"},
    {"GROUP_RANK": "1"},
    {"LOCAL_RANK": "1"},
    {"LOCAL_RANK": "x"},
    {"RANK": "3"},
    {"WORLD_SIZE": "4"},
    {"TORCHELASTIC_RUN_ID": "none"},
    {**OF_TORCHRUN, "WORLD_SIZE": "", **LEFT},
]


@pytest.mark.parametrize("environ", EACH, ids=lambda environ: next(iter(environ)))
def test_each_is_dropped_where_one_process_meets_nobody_and_refused_by_name_otherwise(environ: dict[str, str]) -> None:
    rest = cleaned(environ, ALONE)
    assert rest == {"HOME": "/root"}
    found = detect(rest, ALONE, COMMAND)
    assert (found.launcher, found.rank, found.is_child) == ("local", 0, False)
    assert cleaned(environ, FabricConfig(accelerator="cpu")) == rest  # one process is the default on the CPU

    with pytest.raises(ConfigError, match="left over from another launcher") as caught:
        cleaned(environ, TWO)
    line = str(caught.value)
    assert "\n" not in line
    for name, value in environ.items():
        assert f"{name}={value}" in line
        assert f"-u {name} " in line
    assert line.endswith(" python train.py conf/demo.yaml; or use fabric.devices=1")


def test_without_them_nothing_is_dropped() -> None:
    environ = {"HOME": "/root", "SLURM_CONF": "/etc/slurm.conf", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert without_leftovers(environ, TWO, COMMAND) == environ


def test_a_process_that_another_one_of_the_run_has_started_keeps_its_place() -> None:
    environ = {"LORAFAIR_STARTED_BY": str(os.getppid()), "LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0", **LEFT}
    assert cleaned(environ, TWO).items() >= environ.items()
    assert "LOCAL_RANK" not in cleaned(environ | {"LORAFAIR_STARTED_BY": "1000000"}, ALONE)
    assert without_launch(environ) == {}


def test_torchrun_is_believed_unless_it_does_not_answer() -> None:
    assert cleaned(OF_TORCHRUN | LEFT, TWO).items() >= OF_TORCHRUN.items()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        held = OF_TORCHRUN | {
            "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        assert cleaned(held, TWO).items() >= OF_TORCHRUN.items()
    assert cleaned(held, ALONE) == {"HOME": "/root"}
    with pytest.raises(ConfigError, match=r"TORCHELASTIC_RUN_ID=none.*left over"):
        cleaned(held, TWO)


def test_in_a_slurm_step_ranks_are_slurms_and_the_address_has_to_be_that_of_process_0() -> None:
    of_step = step("1(x2)", RANK="7", LOCAL_RANK="7", WORLD_SIZE="9", PMI_SIZE="2")
    rest = cleaned(of_step, FabricConfig())
    assert of_step.keys() - rest.keys() == {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    assert detect(rest, FabricConfig(), COMMAND).rank == 0
    here = cleaned(of_step | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, FabricConfig())
    assert (here["MASTER_ADDR"], here["MASTER_PORT"]) == ("127.0.0.1", "29500")
    for address, port, message in (
        ("192.0.2.1", "29500", "MASTER_ADDR=192.0.2.1 is no address of .*, where process 0 is.*env -u MASTER_ADDR "),
        ("no-such-host.invalid", "1", "MASTER_ADDR=no-such-host.invalid is no host.*env -u MASTER_ADDR "),
        ("127.0.0.1", "port", "MASTER_PORT=port is no port.*env -u MASTER_PORT "),
    ):
        with pytest.raises(ConfigError, match=message):
            cleaned(of_step | {"MASTER_ADDR": address, "MASTER_PORT": port}, FabricConfig())
    # Process 0 says it; the others cannot know.
    assert "MASTER_ADDR" in cleaned(of_step | {"SLURM_PROCID": "1", "MASTER_ADDR": "192.0.2.1"}, FabricConfig())


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NODE_RANK": "2", **LEFT}, "NODE_RANK=2: with fabric.num_nodes=2 the nodes are 0 to 1"),
        ({"NODE_RANK": "1"}, "MASTER_ADDR and MASTER_PORT not set"),
        ({"NODE_RANK": "1", **LEFT, "RANK": "1"}, "^RANK=1: left over.*env -u RANK python"),
        ({"NODE_RANK": "0", **LEFT, "MASTER_ADDR": "192.0.2.1"}, "MASTER_ADDR=192.0.2.1 is no address of"),
    ],
)
def test_a_command_on_each_node_needs_a_number_and_an_address(environ: dict[str, str], message: str) -> None:
    config = FabricConfig(devices=1, num_nodes=2, accelerator="cpu")
    with pytest.raises(ConfigError, match=message):
        cleaned(environ, config)
    assert cleaned({"NODE_RANK": "1", **LEFT}, config).items() >= LEFT.items()


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_two_processes_of_mpirun_are_not_two_runs(name: str) -> None:
    for config in (ALONE, TWO):
        with pytest.raises(
            ConfigError, match=f"mpirun is not supported.*fabric.devices=2.*env -u {name} python"
        ) as caught:
            detect({name: "2"}, config, COMMAND)
        assert "\n" not in str(caught.value)
    assert processes_started({name: "2"}) == 2
    for alone in ("1", "", "x"):
        assert detect({name: alone, "PMI_RANK": "0", "OMPI_COMM_WORLD_RANK": "0"}, TWO, COMMAND).launcher == "local"
        assert processes_started({name: alone}) == 1


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "3"},
        {"TORCHELASTIC_RUN_ID": "none"},
    ],
)
def test_a_part_of_a_launch_is_no_launch(environ: dict[str, str]) -> None:
    assert processes_started(environ) == 1
    assert detect(cleaned(environ, ALONE), ALONE, COMMAND).launcher == "local"


def test_variables_of_a_job_that_has_ended_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {**BATCH, "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_CONF": "/etc/slurm.conf"}
    with pytest.raises(
        ConfigError, match=r"has 4 tasks on 2 nodes.*env -u SLURM_JOB_ID python train.py conf/demo.yaml$"
    ):
        detect(cleaned(job, ALONE), ALONE, COMMAND)
    asked: list[Any] = []
    monkeypatch.setattr(leftovers, "has_ended", lambda job: asked.append(job.name) or True)
    assert cleaned(job, ALONE) == {"HOME": "/root", "SLURM_CONF": "/etc/slurm.conf"}
    assert cleaned(job, TWO) == {"HOME": "/root", "SLURM_CONF": "/etc/slurm.conf"}
    assert cleaned(step("1(x2)", rank=1), FabricConfig())["SLURM_JOB_ID"] == "12"
    assert asked == ["12", "12"]  # process 0 asks
