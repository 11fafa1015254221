"""Images a second that the loader gives (decoding files, cached images, resident) and that training takes.

The images are made-up JPEGs. Training is the cohort's own loop on one client, fed with resident images. Everything runs
on the same CPU threads, in one process. Example:

    python benchmarks/loading.py --model vit_tiny_patch16_224 --size 224
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lorafair.caching.images import cached_images
from lorafair.client.cohort import Cohort, LocalTraining
from lorafair.config import ClientConfig, DataConfig, FabricConfig, LoRAConfig, ModelConfig
from lorafair.data.images import ImageReader
from lorafair.data.loading import BatchSource, ImageSource, Indices, ResidentSource, cohort_steps, local_batches
from lorafair.data.sources import load_images
from lorafair.launch import in_place
from lorafair.model.backbone import build_model
from lorafair.seeding import seeded, seeded_numpy


def write_images(root: Path, count: int, side: int) -> None:
    """Smooth noise: JPEGs that take as long to decode as photographs of that size."""
    rng = seeded_numpy(0, "benchmark")
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        file = root / "made-up" / f"class{number % 4}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, quality=85)


def load(source: BatchSource, batches: Sequence[Indices]) -> int:
    """One pass over the batches; returns the number of images."""
    return sum(len(batch) for batch in source.batches(batches))


def rate(pass_once: Callable[[], int], seconds: float) -> float:
    """Images a second of a pass that returns their number; the first one warms up."""
    pass_once()
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        images += pass_once()
    return images / (time.perf_counter() - began)


class Training:
    """Rounds of one client on all images."""

    def __init__(self, name: str, size: int, source: BatchSource, labels: Indices, batch_size: int) -> None:
        lora = LoRAConfig(rank=16)
        config = ModelConfig(name=name, weights="random", image_size=size, normalization="imagenet", lora=lora)
        model = build_model(config, classes=4, seed=0).attach("cpu")
        client = ClientConfig(epochs=1, batch_size=batch_size, learning_rate=0.001, momentum=0.9)
        self.training = LocalTraining(model, torch.from_numpy(labels), client)
        self.start = model.adapters.draw(0, 0).unsqueeze(0)
        self.batches = local_batches(np.arange(len(labels)), client, seeded(0, "batches"))
        self.source, self.images = source, len(labels)

    def round(self) -> int:
        """Train once; returns the number of images."""
        cohort = Cohort(self.start, cohort_steps([self.batches]), [seeded(0, "dropout")])
        self.training.train(cohort, self.source.batches(self.batches))
        return self.images


def main() -> None:
    """Print a line a way of loading."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_vit")
    parser.add_argument("--size", type=int, default=160, help="side of the model's input")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--side", type=int, default=400, help="side of the files' images")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="processes of the loader, as data.workers")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each measurement")
    options = parser.parse_args()
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    with in_place(FabricConfig(accelerator="cpu", threads=threads)) as fabric, tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        write_images(Path(scratch), options.images, options.side)
        config = DataConfig(source="folder", root=Path(scratch), test_fraction=0.1, workers=options.workers)
        direct = load_images(config, seed=0)
        count = len(direct.train)
        cached = cached_images(fabric, config, direct, options.size, read_once=False)

        def source(images: ImageReader) -> ImageSource:
            return ImageSource(images, options.size, options.workers)

        resident = ResidentSource(source(cached.train.images), count, torch.device("cpu"))
        ways: dict[str, BatchSource] = {
            "decoding files": source(direct.train.images),
            "cached images": source(cached.train.images),
            "resident": resident,
        }
        training = Training(options.model, options.size, resident, direct.train.labels, options.batch)
        taken = rate(training.round, options.seconds)
        print(f"{options.model}, {options.size} pixels, CPU threads: {threads}, workers: {options.workers}")
        print(f"{'training takes':16} {taken:10,.0f} images/s")
        for name, way in ways.items():
            given = rate(functools.partial(load, way, training.batches), options.seconds)
            print(f"{name:16} {given:10,.0f} images/s   {given / taken:6.1f} x what training takes")


if __name__ == "__main__":
    main()
