"""What whole runs of the command cost beside training, each in processes of its own: time, memory, start.

    overhead   a round of 6 clients x 64 images: seconds of it, and of them outside of the training of clients
    clients    6 to 100,000 clients of two images, all of them or 60 of them a round: time a client and memory
    memory     peak memory after 20 and after 200 rounds
    ranks      1, 2, ... processes on as many cores: images/s
    cohort     clients side by side at batches of 4 to 32: time relative to one by one
    cache      the demo's model with and without the cached tokens of its frozen blocks: time of a round
    threads    two processes with half of the cores each, and with all of them each
    start      from the command to the first round, and what imports take of it

Examples:

    python benchmarks/rounds.py
    python benchmarks/rounds.py overhead clients --most 10000
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0))

TINY = (
    "data.source=synthetic", "data.test_images=6", "partition.scheme=iid", "model.name=test_vit",
    "model.weights=random", "model.image_size=32", "model.prefix_cache=never", "model.lora.rank=4",
    "method.name=fedit", "client.optimizer=adamw", "client.learning_rate=0.001", "client.batch_size=16",
    "client.cohort=1", "fabric.accelerator=cpu", "evaluation.every=1000000",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a run has cost."""

    rounds: list[float]  # seconds of each round by the clock, the first two left out where there are more
    beside: list[float]  # of them outside of the training of clients, on rank 0
    start: float  # seconds from the command to the first round
    memory: int  # MiB, peak of the largest process

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


# Runs the command, and writes when each round began and what was trained in it.
CODE = """
import os, sys, time, json, resource
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, which here comes after torch is loaded
from lorafair import cli, federation
from lorafair.client.cohort import LocalTraining
marks, spent = [], [0.0]
begin, train = federation.begin_round, LocalTraining.train
def mark(*given):
    marks.append((time.time(), spent[0]))
    return begin(*given)
def timed(*given, **options):
    started = time.perf_counter()
    result = train(*given, **options)
    spent[0] += time.perf_counter() - started
    return result
save, ends = federation.save, []
def saved(*given, **options):
    save(*given, **options)
    ends.append((time.time(), spent[0]))
federation.begin_round, LocalTraining.train, federation.save = mark, timed, saved
out, *arguments = sys.argv[1:]
status = cli.main(arguments)
if status == 0 and os.environ.get("LOCAL_RANK", "0") == "0":
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    json.dump({"begins": marks, "ends": ends, "peak": peak // 1024}, open(out, "w"))
sys.exit(status)
"""


def run(*arguments: str, threads: int = 1, rounds: int = 6, environment: dict[str, str] | None = None) -> Run:
    """Run the command with these key=value pairs."""
    with tempfile.TemporaryDirectory() as folder:
        script, out = Path(folder, "run.py"), Path(folder, "out.json")
        script.write_text(CODE)
        own = os.environ | {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "XDG_CACHE_HOME": str(Path(folder, "cache")),
        } | (environment or {})  # fmt: skip
        began = time.time()
        command = [sys.executable, str(script), str(out), *arguments, f"rounds={rounds}", f"run_dir={folder}/run"]
        done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
        found = json.loads(out.read_text())
    skip = 2 if rounds > 4 else 0
    pairs = list(zip(found["begins"], found["ends"], strict=True))[skip:]
    return Run(
        rounds=[end[0] - begin[0] for begin, end in pairs],
        beside=[(end[0] - begin[0]) - (end[1] - begin[1]) for begin, end in pairs],
        start=found["begins"][0][0] - began,
        memory=found["peak"],
    )


def of_clients(clients: int, images: int) -> tuple[str, ...]:
    return (f"partition.clients={clients}", f"data.train_images={-(-clients * images // 3)}")


def overhead(_: argparse.Namespace) -> None:
    print(
        "model | clients x images | method | s a round | ms beside training | fraction of the round | ms of it a client"
    )
    tiny, small = ((f"model.name=vit_{size}_patch16_224", "model.image_size=96") for size in ("tiny", "small"))
    for name, changes, clients, images, rounds in (
        ("test_vit, 32 px", (), 6, 64, 20), ("test_vit, 32 px", (), 60, 16, 20),
        ("ViT-Ti/16, 96 px", tiny, 6, 64, 5), ("ViT-S/16, 96 px", small, 6, 64, 5),
    ):  # fmt: skip
        for method in ("fedit", "lora_fair"):
            r = run(*TINY, *changes, *of_clients(clients, images), f"method.name={method}", rounds=rounds)
            beside = statistics.median(r.beside)
            print(
                f"{name} | {clients} x {images} | {method} | {r.median:.3f} | {1000 * beside:.1f} | "
                f"{beside / r.median:.1%} | {1000 * beside / clients:.2f}", flush=True,
            )  # fmt: skip


