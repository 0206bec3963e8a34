"""The simulated timeline: speeds, staleness, and workers that die, join and lose messages."""

import chex
import numpy as np
import problem
import pytest
from elastic_runs import SHARP, loss_of, make_worker

from samx import elastic
from samx.elastic._ledger import may_exchange

pytestmark = pytest.mark.usefixtures("float64")


def gradients_per_second(seconds_per_step, **changes):
    events = list(elastic.timeline(seconds_per_step, period=4, num_exchanges=400, **changes))
    finished = [event.time for event in events if event.kind == "finish"]
    return len(finished) / finished[-1]


def test_a_slow_worker_holds_nobody_up():
    seconds = [1.0, 1.0, 1.0, 4.0]
    own_speeds = sum(1 / s for s in seconds)
    assert gradients_per_second(seconds, latency=0.2) >= 0.98 * own_speeds
    assert len(seconds) / max(seconds) <= 0.31 * own_speeds  # if all waited for the slowest


def test_a_slow_center_does():
    """Workers wait for replies that take longer than a step, once per period."""
    assert gradients_per_second([1.0] * 2, latency=1.5) == pytest.approx(2 * 4 / 6, rel=0.02)
    waiting = gradients_per_second([1.0] * 2, latency=0.5, overlap=False)
    assert waiting == pytest.approx(2 * 4 / 5, rel=0.02)


def staleness(events):
    """Compute the staleness from the exchanges alone."""
    last, version, found = {}, 0, []
    for event in events:
        if event.kind == "join":
            last[event.worker] = version
        if event.kind == "exchange":
            found.append(version - last[event.worker])
            assert found[-1] == event.staleness
            version += 1
            last[event.worker] = version
    return found


def test_staleness_is_bounded_and_then_costs_time():
    seconds = [0.1, 0.3, 1.0, 4.0]
    free = list(elastic.timeline(seconds, period=2, num_exchanges=200))
    assert max(staleness(free)) > 20
    for bound in (3, 8):
        bounded = list(elastic.timeline(seconds, period=2, num_exchanges=200, max_staleness=bound))
        assert len(staleness(bounded)) == 200
        assert max(staleness(bounded)) <= bound
        assert bounded[-1].time > free[-1].time


def test_workers_die_join_and_lose_messages():
    changes = [(2.5, 0, "die"), (4.5, 2, "join"), (6.0, 0, "join")]
    events = list(
        elastic.timeline(
            [1.0] * 3, period=2, num_exchanges=12, changes=changes, drops={(1, 1)}, latency=0.1
        )
    )
    of = [[e for e in events if e.worker == i] for i in range(3)]
    assert [e.time for e in of[0] if e.kind in ("join", "die")] == [0.0, 2.5, 6.0]
    assert not any(2.5 < e.time < 6.0 for e in of[0])
    assert of[2][0].time == 4.5
    exchanged = [round(e.time, 1) for e in of[1] if e.kind == "exchange"]
    assert exchanged[:3] == [0.1, 4.1, 6.1]  # the exchange at 2.1 was lost
    assert sum(e.kind == "exchange" for e in events) == 12
    staleness(events)

    rule = elastic.Rule(beta=0.9, period=2)
    make = make_worker(SHARP, 3)
    simulation = elastic.Simulation([make(i) for i in range(3)], problem.make()[1], rule)
    for event in events:
        simulation.apply(event)
        if event.kind == "join":  # it starts at the center, in any case
            chex.assert_trees_all_equal(simulation.workers[event.worker].params, simulation.center)
    assert simulation.exchanges == 12
    assert loss_of(simulation.center) < 0.8 * loss_of(problem.make()[1])


@pytest.mark.parametrize("num_workers", [2, 5])
def test_the_bound_lets_somebody_go_on_always(num_workers):
    """In any allowed order, some worker may go on, and no worker is staler than the bound."""
    rng = np.random.default_rng(0)
    for bound in (num_workers - 1, num_workers, 3 * num_workers):
        last = dict.fromkeys(range(num_workers), 0)
        for version in range(300):
            allowed = [i for i in last if may_exchange(i, version, last, bound)]
            assert min(last, key=last.get) in allowed
            mover = allowed[rng.integers(len(allowed))]
            assert version - last[mover] <= bound
            last[mover] = version + 1
