"""Kills a random process of a run at random moments, again and again: does the result keep the undisturbed run's bits?

A two-process run is started; after a random time one of its processes gets a SIGKILL, and the same command is given
again. A run that gets to its end is compared, and another one begins, until there were as many kills as asked for.
What is checked each time: all processes are gone within --patience seconds, and the exit status tells of the failure.
Exit status 1 if anything differs. Example:

    python benchmarks/chaos.py --kills 50 conf/synthetic.yaml rounds=200
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Tally:
    """What has happened so far."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)  # by process and phase
    runs: int = 0  # that got to their end
    different: int = 0
    slowest: float = 0.0  # seconds from a kill until all processes were gone
    problems: list[str] = field(default_factory=list)


def start(arguments: list[str], folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """Begin or continue the run in `folder`; its output is appended to a file beside it."""
    log = folder.with_suffix(".log")
    with log.open("ab") as out:
        command = [sys.executable, str(ROOT / "train.py"), *arguments, f"run_dir={folder}"]
        return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True), log


def members(session: int) -> list[int]:
    """The living processes of a session, the one that was started first at the front."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, owner = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            if int(owner) == session and state != "Z":
                found.append(int(entry.name))
    return sorted(found)


def phase(log: Path, offset: int) -> str:
    """What a run was doing, by what it has printed since it was started this time."""
    text = log.read_bytes()[offset:].decode()
    if re.search(r"^round +\d+/\d+ ", text, re.MULTILINE):  # a round is done
        return "later round"
    return "first round since the start" if "clients:" in text else "starting"


def adapter(folder: Path) -> bytes:
    """All tensors of the last checkpoint."""
    last = max((folder / "checkpoints").glob("round_*"))
    content = b""
    for file in sorted(last.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            content += b"".join(opened.get_tensor(name).numpy().tobytes() for name in sorted(opened.keys()))
    return content


def disturb(
    arguments: list[str], folder: Path, longest: float, chance: random.Random, patience: float, tally: Tally
) -> bool:
    """Start the run and kill one of its processes, if it does not end before; returns whether it has ended."""
    log = folder.with_suffix(".log")
    offset = log.stat().st_size if log.exists() else 0
    process, log = start(arguments, folder)
    try:
        status = process.wait(chance.uniform(0, longest))
    except subprocess.TimeoutExpired:
        living = members(process.pid)
        victim = chance.choice(living)
        when = phase(log, offset)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        while members(process.pid) and time.monotonic() - killed < patience:
            time.sleep(0.05)
        tally.slowest = max(tally.slowest, time.monotonic() - killed)
        tally.kills[f"{'process 0' if victim == process.pid else 'another process'}, {when}"] += 1
        if left := members(process.pid):
            tally.problems.append(f"{len(left)} processes were still there {patience:g} s after the kill")
            os.killpg(process.pid, signal.SIGKILL)
        if process.wait() == 0 and not (folder / "result.json").exists():
            tally.problems.append("exit status 0 without a result")
        return False
    if status != 0:
        tally.problems.append(f"a run without a disturbance ended with status {status}: {log.read_text()[-500:]}")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims (0)")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds for all processes to be gone (30)")
    parser.add_argument("run", nargs="*", help="YAML file and key=value of the run (conf/synthetic.yaml rounds=200)")
    options = parser.parse_args()
    arguments = options.run or [str(ROOT / "conf" / "synthetic.yaml"), "rounds=200"]
    chance, tally = random.Random(options.seed), Tally()
    with tempfile.TemporaryDirectory() as root:
        began = time.monotonic()
        process, log = start(arguments, Path(root, "undisturbed"))
        if process.wait() != 0:
            print(log.read_text(), file=sys.stderr)
            return 1
        longest = 0.5 * (time.monotonic() - began)  # so that a run takes several starts
        expected = adapter(Path(root, "undisturbed"))
        number, kills_of_run = 0, 0
        while tally.kills.total() < options.kills and not tally.problems:
            folder = Path(root, f"run_{number}")
            if not disturb(arguments, folder, longest, chance, options.patience, tally):
                kills_of_run += 1
                continue
            same = adapter(folder) == expected
            tally.runs, tally.different = tally.runs + 1, tally.different + (not same)
            print(f"run {number}: {kills_of_run} kills, {'equal bits' if same else 'DIFFERENT'}", flush=True)
            number, kills_of_run = number + 1, 0
        if kills_of_run and not tally.problems:  # the last run, undisturbed from here on
            folder = Path(root, f"run_{number}")
            start(arguments, folder)[0].wait()
            same = adapter(folder) == expected
            tally.runs, tally.different = tally.runs + 1, tally.different + (not same)
            print(f"run {number}: {kills_of_run} kills, {'equal bits' if same else 'DIFFERENT'}", flush=True)
    print(
        f"\n{tally.kills.total()} kills in {time.monotonic() - began:.0f} s, {tally.runs} runs got to their end,",
        end=" ",
    )
    print(f"{tally.different} of them different; all processes gone within {tally.slowest:.1f} s of a kill")
    for what, count in sorted(tally.kills.items()):
        print(f"  {count:>4}  {what}")
    for problem in tally.problems:
        print(f"problem: {problem}")
    return 1 if tally.different or tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