def clients(options: argparse.Namespace) -> None:
    print("clients | of a round | s before round 1 | s a round | ms a client of the round | MiB")
    small = ("model.lora.rank=1", "model.lora.last_blocks=1", "client.cohort=auto", "checkpoint.every=1000")
    for total in (6, 60, 1000, 10_000, 100_000):
        for drawn in sorted({min(60, total), total}):
            if total <= options.most:
                r = run(
                    *TINY, *small, *of_clients(total, 2), f"federation.clients_per_round={drawn}",
                    rounds=20 if drawn <= 60 else 3,
                )  # fmt: skip
                print(
                    f"{total:,} | {drawn:,} | {r.start:.1f} | {r.median:.3f} | {1000 * r.median / drawn:.2f} | "
                    f"{r.memory:,}", flush=True,
                )  # fmt: skip


def memory(_: argparse.Namespace) -> None:
    print("rounds | MiB")
    for rounds in (20, 200):
        r = run(*TINY, *of_clients(6, 16), "evaluation.every=10", rounds=rounds)
        print(f"{rounds} | {r.memory}")


def ranks(_: argparse.Namespace) -> None:
    print("processes | images/s | speed-up")
    first = 0.0
    for count in (n for n in (1, 2, 4, 8) if n <= CORES):
        r = run(*TINY, *of_clients(24, 64), f"fabric.devices={count}", rounds=8)
        first = first or r.median
        print(f"{count} | {24 * 64 / r.median:,.0f} | {first / r.median:.2f}")


def cohort(_: argparse.Namespace) -> None:
    print("batch | one by one, s a round | 2 | 4 | 8 | 16 | auto, of 64 clients (time relative to one by one)")
    for batch in (4, 8, 16, 32):

        def seconds(size: str, batch: int = batch) -> float:
            return run(
                *TINY, *of_clients(64, 32), f"client.batch_size={batch}", f"client.cohort={size}", rounds=6
            ).median

        base = seconds("1")
        others = [f"{seconds(size) / base:.2f}" for size in ("2", "4", "8", "16", "auto")]
        print(f"{batch} | {base:.3f} | {' | '.join(others)}", flush=True)


def cache(_: argparse.Namespace) -> None:
    print("cached tokens | s a round (conf/demo.yaml, one process, 5 steps a client, without evaluation)")
    common = ("conf/demo.yaml", "fabric.devices=1", "client.steps=5", "evaluation.every=1000000")
    home = {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))}
    times = []
    for choice in ("auto", "never"):
        r = run(*common, f"model.prefix_cache={choice}", threads=CORES, rounds=3, environment=home)
        times.append(min(r.rounds))
        print(f"{'yes' if choice == 'auto' else 'no'} | {times[-1]:.2f}", flush=True)
    print(f"ratio | {times[1] / times[0]:.1f}")


def threads(_: argparse.Namespace) -> None:
    print("two processes with | waiting | s a round")
    for count in sorted({max(1, CORES // 2), CORES}):
        for policy in ("PASSIVE", "ACTIVE"):
            r = run(
                *TINY, *of_clients(12, 32), "fabric.devices=2", f"fabric.threads={count}", threads=count, rounds=6,
                environment={"OMP_WAIT_POLICY": policy},
            )  # fmt: skip
            print(f"{count} of {CORES} cores each | {policy.lower()} | {r.median:.3f}", flush=True)


def start(_: argparse.Namespace) -> None:
    runs = [run(*TINY, *of_clients(6, 16), rounds=1).start for _ in range(3)]

    def imports(what: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", what], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
        return time.perf_counter() - began

    print("s from the command to round 1 | of an empty Python | importing torch, timm | importing the package")
    # What a run has imported when its processes are started.
    package = "import lorafair.federation; from lorafair import third_party; third_party.import_fabric()"
    parts = [min(imports(what) for _ in range(3)) for what in ("pass", "import torch, timm", package)]
    print(" | ".join(f"{value:.2f}" for value in (min(runs), *parts)))


SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    f.__name__: f for f in (overhead, clients, memory, ranks, cohort, cache, threads, start)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="all, if none is named")
    parser.add_argument("--most", type=int, default=100_000, help="clients in the section of that name (100,000)")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {CORES} cores, load {os.getloadavg()[0]:.1f}")
    for name in options.sections or SECTIONS:
        print(f"\n{name}")
        SECTIONS[name](options)
    print(f"\nprocessor seconds in all: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime:.0f}")


if __name__ == "__main__":
    main()
