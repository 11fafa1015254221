"""Suggestions for option names of other programs and of older versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafair.config.hints import options_called
from lorafair.config.loading import load_config
from lorafair.config.options import all_options, former_keys
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
        ("clients={learning_rate:0.1}", "client"),
    ],
)
def test_the_error_says_what_may_have_been_meant(given: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(given.split())
    assert f"did you mean {meant}? " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("former", former_keys(Config))
def test_a_renamed_option_names_the_new_one(former: str) -> None:
    assert former not in dict(all_options(Config))
    with pytest.raises(ConfigError, match=rf"^{former} is now {former_keys(Config)[former]}$"):
        load_config(f"{former}=[0.5]")
    assert {"client.final_share", "model.lora.client_rank_shares"} <= former_keys(Config).keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("fabric.strategy=ddp", r"^there is no option fabric\.strategy; options of fabric: "),
        ("compare={methods: [fedit]}", r"^a compare: section is for lorafair compare; type: lorafair compare FILE"),
        ("=3", r"^=3 has no name before the = "),
        ("method=null", r"^method=None: method is a group of options; set method\.name=lora_fair$"),
        ("rounds=null", r"^rounds=null is not possible; leave it out for the default$"),
        ("data.options=[a]", r"^data\.options=\['a'\] must be a group of options: data\.options=\{NAME: VALUE\}$"),
        ("model.lora.rank={4: x}", r"^model\.lora\.rank=.*: the probability of each rank must be a number"),
        ("model.lora.rank={4:0.5}", "with a space after each colon$"),
    ],
)
def test_other_mistakes_say_what_is_possible(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([given])


def test_only_the_pair_with_the_mistake_is_shown() -> None:
    with pytest.raises(ConfigError, match=r"^loggers=\{a:\{\}\}: "):
        load_config("rounds=3", "loggers={a:{}}")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r" is a folder; name a YAML file$"):
        load_config(tmp_path)


def test_only_options_that_there_are_can_be_meant() -> None:
    assert options_called("momentum") == ["client.momentum", "server.momentum"]
    assert options_called("GPUs") == ["fabric.devices"]
    assert options_called("nonsense") == []
