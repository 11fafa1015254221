"""What is found wrong before the processes start."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import lorafair
from lorafair.checkpointing.checkpoint import mark_begun
from lorafair.cluster.placement import detect
from lorafair.cluster.slurm import Job
from lorafair.commands.checks import check_data, check_devices, check_run
from lorafair.config.loading import load_config
from lorafair.config.schema import Config
from lorafair.data.images import DataError
from lorafair.errors import ConfigError
from lorafair.federation import run_federation
from tests.conftest import launched


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_more_processes_than_cores_are_refused(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    three, four = (
        load_config(f"fabric.accelerator={accelerator}", f"fabric.devices={devices}").fabric for devices in (3, 4)
    )
    placement = detect({}, three, ["train.py"])
    check_devices(load_config(f"fabric.accelerator={accelerator}", "fabric.devices=3"), placement)
    with pytest.raises(ConfigError, match=r"^fabric\.devices=4: this node has 3 cores .*; use fabric\.devices=3$"):
        check_devices(load_config(f"fabric.accelerator={accelerator}", "fabric.devices=4"), detect({}, four, ["x"]))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    if accelerator == "auto":  # then make_fabric compares with the GPUs
        check_devices(load_config("fabric.devices=4"), detect({}, four, ["train.py"]))


@pytest.mark.slow
def test_a_requeued_job_needs_the_checkpoint_that_it_began_from_no_more(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run may have removed it by then."""
    config = tiny("rounds=1", f"resume={tmp_path / 'other' / 'checkpoints' / 'round_000001'}")
    with pytest.raises(ConfigError, match=r"^resume=.* is not a readable checkpoint: there is no such folder"):
        check_run(config)
    run_federation(launched(1), tiny("rounds=1"))
    mark_begun(config.folder, Job("7", 0))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(ConfigError, match="is not a readable checkpoint"):
        check_run(config)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    check_run(config)


def test_a_folder_of_images_that_is_not_there_is_found_before_processes_start(tmp_path: Path) -> None:
    missing = load_config(["data.source=folder", f"data.root={tmp_path / 'images'}"])
    there = load_config(["data.source=folder", f"data.root={tmp_path}"])
    check_data(there, load_config([]))
    with pytest.raises(
        DataError, match=r"^data\.root=.*/images is not a folder that exists; data\.source=folder reads"
    ):
        check_data(there, missing)
    with pytest.raises(DataError, match=r"is not a folder that exists"):
        lorafair.run(["data.source=folder", f"data.root={tmp_path / 'images'}", f"run_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists(), "nothing is begun"
