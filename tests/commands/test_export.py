"""A trained model leaves the framework: the same logits in timm alone, and as a PEFT adapter."""

from __future__ import annotations

import resource
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.beit import Beit
from torch import nn

import lorafair
from lorafair.aggregation.registry import method_of
from lorafair.checkpointing.checkpoint import list_checkpoints, load_checkpoint
from lorafair.cli import main
from lorafair.commands.export import TrainedModel, export_run, write_merged, write_peft
from lorafair.config.schema import Config, LoRAConfig, ModelConfig
from lorafair.errors import LorafairError
from lorafair.federation import run_federation
from lorafair.model.backbone import build_model, create_backbone
from lorafair.registry import BACKBONES
from lorafair.seeding import seeded
from tests.conftest import launched

IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=seeded(0, "images"))
Tiny = Callable[..., Config]


def trained(config: Config) -> torch.Tensor:
    """Run it; the logits of its global model."""
    run_federation(launched(1), config)
    tensors = load_checkpoint(list_checkpoints(config.folder)[-1]).tensors
    model = build_model(config.model, 4, config.seed).attach()
    model.adapters.write(tensors["adapter"])
    model.adapters.load_base_weights({k.removeprefix("base."): t for k, t in tensors.items() if k.startswith("base.")})
    with torch.inference_mode():
        return model(IMAGES)


@pytest.mark.parametrize(
    ("name", "target", "takes_size"),
    [
        ("test_vit", "attn.proj", True),
        ("test_convnext", "mlp.fc1", False),
        ("coat_tiny", "serial_blocks1.*.fc1", True),  # some of its modules are shared
        ("nest_tiny", "levels.2.*.0.mlp.fc1", True),  # how it pools is a module of its own
        ("volo_d1_224", "network.4.*.mlp.fc1", True),  # without the second head
    ],
)
def test_the_line_that_is_printed_runs_as_it_is(tmp_path: Path, name: str, target: str, takes_size: bool) -> None:
    """With img_size only where the architecture takes it, and from a folder with quotes in its name."""
    lora = LoRAConfig(rank=1, targets=(target,))
    config = Config(model=ModelConfig(name=name, weights="random", image_size=64, lora=lora))
    model = build_model(config.model, 4, 0).attach()
    model.adapters.write(torch.randn(model.adapters.layout.length, generator=seeded(0, "row")))
    folder = tmp_path / 'a "quoted" folder'
    folder.mkdir()
    images = IMAGES.repeat_interleave(2, 2).repeat_interleave(2, 3)  # 64 x 64
    with torch.inference_mode():
        expected = model(images)
        line = write_merged(TrainedModel(config, model, 4, folded=False), folder)
        assert ("img_size=64" in line) == takes_size
        torch.testing.assert_close(eval(line).eval()(model.normalize(images)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["head", "all"])
def test_the_mean_of_the_last_rounds_is_evaluated_and_exported_and_trains_nothing(
    tiny: Tiny, tmp_path: Path, parts: str
) -> None:
    """Of rounds 2 and 3: against the adapters of runs without it that ended there."""
    row, last = [], 0.0
    for rounds in (1, 2, 3):
        config = tiny("method.name=fedit", f"rounds={rounds}", f"run_dir={tmp_path / 'plain'}")
        trained(config)
        row.append(load_checkpoint(list_checkpoints(config.folder)[-1]).tensors["adapter"].double())
        last = lorafair.RunResult(config.folder).content["mean_loss"]
    given = ("method.name=fedit", "evaluation.average_rounds=2", f"evaluation.average_parts={parts}")
    config = tiny(*given, "rounds=3")
    trained(config)
    tensors = load_checkpoint(list_checkpoints(config.folder)[-1]).tensors
    assert torch.equal(tensors["adapter"].double(), row[2]), "training is what it was"
    model = build_model(config.model, 4, config.seed).attach()
    begin = 0 if parts == "all" else model.adapters.layout.adapter_length
    expected = row[2].clone()
    expected[begin:] = ((row[1] + row[2]) / 2)[begin:]
    model.adapters.write(expected.float())
    with torch.inference_mode():
        torch.testing.assert_close(
            lorafair.RunResult(config.folder).load_model()(model.normalize(IMAGES)), model(IMAGES), rtol=1e-4, atol=1e-5
        )
    losses = [lorafair.RunResult(config.folder).metrics["eval/loss"][n] for n in (1, 3)]
    assert losses[0] == lorafair.RunResult(tmp_path / "plain").metrics["eval/loss"][1], "there is one round so far"
    assert losses[1] != last


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (("method.name=fedsa_lora", "average_parts=head"), "whose clients are evaluated with a model each; leave it"),
        (("method.name=fedex_lora", "average_parts=all"), r"average_parts=all does not fit method\.name=fedex_lora"),
        (("method.name=flex_lora", "average_parts=all"), "possible: head$"),
    ],
)
def test_rounds_that_cannot_be_averaged_are_refused(tiny: Tiny, pairs: tuple[str, str], message: str) -> None:
    config = tiny(pairs[0], "evaluation.average_rounds=2", f"evaluation.{pairs[1]}")
    with pytest.raises(LorafairError, match=message):
        method_of(config)


