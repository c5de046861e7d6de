"""The harness of `embershard bench`: ratios are paired round by round, and a contender that fails is named."""

import pytest
from embershard.cluster.bench import Comparison, Contender, run_rounds
from embershard.cluster.errors import RunFailed


def test_a_ratio_is_the_median_of_the_rounds_own_ratios():
    comparison = Comparison()
    for ours, theirs in ((10.0, 10.0), (40.0, 20.0), (30.0, 10.0)):  # the machine drifts, both see it
        comparison.add("ours", {"rate": ours})
        comparison.add("theirs", {"rate": theirs})
    summary = comparison.summary({"ours_over_theirs": ("ours.rate", "theirs.rate")})
    assert summary["readings"] == {"ours.rate": 30.0, "theirs.rate": 10.0}
    assert summary["ratios"] == {"ours_over_theirs": 2.0}
    assert summary["ratio_spread"] == {"ours_over_theirs": [1.0, 3.0]}


def test_a_ratio_with_a_contender_left_out_is_left_out():
    comparison = Comparison()
    comparison.add("ours", {"rate": 1.0})
    assert comparison.summary({"ours_over_theirs": ("ours.rate", "theirs.rate")})["ratios"] == {}


def test_a_reading_that_is_wanted_and_missing_is_named():
    comparison = Comparison()
    comparison.add("ours", {"rate": 1.0})
    comparison.add("theirs.d16", {"other": 1.0})
    with pytest.raises(RunFailed, match=r"theirs\.d16\.rate was not read, so there is no ratio"):
        comparison.summary({"ratio": ("ours.rate", "theirs.d16.rate")})


def test_a_contender_that_fails_is_named():
    contender = Contender("broken", ("embershard.parameter_server.bench", "nobody", "{}"))
    with pytest.raises(RunFailed, match="contender broken failed: KeyError: 'nobody'"):
        run_rounds([contender], {}, 1, lambda line: None)


def test_a_contender_that_does_not_end_is_named(monkeypatch):
    monkeypatch.setattr("embershard.cluster.bench.CONTENDER_SECONDS", 0.2)
    asleep = Contender("asleep", ("timeit", "-n1", "-r1", "import time; time.sleep(9)"))
    with pytest.raises(RunFailed, match=r"contender asleep was not done after 0\.2 s"):
        run_rounds([asleep], {}, 1, lambda line: None)


def test_every_second_round_goes_the_other_way(monkeypatch):
    monkeypatch.setattr("embershard.cluster.bench._measure", lambda contender: {"rate": 1.0})
    told = []
    run_rounds([Contender("a", ()), Contender("b", ())], {}, 3, told.append)
    assert [line[-1] for line in told] == ["a", "b", "b", "a", "a", "b"]


def test_what_is_missing_is_said_after_the_first_round(monkeypatch):
    monkeypatch.setattr("embershard.cluster.bench._measure", lambda contender: {"rate": 1.0})
    told = []
    with pytest.raises(RunFailed, match=r"b\.other was not read"):
        run_rounds([Contender("a", ()), Contender("b", ())], {"a_over_b": ("a.rate", "b.other")}, 3, told.append)
    assert len(told) == 2
