"""PREDICTS the seconds of a round on 1 to 1,024 GPUs from parts that are measured alone. Nothing is trained here.

The plan is the scheduler's, with the clients side by side that client.cohort=auto takes; adapters, shards and bytes are
those of the configuration (conf/paper/domainnet_vit.yaml). Seconds are given as options; where none is measured, their
default is a goal or an assumption, and --help says which. All federations divide the same images among their clients.
With --paper: the hours of the six settings in conf/paper on 1, 4 and 8 GPUs, the decoding of the files included.
Examples, with what benchmarks/gpu.py has measured on a card:

    python benchmarks/scaling.py --images-per-second 3500 --server-ms 12 0.8 --clients 60 1000 --gpus 1 8 64
    python benchmarks/scaling.py --paper --images-per-second 2500
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass

import torch

from lorafair.config.loading import load_config
from lorafair.config.schema import Config
from lorafair.data.loading import number_of_batches
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.adapter import AdapterLayout
from lorafair.model.backbone import build_model
from lorafair.model.side_by_side import cohort_size
from lorafair.schedule import RoundPlan, Scheduler
from lorafair.seeding import seeded_numpy

CONFIG = "conf/paper/domainnet_vit.yaml"
# Lines of the lists that DomainNet's authors publish (ai.bu.edu/M3SDA), of 345 classes: clipart, infograph, painting,
# quickdraw, real, sketch.
TRAIN = (33_525, 36_023, 50_416, 120_750, 120_906, 48_212)
TEST = (14_604, 15_582, 21_850, 51_750, 52_041, 20_916)
CLASSES, OF_CLASSES = 100, 345
NICO = 88_866  # images of NICO++'s six public domains (arXiv 2204.08040); assumed: equal domains, a fifth for testing
SETTINGS = (
    "domainnet_vit", "domainnet_mixer", "domainnet_vit_label_skew", "nico_vit", "nico_mixer", "nico_vit_label_skew",
)  # fmt: skip
GFLOP = {"vit_base_patch16_224": 71.5, "mixer_b16_224": 51.8}  # of training on an image, as benchmarks/gpu.py counts it
GPUS_OF_NODE = 8
SMALL_COLLECTIVES = 9  # of a round: agreements on errors and stops, losses and seconds, what evaluation counts
# NVIDIA/nccl, src/graph/tuning.cc, microseconds: a tree's base and steps over NVLink and network (LL), a ring's steps
# (Simple).
TREE_BASE, TREE_NVLINK, TREE_NETWORK, RING_NVLINK, RING_NETWORK = 4.4, 0.9, 5.0, 3.4, 9.6


@dataclass(frozen=True)
class Parts:
    """What is measured, or assumed, of a machine."""

    images_per_second: float
    evaluated_per_second: float
    step: float  # seconds of the shortest step, however few images it has
    cohort: float  # seconds around the steps of a cohort
    server: tuple[float, float]  # seconds of the server step on one GPU: of any, and a client more
    rest: tuple[float, float]  # seconds of rank 0's curves and checkpoint: of any, and a client more
    message: float  # seconds until a message is on its way
    pickle: float  # bytes a second, of the sharded server's results
    nvlink: float  # bytes a second and direction
    network: float  # bytes a second, direction and GPU


@dataclass(frozen=True)
class Federation:
    """A round of K clients on any number of GPUs."""

    config: Config
    model: AdaptedModel
    sizes: list[int]  # (N,) training images of each client
    test: list[int]  # test images of each domain

    @property
    def layout(self) -> AdapterLayout:
        """Of a packed adapter."""
        return self.model.adapters.layout

    @property
    def cohort(self) -> int:
        """Clients side by side on a GPU."""
        return cohort_size(self.config, self.sizes, self.model, torch.device("cuda"))


def federation(config: Config, model: AdaptedModel, clients: int, sigma: float) -> Federation:
    """Every domain's images divided among as many clients, of log-normal sizes where a domain has several."""
    generator, sizes = seeded_numpy(0, "scaling", clients), list[int]()
    for domain, total in enumerate(TRAIN):
        count = len(range(domain, clients, len(TRAIN)))
        parts = generator.lognormal(sigma=sigma, size=count)
        sizes += [max(1, round(total * CLASSES / OF_CLASSES * part / parts.sum())) for part in parts]
    return Federation(config, model, sizes, [round(total * CLASSES / OF_CLASSES) for total in TEST])


def training(case: Federation, parts: Parts, gpus: int) -> tuple[RoundPlan, list[float]]:
    """The plan, once the clients' seconds are learned, and how long each GPU trains."""
    local, cohort = case.config.client, case.cohort
    scheduler = Scheduler(
        seed=0, sizes=case.sizes, costs=case.sizes, clients_per_round=case.config.federation.clients_per_round,
        weighting="size", cohort=cohort, world_size=gpus,
    )  # fmt: skip

    def seconds(members: tuple[int, ...]) -> float:
        sizes = [case.sizes[client] for client in members]
        steps = [number_of_batches(size, local) for size in sizes]
        # The last batch of every pass over a client's images may be smaller than the others.
        images = sum(size * n / math.ceil(size / local.batch_size) for size, n in zip(sizes, steps, strict=True))
        return max(max(steps) * parts.step, images / parts.images_per_second) + parts.cohort

    alone = scheduler.plan(0, {})
    taken = {
        client: seconds(members) / len(members)
        for cohorts in alone.cohorts_of_rank
        for members in cohorts
        for client in members
    }
    plan = scheduler.plan(0, taken)
    return plan, [sum(taken[client] for client in clients) for clients in plan.clients_of_rank]


