"""Who has which images: every image has one owner, and only the seed and a domain's own labels decide which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafair.config.schema import PartitionConfig
from lorafair.data.partition import Client, PartitionError, balanced_cuts, partition, pooled, register_partition
from lorafair.errors import ConfigError
from lorafair.registry import PARTITIONS

NAMES = ("serif", "sans", "mono")
PER_DOMAIN, CLASSES = 60, 5


def make_images(seed: int = 0, per_domain: int = PER_DOMAIN) -> tuple[np.ndarray, np.ndarray]:
    """(labels, domains), both shuffled together."""
    rng = np.random.default_rng(seed)
    domains = rng.permutation(np.repeat(np.arange(len(NAMES)), per_domain))
    return rng.integers(0, CLASSES, len(domains)), domains


def dirichlet(clients: int = 4, alpha: float = 0.5, least: int = 1) -> PartitionConfig:
    return PartitionConfig(scheme="dirichlet", clients_per_domain=clients, alpha=alpha, min_images=least)


def owners(clients: tuple[Client, ...]) -> list[list[int]]:
    return [client.indices.tolist() for client in clients]


def test_one_client_a_domain() -> None:
    labels, domains = make_images()
    clients = partition(PartitionConfig(), labels, domains, NAMES, seed=0)
    assert [(c.name, c.domain) for c in clients] == [("serif", 0), ("sans", 1), ("mono", 2)]
    for client in clients:
        assert set(domains[client.indices]) == {client.domain}


def test_several_clients_a_domain_stay_inside_it() -> None:
    labels, domains = make_images()
    clients = partition(dirichlet(clients=2), labels, domains, NAMES, seed=0)
    assert [c.name for c in clients] == ["serif-0", "serif-1", "sans-0", "sans-1", "mono-0", "mono-1"]
    for client in clients:
        assert set(domains[client.indices]) == {client.domain}


def test_iid_clients_have_equal_sizes_up_to_one_and_images_of_all_domains() -> None:
    labels, domains = make_images()
    clients = partition(PartitionConfig(scheme="iid", clients=7), labels, domains, NAMES, seed=0)
    assert [c.name for c in clients] == [f"client-{k}" for k in range(7)]
    assert sorted({len(c.indices) for c in clients}) == [25, 26]  # 180 / 7
    for client in clients:
        assert client.domain is None
        assert set(domains[client.indices]) == {0, 1, 2}


def test_pooled_is_one_client_with_everything() -> None:
    labels, _ = make_images()
    (client,) = pooled(labels)
    assert (client.name, client.domain) == ("all", None)
    assert client.indices.tolist() == list(range(len(labels)))


configs = st.one_of(
    st.just(PartitionConfig()),
    st.builds(lambda k: PartitionConfig(scheme="iid", clients=k), st.integers(1, 3 * PER_DOMAIN)),
    st.builds(dirichlet, st.integers(1, 5), st.floats(0.2, 100), st.integers(1, 3)),
)


@given(configs, st.integers(0, 2**32), st.integers(0, 10))
def test_every_image_belongs_to_exactly_one_client(config: PartitionConfig, seed: int, data_seed: int) -> None:
    labels, domains = make_images(data_seed)
    clients = partition(config, labels, domains, NAMES, seed)
    assert sorted(i for own in owners(clients) for i in own) == list(range(len(labels)))
    for client in clients:
        assert client.indices.dtype == np.int64
        assert np.all(np.diff(client.indices) > 0)  # ascending
        assert len(client.indices) >= (config.min_images or 1)


@pytest.mark.parametrize("config", [dirichlet(), PartitionConfig(scheme="iid", clients=4)], ids=["dirichlet", "iid"])
def test_the_seed_decides(config: PartitionConfig) -> None:
    labels, domains = make_images()
    first = owners(partition(config, labels, domains, NAMES, seed=1))
    assert first == owners(partition(config, labels, domains, NAMES, seed=1))
    assert first != owners(partition(config, labels, domains, NAMES, seed=2))


def test_a_domains_clients_do_not_depend_on_the_other_domains() -> None:
    labels, domains = make_images()
    sans = np.flatnonzero(domains == 1)
    together = partition(dirichlet(), labels, domains, NAMES, seed=0)
    alone = partition(dirichlet(), labels[sans], np.zeros(len(sans), np.int64), ("sans",), seed=0)
    assert [sans[c.indices].tolist() for c in alone] == owners(together)[4:8]


def test_alpha_sets_how_skewed_the_labels_are() -> None:
    labels, domains = make_images(per_domain=2000)

    def largest_fraction(alpha: float) -> float:
        """Mean over clients and classes of a client's largest fraction in its domain's class; 1/4 if all are alike."""
        clients = partition(dirichlet(alpha=alpha), labels, domains, NAMES, seed=0)
        counts = np.array([np.bincount(labels[c.indices], minlength=CLASSES) for c in clients]).reshape(3, 4, CLASSES)
        return float((counts.max(axis=1) / counts.sum(axis=1)).mean())

    assert largest_fraction(1e4) < 0.27 < 0.4 < largest_fraction(0.5) < 0.85 < largest_fraction(0.05)


def test_the_shares_have_the_dirichlet_distributions_variance() -> None:
    """Var of one fraction of Dirichlet(a, ..., a) over K clients is (1/K)(1 - 1/K) / (K a + 1)."""
    alpha, k, images, classes = 0.5, 4, 400, 500
    labels = np.repeat(np.arange(classes), images)
    clients = partition(dirichlet(k, alpha), labels, np.zeros_like(labels), ("only",), seed=0)
    fractions = np.array([np.bincount(labels[c.indices], minlength=classes) for c in clients]) / images
    expected = (1 / k) * (1 - 1 / k) / (k * alpha + 1)
    np.testing.assert_allclose(fractions.var(axis=1), expected, rtol=0.2)
    np.testing.assert_allclose(fractions.mean(axis=1), 1 / k, atol=0.05)


def test_more_images_than_there_are_is_refused_with_the_numbers() -> None:
    labels, domains = make_images()
    with pytest.raises(PartitionError, match=r"domain serif has 60 .*clients_per_domain=7 .*min_images=10"):
        partition(dirichlet(clients=7, least=10), labels, domains, NAMES, seed=0)
    with pytest.raises(PartitionError, match=r"partition\.clients=181 is more than the 180"):
        partition(PartitionConfig(scheme="iid", clients=181), labels, domains, NAMES, seed=0)


def test_a_draw_that_never_succeeds_ends_and_says_what_to_change() -> None:
    labels, domains = make_images()
    with pytest.raises(PartitionError, match=r"domain serif: in 1000 draws .*min_images=15; .*partition\.alpha=0\.01"):
        partition(dirichlet(alpha=0.01, least=15), labels, domains, NAMES, seed=0)


# Schemes that a user registers


@pytest.fixture(autouse=True)
def only_shipped_schemes() -> Iterator[None]:
    """Take back what a test has registered."""
    before = set(PARTITIONS.names)
    yield
    for name in set(PARTITIONS.names) - before:
        PARTITIONS.remove(name)


def test_a_registered_scheme_deals_the_images_out() -> None:
    labels, domains = make_images()
    asked: list[tuple[object, ...]] = []

    @register_partition("dealt_by_class")
    def by_class(
        config: PartitionConfig, labels: np.ndarray, domains: np.ndarray, domain_names: Sequence[str], seed: int
    ) -> list[Client]:
        asked.append((config, domain_names, seed))
        return [Client(f"class-{c}", None, np.flatnonzero(labels == c)) for c in range(config.options["classes"])]

    config = PartitionConfig(scheme="dealt_by_class", options={"classes": CLASSES})
    clients = partition(config, labels, domains, NAMES, seed=7)
    assert asked == [(config, NAMES, 7)]
    assert [client.name for client in clients] == [f"class-{c}" for c in range(CLASSES)]
    for c, client in enumerate(clients):
        assert set(labels[client.indices]) == {c}


def deal(*parts: Sequence[int], names: Sequence[str] = "abcdef") -> tuple[Client, ...]:
    """Deal six images out as a registered scheme does that returns these parts."""

    @register_partition("fixed")
    def fixed(
        config: PartitionConfig, labels: np.ndarray, domains: np.ndarray, domain_names: Sequence[str], seed: int
    ) -> list[Client]:
        return [Client(name, None, np.array(part, np.int64)) for name, part in zip(names, parts, strict=False)]

    return partition(PartitionConfig(scheme="fixed"), np.arange(6) % 2, np.zeros(6, np.int64), ("only",), seed=0)


def test_no_image_belongs_to_two_clients_and_those_left_out_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert owners(deal([0, 5], [1, 2, 3, 4])) == [[0, 5], [1, 2, 3, 4]]
    with pytest.raises(PartitionError, match=r"^partition\.scheme=fixed: client b has no images$"):
        deal([0, 1, 2, 3, 4, 5], [])
    with pytest.raises(PartitionError, match=r"2 of 6 training images belong to several clients, image 2 to 2 of"):
        deal([0, 1, 2, 3], [2, 3, 4, 5])
    for wrong, said in (([5, 6], "5 to 6"), ([-1, 5], "-1 to 5")):
        with pytest.raises(PartitionError, match=rf"client b has images {said}; there are images 0 to 5 for training"):
            deal([0, 1, 2], wrong)
    assert capsys.readouterr().out == ""
    assert owners(deal([0, 1, 2], [3, 5])) == [[0, 1, 2], [3, 5]]
    assert capsys.readouterr().out == "partition.scheme=fixed leaves 1 of 6 training images to no client\n"


def test_there_must_be_clients_with_names_of_their_own() -> None:
    message = "scheme=fixed must return at least one client, each with a name of its own"
    with pytest.raises(PartitionError, match=message):
        deal([0, 1, 2], [3, 4, 5], names=("a", "a"))
    with pytest.raises(PartitionError, match=message):
        deal()


def test_a_name_that_is_taken_is_refused() -> None:
    def other(
        config: PartitionConfig, labels: np.ndarray, domains: np.ndarray, domain_names: Sequence[str], seed: int
    ) -> list[Client]:
        return list(pooled(labels))

    with pytest.raises(
        ConfigError, match=r"there is a partition iid already, of lorafair; register yours under another"
    ):
        register_partition("iid")(other)
    deal([0, 1, 2, 3, 4, 5])
    deal([0, 1, 2], [3, 4, 5])  # the same definition may come again, as when a cell of a notebook is run twice
    with pytest.raises(ConfigError, match=r"there is a partition fixed already, .*deal\.<locals>\.fixed in "):
        register_partition("fixed")(other)
    assert register_partition("other")(other) is other


def test_an_unknown_scheme_says_what_there_is() -> None:
    labels, domains = make_images()
    with pytest.raises(
        ConfigError, match=r"partition\.scheme=uniform is unknown; did you mean iid\? partitions: domain, "
    ):
        partition(PartitionConfig(scheme="uniform"), labels, domains, NAMES, seed=0)


def niid_bench(labels: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Class by class as in NIID-Bench's `noniid-labeldir`: images (C, K) of each class at each party."""
    parties: list[list[int]] = [[] for _ in range(fractions.shape[1])]
    counts = []
    for k, drawn in zip(np.unique(labels), fractions, strict=True):
        members = np.flatnonzero(labels == k)
        part = np.array([p * (len(own) < len(labels) / len(parties)) for p, own in zip(drawn, parties, strict=True)])
        cuts = (np.cumsum(part / part.sum()) * len(members)).astype(int)[:-1]
        pieces = np.split(members, cuts)
        counts.append([len(piece) for piece in pieces])
        for own, piece in zip(parties, pieces, strict=True):
            own += piece.tolist()
    return np.array(counts)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 10.0])
