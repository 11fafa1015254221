"""Whether lorafair is right and fast on a GPU, and by how much: one command, one card, eight minutes.

    a correctness   every method against the CPU, equal bits, killed and resumed, NaN, process groups, no waiting
    b training      images/s and MFU of one client, against a bare loop and peft; ViT-B/16, Mixer-B/16, ViT-L/16
    c cohorts       64 clients of batch 8, one by one and side by side
    d server        the server step of every method on the card and on the CPU
    e rounds        whole rounds of conf/paper/domainnet_vit: shares of the phases, idle time, evaluation
    f data          images/s from files, packed, resident, as tokens
    g start         seconds from the command to the first step

It needs no network, no data and no weights, runs from a checkout, and leaves gpu.json, gpu.md and trace.json.gz. What
comes is printed as it comes, and written after each line. Parts are processes of their own: one that fails is printed
with its traceback and recorded, and the next one goes on; the exit status is 1 then. Examples:

    python benchmarks/gpu.py --out runs/gpu
    python benchmarks/gpu.py --only b c --minutes 4
    python benchmarks/gpu.py --tiny --device cpu        # all of it with a tiny model, to try the script
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

from gpu_parts import ROOT, environ_of_child  # noqa: E402
from gpu_parts.record import Part, markdown, write_json  # noqa: E402

# Name: fraction of the time. What a part leaves goes to those after it.
PARTS = {
    "correctness": 0.3,
    "training": 0.25,
    "cohorts": 0.13,
    "server": 0.1,
    "rounds": 0.1,
    "data": 0.06,
    "start": 0.06,
}
LETTERS = dict(zip("abcdefg", PARTS, strict=True))
WORK = "in_work"  # folder in the results, of what a part in work has found; removed at the end
GRACE = 40.0  # seconds beyond its time after which a part is killed
SHORTEST = 1.0  # seconds that must be left for a part
EMPTY: dict[str, Any] = {
    "status": "failed", "seconds": 0.0, "tables": [], "checks": [], "goals": [], "notes": [], "failures": {},
}  # fmt: skip
WARM_UPS = 2  # processes that compile while part a runs
# Dense bf16 TFLOP/s by a part of the name, the more exact ones first (NVIDIA's data sheets, without sparsity).
PEAKS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0, "B200": 2250.0, "A100": 312.0,
    "L40S": 362.0, "A10": 125.0, "L4": 121.0,
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*LETTERS, *PARTS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help="letters or names (all)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few repeats, also on a CPU")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(cuda)")
    parser.add_argument("--minutes", type=float, default=8.0, help="in all (8)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of the results (runs/gpu)")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="dense bf16 peak of the card (by its name)")
    parser.add_argument("--here", action="store_true", help="all parts in this process, to debug one")
    parser.add_argument("--part", choices=[*PARTS, "warm_up"], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the first card; empty without one."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (cell.strip() for cell in text.splitlines()[0].split(",")), strict=False))


@cache
def name_of_card() -> str:
    """Empty without one. This process loads no CUDA, and a machine may have no nvidia-smi."""
    if name := smi("name").get("name"):
        return name
    code = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


def state_of_card() -> str:
    """Clocks and temperature now."""
    found = smi("clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit", "pstate")
    return ", ".join(f"{name} {value}" for name, value in found.items()) or "no card"


def header(options: argparse.Namespace) -> dict[str, Any]:
    from lorafair.files.shipped import commit

    card = {"name": name_of_card()} | smi("driver_version", "memory.total") if options.device == "cuda" else {}
    versions = {}
    for package in ("torch", "lightning", "pytorch-lightning", "timm", "peft", "torchmetrics", "omegaconf"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    file = ROOT / "COMMIT"  # of a copy without git
    return {
        "command": shlex.join(["python", *sys.argv]),
        "card": ", ".join(f"{name} {value}" for name, value in card.items()) or f"none; {options.device}",
        "card before": state_of_card(),
        "peak, dense bf16": f"{peak(options)} TFLOP/s",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}",
        "versions": f"Python {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in versions.items()),
        "commit": commit() or (file.read_text().strip() if file.exists() else "unknown"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def peak(options: argparse.Namespace) -> float | None:
    if options.peak is not None or options.device == "cpu":
        return options.peak
    return next((value for key, value in PEAKS.items() if key in name_of_card()), None)


def run_part(options: argparse.Namespace) -> dict[str, Any]:
    """One part in this process."""
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: torch sees no CUDA device; use --device cpu --tiny, or load the driver")
    scratch = Path(tempfile.mkdtemp(prefix=f"gpu-{options.part}-"))
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
    name = options.part if options.part != "warm_up" else f"warm_up_{options.turn}"
    part = Part(
        name=name, device=torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu"),
        tiny=options.tiny, scratch=scratch, out=options.out / WORK / f"{name}.json", seconds=options.seconds,
        peak_tflops=peak(options),
    )  # fmt: skip
    extra = (options.turn, WARM_UPS) if options.part == "warm_up" else ()
    try:
        module = part.attempt("import", lambda: importlib.import_module(f"gpu_parts.{options.part}"))
        if module is not None:
            part.attempt("the part", lambda: module.run(part, *extra))
        part.ended = True
        part.save()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return part.content()


def child(options: argparse.Namespace, name: str, seconds: float, turn: int = 0, **run: Any) -> subprocess.Popen[bytes]:
    """The process of a part."""
    command = [sys.executable, "-u", str(HERE / "gpu.py"), "--part", name, "--seconds", str(seconds)]
    command += ["--turn", str(turn), "--device", options.device, "--out", str(options.out)]
    command += ["--tiny"] * options.tiny + (["--peak", str(options.peak)] if options.peak is not None else [])
    environ = environ_of_child()
    if name == "correctness":  # deterministic products need it, and others are slower with it
        environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return subprocess.Popen(command, env=environ, cwd=ROOT, start_new_session=True, **run)


def finish(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Wait so long for a child; kill it, and what it has started, afterwards. None if that was needed."""
    try:
        return process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        kill(process)
        return None


def kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def in_child(options: argparse.Namespace, name: str, seconds: float, longest: float) -> dict[str, Any]:
    """One part in a process of its own; what it has left if it was killed or has crashed."""
    file = options.out / WORK / f"{name}.json"
    file.unlink(missing_ok=True)
    process = child(options, name, seconds)
    try:
        status = finish(process, longest)
    finally:
        kill(process)
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else copy.deepcopy(EMPTY)
    if status is None:
        content["notes"].append(f"killed after {longest:.0f} s")
        content["status"] = "failed"
    elif status != 0:
        content["failures"]["the process"] = f"ended with status {status}"
        content["status"] = "failed"
    return content


def main() -> int:
    options = arguments()
    options.out = options.out.resolve()
    (options.out / WORK).mkdir(parents=True, exist_ok=True)
    if options.part:
        run_part(options)
        return 0
    if options.device == "cuda" and not name_of_card():
        print("error: --device cuda: torch sees no CUDA device; use --device cpu --tiny", file=sys.stderr)
        return 2
    chosen = [LETTERS.get(name, name) for name in options.only or PARTS]
    chosen = [name for name in PARTS if name in chosen]
    report: dict[str, Any] = {"header": header(options), "parts": {}}
    for name, value in report["header"].items():
        print(f"{name}: {value}", flush=True)
    warming = warm_ups(options, chosen)
    try:
        run_parts(options, chosen, report, warming)
    finally:
        for process in warming:
            kill(process)
        logs = [log.read_text(errors="replace") for log in sorted((options.out / WORK).glob("warm_up_*.log"))]
        lines = [line for log in logs for line in log.splitlines()]
        report["compiled before"] = [line for line in lines if line.startswith(("compiled:", "FAILED", "note"))]
        write_json(options.out / "gpu.json", report)
        shutil.rmtree(options.out / WORK, ignore_errors=True)
    failed = [name for name, part in report["parts"].items() if part["status"] != "done"]
    verdict = f"failed or left out: {', '.join(failed)}" if failed else "all parts done"
    print(f"\n{options.out / 'gpu.md'}; {verdict}", flush=True)
    return 1 if failed else 0


def warm_ups(options: argparse.Namespace, chosen: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    """Processes that compile what later parts need."""
    started: list[subprocess.Popen[bytes]] = []
    if options.device == "cuda" and not options.tiny and {"training", "cohorts"} & set(chosen):
        for turn in range(WARM_UPS):
            with (options.out / WORK / f"warm_up_{turn}.log").open("wb") as log:
                started.append(child(options, "warm_up", 300, turn, stdout=log, stderr=log))
    return started


def run_parts(
    options: argparse.Namespace, chosen: Sequence[str], report: dict[str, Any], warming: Sequence[Any]
) -> None:
    """One part after the other; the report is written after each."""
    until = time.monotonic() + 60 * options.minutes
    for index, name in enumerate(chosen):
        if name != "correctness":  # nothing else may run while a part is timed
            for process in warming:
                finish(process, min(90.0, (until - time.monotonic()) / 3))
        left = until - time.monotonic()
        seconds = left * PARTS[name] / sum(PARTS[other] for other in chosen[index:])
        print(f"\n==== {name}: {seconds:.0f} s of {left:.0f}; {state_of_card()}", flush=True)
        if left < SHORTEST:
            content = EMPTY | {"status": "left out", "notes": ["the time was over"]}
        elif options.here:
            options.part, options.seconds = name, seconds
            content = run_part(options)
        else:
            content = in_child(options, name, seconds, min(seconds + GRACE, left))
        report["parts"][name] = content | {"card after": state_of_card()}
        print(f"---- {name}: {content['status']}, {content['seconds']:.0f} s", flush=True)
        write_json(options.out / "gpu.json", report)
        (options.out / "gpu.md").write_text(markdown(report["parts"], report["header"]))


if __name__ == "__main__":
    sys.exit(main())
