"""docs/scaling.md: it is current, its volumes are those of docs/distributed.md, and what it says follows from it."""

import pytest

from benchmarks import scaling
from benchmarks.scaling import ETHERNET, INFINIBAND, NVLINK, SIZES, WORLDS, Network, hiding, step
from fastvlm_loss import distributed

PAPER = [
    (big, world, network)
    for world in WORLDS
    for network in ((NVLINK,) if world == 8 else (INFINIBAND, ETHERNET))
    for big in SIZES
]


def test_the_page_is_current():
    assert not scaling.main(check=True), "run python -m benchmarks.scaling"


def test_what_is_sent_is_what_the_docs_say(monkeypatch):
    monkeypatch.setattr(scaling, "MESSAGE", 0.0)
    monkeypatch.setattr(scaling, "LINKS", 1.0)
    slow = Network("a byte a second", 1.0)  # so seconds are bytes
    for big, world, d, b in ((64, 4, 10, 2), (96, 8, 7, 4)):
        n = big // world
        states = 3 * 3 * 4 * (big - n)
        gather, ring = (step(big, world, slow, kind, 1e9, d, b) for kind in (False, True))
        assert gather.sent == pytest.approx(2 * (big - n) * d * b + states)
        assert ring.sent == pytest.approx(2 * (big - n) * d * b + 4 * big * d + states)
        assert gather.compute == pytest.approx(8 * n * big * d / 1e9)


def test_a_collective_across_hosts_waits_for_the_ports_of_a_host():
    one = INFINIBAND.collective(100, 8, 1e6)
    eight = INFINIBAND.collective(100, 64, 1e6)
    assert one == pytest.approx(7 * 1e8 / INFINIBAND.inside / scaling.LINKS, rel=0.2)
    assert eight == pytest.approx(56 * 1e8 / INFINIBAND.host / scaling.LINKS, rel=0.2)


@pytest.mark.parametrize(("big", "world", "network"), PAPER)
def test_a_step_is_computing_and_what_is_not_hidden(big, world, network):
    gather, ring = (step(big, world, network, kind) for kind in (False, True))
    assert gather.hidden == pytest.approx(0.0, abs=1e-6) and 0 <= ring.hidden < 1
    assert gather.compute == ring.compute <= min(gather.total, ring.total)
    assert ring.memory < gather.memory
    # what the page says of when a ring is the faster way
    speed = NVLINK.inside if world == 8 else network.flow
    assert (ring.total < gather.total) == (big // world > hiding(speed))


def test_where_a_ring_starts_is_the_limit_of_the_library():
    assert distributed._gathered == scaling.LIMIT
    assert SIZES[-1] * scaling.D * scaling.BYTES < scaling.LIMIT  # "a million pairs are still gathered"


def test_ethernet_sends_for_longer_than_it_computes():
    assert all(step(big, 64, ETHERNET, False).sent > step(big, 64, ETHERNET, False).compute for big in SIZES)