@pytest.mark.slow
@pytest.mark.parametrize("initialization", ["average", "fresh"])
def test_merged_weights_are_plain_timm(tiny: Tiny, tmp_path: Path, initialization: str) -> None:
    config = tiny(f"federation.initialization={initialization}")
    expected = trained(config)
    assert main(["export", str(config.folder), str(tmp_path / "out")]) == 0
    alone = timm.create_model(
        "test_vit", num_classes=4, img_size=32, checkpoint_path=str(tmp_path / "out" / "model.safetensors")
    ).eval()
    with torch.inference_mode():
        torch.testing.assert_close(alone((IMAGES / 255 - 0.5) / 0.5), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_weights_that_average_tokens_are_loaded_as_printed(tiny: Tiny, tmp_path: Path) -> None:
    """A fine-tuned MAE: the line that loads it makes a model that averages, too."""
    file = tmp_path / "mae.pth"
    torch.save({"model": timm.create_model("test_vit", img_size=32, global_pool="avg").state_dict()}, file)
    config = tiny(f"model.weights={file}")
    expected = trained(config)
    alone = eval(export_run(config.folder, tmp_path / "out", peft=False).splitlines()[0], {"timm": timm}).eval()
    with torch.inference_mode():
        torch.testing.assert_close(alone((IMAGES / 255 - 0.5) / 0.5), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_peft_adapter_on_the_same_frozen_weights(tiny: Tiny, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install 'lorafair[export]'")
    config = tiny()
    expected = trained(config)
    assert "PeftModel.from_pretrained" in export_run(config.folder, tmp_path / "out", peft=True)
    loaded = peft.PeftModel.from_pretrained(create_backbone(config.model, 4, config.seed), tmp_path / "out").eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded((IMAGES / 255 - 0.5) / 0.5), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_peft_adapter_of_a_backbone_that_does_not_know_the_classes(tiny: Tiny, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install 'lorafair[export]'")

    class Small(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(3 * 32 * 32, 16), nn.Linear(16, classes)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.hidden(images.flatten(1)).relu())
            return logits

    lorafair.register_backbone("small", head="head", image_size=32, targets=("hidden",))(lambda config: Small(2))
    try:
        config = tiny("model.name=small", "model.lora.last_blocks=null")
        expected = trained(config)
        export_run(config.folder, tmp_path / "out", peft=True)
        plain = create_backbone(config.model, 4, config.seed)
        plain.head = nn.Linear(16, 4)
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        with torch.inference_mode():
            torch.testing.assert_close(loaded((IMAGES / 255 - mean) / std), expected, rtol=1e-4, atol=1e-5)
    finally:
        BACKBONES.remove("small")


@pytest.mark.slow
def test_a_full_disk_is_one_line_with_the_folder(tiny: Tiny, tmp_path: Path) -> None:
    trained(config := tiny("rounds=1"))
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
    try:
        with pytest.raises(LorafairError, match=rf"^{tmp_path / 'out'} cannot be written: .*File too large"):
            export_run(config.folder, tmp_path / "out", peft=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.mark.slow
def test_what_cannot_be_exported_says_why(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(LorafairError, match="is no run directory with a checkpoint"):
        export_run(tmp_path / "none", tmp_path / "out", peft=False)
    personal = tiny("method.name=local_only", f"run_dir={tmp_path / 'personal'}")
    run_federation(launched(1), personal)
    with pytest.raises(LorafairError, match="has no global model"):
        export_run(personal.folder, tmp_path / "out", peft=False)
    fresh = tiny("federation.initialization=fresh", f"run_dir={tmp_path / 'fresh'}")
    run_federation(launched(1), fresh)
    with pytest.raises(LorafairError, match="merged updates into the frozen weights"):
        export_run(fresh.folder, tmp_path / "out", peft=True)


def test_peft_is_refused_for_layers_whose_weight_the_backbone_reads(tmp_path: Path) -> None:
    """PEFT's layer has no effect there: the adapter would be written and give the logits of the frozen weights."""
    pytest.importorskip("peft", reason="pip install 'lorafair[export]'")

    def build(config: ModelConfig) -> nn.Module:
        return Beit(img_size=32, patch_size=16, num_classes=4, embed_dim=16, depth=1, num_heads=2)

    lorafair.register_backbone("small_beit", head="head", image_size=32)(build)
    try:
        for targets, message in ((("attn.qkv",), "would give other logits"), (("attn.proj",), "")):
            lora = LoRAConfig(rank=2, targets=targets)
            config = Config(model=ModelConfig(name="small_beit", weights="random", lora=lora))
            model = build_model(config.model, 4, config.seed).attach()
            model.adapters.write(torch.randn(model.adapters.layout.length, generator=seeded(0, "row")))
            with pytest.raises(LorafairError, match=message) if message else nullcontext():
                write_peft(TrainedModel(config, model, 4, folded=False), tmp_path)
    finally:
        BACKBONES.remove("small_beit")
