"""What `lorafair prepare` and `lorafair doctor` say."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import time
from pathlib import Path
from typing import Any

import pytest

from lorafair.cli import main
from lorafair.commands.doctor import RankReport, diagnose, examine
from lorafair.config.loading import load_config
from tests.conftest import TINY, run_ranks

HEALTHY = RankReport(
    host="cn01", address="10.0.0.1", gpus=2, threads=2, cores=4, node_cores=8, versions="lorafair", free={"temp": 50.0},
    clock=time.time(), sees_run_dir=True, passive=True,
)  # fmt: skip


def examined(fabric: Any, arguments: list[str]) -> tuple[bool, str]:
    """Whether a rank finds that a run would work, and what it has printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        healthy = examine(fabric, load_config(arguments))
    return healthy, printed.getvalue()


@pytest.mark.slow
def test_a_healthy_job_of_two_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    (healthy, said), (healthy_too, nothing) = run_ranks(2, examined, [*TINY, f"run_dir={folder}"])
    assert healthy
    assert healthy_too
    assert nothing == "", "rank 0 speaks for all"
    assert "free GB run_dir, cache, temp" in said
    assert "2 ranks on cpu, gloo, rank 0 at 127.0.0.1:" in said
    for collective in ("barrier", "all-gather, 0.0 MB a rank", "broadcast, 0.0 MB"):
        assert collective in said
    assert "PROBLEM" not in said
    assert not list(folder.parent.iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    ("changes", "gpus_needed", "problem", "warning"),
    [
        ({"host": "cn02", "address": "127.0.1.1"}, False, "cn02 resolves to 127.0.1.1, .* GLOO_SOCKET_IFNAME", ""),
        ({"host": "cn02", "sees_run_dir": False}, False, "run_dir is not shared: cn02 does not see", ""),
        ({"versions": "other"}, False, "the nodes have different versions: lorafair; other", ""),
        ({"gpus": 1}, True, "cn01: 2 processes and 1 GPUs; ask with --gpus-per-node", ""),
        ({"host": "cn02", "gpus": 0}, True, "cn02: 1 process and 0 GPUs; ask with --gpus-per-node", ""),
        ({"host": "cn02", "threads": 1, "cores": 1}, True, "", "one core a process; export SRUN_CPUS_PER_TASK"),
        ({"host": "cn02", "threads": 8}, False, "", "cn02: 8 threads on 4 cores; set fabric.threads"),
        ({"threads": 7, "cores": 7}, False, "", "cn01: 9 threads on 8 cores; set fabric.threads"),
        ({"host": "cn02", "free": {"temp": 0.25}}, False, "", "cn02: temp has 0.25 GB free"),
        ({"clock": HEALTHY.clock + 90}, False, "", "clocks are 90 s apart"),
        ({"passive": False}, False, "", "OMP_WAIT_POLICY is not PASSIVE"),
    ],
)
def test_what_goes_wrong_is_named_with_its_cure(
    changes: dict[str, Any], gpus_needed: bool, problem: str, warning: str
) -> None:
    problems, warnings = diagnose([HEALTHY, dataclasses.replace(HEALTHY, **changes)], gpus_needed=gpus_needed)
    for found, expected in ((problems, problem), (warnings, warning)):
        assert len(found) == bool(expected)
        if expected:
            assert re.search(expected, found[0])


def test_the_command_examines_what_a_run_or_a_comparison_would_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two.yaml").write_text("compare: {methods: [fedit, flora], seeds: [0]}\n")
    for more in ([], [str(tmp_path / "two.yaml")]):
        assert main(["doctor", *more, *TINY, f"run_dir={tmp_path / 'runs' / 'one'}"]) == 0
        said = capsys.readouterr().out
        assert "1 process on cpu" in said
        assert re.search(r"^0 +\S+ +\S+ +\d+ +1 ", said, re.MULTILINE), "rank 0 with one thread"
        assert "1 rank on cpu, no process group" in said
        assert not list((tmp_path / "runs").iterdir()), "nothing is left behind"


@pytest.mark.slow
def test_prepare_says_what_is_where_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", *TINY, f"run_dir={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    assert "weights:  test_vit (random)" in said
    assert "images:   synthetic" in said
    assert not (tmp_path / "run").exists()
    file = tmp_path / "two.yaml"
    file.write_text("compare: {methods: [fedit, flora], seeds: [0]}\n")
    assert main(["prepare", str(file), *TINY, f"run_dir={tmp_path / 'runs'}"]) == 0
    assert capsys.readouterr().out.count("weights: ") == 1, "what runs share is prepared once"
    assert main(["prepare", *TINY, "data.source=folder", "data.root=/nowhere"]) == 2
