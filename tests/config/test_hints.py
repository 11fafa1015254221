"""What is said to somebody who types what another program, or an older version, understood."""

from __future__ import annotations

import pytest

from lorafair.config.hints import RENAMED, options_called
from lorafair.config.loading import load_config
from lorafair.config.options import all_options
from lorafair.config.schema import Config
from lorafair.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lr=0.1", "client.learning_rate=0.1"),
        ("learning_rate=0.1", "client.learning_rate=0.1 or server.learning_rate=0.1"),
        ("epochs=3", "client.epochs=3"),
        ("local_epochs=3", "client.epochs=3"),
        ("batch_size=4", "client.batch_size=4 or evaluation.batch_size=4"),
        ("precision=bf16", "fabric.precision=bf16"),
        ("client.lr=0.1", "client.learning_rate=0.1"),
        ("num_clients=5", "partition.clients=5"),
        ("lambda=0.1", "method.regularization=0.1"),
        ("r=8", "model.lora.rank=8"),
        ("rouns=3", "rounds"),
        ("method.name=fedavg", "fedit"),
        ("method.name=LoRA-FAIR", "lora_fair"),
        ("method.name=lorafair", "lora_fair"),
        ("data.source=ImageFolder data.root=/images", "folder"),
        ("data.source=NICO++", "nico"),
        ("partition.scheme=uniform", "iid"),
        ("client.optimizer=adam", "adamw"),
        ("fabric.accelerator=cudaa", "cuda"),
        ("resume=true", "resume=auto"),
        ("resume=latest", "resume=auto"),
        ("resume=false", "resume=never"),
    ],
)
def test_the_error_says_what_may_have_been_meant(given: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(given.split())
    assert f"did you mean {meant}? " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("former", RENAMED)
def test_a_renamed_option_names_the_new_one(former: str) -> None:
    assert former not in dict(all_options(Config))
    assert RENAMED[former] in dict(all_options(Config))
    with pytest.raises(ConfigError, match=rf"^{former} is now {RENAMED[former]}$"):
        load_config(f"{former}=[0.5]")
    assert {"client.final_share", "model.lora.client_rank_shares"} <= RENAMED.keys()


def test_only_options_that_there_are_can_be_meant() -> None:
    assert options_called("momentum") == ["client.momentum", "server.momentum"]
    assert options_called("GPUs") == ["fabric.devices"]
    assert options_called("nonsense") == []