def link(parts: Parts, gpus: int) -> float:
    """Bytes a second that a GPU sends or receives."""
    return parts.nvlink if gpus <= GPUS_OF_NODE else parts.network


def small(gpus: int) -> float:
    """Seconds of an all-reduce of some numbers, by NCCL's own model of a tree."""
    if gpus == 1:
        return 0.0
    inside, nodes = min(gpus, GPUS_OF_NODE), math.ceil(gpus / GPUS_OF_NODE)
    return 1e-6 * (TREE_BASE + 2 * ((inside - 1) * TREE_NVLINK + math.log2(nodes) * TREE_NETWORK))


def predict(case: Federation, parts: Parts, gpus: int, server: str) -> dict[str, float]:
    """Seconds of every part of a round."""
    plan, loads = training(case, parts, gpus)
    layout, clients = case.layout, len(plan.clients)
    row, speed = 4 * layout.length, link(parts, gpus)
    split = [shard.length for shard in layout.split(gpus)]
    shards = split if server == "sharded" else [layout.length, *[0] * (gpus - 1)]
    busy = sum(map(bool, plan.clients_of_rank))
    moved = 4 * max(  # bytes that the busiest GPU receives or sends
        max((clients - len(own)) * shard, len(own) * (layout.length - shard))
        for own, shard in zip(plan.clients_of_rank, shards, strict=True)
    )
    messages = (busy + sum(map(bool, shards))) * max(1, min(16, math.ceil(clients * max(shards) / 2**24)))
    together = 0.0 if server == "rank0" or gpus == 1 else row / parts.pickle + gpus * parts.message
    hop = 1e-6 * (RING_NVLINK if gpus <= GPUS_OF_NODE else RING_NETWORK)
    batch = case.config.evaluation.batch_size
    batches = sum(math.ceil(total / batch) for total in case.test)
    return {
        "train": max(loads),
        "gather": 0.0 if gpus == 1 else moved / speed + messages * parts.message,
        "server": parts.server[0] + parts.server[1] * clients * max(shards) / layout.length + together,
        "broadcast": 0.0 if gpus == 1 else gpus * hop + row / speed,
        "evaluate": math.ceil(batches / gpus) * batch / parts.evaluated_per_second,
        "rest": parts.rest[0] + parts.rest[1] * clients + SMALL_COLLECTIVES * small(gpus),
        "balance": sum(loads) / gpus / max(loads),
    }


def most_overlap(seconds: dict[str, float], cohorts: float) -> float:
    """The most that asynchronous work could save of a round.

    A rank's last cohort cannot be sent before it ends. GPUs that wait for the server step could at most evaluate the
    round before, because the next evaluation is of what the step makes.
    """
    hidden = seconds["gather"] * max(0.0, 1 - 1 / max(1.0, cohorts))
    return hidden + min(seconds["server"], seconds["evaluate"])


