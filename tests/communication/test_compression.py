"""Codings against their definitions, number by number, and the bytes that are counted against those of messages."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

import lorafair
from lorafair.aggregation.base import ServerUpdate
from lorafair.aggregation.fedex_lora import FedExLoRA
from lorafair.aggregation.fedit import FedIT
from lorafair.communication.compression.base import RowCoding, register_compression
from lorafair.communication.compression.codings import Codings
from lorafair.communication.compression.downlink import Downlink
from lorafair.communication.compression.folded import decode_folded, encode_folded, folded_bytes, forms_of
from lorafair.communication.compression.message import MessageFormat
from lorafair.communication.compression.positions import decode_positions, encode_positions, position_bytes
from lorafair.communication.traffic import client_traffic, round_traffic
from lorafair.config.schema import CompressionConfig
from lorafair.errors import ConfigError
from lorafair.model.adapter import PARTS, AdapterLayout, CoreShape, LoRAFactors
from lorafair.registry import COMPRESSIONS
from lorafair.seeding import seeded

OPTIONS: list[dict[str, Any]] = [{}, {"rounding": "stochastic", "bits": 4, "fraction": 0.3}, {"bits": 3, "rate": 2.5}]
CODINGS = list(itertools.product(COMPRESSIONS.names, range(len(OPTIONS))))
LAYOUT = AdapterLayout.of(
    {"one": ((3, 7), (5, 3)), "two": ((3, 6), (9, 3))},
    {"head.weight": (4, 5), "head.bias": (4,)},
    CoreShape(heads=1, scaled=True),
)


def coding_of(name: str, options: int = 0, *, feedback: bool = True) -> RowCoding:
    coding: RowCoding = COMPRESSIONS[name].of(CompressionConfig(**OPTIONS[options]), feedback)
    return coding


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(0, "test", *shape))


def keys_of(count: int) -> torch.Tensor:
    return torch.arange(count) * 12345 - 7


def test_float16_and_bfloat16_are_those_of_the_formats() -> None:
    rows = torch.cat([drawn(2, 9), torch.tensor([[1e6, -1e6, 6e-8, 1e-9, 0.0, -0.0, 1.0, 1 / 3, 65504.0]])])
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        coding = coding_of(name)
        message = coding.encode(rows, keys_of(3))
        expected = rows.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
        assert bytes(message.flatten().tolist()) == bytes(expected.view(torch.uint8).flatten().tolist())
        assert torch.equal(coding.decode(message, 9, keys_of(3)), expected.float())


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
def test_integers_are_multiples_of_the_scale_of_their_row(name: str, bits: int) -> None:
    rows, coding = torch.cat([drawn(3, 11), torch.zeros(1, 11)]), coding_of(name)
    message = coding.encode(rows, keys_of(4))
    assert message.shape == (4, 4 + math.ceil(11 * bits / 8))
    largest = 2 ** (bits - 1) - 1
    for row, coded, decoded in zip(rows.tolist(), message, coding.decode(message, 11, keys_of(4)), strict=True):
        scale = np.float32(max(map(abs, row)) / largest)
        assert np.frombuffer(bytes(coded[:4].tolist()), np.float32)[0] == scale
        number = int.from_bytes(bytes(coded[4:].tolist()), "little")
        for place, value in enumerate(row):
            wanted = round(value / float(scale)) if scale else 0
            assert (number >> (bits * place)) % 2**bits - largest == wanted
            assert decoded[place].item() == np.float32(wanted) * scale


def test_ternary_is_the_nearest_of_all_ternary_rows() -> None:
    rows, coding = drawn(5, 6), coding_of("ternary")
    message = coding.encode(rows, keys_of(5))
    assert message.shape == (5, 4 + 2)
    for row, coded, decoded in zip(rows.double(), message, coding.decode(message, 6, keys_of(5)), strict=True):
        digits = [(coded[4 + place // 5].item() // 3 ** (place % 5)) % 3 - 1 for place in range(6)]
        [scale] = coded[:4].clone().view(torch.float32).tolist()
        assert decoded.tolist() == [scale * digit for digit in digits]
        tried = [torch.tensor(signs).double() for signs in itertools.product((-1, 0, 1), repeat=6)]
        fits = [(row - (row @ t / (t @ t) if t.any() else 0.0) * t).norm().item() for t in tried]
        assert (row - decoded).norm().item() == pytest.approx(min(fits), rel=1e-6)


STEPS = (torch.arange(1, 0x7F80, dtype=torch.int32) << 16).view(torch.float32).double()  # of bfloat16, all of them


def unary(numbers: torch.Tensor) -> str:
    """0, 1, −1, 2, ... or ½, −½, 1½, ... as text."""
    shift = 0.0 if numbers[0] == int(numbers[0]) else 0.5
    order = [0.0] if not shift else []
    for size in range(1, 200):
        order += [size - shift, shift - size]
    return "".join("0" * order.index(number) + "1" for number in numbers.tolist())


def fitting(row: torch.Tensor, bits: int, shift: float) -> list[torch.Tensor]:
    """By a search through all steps, and then number by number; nothing where nothing fits."""
    tried = (row.abs() / STEPS.unsqueeze(1) + 0.5 - shift).floor() + shift
    tried[:, row < 0] *= -1
    fits = (2 * tried.abs() + (tried <= 0)).sum(1) <= bits
    if not fits.any():
        return []
    place = int(fits.long().argmax())
    filled = tried[place].clone()
    for i in range(len(row)):
        changed = filled.clone()
        changed[i] = tried[place - 1][i]
        if len(unary(changed)) > bits:
            break
        filled = changed
    return [tried[place], filled]


@pytest.mark.parametrize("rate", [1.95, 3.0])
def test_unary_is_its_definition_with_the_smallest_step_of_bfloat16_that_fits(rate: float) -> None:
    """Against the codes as text and a search through all steps."""
    assert unary(torch.tensor([0, 1, -1, 2, -2])) == "1" + "01" + "001" + "0001" + "00001"
    assert unary(torch.tensor([0.5, -0.5, 1.5, -1.5])) == "1" + "01" + "001" + "0001"
    ones = torch.ones(1, 21)
    rows = torch.cat([drawn(3, 21), 1e-3 * drawn(2, 21) ** 5, ones, -ones, drawn(1, 21).sign()])
    rows[3, 5], rows[4, 0] = 1.0, -2.0  # far above the others
    coding: RowCoding = COMPRESSIONS["unary"].of(CompressionConfig(rate=rate), True)
    message, size, kinds = coding.encode(rows, keys_of(8)), max(math.floor(rate * 21 / 8), 2 + 4), set()
    assert message.shape == (8, size) == (8, coding.row_bytes(21))
    for row, coded, decoded in zip(rows.double(), message, coding.decode(message, 21, keys_of(8)), strict=True):
        found = [numbers for shift in (0.0, 0.5) for numbers in fitting(row, 8 * (size - 2), shift)]
        scaled = [(numbers, row @ numbers / max(float(numbers @ numbers), 0.1)) for numbers in found]
        numbers, scale = min(scaled, key=lambda it: (row - it[0] * it[1]).norm().item())
        text = "".join(f"{byte:08b}"[::-1] for byte in coded[2:].tolist())
        assert text == unary(numbers).ljust(8 * (size - 2), "0")
        sent = coded[:2].clone().view(torch.bfloat16)
        assert sent.abs().item() == scale.bfloat16()
        assert bool(sent.signbit()) == (numbers[0] != numbers[0].round())
        assert torch.equal(decoded, sent.abs().float() * numbers.float())
        kinds.add(bool(sent.signbit()))
    assert kinds == {False, True}
    assert torch.equal(coding.decode(message, 21, keys_of(8))[[5, 7]], rows[[5, 7]]), "signs alone lose nothing"


def test_unary_codes_any_finite_row() -> None:
    coding = coding_of("unary")
    rows = torch.stack([torch.zeros(40), torch.full((40,), 3.4e38), torch.full((40,), 1e-44), 1e-30 * drawn(1, 40)[0]])
    rows = torch.cat([rows, torch.tensor([[-3e38] + [1.0] * 39])])
    decoded = coding.decode(coding.encode(rows, keys_of(5)), 40, keys_of(5))
    assert decoded.isfinite().all()
    assert not decoded[0].any()
    assert (decoded[3] - rows[3]).double().norm() < 0.6 * rows[3].double().norm()
    assert decoded[4].nonzero().tolist() == [[0]]
    one = coding.decode(coding.encode(torch.tensor([[-0.3]]), keys_of(1)), 1, keys_of(1))
    assert one.item() == pytest.approx(-0.3, rel=2**-8)


def test_unary_is_sixteen_times_less_than_float32() -> None:
    """The rows of a ViT-S of rank 8, ten classes and their biases, which are short."""
    factors = {"proj": ((8, 384), (384, 8)), "fc2": ((8, 1536), (384, 8))}
    layout = AdapterLayout.of(factors, {"head.weight": (10, 384), "head.bias": (10,)})
    length = MessageFormat(layout, ("A", "B", "head"), coding_of("unary")).length(8)
    assert length == 8 * (3 * 93 + 374) + 10 * 93 + 4
    assert 4 * layout.length > 16.4 * length


@pytest.mark.parametrize("name", ["int8", "int4", "ternary"])
def test_stochastic_rounding_is_right_in_the_mean(name: str) -> None:
    coding: RowCoding = COMPRESSIONS[name].of(CompressionConfig(rounding="stochastic"), True)
    rows = drawn(1, 8).expand(4000, -1)
    decoded = coding.decode(coding.encode(rows, torch.arange(4000)), 8, keys_of(1))
    error = decoded.double().std(0) / 4000**0.5
    assert ((decoded.double().mean(0) - rows[0]).abs() < 5 * error + 1e-6).all()
    assert (decoded.std(0) > 0).sum() >= 7, "but the largest, which is exact"


@pytest.mark.parametrize(("count", "width"), [(1, 1), (1, 10), (2, 10), (10, 10), (48, 384), (24, 384), (200, 384)])
def test_positions_come_back_from_as_few_bytes_as_is_said(count: int, width: int) -> None:
    positions = torch.stack([drawn(s + 1, width)[s].argsort()[:count].sort().values for s in range(6)])
    message = encode_positions(positions, width)
    assert message.shape == (6, position_bytes(count, width))
    assert torch.equal(decode_positions(message, count, width), positions)
    bits = math.log2(math.comb(width, count))
    assert bits / 8 <= position_bytes(count, width) <= math.ceil(min(width, bits + 0.6 * count + 2) / 8)


def test_positions_of_elias_and_fano_by_hand() -> None:
    # 3 of 32: l = 3 low bits. 1 = 0·8 + 1, 10 = 1·8 + 2, 30 = 3·8 + 6: ones at 0 + 0, 1 + 1, 2 + 3 of seven bits.
    message = encode_positions(torch.tensor([[1, 10, 30]]), 32)
    bits = "1010010" + "100" + "010" + "011"
    expected = [int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8)]
    assert message.tolist() == [expected]


@pytest.mark.parametrize("bits", [None, 4])
def test_topk_keeps_the_largest_of_every_row(bits: int | None) -> None:
    coding: RowCoding = COMPRESSIONS["topk"].of(CompressionConfig(fraction=0.25, bits=bits), True)
    rows = drawn(4, 10)
    decoded = coding.decode(coding.encode(rows, keys_of(4)), 10, keys_of(4))
    for row, found in zip(rows.tolist(), decoded.tolist(), strict=True):
        largest = sorted(range(10), key=lambda place: -abs(row[place]))[:3]  # ⌈2.5⌉
        unit = max(map(abs, row)) / 7
        for place in range(10):
            wanted = row[place] if place in largest else 0.0
            if bits is not None:
                wanted = round(wanted / unit) * unit
            assert found[place] == pytest.approx(wanted, rel=1e-6)
    ties = coding.decode(coding.encode(torch.ones(1, 10), keys_of(1)), 10, keys_of(1))
    assert ties[0].nonzero().flatten().tolist() == [0, 1, 2]


def test_randomk_sends_a_choice_that_its_key_determines() -> None:
    fed_back, unbiased = coding_of("randomk"), coding_of("randomk", feedback=False)
    rows = drawn(1, 40).expand(3000, -1).contiguous()
    decoded = fed_back.decode(fed_back.encode(rows, torch.arange(3000)), 40, torch.arange(3000))
    kept = decoded != 0
    assert (kept.sum(1) == 5).all()
    assert torch.equal(decoded[kept], rows[kept])
    assert (kept.float().mean(0) - 1 / 8).abs().max() < 0.04, "every place is as likely"
    scaled = unbiased.decode(unbiased.encode(rows, torch.arange(3000)), 40, torch.arange(3000))
    assert torch.equal(scaled, 8 * decoded)


@pytest.mark.parametrize(("name", "options"), CODINGS)
def test_a_row_is_the_same_whatever_is_coded_beside_it(name: str, options: int) -> None:
    coding, rows, keys = coding_of(name, options), drawn(6, 33), keys_of(6)
    message = coding.encode(rows, keys)
    assert message.dtype == torch.uint8
    assert message.shape == (6, coding.row_bytes(33))
    decoded = coding.decode(message, 33, keys)
    for place in range(6):
        alone = coding.encode(rows[place : place + 1].contiguous(), keys[place : place + 1])
        assert torch.equal(alone[0], message[place])
        assert torch.equal(coding.decode(alone, 33, keys[place : place + 1])[0], decoded[place])


@pytest.mark.parametrize(("name", "options"), CODINGS)
@pytest.mark.parametrize("parts", [PARTS, ("A",), ("B", "head"), ("core", "head")])
def test_messages_have_the_bytes_that_are_counted(name: str, options: int, parts: Any) -> None:
    message = MessageFormat(LAYOUT, parts, coding_of(name, options))
    numbers = drawn(4, LAYOUT.length)
    for lora_rank in (1, 2, 3):
        directions = torch.stack([torch.randperm(3, generator=seeded(k))[:lora_rank].sort().values for k in range(4)])
        coded = message.encode(numbers, directions, keys_of(4))
        assert coded.shape == (4, message.length(lora_rank))
        decoded = message.decode(coded, directions)
        left_out = [span for part, span in LAYOUT.slices.items() if part not in parts]
        assert not any(decoded[:, span].any() for span in left_out)
        for client, factors in enumerate(
            zip(*(LAYOUT.unpack(decoded).factors[p].A for p in ("one", "two")), strict=True)
        ):
            others = [d for d in range(3) if d not in directions[client].tolist()]
            assert not any(A[others].any() for A in factors)
        one = message.decode(message.encode(numbers[2:3], directions[2:3], keys_of(4)[2:3]), directions[2:3])
        assert torch.equal(one[0], decoded[2])


def test_the_head_may_have_a_coding_of_its_own() -> None:
    """Its bytes and numbers are those of its coding, and all else is as before."""
    plain, other = (MessageFormat(LAYOUT, PARTS, coding_of(name)) for name in ("ternary", "int8"))
    mixed = MessageFormat(LAYOUT, PARTS, coding_of("ternary"), coding_of("int8"))
    numbers, directions = drawn(4, LAYOUT.length), torch.arange(3).expand(4, -1)
    coded = mixed.encode(numbers, directions, keys_of(4))
    assert coded.shape == (4, mixed.length(3))
    head = MessageFormat(LAYOUT, ("head",), coding_of("int8")).length(3)
    assert mixed.length(3) == plain.length(3) - MessageFormat(LAYOUT, ("head",), coding_of("ternary")).length(3) + head
    span, decoded = LAYOUT.slices["head"], mixed.decode(coded, directions)
    by_plain, by_other = (of.decode(of.encode(numbers, directions, keys_of(4)), directions) for of in (plain, other))
    assert torch.equal(decoded[:, span], by_other[:, span])
    assert torch.equal(decoded[:, : span.start], by_plain[:, : span.start])
    needs = MessageFormat(LAYOUT, ("A", "head"), coding_of("ternary"), coding_of("randomk"))
    assert needs.needs_key
    assert not MessageFormat(LAYOUT, ("A",), coding_of("ternary"), coding_of("randomk")).needs_key


def update_of(row: torch.Tensor, sent: int = 3) -> ServerUpdate:
    state = LAYOUT.unpack(row)
    return ServerUpdate(state.factors, {}, state.head, dict.fromkeys(LAYOUT.factors, sent), state.cores)


@pytest.mark.parametrize(("name", "options"), CODINGS)
@pytest.mark.parametrize("decomposes", [False, True])
def test_what_the_server_loses_is_sent_later(name: str, options: int, decomposes: bool) -> None:
    """The sum of what clients get is what the server wanted, less what it still has to send."""
    downlink = Downlink(LAYOUT, coding_of(name, options), PARTS, decomposes=decomposes)
    held, lost = drawn(LAYOUT.length), torch.zeros(LAYOUT.length)
    wanted = held + 0.1 * drawn(1, LAYOUT.length)[0]
    parts = ("A", "B", "head")
    fabric: Any = type("Fabric", (), {"world_size": 1, "device": torch.device("cpu")})()
    start = held.clone()
    for key in range(3):
        message, target = downlink.encode(update_of(wanted), held, lost.clone(), parts, key)
        assert len(message) == downlink.length(parts, 3)
        received = downlink.broadcast(fabric, update_of(wanted), held, lost, parts, key)
        reached = LAYOUT.replaced(held, parts, received)
        assert torch.equal(downlink.decode(message, held, parts, dict.fromkeys(LAYOUT.factors, 3)), reached)
        columns = [LAYOUT.slices[part] for part in parts]
        for span in columns:
            assert torch.equal(lost[span], target[span] - reached[span])
        assert torch.equal(reached[LAYOUT.slices["core"]], start[LAYOUT.slices["core"]]), "it is not sent"
        held, wanted = reached, reached  # nothing new: only what was lost
    if not coding_of(name, options).is_sparse:
        goal = (start + 0.1 * drawn(1, LAYOUT.length)[0])[LAYOUT.slices["A"]]
        assert (held[LAYOUT.slices["A"]] - goal).norm() < 0.5 * (start[LAYOUT.slices["A"]] - goal).norm()


def test_directions_that_are_not_sent_are_not_charged() -> None:
    downlink = Downlink(LAYOUT, coding_of("int8"), ("head",), decomposes=True)
    held, lost, wanted = drawn(LAYOUT.length), torch.zeros(LAYOUT.length), drawn(1, LAYOUT.length)[0].clone()
    state = LAYOUT.unpack(wanted)
    for path, factors in state.factors.items():
        factors.B[:, 1:] = 0
        factors.A[1:] = LAYOUT.unpack(held).factors[path].A[1:]
    parts, sent = ("A", "B", "head"), dict.fromkeys(LAYOUT.factors, 1)
    message, _ = downlink.encode(update_of(wanted, sent=1), held, lost, parts, 0)
    assert len(message) == downlink.length(parts, 3, sent) == 1 + 4 * 4 + (7 + 5 + 6 + 9) + 5 * 4 + 4 * 5 + 4
    reached = LAYOUT.unpack(downlink.decode(message, held, parts, sent)).factors
    for path, factors in reached.items():
        assert torch.equal(factors.B[:, 1:], torch.zeros_like(factors.B[:, 1:]))
        assert torch.equal(factors.A[1:], LAYOUT.unpack(held).factors[path].A[1:])
        torch.testing.assert_close(factors.B[:, 0], state.factors[path].B[:, 0], atol=0.05, rtol=0)


@pytest.mark.parametrize("name", ["float16", "int4", "ternary", "unary"])
def test_folded_factors_have_the_bytes_that_are_counted(name: str) -> None:
    folded = {
        "one": LoRAFactors(A=torch.eye(7), B=drawn(5, 7)),  # kept as a matrix
        "two": LoRAFactors(A=drawn(4, 6), B=drawn(9, 4)),
    }
    folded["one"] = LoRAFactors(A=drawn(5, 7), B=torch.eye(5))
    coding, forms = coding_of(name), forms_of(folded)
    message = encode_folded(folded, LAYOUT, coding, 3)
    sizes = folded_bytes(LAYOUT, forms, coding)
    assert sizes == {
        "one": 5 * coding.row_bytes(7),
        "two": 4 * (coding.row_bytes(6) + coding.row_bytes(9)),
    }
    assert len(message) == sum(sizes.values())
    decoded = decode_folded(message, LAYOUT, forms, coding)
    assert torch.equal(decoded["one"].B, torch.eye(5))
    key = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(decoded["two"].A, coding.decode(coding.encode(folded["two"].A, key), 6, key))
    assert torch.equal(decoded["two"].B.mT, coding.decode(coding.encode(folded["two"].B.mT.contiguous(), key), 9, key))
    update = ServerUpdate(LAYOUT.unpack(drawn(LAYOUT.length)).factors, folded, {}, {})
    codings = Codings(folded=coding)
    plain, coded = (round_traffic(LAYOUT, FedExLoRA(), update, 0, (3, 3), *more) for more in ((), (codings,)))
    numbers = 5 * 7 + 4 * (6 + 9)
    assert plain.down - coded.down == 2 * (4 * numbers - len(message))
    assert plain.up == coded.up


def test_traffic_of_each_client_adds_up() -> None:
    update = update_of(drawn(LAYOUT.length))
    up, down = MessageFormat(LAYOUT, PARTS, coding_of("int4")), Downlink(LAYOUT, coding_of("int8"), PARTS)
    codings = Codings(up=up.coding, down=down)
    each = client_traffic(LAYOUT, FedIT(), update, 0, (3, 1), codings)
    assert [(t.up, t.down) for t in each] == [(up.length(r), down.length(PARTS, r)) for r in (3, 1)]
    total = round_traffic(LAYOUT, FedIT(), update, 0, (3, 1), codings)
    assert (total.up, total.down) == (sum(t.up for t in each), sum(t.down for t in each))


def test_a_plug_in_registers_a_coding() -> None:
    @lorafair.register_compression("signs")
    class Signs(lorafair.RowCoding):
        def row_bytes(self, width: int) -> int:
            return 4 + width

        def encode(self, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
            scale = rows.abs().amax(1, keepdim=True)
            return torch.cat([scale.view(torch.uint8), (rows > 0).to(torch.uint8)], dim=1)

        def decode(self, message: torch.Tensor, width: int, keys: torch.Tensor) -> torch.Tensor:
            return message[:, :4].contiguous().view(torch.float32) * (2 * message[:, 4:].float() - 1)

    assert isinstance(Codings(up=COMPRESSIONS["signs"].of(CompressionConfig(), True)).up, Signs)
    message = MessageFormat(LAYOUT, PARTS, Signs())
    coded = message.encode(drawn(1, LAYOUT.length), torch.arange(3).unsqueeze(0), keys_of(1))
    assert coded.shape[1] == message.length(3)
    with pytest.raises(ConfigError, match=r"must extend lorafair\.RowCoding and have `row_bytes`, `encode`"):
        register_compression("nothing")(object)  # type: ignore[type-var]


def test_a_new_decomposition_is_turned_towards_the_factors_before() -> None:
    """The same product, of factors whose difference to those that clients hold is small; what is far is sent whole."""
    held = drawn(LAYOUT.length)
    wanted = held.clone()
    for factors in LAYOUT.unpack(wanted).factors.values():
        turn = torch.linalg.qr(drawn(3, 3))[0]
        turn[:, 0] *= turn.det().sign()  # a rotation
        factors.A.copy_(turn.mT @ factors.A)
        factors.B.copy_(factors.B @ turn)
    downlink = Downlink(LAYOUT, coding_of("int8"), PARTS, decomposes=True, turns=True)
    lost, parts, sent = torch.zeros(LAYOUT.length), ("A", "B", "head"), dict.fromkeys(LAYOUT.factors, 3)
    message, target = downlink.encode(update_of(wanted), held, lost, parts, 0)
    torch.testing.assert_close(target, held, atol=1e-5, rtol=0)
    assert message[0] == 0, "differences, of all six tensors"
    torch.testing.assert_close(downlink.decode(message, held, parts, sent), held, atol=1e-5, rtol=0)
    plain = Downlink(LAYOUT, coding_of("int8"), PARTS, decomposes=True)
    small = 0.01 * wanted
    message, target = plain.encode(update_of(small), held, lost, parts, 0)
    assert message[0] == 0b111111
    reached = plain.decode(message, held, parts, sent)
    columns = slice(0, LAYOUT.slices["B"].stop)
    assert (reached - small)[columns].abs().max() < 0.01 * small[columns].abs().max()
