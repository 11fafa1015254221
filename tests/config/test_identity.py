"""Which settings make a run the same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafair.config.identity import differences, differing_keys, flatten, identity_settings, run_identity
from lorafair.config.loading import load_config
from lorafair.errors import ConfigError


@pytest.mark.parametrize(
    "pair",
    [
        "rounds=3", "run_dir=elsewhere", "fabric.devices=2", "fabric.server=sharded", "checkpoint.every=5",
        "data.workers=2", "model.prefix_cache=never", "evaluation.every=2", "loggers={csv: {}}",
        "model.gradient_checkpointing=true",
    ],
)  # fmt: skip
def test_what_changes_no_number_is_no_part_of_it(pair: str) -> None:
    assert identity_settings(load_config(pair)) == identity_settings(load_config())


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("seed=3", "seed is 0 there and 3 here"),
        ("client.learning_rate=0.1", "client.learning_rate is 0.01 there and 0.1 here"),
        ("client.momentum=0.5", "client.momentum is 0.9 there and 0.5 here"),
        ("fabric.precision=bf16", "fabric.precision is 32-true there and bf16-mixed here"),
        ("fabric.precision=bf16-true", "fabric.precision is 32-true there and bf16-true here"),
        ("method.solver=sgd", "method.solver is not set there and sgd here"),
        ("data.domains=[a, b]", "data.domains is None there and ['a', 'b'] here"),
        ("model.prefix_cache_dtype=bfloat16", "model.prefix_cache_dtype is float32 there and bfloat16 here"),
    ],
)
def test_what_changes_numbers_is_said(pair: str, said: str) -> None:
    before, now = (identity_settings(load_config(*pairs)) for pairs in ([], [pair]))
    assert differences(before, now) == said
    assert differences(json.loads(json.dumps(before)), before) == "", "as it was written to a file"


def test_three_differences_are_said_and_the_others_counted() -> None:
    pairs = ["seed=1", "client.steps=2", "client.batch_size=3", "client.weight_decay=0", "client.proximal=1"]
    said = differences(identity_settings(load_config()), identity_settings(load_config(pairs)))
    assert said.count(" there and ") == 3
    assert said.endswith("; and 3 more"), "epochs, too: it is not set where there are steps"


def test_an_option_that_an_older_version_did_not_have_counts_as_its_default() -> None:
    mine = identity_settings(load_config())
    older = json.loads(json.dumps(mine))
    del older["client"]["b_learning_rate_ratio"], older["data"]["options"], older["data"]["augmentation"]
    assert differences(older, mine) == ""
    changed = identity_settings(load_config("client.b_learning_rate_ratio=4"))
    assert differences(older, changed) == "client.b_learning_rate_ratio is not set there and 4.0 here"


def test_an_option_that_had_another_name_is_the_same_one() -> None:
    mine = identity_settings(load_config("client.schedule=cosine", "client.final_fraction=0.1"))
    older = json.loads(json.dumps(mine))
    older["client"]["final_share"] = older["client"].pop("final_fraction")
    older["model"]["lora"]["client_rank_shares"] = older["model"]["lora"].pop("client_rank_probabilities")
    assert differences(older, mine) == ""
    older["client"]["final_share"] = 0.2
    assert differences(older, mine) == "client.final_fraction is 0.2 there and 0.1 here"


def test_the_configuration_of_a_run_of_an_older_version_is_read(tmp_path: Path) -> None:
    """Its own config.yaml has every option, by the names of then; in a file of a user these are a mistake."""
    written = (
        "client: {schedule: cosine, final_share: 0.1}\n"
        "model: {lora: {client_ranks: null, client_rank_shares: null}}\n"
        "run_dir: !!python/object/apply:pathlib.PosixPath\n- runs\n- old\n"
    )
    of_run, of_user = tmp_path / "config.yaml", tmp_path / "mine.yaml"
    of_run.write_text(f"# lorafair 0.1.0\n{written}")
    of_user.write_text(written)
    read = load_config(of_run)
    assert (read.client.final_fraction, read.model.lora.client_rank_probabilities) == (0.1, None)
    assert read.run_dir == Path("runs/old")
    with pytest.raises(ConfigError, match=r"mine\.yaml: client\.final_share is now client\.final_fraction$"):
        load_config(of_user)


def test_groups_are_flattened_to_dotted_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [2]}) == {"a.b.c": 1, "a.d": {}, "e": [2]}


@pytest.mark.parametrize(
    ("pairs", "is_corrected"),
    [
        (["method.name=fedsvd"], True),
        (["method.name=lora_fair"], True),
        (["method.name=lora_fair", "method.rescale=false"], False),
        (["method.name=lora_fair", "method.rescale=false", "method.align=true"], True),
        (["method.name=fedit"], False),
    ],
)
def test_a_run_from_before_a_correction_of_its_method_is_another_one(pairs: list[str], is_corrected: bool) -> None:
    assert "mixed_lora_ranks" not in run_identity(load_config(*pairs)), "equal ranks: nothing has changed"
    now = run_identity(load_config(*pairs, "model.lora.client_ranks=[4,2,1]"))
    before = {key: value for key, value in now.items() if key != "mixed_lora_ranks"}
    said = differences(before, now)
    assert ("where clients differ in LoRA rank was corrected in lorafair 0.2" in said) == is_corrected
    assert not differences(now, now)


def test_what_an_error_proposes_to_accept_can_be_accepted_and_a_group_with_all_in_it() -> None:
    now = run_identity(load_config("method.name=fedsvd", "model.lora.client_ranks=[4,2,1]"))
    before = {key: value for key, value in now.items() if key != "mixed_lora_ranks"}
    before |= {"method": {"name": "fedit"}, "images": "others", "plugins": {"method mine": "a sum"}}
    keys = differing_keys(before, now)
    assert keys == ["method.name", "mixed_lora_ranks", "plugins.method mine", "images"]
    accepted = load_config(f"accept=[{','.join(keys)}]").accept
    assert not differences(before, now, accepted)
    groups = load_config("accept=[method, mixed_lora_ranks, plugins]").accept
    assert differing_keys(before, now, groups) == ["images"]
    assert differing_keys({"methods": {"name": "a"}}, {}, groups) == ["methods.name"], "another key that begins so"


def test_what_may_be_accepted_is_checked() -> None:
    accepted = "accept=[images, seed, method.solver, plugins.method mine, model.options.width]"
    assert load_config(accepted).accept[:2] == ("images", "seed")
    with pytest.raises(ConfigError, match="accept: image is not possible; did you mean images"):
        load_config("accept=[image]")
    with pytest.raises(ConfigError, match="accept: rounds is not possible"):  # it may differ anyway
        load_config("accept=[rounds]")
