"""What clients that miss rounds are charged for when they take part again, by hand."""

from __future__ import annotations

import torch

from lorafair.aggregation.base import Aggregator, ServerUpdate
from lorafair.aggregation.fedex_lora import FedExLoRA
from lorafair.aggregation.fedit import FedIT
from lorafair.aggregation.ro_lora import RoLoRA
from lorafair.communication.catch_up import CatchUp, has_to_catch_up
from lorafair.communication.compression.codings import PLAIN, Codings
from lorafair.communication.compression.downlink import Downlink
from lorafair.communication.compression.integers import Integers
from lorafair.communication.traffic import client_traffic
from lorafair.model.adapter import PARTS, AdapterLayout, LoRAFactors

INPUTS, OUTPUTS, RANK, HEAD = 6, 5, 2, 3
LAYOUT = AdapterLayout.of({"layer": ((RANK, INPUTS), (OUTPUTS, RANK))}, {"bias": (HEAD,)})
SIDES = INPUTS + OUTPUTS


def update(folded_rank: int = 0) -> ServerUpdate:
    state = LAYOUT.unpack(torch.zeros(LAYOUT.length))
    folded = {"layer": LoRAFactors(A=torch.ones(folded_rank, INPUTS), B=torch.ones(OUTPUTS, folded_rank))}
    return ServerUpdate(state.factors, folded if folded_rank else {}, state.head, {})


def down_of(
    aggregator: Aggregator,
    rounds: list[tuple[int, ...]],
    *,
    folded: int = 0,
    codings: Codings = PLAIN,
    merges: bool = False,
    lora_ranks: tuple[int, ...] = (RANK,) * 3,
) -> list[dict[int, int]]:
    """client -> bytes down of each round, less what its own round costs."""
    catch_up, found = CatchUp(LAYOUT, aggregator, codings, merges), []
    missed = catch_up.at_start(len(lora_ranks))
    for index, clients in enumerate(rounds):
        made = update(folded)
        mine = [lora_ranks[client] for client in clients]
        plain = client_traffic(LAYOUT, aggregator, made, index, mine, codings)
        charged = catch_up.traffic_of_round(missed, made, index, clients, lora_ranks)
        assert [t.up for t in charged] == [t.up for t in plain]
        found.append({c: t.down - p.down for c, t, p in zip(clients, charged, plain, strict=True)})
    return found


def test_full_participation_costs_what_it_did() -> None:
    everyone = [(0, 1, 2)] * 3
    down = Codings(down=Downlink(LAYOUT, Integers(8), PARTS))
    for found in (
        down_of(FedExLoRA(), everyone, folded=3),
        down_of(RoLoRA(), everyone),
        down_of(FedIT(), everyone, codings=down),
        down_of(FedIT(), everyone, merges=True),
    ):
        assert found == [{0: 0, 1: 0, 2: 0}] * 3


def test_folded_parts_of_missed_rounds_are_charged_or_their_sum() -> None:
    part = 4 * SIDES  # of rank 1; the layer itself has 4·30 bytes
    assert down_of(FedExLoRA(), [(0, 1), (0,), (0,), (0, 1, 2), (1, 2)], folded=1) == [
        {0: 0, 1: 0}, {0: 0}, {0: 0}, {0: 0, 1: 2 * part, 2: min(3 * part, 4 * OUTPUTS * INPUTS)}, {1: 0, 2: 0},
    ]  # fmt: skip
    assert 3 * part > 4 * OUTPUTS * INPUTS


def test_a_client_without_folded_parts_needs_only_the_newest_adapter() -> None:
    assert down_of(FedIT(), [(0,), (0,), (1,)]) == [{0: 0}, {0: 0}, {1: 0}]
    assert not has_to_catch_up(FedIT(), merges=False, coded=False)
    assert has_to_catch_up(RoLoRA(), merges=False, coded=False)


def test_merged_factors_of_missed_rounds_have_the_bytes_that_they_are_sent_in() -> None:
    missed = [(0,), (1,)]
    for precision, size in (("float16", 2), ("float32", 4)):
        coded = FedExLoRA(fold_bits=4, start_precision=precision)  # type: ignore[arg-type]
        assert down_of(coded, missed, merges=True) == [{0: 0}, {1: size * RANK * SIDES}]


def test_factors_that_take_turns_are_sent_to_those_who_missed_theirs() -> None:
    """RoLoRA sends B after rounds 1 and 3, A after round 2; the newest of each is enough."""
    found = down_of(RoLoRA(), [(0,), (0,), (1,), (1,), (0, 2)], lora_ranks=(2, 1, 2))
    a, b = 4 * INPUTS, 4 * OUTPUTS
    assert found == [{0: 0}, {0: 0}, {1: a}, {1: 0}, {0: 2 * a, 2: 2 * a}]
    assert b < a  # the fifth round sends B, so that A alone is lacking


def test_coded_differences_of_missed_rounds_are_charged_or_the_state() -> None:
    codings = Codings(down=Downlink(LAYOUT, Integers(8), PARTS))
    message = RANK * (2 * 4 + SIDES) + 4 + HEAD
    state = 4 * (RANK * SIDES + HEAD)
    rounds = [(0,)] * 3 + [(1,)] + [(0,)] * 3 + [(2,)]
    found = down_of(FedIT(), rounds, codings=codings, lora_ranks=(2, 2, 1))
    assert found[3] == {1: min(3 * message, state)} == {1: state}
    assert found[4] == {0: message}
    smaller = 1 * (2 * 4 + SIDES) + 4 + HEAD
    assert found[7] == {2: min(7 * smaller, 4 * (SIDES + HEAD))}
    assert down_of(FedIT(), [(0,), (1,), (0,)], codings=codings)[2] == {0: message}


def test_what_is_merged_of_the_factors_is_needed_too() -> None:
    """Fresh starts: W0 takes in each round's factors, of rank 2."""
    found = down_of(FedIT(), [(0,), (0, 1), (0,), (0,), (1,)], merges=True)
    part = 4 * RANK * SIDES
    assert found[1] == {0: 0, 1: part}
    assert found[4] == {1: min(2 * part, 4 * OUTPUTS * INPUTS)}
