"""A process whose client hangs, or that has lost another process, ends in bounded time and prints the reason."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from lorafair import cli, launch
from lorafair.checkpointing.partial_round import list_unfinished
from lorafair.cluster import watchdog
from lorafair.communication.agreement import is_peer_loss
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]


def python(code: str, *arguments: str, outputs: str = "") -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, which the watchdog may end; `outputs` as a shell has them: 2>/dev/full."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    command = ["bash", "-c", f'exec "$@" {outputs}', "bash", *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)


@pytest.mark.slow
def test_what_gets_no_further_ends_the_process_after_saving() -> None:
    ended = python("""
        import time
        from lorafair.cluster.saved import begin_start, note_saved
        from lorafair.cluster.watchdog import saving, start_watchdog
        watchdog = start_watchdog("process 0")
        begin_start()
        def save():
            print("saved", flush=True)
            note_saved()
        with saving(save), watchdog.deadline("client photo", 0.2):
            time.sleep(60)
    """)
    assert (ended.returncode, ended.stdout) == (1, "saved\n")
    assert "error: process 0: client photo has got no further for 0.2 seconds; what is saved stays" in ended.stderr
    assert "time.sleep" not in ended.stderr
    assert "<string>" in ended.stderr  # where it hangs


@pytest.mark.slow
@pytest.mark.parametrize("outputs", ["2>/dev/full", "2>&-"])
def test_a_process_that_hangs_is_ended_where_nobody_can_be_told(outputs: str) -> None:
    ended = python(
        """
        import threading
        from lorafair.cluster.watchdog import start_watchdog
        with start_watchdog("process 0").deadline("client photo", 0.2):
            threading.Event().wait(20)
        """,
        outputs=outputs,
    )
    assert ended.returncode == 1


@pytest.mark.slow
def test_steps_are_signs_that_it_gets_on_and_nothing_is_expected_outside_of_the_block() -> None:
    ended = python("""
        import time
        from lorafair.cluster.watchdog import deadline, heartbeat, start_watchdog, stop_watchdog
        start_watchdog("process 0")
        with deadline("evaluation", 1.5 / 60):  # in minutes
            for _ in range(4):
                time.sleep(0.6)
                heartbeat()
            with deadline("client photo", None):
                time.sleep(2)
        time.sleep(2)
        stop_watchdog()
    """)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stop_ends_a_process_that_waits_for_others_to_start(name: str) -> None:
    """The main thread waits in C, where Python's handlers do not run."""
    ended = python(f"""
        import ctypes, os, signal, threading
        from lorafair.cluster.signals import handling_signals
        from lorafair.cluster.watchdog import start_watchdog
        dog = start_watchdog("process 0")
        with handling_signals(), dog.deadline("the start", 60, stoppable=True):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.{name})).start()
            while True:
                ctypes.CDLL(None).sleep(60)
    """)
    assert ended.returncode == 130
    assert f"error: process 0: stopped by {name} in the start\n" in ended.stderr


@pytest.mark.slow
def test_a_started_process_that_fails_ends_its_starter_and_an_orphan_ends_itself() -> None:
    ended = python("""
        import subprocess, sys, time
        from lorafair.cluster.watchdog import start_watchdog
        dog = start_watchdog("process 0")
        dog.children = [subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])]
        time.sleep(60)
    """)
    assert ended.returncode == 1
    assert "error: process 0: process 1 was ended by SIGKILL" in ended.stderr

    ended = python("""
        import subprocess, sys, time
        from lorafair.cluster.watchdog import start_watchdog
        dog = start_watchdog("process 0")
        dog.children = [subprocess.Popen([sys.executable, "-c", "raise SystemExit(130)"])]
        time.sleep(60)
    """)
    assert ended.returncode == 130
    assert "error: process 0: process 1 was stopped by Ctrl-C" in ended.stderr

    ended = python("""
        import os, time
        from lorafair.cluster.watchdog import start_watchdog
        start_watchdog("process 0")
        if os.fork():
            os._exit(0)
        time.sleep(1)  # as long as imports take, say
        start_watchdog("process 1", is_child=True)
        time.sleep(60)
    """)  # the pipes are open until the orphan ends, too
    assert "error: process 1: the process that has started this one is gone" in ended.stderr


@pytest.mark.slow
def test_a_silent_rank_is_taken_for_lost_and_one_that_has_left_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_HEARTBEAT_SECONDS", 0.05)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
    stopped = [threading.Event() for _ in range(3)]
    ranks = [watchdog._Peers(store, rank, 3, 0.5, event, lambda: "") for rank, event in enumerate(stopped)]
    time.sleep(1.5)
    assert [peers.lost() for peers in ranks] == ["", "", ""]

    stopped[1].set()
    ranks[1].join()
    store.set("lorafair/alive/2", "the last")
    monkeypatch.setattr(ranks[2], "_store", None)  # its next beat fails: it is silent from now on
    threading.excepthook, before = lambda _: None, threading.excepthook
    time.sleep(1.5)
    threading.excepthook = before
    assert ranks[0].lost() == "process 2 has sent no heartbeat for 0.5 seconds"
    stopped[0].set()
    ranks[0].join()


