"""The measurement of the ring's overlap: it runs, and its committed table is that of its numbers."""

import pytest
import torch.distributed as dist

from benchmarks import overlap, store

RESULT = store.RESULTS / "overlap" / "cpu-avx2.json"


def test_the_table_is_that_of_the_numbers():
    result = store.load(RESULT)
    assert RESULT.with_suffix(".md").read_text() == overlap.markdown(result) + "\n"
    for link in result["links"]:
        ring, later = (link["timings"][who] for who in (overlap.RING, overlap.LATER))
        # docs/distributed.md says that the messages are hidden in part: by more than both measurements scatter
        assert later["median"] - ring["median"] > max(ring["spread"], later["spread"]) / 2
        assert 0 < overlap.hidden(link["timings"]) < 1


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
def test_it_runs():
    found = overlap.measure(8, 4, 1)
    assert set(found) == {overlap.RING, overlap.LATER, overlap.ALONE, overlap.SENDING, overlap.GATHERED}
    assert all(timing["median"] > 0 and timing["repeats"] == 1 for timing in found.values())
