"""The same federated LoRA work in lorafair, a bare PyTorch loop, pfl-research and Flower, side by side (Linux).

Each is installed into a virtual environment of its own, on the same build of torch. lorafair writes down its images,
start weights and batches once; the others read them. All clients train one epoch a round, one after the other, and
their trained numbers are averaged; the final weights must agree. Every repeat runs all four, in turn; medians count.

    python benchmarks/peers.py --clients 6x64 60x16
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))
from processes import memory  # noqa: E402

REPOSITORY = HERE.parent
REQUIREMENTS = {  # what an environment has besides torch; {timm} is the version that lorafair's has
    "lorafair": ["-e", str(REPOSITORY)],
    "bare loop": ["timm=={timm}"],
    "pfl": ["timm=={timm}", "pfl[pytorch]"],
    "flower": ["timm=={timm}", "flwr[simulation]"],
}
PACKAGES = ("lorafair", "torch", "timm", "pfl", "flwr", "ray")
NOTES = """\
Start: process start to first round. Overhead: a round less the bare loop's. Beyond training: what of a round is no
client's steps. CPU and memory (largest PSS): with children; on a busy machine the CPU says more than the clock.
Start leaves out that Flower's actor loads torch and the model in the first round, which no other number has either.
Difference: largest of a final weight, relative to the largest weight.
Not compared: evaluation (lorafair's, of 6 images, follows the last round; pfl's takes place in the first; Flower has
none), checkpoints but lorafair's last one, lorafair's cache of frozen blocks, several clients at once. lorafair writes
its log and metrics every round. pfl runs in one process; Flower by run_simulation, with one Ray actor on one CPU that
keeps model and images between the rounds.
"""


@dataclass(frozen=True)
class Run:
    """What one process has left."""

    start: float  # seconds from the start of the process to its first round
    round: float  # seconds, median of the rounds but first and last
    cpu: float  # seconds of CPU of a round, mean of the same rounds
    beyond: float  # seconds of a round in which no client trained
    memory: float  # bytes at the peak, of the process and its children
    weights: tuple[float, ...]  # (P,) final


def python(envs: Path, name: str) -> str:
    return str(envs / name.replace(" ", "-") / "bin" / "python")


def install(envs: Path, torch: str | None) -> dict[str, dict[str, str]]:
    """Make the environments that are not there yet; returns the versions of what is in each."""
    versions: dict[str, dict[str, str]] = {}
    for name, requirements in REQUIREMENTS.items():
        interpreter = python(envs, name)
        done, wanted = Path(interpreter).parents[1] / ".installed", " ".join([*requirements, torch or ""])
        if not done.is_file() or done.read_text() != wanted:
            print(f"installing {name} into {done.parent}", flush=True)
            pip = [interpreter, "-m", "pip", "install", "-q"]
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(done.parent)], check=True)
            build = f"torch=={versions['lorafair']['torch']}" if versions else torch or cpu_build(interpreter)
            index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"] if "+" in build and torch else []
            subprocess.run([*pip, *index, *build.split()], check=True)
            have = installed(interpreter)
            filled = [text.format(timm=versions["lorafair"]["timm"]) if versions else text for text in requirements]
            subprocess.run([*pip, f"torch=={have['torch']}", *filled], check=True)
            done.write_text(wanted)
        versions[name] = installed(interpreter)
    return versions


def cpu_build(interpreter: str) -> str:
    """The CPU build of torch that the package index has, else that of pytorch.org, as in the Makefile."""
    listing = subprocess.run([interpreter, "-m", "pip", "index", "versions", "torch"], capture_output=True, text=True)
    found = re.search(r"[0-9.]+\+cpu", listing.stdout)
    return f"torch=={found.group()}" if found else "torch --index-url https://download.pytorch.org/whl/cpu"


def installed(interpreter: str) -> dict[str, str]:
    code = (
        "import json; from importlib.metadata import distributions as d; "
        "print(json.dumps({x.name: x.version for x in d()}))"
    )
    return dict(json.loads(subprocess.check_output([interpreter, "-I", "-c", code], text=True)))


def configuration(clients: int, images: int, rounds: int) -> list[str]:
    """lorafair's arguments for equal clients on made-up images."""
    return [
        "data.source=synthetic", f"data.train_images={clients * images // 3}", "data.test_images=2",
        "partition.scheme=iid", f"partition.clients={clients}", "model.name=test_vit", "model.weights=random",
        "model.image_size=32", "model.prefix_cache=never", "model.lora.rank=4",
        "model.lora.targets=[attn.proj,mlp.fc2]", "method.name=fedit", "client.optimizer=adamw",
        "client.learning_rate=0.001", "client.batch_size=16", "client.epochs=1", "client.cohort=1", f"rounds={rounds}",
        "fabric.accelerator=cpu", "checkpoint.every=1000", "evaluation.every=1000",
    ]  # fmt: skip


def environment(threads: int) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{HERE / 'peers'}{os.pathsep}{REPOSITORY}", "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip


def execute(command: Sequence[str], log: Path, threads: int) -> tuple[float, float]:
    """Run a process to its end; returns when it began (seconds since the epoch) and its peak of memory in bytes."""
    with log.open("w") as output:
        began = time.time()
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment(threads), cwd=log.parent)
        peak, over = [0], threading.Event()

        def watch() -> None:
            while not over.wait(0.2):
                peak[0] = max(peak[0], memory(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = process.wait()
        over.set()
        watcher.join()
    if status:
        sys.exit(f"{' '.join(command)}: exit status {status}\n{log.read_text()[-4000:]}")
    return began, peak[0]


def run(name: str, envs: Path, work: Path, arguments: list[str], clients: int, threads: int) -> Run:
    """Do the work once in one of the frameworks."""
    with tempfile.TemporaryDirectory(dir=work.parent) as folder:
        out = Path(folder) / "out.json"
        script = [python(envs, name), str(HERE / "peers" / f"{name.split()[0]}_run.py")]
        given = ["run", str(out), *arguments] if name == "lorafair" else [str(work), str(out)]
        began, peak = execute([*script, *given], Path(folder) / "log", threads)
        left = json.loads(out.read_text())
    rounds = [b - a for a, b in zip(left["began"], left["began"][1:], strict=False)][1:]  # the first one warms up
    training = [sum(left["training"][clients * r : clients * (r + 1)]) for r in range(1, len(rounds) + 1)]
    return Run(
        start=left["began"][0] - began,
        round=statistics.median(rounds),
        cpu=(left["cpu"][-1] - left["cpu"][1]) / len(rounds),
        beyond=statistics.median(all_ - some for all_, some in zip(rounds, training, strict=True)),
        memory=peak,
        weights=tuple(left["weights"]),
    )


def compare(clients: int, images: int, options: argparse.Namespace, loads: list[float]) -> list[list[str]]:
    """The lines of the table for one federation."""
    names, envs = list(REQUIREMENTS), options.envs
    arguments = configuration(clients, images, options.rounds)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work.pt"
        script = [python(envs, "lorafair"), str(HERE / "peers" / "lorafair_run.py"), "prepare", str(work)]
        execute([*script, *arguments, f"run_dir={folder}/prepared"], Path(folder) / "log", options.threads)
        for repeat in range(options.repeats):
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                runs[name].append(run(name, envs, work, arguments, clients, options.threads))
                loads.append(os.getloadavg()[0])
                print(
                    f"{clients} clients, repeat {repeat + 1}: {name} {runs[name][-1].round:.3f} s a round", flush=True
                )
    bare, reference = runs["bare loop"], runs["lorafair"][0].weights
    largest = max(map(abs, reference))

    def medians(name: str) -> list[float]:
        mine, pairs = runs[name], list(zip(runs[name], bare, strict=True))
        return [
            statistics.median(r.start for r in mine),
            statistics.median(r.round for r in mine),
            statistics.median(r.cpu for r in mine),
            1000 * statistics.median(r.round - b.round for r, b in pairs),
            1000 * statistics.median(r.beyond for r in mine) / clients,
            statistics.median(r.memory for r in mine) / 2**20,
        ]

    ours, lines = medians("lorafair"), []
    for name in names:
        gap = max(abs(a - b) for r in runs[name] for a, b in zip(r.weights, reference, strict=True)) / largest
        if gap > options.tolerance:
            sys.exit(f"{name}: its final weights differ by {gap:.1e} of the largest from lorafair's")
        cells = [
            f"{value:.{digits}f}" + (f" ({value / base:.2f})" if base > 0 and value > 0 else "")
            for value, base, digits in zip(medians(name), ours, (1, 3, 3, 1, 2, 0), strict=True)
        ]
        lines.append([f"{clients} x {images}", name, *cells, f"{gap:.1e}"])
    return lines


def federation(text: str) -> tuple[int, int]:
    """Clients and images of each, from "6x64"; raises ValueError, which argparse turns into its usage line."""
    clients, images = map(int, text.split("x"))
    if clients < 1 or images < 1 or clients * images % 3:  # the images come from 3 domains of one size
        raise ValueError(text)
    return clients, images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--clients",
        nargs="+",
        type=federation,
        default=[(6, 64), (60, 16)],
        metavar="NxIMAGES",
        help="clients and images of each, a multiple of 3 together (6x64 60x16)",
    )
    parser.add_argument("--rounds", type=int, default=8, help="of a run; all but the first and the last are timed (8)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each framework; medians count (5)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of the final weights, relative (1e-3)")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lorafair" / "peers"
    parser.add_argument("--envs", type=Path, default=cache, help=f"folder of the environments ({cache})")
    parser.add_argument("--torch", help="build to install, e.g. torch==2.13.0 (the newest CPU build)")
    options = parser.parse_args()
    options.envs = options.envs.resolve()
    if options.rounds < 3:
        parser.error(f"--rounds {options.rounds}: at least 3, because the first and the last round are not timed")
    versions, loads = install(options.envs, options.torch), [os.getloadavg()[0]]
    lines = [line for clients, images in options.clients for line in compare(clients, images, options, loads)]
    for name, of in versions.items():
        print(f"{name}: " + ", ".join(f"{package} {of[package]}" for package in PACKAGES if package in of))
    print(
        f"\nPython {sys.version.split()[0]}; test_vit at 32 px, LoRA rank 4 on attn.proj and mlp.fc2, AdamW, batch 16, "
        f"{options.threads} CPU threads; medians of {options.repeats} repeats of {options.rounds} rounds, in brackets "
        f"relative to lorafair;\nload average {min(loads):.1f} to {max(loads):.1f} on {os.cpu_count()} cores, "
        f"about 1 of it the work itself\n{NOTES}"
    )
    head = (
        "clients x images", "framework", "start s", "round s", "CPU s a round", "overhead ms a round",
        "ms a client beyond training", "memory MiB", "difference of weights",
    )  # fmt: skip
    for line in (head, ["---"] * len(head), *lines):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
