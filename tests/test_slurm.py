"""Runs on a real Slurm of two virtual nodes. Importing torch dominates, so there are few jobs with many checks each."""

from __future__ import annotations

from tests.slurm_cluster import Cluster


def test_two_nodes_with_names_of_their_own(slurm: Cluster) -> None:
    assert sorted(slurm.run("srun", "-N2", "hostname").split()) == ["cn01", "cn02"]