def options() -> argparse.Namespace:
    """What the command was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--clients", type=int, nargs="+", default=[6, 60, 1000, 10000], metavar="K")
    add("--gpus", type=int, nargs="+", default=[1, 8, 64, 256, 1024], metavar="W")
    add("--servers", nargs="+", default=["rank0", "sharded"], choices=["rank0", "sharded"])
    add("--sigma", type=float, default=1.0, help="of the logarithm of a client's size (1)")
    add("--images-per-second", type=float, default=4250, help="a GPU trains; measured: bf16-true, compiled, H100")
    add("--evaluated-per-second", type=float, default=8500, help="measured: the same card, not compiled")
    add("--step-ms", type=float, default=17.0, help="of the shortest step; measured for 64 images, compiled")
    add("--cohort-ms", type=float, default=5.0, help="around a cohort; the CPU takes 1 to 5 a client (rounds.py)")
    add(
        "--server-ms",
        type=float,
        nargs=2,
        default=[82.0, 0.16],
        metavar=("FIXED", "CLIENT"),
        help="LoRA-FAIR with the bias; measured: an H100, 6 and 100 clients. A CPU thread takes 46 a client",
    )
    add("--rest-ms", type=float, nargs=2, default=[20.0, 0.005], metavar=("FIXED", "CLIENT"),
        help="rank 0's curves and checkpoint (rounds.py), and the plan of 10,000 clients; on a CPU")  # fmt: skip
    add("--message-us", type=float, default=15.0, help="measured with PyTorch's group that sends nothing")
    add("--nvlink-gbs", type=float, default=360.0, help="80 %% of H100's 450 a direction (NVIDIA's data sheet)")
    add("--network-gbs", type=float, default=40.0, help="80 %% of a 400 Gb/s adapter a GPU (DGX H100 user guide)")
    add("--pickle-gbs", type=float, default=1.0, help="of the sharded server's results; assumed")
    add("--paper", action="store_true", help="the six settings in conf/paper instead")
    add("--decode-ms", type=float, default=6.5, help="a core for a file to 224 pixels; measured: image_files.py")
    add("--cores", type=int, default=16, help="a GPU's, for decoding")
    return parser.parse_args()


def parts_of(given: argparse.Namespace) -> Parts:
    """The options in seconds and bytes."""
    return Parts(
        images_per_second=given.images_per_second,
        evaluated_per_second=given.evaluated_per_second,
        step=given.step_ms / 1e3,
        cohort=given.cohort_ms / 1e3,
        server=(given.server_ms[0] / 1e3, given.server_ms[1] / 1e3),
        rest=(given.rest_ms[0] / 1e3, given.rest_ms[1] / 1e3),
        message=given.message_us / 1e6,
        pickle=1e9 * given.pickle_gbs,
        nvlink=1e9 * given.nvlink_gbs,
        network=1e9 * given.network_gbs,
    )


def shapes_of(config: Config, classes: int) -> AdaptedModel:
    """The model without numbers."""
    with torch.device("meta"):
        return build_model(dataclasses.replace(config.model, weights="random"), classes, seed=0).attach("meta")


def of_paper(name: str) -> Federation:
    """One of the paper's settings: domains, each with one client or several of log-normal sizes."""
    config = load_config([f"conf/paper/{name}.yaml", "data.root=/not/read"])
    nico = name.startswith("nico")
    train = [NICO * 4 // 5 // 6] * 6 if nico else [total * CLASSES // OF_CLASSES for total in TRAIN]
    test = [NICO // 5 // 6] * 6 if nico else [total * CLASSES // OF_CLASSES for total in TEST]
    generator, sizes, count = seeded_numpy(0, "paper"), list[int](), config.partition.clients_per_domain or 1
    for total in train:
        parts = generator.lognormal(sigma=0.5, size=count)
        sizes += [max(1, round(total * part / parts.sum())) for part in parts]
    return Federation(config, shapes_of(config, 60 if nico else CLASSES), sizes, test)


def print_paper(parts: Parts, given: argparse.Namespace) -> None:
    """Hours of whole runs, one line a setting; each GPU comes with its cores for decoding."""
    print("PREDICTION, not measured: whole runs; decoding happens once, its result is kept for later runs")
    print("| setting | images | " + " | ".join(f"{gpus} GPU: decode min, s a round, h" for gpus in (1, 4, 8)) + " |")
    print("|---|---|---|---|---|")
    for name in SETTINGS:
        case = of_paper(name)
        speed = GFLOP["vit_base_patch16_224"] / GFLOP[case.config.model.name]
        faster = dataclasses.replace(
            parts,
            images_per_second=parts.images_per_second * speed,
            evaluated_per_second=parts.evaluated_per_second * speed,
        )
        images, cells = sum(case.sizes) + sum(case.test), []
        for gpus in (1, 4, 8):
            decode = images * given.decode_ms / 1e3 / (given.cores * gpus)
            seconds = predict(case, faster, gpus, "rank0")
            seconds.pop("balance")
            total = sum(seconds.values())
            hours = (decode + case.config.rounds * total) / 3600
            cells.append(f"{decode / 60:.1f}, {total:.1f}, {hours:.2f}")
        print(f"| {name} | {images:,} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print one of the tables."""
    given = options()
    parts, config = parts_of(given), load_config([CONFIG, "data.root=/not/read"])
    if given.paper:
        print_paper(parts, given)
    else:
        print_scaling(parts, given, config)


def print_scaling(parts: Parts, given: argparse.Namespace, config: Config) -> None:
    """A round of any number of clients on any number of GPUs."""
    model = shapes_of(config, CLASSES)
    print(f"PREDICTION, not measured: {CONFIG}, {model.adapters.layout.length:,} numbers a client")
    columns = "clients (side by side) | GPUs | server | s a round | speed-up | balance"
    print(f"{columns} | train | gather | server | broadcast | evaluate | rest, % | overlap saves at most, %")
    for clients in given.clients:
        case = federation(config, model, clients, given.sigma)
        for server in given.servers:
            alone = 0.0
            for gpus in given.gpus:
                seconds = predict(case, parts, gpus, server)
                balance = seconds.pop("balance")
                total = sum(seconds.values())
                alone = alone or total * given.gpus[0]
                saved = most_overlap(seconds, clients / case.cohort / gpus) / total
                shares = " | ".join(f"{100 * part / total:.1f}" for part in seconds.values())
                first = f"{clients} ({case.cohort}) | {gpus} | {server} | {total:.3g} | {alone / total:.1f}"
                print(f"{first} | {balance:.2f} | {shares} | {100 * saved:.1f}", flush=True)


if __name__ == "__main__":
    main()
