"""Who has which images: every image has one owner, and only the seed and a domain's own labels decide which."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafair.config import PartitionConfig
from lorafair.data.partition import Client, PartitionError, partition, pooled

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


def test_one_client_a_domain():
    labels, domains = make_images()
    clients = partition(PartitionConfig(), labels, domains, NAMES, seed=0)
    assert [(c.name, c.domain) for c in clients] == [("serif", 0), ("sans", 1), ("mono", 2)]
    for client in clients:
        assert set(domains[client.indices]) == {client.domain}


def test_several_clients_a_domain_stay_inside_it():
    labels, domains = make_images()
    clients = partition(dirichlet(clients=2), labels, domains, NAMES, seed=0)
    assert [c.name for c in clients] == ["serif-0", "serif-1", "sans-0", "sans-1", "mono-0", "mono-1"]
    for client in clients:
        assert set(domains[client.indices]) == {client.domain}


def test_iid_clients_have_equal_sizes_up_to_one_and_images_of_all_domains():
    labels, domains = make_images()
    clients = partition(PartitionConfig(scheme="iid", clients=7), labels, domains, NAMES, seed=0)
    assert [c.name for c in clients] == [f"client-{k}" for k in range(7)]
    assert sorted({len(c.indices) for c in clients}) == [25, 26]  # 180 / 7
    for client in clients:
        assert client.domain is None
        assert set(domains[client.indices]) == {0, 1, 2}


def test_pooled_is_one_client_with_everything():
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
def test_every_image_belongs_to_exactly_one_client(config, seed, data_seed):
    labels, domains = make_images(data_seed)
    clients = partition(config, labels, domains, NAMES, seed)
    assert sorted(i for own in owners(clients) for i in own) == list(range(len(labels)))
    for client in clients:
        assert client.indices.dtype == np.int64
        assert np.all(np.diff(client.indices) > 0)  # ascending
        assert len(client.indices) >= (config.min_images or 1)


@pytest.mark.parametrize("config", [dirichlet(), PartitionConfig(scheme="iid", clients=4)], ids=["dirichlet", "iid"])
def test_the_seed_decides(config):
    labels, domains = make_images()
    first = owners(partition(config, labels, domains, NAMES, seed=1))
    assert first == owners(partition(config, labels, domains, NAMES, seed=1))
    assert first != owners(partition(config, labels, domains, NAMES, seed=2))


def test_a_domains_clients_do_not_depend_on_the_other_domains():
    labels, domains = make_images()
    sans = np.flatnonzero(domains == 1)
    together = partition(dirichlet(), labels, domains, NAMES, seed=0)
    alone = partition(dirichlet(), labels[sans], np.zeros(len(sans), np.int64), ("sans",), seed=0)
    assert [sans[c.indices].tolist() for c in alone] == owners(together)[4:8]


def test_alpha_sets_how_skewed_the_labels_are():
    labels, domains = make_images(per_domain=2000)

    def largest_share(alpha: float) -> float:
        """Mean over clients and classes of a client's largest share in its domain's class; 1/4 if all are alike."""
        clients = partition(dirichlet(alpha=alpha), labels, domains, NAMES, seed=0)
        counts = np.array([np.bincount(labels[c.indices], minlength=CLASSES) for c in clients]).reshape(3, 4, CLASSES)
        return float((counts.max(axis=1) / counts.sum(axis=1)).mean())

    assert largest_share(1e4) < 0.27 < 0.4 < largest_share(0.5) < 0.85 < largest_share(0.05)


def test_the_shares_have_the_dirichlet_distributions_variance():
    """Var of one share of Dirichlet(a, ..., a) over K clients is (1/K)(1 - 1/K) / (K a + 1)."""
    alpha, k, images, classes = 0.5, 4, 400, 500
    labels = np.repeat(np.arange(classes), images)
    clients = partition(dirichlet(k, alpha), labels, np.zeros_like(labels), ("only",), seed=0)
    shares = np.array([np.bincount(labels[c.indices], minlength=classes) for c in clients]) / images
    expected = (1 / k) * (1 - 1 / k) / (k * alpha + 1)
    np.testing.assert_allclose(shares.var(axis=1), expected, rtol=0.2)
    np.testing.assert_allclose(shares.mean(axis=1), 1 / k, atol=0.05)


def test_more_images_than_there_are_is_refused_with_the_numbers():
    labels, domains = make_images()
    with pytest.raises(PartitionError, match=r"domain serif has 60 .*clients_per_domain=7 .*min_images=10"):
        partition(dirichlet(clients=7, least=10), labels, domains, NAMES, seed=0)
    with pytest.raises(PartitionError, match=r"partition\.clients=181 is more than the 180"):
        partition(PartitionConfig(scheme="iid", clients=181), labels, domains, NAMES, seed=0)


def test_a_draw_that_never_succeeds_ends_and_says_what_to_change():
    labels, domains = make_images()
    with pytest.raises(PartitionError, match=r"domain serif: in 1000 draws .*min_images=15; .*partition\.alpha=0\.01"):
        partition(dirichlet(alpha=0.01, least=15), labels, domains, NAMES, seed=0)
