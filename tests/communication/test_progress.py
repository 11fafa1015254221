"""How far a round is, counted over the ranks and over an interruption."""

from __future__ import annotations

import sys

import pytest

from lorafair.communication.progress import TrainingProgress
from lorafair.schedule import RoundPlan
from tests.conftest import launched
from tests.test_console import Terminal


def test_clients_done_before_count_where_the_plan_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cohorts of a run on another device, which are trained again, do not."""
    terminal, now = Terminal(), [0.0]
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr("time.monotonic", lambda: now[-1])
    plan = RoundPlan(clients=(0, 1, 2, 5), weights=(0.25,) * 4, cohorts_of_rank=(((0,), (1, 2), (5,)),))
    finished = {(0,), (1, 2, 5)}
    with TrainingProgress(launched(1), "round 1/2", plan, finished, costs=[100, 10, 20, 0, 0, 30]) as progress:
        progress.clients_done(2)
        now.append(10.0)
        progress.images_done(30)
    assert "round 1/2: 3 of 4 clients, 30 of 60 images, 3/s, 0:10 left" in terminal.getvalue()
