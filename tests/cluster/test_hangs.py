"""A run of one process that hangs, wherever that is, ends in bounded time and shows the place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lorafair.checkpointing.partial_round import list_unfinished
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "howto" / "slurm.md"

# Each place in a fork of one process: importing torch takes longer than all of the runs.
RUNS = """
import ctypes, os, sys, time

import lorafair.federation as federation
from lorafair import cli
from lorafair.caching import shared_array
from lorafair.client import training
from lorafair.cluster import backstop
from lorafair.commands import checks
from lorafair.reporting.report import Report

folder, arguments, calls = sys.argv[1], sys.argv[2:], []


def hold(*_, **__):
    ctypes.PyDLL(None).sleep(600)  # with the interpreter's lock


def sleep(*_, **__):
    time.sleep(600)


def second(hang, otherwise):
    def of_the_second_call_on(*arguments, **options):
        calls.append(1)
        return (hang if len(calls) > 1 else otherwise)(*arguments, **options)
    return of_the_second_call_on


PLACES = {
    "checks": (checks, "check_model", sleep),
    "client, locked": (training.Trainer, "train", second(hold, training.Trainer.train)),
    "server, locked": (federation.Server, "aggregate_shard", hold),
    "evaluation, locked": (federation, "initial_adapters", hold),
    "server": (federation.Server, "aggregate_shard", sleep),
    "checkpoint": (federation, "save_checkpoint", sleep),
    "report": (Report, "round_ended", sleep),
    "end of the report": (Report, "finished", sleep),
    "tokens": (shared_array, "_fill", sleep),
}
processes = {}
for place, (owner, name, hanging) in PLACES.items():
    processes[place] = os.fork()
    if processes[place] == 0:
        log = os.open(f"{folder}/{place}.log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        setattr(owner, name, hanging)
        if "locked" in place:  # elsewhere the watchdog is to come first, on a busy machine too
            backstop.MARGIN_SECONDS = 2.0
        method = "fedsa_lora" if place == "evaluation, locked" else "fedit"
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache of {place}"
        os._exit(cli.main([*arguments, f"method.name={method}", f"run_dir={folder}/{place}"]))
for place, number in processes.items():
    print(place, os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), sep=": ")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs that hang, once all of them have ended; with the log of each."""
    folder = tmp_path_factory.mktemp("hangs")
    arguments = (
        *TINY, "data.train_images=24", "data.test_images=6", "fabric.devices=1", "client.timeout_minutes=0.1",
        "fabric.timeout_minutes=0.1", "rounds=1",
    )  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-c", RUNS, str(folder), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    (folder / "statuses").write_text(ended.stdout)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("checks", r"the checks before the start has got no further for 6 seconds \(fabric.timeout_minutes\)"),
        ("server", r"the server step of round 1 has got no further for 6 seconds \(client.timeout_minutes\)"),
        ("checkpoint", "the report and checkpoint of round 1 has got no further"),
        ("report", "the report and checkpoint of round 1 has got no further"),
        ("end of the report", "the final report has got no further"),
        (
            "tokens",
            r"the decoding of images or computing of tokens has got no further for 6 .*\(fabric.timeout_minutes\)",
        ),
    ],
)
def test_a_hang_anywhere_ends_with_a_line_that_names_the_place(runs: Path, place: str, line: str) -> None:
    assert f"{place}: 1\n" in (runs / "statuses").read_text()
    log = (runs / f"{place}.log").read_text()
    assert re.search(f"^error: process 0 on .*: {line}", log.splitlines()[-1]), log
    assert ("; what is saved stays" in log) == (place not in ("checks", "tokens"))
    assert ("; nothing was saved yet" in log) == (place in ("checks", "tokens"))
    if place in ("server", "checkpoint", "report"):  # the clients that were done
        (unfinished,) = list_unfinished(runs / place).values()
        assert list(unfinished.glob("clients_*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "frame"),
    [
        ("client, locked", r"in round 1: client \S+$"),
        ("server, locked", "federation.py.* in aggregate$"),
        ("evaluation, locked", "federation.py.* in evaluate$"),
    ],
)
def test_c_code_that_holds_the_interpreters_lock_ends_and_shows_where(runs: Path, place: str, frame: str) -> None:
    assert f"{place}: 1\n" in (runs / "statuses").read_text()
    log = (runs / f"{place}.log").read_text()
    assert "Timeout (0:00:0" in log
    assert re.search(frame, log, re.MULTILINE), log
    assert "error: " not in log


@pytest.mark.slow
def test_the_traceback_of_the_documentation_is_what_is_printed(runs: Path) -> None:
    frames = re.findall(
        r'File "\.\.\.(/lorafair/.*)", line \.\.\. in (.*?)(?:  .*)?$', DOCUMENT.read_text(), re.MULTILINE
    )
    assert [name for _, name in frames] == ["round 1: client noisy", "train", "run_rounds", "run_federation"]
    block = (runs / "client, locked.log").read_text().split("Thread ")[-1]  # of the main thread
    printed = re.findall(r'File ".*(/lorafair/.*)", line \d+ in (.*)', block)
    mine = [(file, re.sub("client .*", "client noisy", name)) for file, name in printed]
    assert [frame for frame in mine if frame in frames] == frames, block
    assert mine[mine.index(frames[1]) :][: len(frames) - 1] == frames[1:], "nothing in between"


@pytest.mark.slow
def test_the_backstop_leaves_work_alone_that_has_no_limit_or_is_done() -> None:
    code = """
        import ctypes, time
        from lorafair.cluster import backstop
        from lorafair.cluster.watchdog import start_watchdog, stop_watchdog
        backstop.MARGIN_SECONDS = 0.1
        backstop._TOLERANCE_SECONDS = 0.1
        watchdog = start_watchdog("process 0")
        with watchdog.deadline("a client", 1.0):
            with watchdog.deadline("without a limit", None):
                ctypes.PyDLL(None).sleep(2)
            ctypes.PyDLL(None).usleep(500_000)
            watchdog.heartbeat()
            ctypes.PyDLL(None).usleep(500_000)
        stop_watchdog()
        time.sleep(1.5)
        print("done")
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
