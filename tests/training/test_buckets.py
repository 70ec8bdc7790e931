"""Bucket scaling of advantages, by hand."""

from __future__ import annotations

import json

import pytest

from keyecli.training.buckets import Answered, BucketScaling, bucket_of, third_bounds


def test_thirds_and_quarters() -> None:
    bounds = third_bounds([5, 1, 9, 3, 7, 11])
    assert bounds == (3, 7)
    found = [
        bucket_of(Answered(rate, tokens, 0.0), bounds) for rate, tokens in ((0.0, 3), (0.25, 4), (1.0, 8))
    ]
    assert found == ["0:0", "1:1", "3:2"]
    assert third_bounds([]) == (0, 0)
    # All of one length are one third.
    assert {bucket_of(Answered(0.5, 4, 0.0), third_bounds([4, 4, 4]))} == {"2:0"}


def test_a_loud_bucket_is_quietened_and_a_quiet_one_raised() -> None:
    loud, quiet = Answered(0.1, 4, -3.0), Answered(0.9, 4, 1.0)
    scaling = BucketScaling()
    # The mean of all is 2.
    assert scaling.scales([quiet, loud], [loud, quiet]) == pytest.approx([2 / 1.001, 2 / 3.001])
    # Never by more than twice or half, however far apart.
    far = BucketScaling()
    hush = Answered(0.9, 4, 0.0)
    assert far.scales([hush, loud, loud, loud], [hush, loud, loud, loud, hush, hush, hush]) == [
        2.0,
        0.5,
        0.5,
        0.5,
    ]


def test_what_was_seen_fades_and_is_gone_on_with() -> None:
    one, other = Answered(0.1, 4, 1.0), Answered(0.9, 4, 3.0)
    scaling = BucketScaling()
    scaling.scales([], [one])
    again = BucketScaling()
    again.take(json.loads(json.dumps(scaling.state())))
    # (0.9 · 1 + 3) / 1.9 over 3.
    assert scaling.scales([other], [other]) == pytest.approx([(3.9 / 1.9) / 3.001])
    assert again.scales([other], [other]) == pytest.approx([(3.9 / 1.9) / 3.001])


def test_processes_agree() -> None:
    everybody = [Answered(0.1 * place, 3 + place, 0.5 * place) for place in range(8)]
    whole = BucketScaling().scales(everybody, everybody)
    halves = [BucketScaling().scales(everybody[part], everybody) for part in (slice(0, 4), slice(4, 8))]
    assert halves[0] + halves[1] == whole
