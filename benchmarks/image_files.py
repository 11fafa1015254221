"""The whole way of DomainNet's files at ViT-B/16's size and 224 pixels: decode, cache, tokens, training, evaluation.

JPEG files are written as DomainNet has them (domain/class/*.jpg with list files), of the sizes that its images have,
from drawings of EmojiDomains or letters of GlyphDomains. Then conf/paper/domainnet_vit.yaml runs on them twice: as it
is, with adapters in all blocks, and with adapters in the last three, where the tokens of the others are kept. Frozen
weights are random: speed does not depend on them, and accuracies mean nothing here. Core-seconds are the cores' work
(user and system), which a busy machine does not change much.

    python benchmarks/image_files.py                             # a quarter of an hour on two cores
    python benchmarks/image_files.py --images 4 --rounds 1 --model vit_tiny_patch16_224
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

import lorafair
from lorafair.config.loading import load_config
from lorafair.config.schema import Config
from lorafair.data.images import ImageData
from lorafair.data.sources import load_images
from lorafair.experiment import build_experiment
from lorafair.federation import run_rounds
from lorafair.launch import in_place
from lorafair.seeding import seeded_numpy

CONFIG = "conf/paper/domainnet_vit.yaml"
STORED = 224  # pixels to which a drawing of the source is read, before it is enlarged
SIDES = (250, 1000)  # pixels of the shorter and the longer side that most of DomainNet's images lie between
WAYS = {
    "adapters in all blocks": ("model.prefix_cache=never",),
    "in the last three, tokens kept": ("model.lora.last_blocks=3", "model.prefix_cache=always", "model.lora.dropout=0"),
}


@dataclass
class Stage:
    """What a stage has cost."""

    work: float = 0.0  # seconds of all cores
    clock: float = 0.0


@dataclass
class Measured:
    """One run."""

    stages: dict[str, Stage] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a block."""
        before, began = work(), time.perf_counter()
        yield
        self.stages[name] = Stage(work() - before, time.perf_counter() - began)


class Phases(lorafair.Callback):
    """Seconds of the phases of every round, by the clock, with the share of it that the cores worked."""

    def __init__(self) -> None:
        self.rounds: list[Mapping[str, float]] = []

    def on_round_end(self, round: int, scalars: Mapping[str, float]) -> None:
        self.rounds.append(dict(scalars))


def work() -> float:
    """Seconds that the cores have worked for this process and those it has waited for."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def memory() -> float:
    """Peak of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_files(root: Path, source: str, per_domain: int, test_per_domain: int) -> int:
    """DomainNet's layout with so many images of every domain; returns their bytes."""
    data = load_images(lorafair.DataConfig(source=source), seed=0)
    rng, size = seeded_numpy(0, "image files"), 0
    for d, domain in enumerate(data.domains):
        for split, images, count in (("train", data.train, per_domain), ("test", data.test, test_per_domain)):
            chosen = rng.permutation(np.flatnonzero(images.domains == d))[:count]
            lines = []
            for number, index in enumerate(chosen.tolist()):
                label = int(images.labels[index])
                name = f"{domain}/{data.classes[label]}/{split}_{number:04}.jpg".replace(" ", "_")
                size += write_image(root / name, np.asarray(images.images.read(index, STORED)), rng)
                lines.append(f"{name} {label}\n")
            (root / f"{domain}_{split}.txt").write_text("".join(lines))
    return size


def write_image(file: Path, picture: np.ndarray, rng: np.random.Generator) -> int:
    """A JPEG file of a photograph's size and grain; returns its bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    width, height = (int(side) for side in rng.uniform(*SIDES, size=2))
    enlarged = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 40, (height // 4 + 1, width // 4 + 1, 3)).clip(-127, 127)
    texture = Image.fromarray((grain + 128).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    Image.blend(enlarged, texture, 0.3).save(file, quality=90)
    return file.stat().st_size


def run_way(config: Config) -> tuple[Measured, Phases, ImageData]:
    """Build, decode or compute tokens, and run all rounds."""
    measured, phases = Measured(), Phases()
    with in_place(config.fabric) as fabric:
        with measured.stage("lists, weights, model"):
            experiment, _ = build_experiment(fabric, config)
        with measured.stage("decode, resize, keep"):
            experiment.open_inputs()
        with measured.stage("rounds"):
            run_rounds(experiment, None, [phases])
        return measured, phases, experiment.data


def main() -> None:
    """Write the files, run both ways, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="emoji_domains", choices=["emoji_domains", "glyph_domains"])
    parser.add_argument("--images", type=int, default=24, help="training images a domain")
    parser.add_argument("--test-images", type=int, default=8, help="test images a domain")
    parser.add_argument("--rounds", type=int, default=2, help="five times as many with tokens")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--model", default="vit_base_patch16_224")
    given = parser.parse_args()
    threads = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch, "DomainNet")
        written = write_files(root, given.source, given.images, given.test_images)
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch, "cache"))
        for number, (way, options) in enumerate(WAYS.items()):
            rounds = given.rounds * (5 if number else 1)
            config = load_config(
                [
                    CONFIG, f"data.root={root}", "data.classes=null", "data.workers=0", f"model.name={given.model}",
                    "model.weights=random", f"client.batch_size={given.batch}", f"rounds={rounds}",
                    f"run_dir={Path(scratch, f'run{number}')}", "fabric.accelerator=cpu", "fabric.devices=1",
                    f"fabric.threads={threads}", f"evaluation.every={rounds}", *options,
                ]
            )  # fmt: skip
            report(way, given, config, written, run_way(config), Path(scratch, "cache"))


def report(
    way: str, given: argparse.Namespace, config: Config, written: int,
    done: tuple[Measured, Phases, ImageData], cache: Path,
) -> None:  # fmt: skip
    """One table."""
    measured, phases, data = done
    train, test = len(data.train), len(data.test)
    print(f"\n{given.model}, {way}: {train} + {test} files of {written / (train + test) / 1e3:.0f} kB on average")
    print("| stage | core-seconds | by the clock | images | core-ms an image |\n|---|---|---|---|---|")
    counts = {"decode, resize, keep": train + test}
    for name, stage in measured.stages.items():
        images = counts.get(name)
        each = f"{1e3 * stage.work / images:.0f}" if images else ""
        print(f"| {name} | {stage.work:.1f} | {stage.clock:.1f} | {images or ''} | {each} |")
    share = measured.stages["rounds"].work / measured.stages["rounds"].clock
    for phase in ("train", "gather", "server", "broadcast", "evaluate"):
        seconds = [scalars[f"time/{phase}"] for scalars in phases.rounds if f"time/{phase}" in scalars]
        images = {"train": train * len(seconds), "evaluate": test}.get(phase)
        total = sum(seconds) * share
        each = f"{1e3 * total / images:.0f}" if images else ""
        print(f"| rounds: {phase} | {total:.2f} | {sum(seconds):.2f} | {images or ''} | {each} |")
    kept = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    print(f"peak memory {memory():.0f} MiB; kept on disk {kept / 1e6:.1f} MB; {config.rounds} rounds", flush=True)


if __name__ == "__main__":
    main()