@pytest.mark.slow
def test_a_client_that_hangs_is_named_and_the_clients_before_it_are_kept(tmp_path: Path) -> None:
    ended = python(
        """
        import sys, time
        from lorafair import cli
        from lorafair.client import training
        train, calls = training.Trainer.train, []
        def hang_at_the_third(*arguments):
            calls.append(1)
            if len(calls) == 3:
                time.sleep(60)
            return train(*arguments)
        training.Trainer.train = hang_at_the_third
        sys.exit(cli.main(sys.argv[1:]))
        """,
        *TINY, "data.train_images=16", "data.test_images=6", "fabric.devices=1", "client.timeout_minutes=0.03",
        f"run_dir={tmp_path}",
    )  # fmt: skip
    assert ended.returncode == 1
    assert "round 1: client " in ended.stderr
    assert "has got no further for 1.8 seconds" in ended.stderr
    (unfinished,) = list_unfinished(tmp_path).values()
    assert len(list(unfinished.glob("clients_*.safetensors"))) == 1


HANGING_SOURCE = """
import multiprocessing
import time

import lorafair
from lorafair.data.images import ImagesInMemory
from lorafair.registry import SOURCES


class Hanging(ImagesInMemory):
    def read_many(self, indices, size):
        if multiprocessing.parent_process() is not None:
            time.sleep(600)
        return super().read_many(indices, size)


@lorafair.register_source("hanging")
def hanging(config, seed):
    collection = SOURCES["synthetic"].load(config, seed)
    return lorafair.ImageCollection(**{**vars(collection), "images": Hanging(collection.images.array)})
"""


@pytest.mark.slow
def test_a_reader_that_hangs_in_a_worker_process_ends_with_the_run(tmp_path: Path) -> None:
    plugin = tmp_path / "hanging.py"
    plugin.write_text(HANGING_SOURCE)
    ended = python(
        """
        from lorafair import cli
        cli.entry()
        """,
        "run", *(argument for argument in TINY if "source" not in argument), f"plugins=[{plugin}]",
        "data.source=hanging", "data.train_images=16", "fabric.devices=1", "data.workers=2", "model.prefix_cache=never",
        "client.timeout_minutes=0.1", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    # The pipes are open until the workers end, too.
    assert ended.returncode == 1
    assert "has got no further for 6 seconds" in ended.stderr


@pytest.mark.parametrize(
    "text",
    [
        "Read error [127.0.0.1]:28331: Connection reset by peer. This is typically caused by a remote worker hanging",
        "[pair.cc:553] Connection closed by peer [10.0.0.2]:45678",
        "Timed out waiting 1800000ms for recv operation to complete",
        "NCCL communicator was aborted on rank 1.",
    ],
)
def test_a_lost_process_is_one_line_and_any_other_failure_has_its_traceback(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "SECONDS_FOR_THE_REASON", 0.0)

    def fail(error: Exception) -> str:
        monkeypatch.setattr(cli, "_dispatch", lambda _: (_ for _ in ()).throw(error))
        assert cli.main([]) == 1
        return capsys.readouterr().err

    line = fail(RuntimeError(text))
    assert line.startswith("error: process 0 on ")
    assert "another process of the run is gone" in line
    assert line.count("\n") == 1
    assert "Traceback" in fail(ZeroDivisionError(text))
    assert not is_peer_loss(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_failure_whose_traceback_nobody_can_read_has_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_dispatch", fail)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert cli.main([]) == 1


@pytest.mark.slow
def test_a_request_to_stop_saves_what_is_done_before_the_work_in_progress_ends() -> None:
    """The scheduler may kill the process in a long evaluation."""
    ended = python("""
        import os, signal, time
        from lorafair.cluster.signals import handling_signals
        from lorafair.cluster.watchdog import saving, start_watchdog
        start_watchdog("process 0")
        with handling_signals(), saving(lambda: print("saved", flush=True)):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-9, "saved\n", "")


@pytest.mark.slow
def test_ctrl_c_ends_a_start_where_a_library_hides_it() -> None:
    ended = python("""
        import os, signal, threading, time
        from lorafair.cluster.signals import handling_signals
        from lorafair.cluster.watchdog import start_watchdog
        dog = start_watchdog("process 0")
        with handling_signals(starting=True), dog.deadline("the loading", 600):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            while True:
                try:
                    time.sleep(60)
                except KeyboardInterrupt:  # as in a destructor, where Python prints it and goes on
                    pass
    """)
    assert ended.returncode == 130
    assert ended.stderr == "error: process 0: stopped by SIGINT in the loading\n"


def test_a_lost_rank_is_named_with_what_it_was_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_HEARTBEAT_SECONDS", 0.02)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
    places = ["round 1, waiting for the other processes", "the server step of round 1\udcff", ""]
    stopped = [threading.Event() for _ in places]
    peers = [watchdog._Peers(store, r, 3, 0.3, stopped[r], lambda r=r: places[r]) for r in range(3)]  # type: ignore[misc]
    time.sleep(0.2)
    assert peers[0].places() == "process 1 was last in the server step of round 1?"
    assert peers[1].places() == ""
    peers[2].last_word = "failed"
    stopped[2].set()
    peers[2].join()
    time.sleep(0.1)
    assert peers[0].lost() == "process 2 has failed"
    peers[2].last_word = "done"
    store.set("lorafair/alive/2", "done")
    monkeypatch.setattr(peers[1], "_store", None)  # its next beat fails: it is silent from now on
    threading.excepthook, before = lambda _: None, threading.excepthook
    time.sleep(0.6)
    threading.excepthook = before
    lost = "process 1 has sent no heartbeat for 0.3 seconds, last in the server step of round 1?"
    assert peers[0].lost() == lost
    stopped[0].set()
    peers[0].join()
