"""Of part a, what needs processes of its own: killed and resumed, in a process group of one.

They are started together and looked at later. Two processes cannot share a card: NCCL refuses them, and gloo does not
send and receive tensors of a GPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import ROOT, environ_of_child
from .record import Part

LONGEST = 90.0  # seconds of a child
KILLED, GROUPED = "killed", "one process, a group of its own"


@dataclass
class Children:
    """A process by what it shows, and where its output goes."""

    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    folder: Path = Path()
    done_when_killed: int = 0  # clients of round 2; 0 if the run had ended before

    def start(self, name: str, command: Sequence[str]) -> None:
        with self.log(name).open("wb") as log:
            self.running[name] = subprocess.Popen(
                list(command), env=environ_of_child(), cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )

    def log(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '-')}.log"

    def run_dir(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-")

    def wait(self, name: str, expected: int = 0) -> str:
        """What is wrong with the process of this name, after it has ended; else an empty text."""
        process = self.running[name]
        try:
            status = process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            status = -1
            _kill(process)
        if status == expected:
            return ""
        return f"the process ended with status {status}:\n{self.log(name).read_text(errors='replace')[-1500:]}"

    def killed(self, part: Part, federation: Callable[..., Any]) -> None:
        """SIGKILL within round 2; the same run, continued, has the bits of one that was not disturbed."""
        from .correctness import TOLERANCE, gap_of, same_bits

        problem = self.wait(KILLED, expected=-signal.SIGKILL)
        options = ("method.name=lora_fair", "checkpoint.seconds=0")
        whole = federation(part, "whole", *options)
        if problem or not self.done_when_killed:
            part.check("killed within round 2", False, problem or "it had ended before")
            return
        resumed = federation(part, f"processes/{KILLED}", *options)
        equal = same_bits(resumed, whole)
        if equal or same_bits(whole, federation(part, "whole again", *options)):
            part.check("killed and resumed = uninterrupted", equal,
                       f"killed in round 2, {self.done_when_killed} clients done; equal bits: {equal}")  # fmt: skip
        else:  # then no resumed run can have equal bits either
            gap = gap_of(resumed, whole)
            part.check("killed and resumed = uninterrupted", gap < TOLERANCE,
                       f"two undisturbed runs differ in bits; this one is {gap:.1e} apart")  # fmt: skip

    def kill_within_round_2(self) -> None:
        """Wait for the first client of round 2, and kill the run at once."""
        process, checkpoints = self.running[KILLED], self.run_dir(KILLED) / "checkpoints"
        while process.poll() is None:
            if done := list(checkpoints.glob("unfinished_000002/clients_*.safetensors")):
                _kill(process)
                self.done_when_killed = 0 if (self.run_dir(KILLED) / "result.json").exists() else len(done)
            time.sleep(0.001)

    def grouped(self, part: Part, federation: Callable[..., Any]) -> None:
        """The collectives of one process, over NCCL on a GPU, change no bit."""
        import lorafair

        from .correctness import TOLERANCE, gap_of, same_bits

        alone = federation(part, "whole", "method.name=lora_fair")  # finished before, in general
        if part.on_gpu:
            part.note(f"fabric.devices=2 on this machine: {refusal()}")
        if problem := self.wait(GROUPED):
            part.check(GROUPED, False, problem)
            return
        backend = self.log(GROUPED).read_text().partition("backend: ")[2].partition("\n")[0]
        result = lorafair.RunResult(self.run_dir(GROUPED))
        equal = same_bits(result, alone)
        gap = 0.0 if equal else gap_of(result, alone)
        part.check(f"{GROUPED}, over {backend}", equal or gap < TOLERANCE,
                   f"equal bits to one process without a group: {equal}, {gap:.1e} apart")  # fmt: skip


@contextlib.contextmanager
def started(part: Part, options: tuple[str, ...]) -> Iterator[Children]:
    """The children at work; none is left behind."""
    children = Children(folder=part.scratch / "processes")
    children.folder.mkdir(parents=True, exist_ok=True)
    given = [*options, f"fabric.accelerator={part.accelerator}", "method.name=lora_fair"]
    python = sys.executable
    script = str(Path(__file__).with_name("grouped_run.py"))

    def run_dir(name: str) -> str:
        return f"run_dir={children.run_dir(name)}"

    try:
        train = [python, str(ROOT / "train.py"), *given, "checkpoint.seconds=0", run_dir(KILLED)]
        children.start(KILLED, train)
        threading.Thread(target=children.kill_within_round_2, daemon=True).start()
        own = "nccl" if part.on_gpu else "gloo"
        children.start(GROUPED, [python, script, own, *given, run_dir(GROUPED)])
        yield children
    finally:
        for process in children.running.values():
            _kill(process)


def refusal() -> str:
    """What the package says to more processes than devices."""
    from lorafair.config import FabricConfig
    from lorafair.errors import ConfigError
    from lorafair.launch import make_fabric

    try:
        make_fabric(FabricConfig(accelerator="cuda", devices=2))
    except ConfigError as error:
        return str(error)
    return "accepted"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started here, and its own children, for they are one session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