def test_balanced_cuts_are_those_of_niid_bench(alpha: float) -> None:
    rng = np.random.default_rng(1)
    for clients in (1, 2, 5, 10):
        labels, fractions = rng.integers(0, 12, 600), rng.dirichlet(np.full(clients, alpha), size=12)
        counts = np.unique(labels, return_counts=True)[1]
        found = np.diff(balanced_cuts(fractions, counts), axis=1, prepend=0, append=counts[:, None])
        assert np.array_equal(found, niid_bench(labels, fractions))
        assert found.sum() == 600


def test_a_class_whose_draw_is_all_with_those_who_have_enough_is_shared_by_the_others() -> None:
    cuts = balanced_cuts(np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), np.array([20, 10]))
    assert cuts.tolist() == [[20, 20], [0, 5]]


def test_a_balanced_split_keeps_every_image_and_is_more_even() -> None:
    labels, domains = make_images(per_domain=200)
    spreads: dict[bool | None, list[float]] = {None: [], True: []}
    for seed in range(8):
        for balance, found in spreads.items():
            clients = partition(replace(dirichlet(alpha=0.2), balance=balance), labels, domains, NAMES, seed=seed)
            assert sorted(i for c in clients for i in c.indices) == list(range(len(labels)))
            found.append(float(np.std([len(c.indices) for c in clients])))
    assert np.mean(spreads[True]) < 0.9 * np.mean(spreads[None])
