import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.engine import Request, Sampling
from moesaic.engine.drafter import Drafter
from moesaic.engine.ngrams import CANDIDATES, LONGEST, SHORTEST, NgramIndex, continuation
from moesaic.engine.request import Sequence
from moesaic.engine.speculation import MAX_PROPOSALS, Speculation
from moesaic.engine.step_costs import REMEMBERED_STEPS, StepCosts


def matched(ids):
    index = NgramIndex()
    index.extend(ids)
    return index.match(ids)


def slow_match(ids):
    """The specification: of the latest occurrences of the last n-gram, the longest match, and of these the latest."""
    places = [p for p in range(SHORTEST, len(ids)) if ids[p - SHORTEST : p] == ids[-SHORTEST:]]
    best = (0, 0)
    for place in places[::-1][:CANDIDATES]:
        common = max(n for n in range(SHORTEST, min(place, LONGEST) + 1) if ids[place - n : place] == ids[-n:])
        if common > best[1]:
            best = place, common
    return best


def test_the_longest_match_is_preferred_then_the_latest():
    assert matched([9, 1, 2, 3, 7, 1, 2, 3, 8, 9, 1, 2, 3]) == (4, 4)
    assert matched([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3]) == (7, 3)
    assert matched([1, 2, 3, 1, 2]) == (0, 0)


@given(st.lists(st.integers(0, 2), max_size=80))
def test_matches_are_those_of_the_specification(ids):
    assert matched(ids) == slow_match(ids)


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 7))
def test_an_index_that_grows_equals_one_built_at_once(ids, chunk):
    index = NgramIndex()
    for end in range(chunk, len(ids), chunk):
        index.extend(ids[:end])
    index.extend(ids)
    assert index.match(ids) == matched(ids)


def test_a_loop_is_continued_beyond_the_end():
    assert continuation([4, 1, 2, 3, 1, 2, 3], 4, 7) == (1, 2, 3, 1, 2, 3, 1)


def sequence(ids, limit=500, **sampling):
    return Sequence(Request((1,), Sampling(**sampling)), 0, 0, 0, limit, list(ids), [])


def copying(**options):
    """A sequence that has begun to repeat itself; its next tokens are 12, 13, ..."""
    return sequence([*range(40), *range(12)], **options)


def speculation(costs):
    """Speculation that has measured steps of these numbers of tokens, with these times."""
    out = Speculation()
    for tokens, seconds in costs.items():
        for _ in range(2):
            out.costs.record(tokens, seconds)
    return out


FREE = {1: 1.0, 2: 1.0, 32: 1.0}
MIXTRAL = {1: 1.0, 2: 1.65, 3: 2.13, 4: 2.5, 5: 2.8, 8: 3.24, 16: 3.55, 17: 3.6}


def proposals(spec, *sequences, budget=100):
    return spec.propose(sequences, budget)


def observe(spec, one, right, times):
    """Let ``one`` be observed ``times`` times: its next token is as proposed, or it is not."""
    for _ in range(times):
        proposals(spec, one)
        spec.observe(one, one.drafter.tokens[:1] if right else [999])


def test_free_tokens_are_proposed_and_right():
    one = copying()
    tokens = proposals(speculation(FREE), one)[one]
    assert tokens == tuple(range(12, 12 + len(tokens)))
    assert 4 < len(tokens) <= MAX_PROPOSALS


def test_nothing_is_proposed_before_a_plain_step_was_measured():
    assert proposals(speculation({2: 1.0}), copying()) == {}


def test_expensive_tokens_are_not_proposed_until_they_are_mostly_accepted():
    one, spec = copying(), speculation(MIXTRAL)
    observe(spec, one, right=False, times=6)
    assert proposals(spec, one) == {}
    observe(spec, one, right=True, times=60)
    assert len(proposals(spec, one)[one]) > 7, "a sure match is worth a long proposal"


def test_rejections_shorten_the_proposals():
    one, spec = copying(), speculation({1: 1.0, 17: 1.8})
    long = len(proposals(spec, one)[one])
    observe(spec, one, right=False, times=3)
    assert len(proposals(spec, one).get(one, ())) < long


def test_the_rate_recovers_without_proposals_being_run():
    one, spec = copying(), speculation({1: 1.0, 2: 1.6, 17: 9.0})
    observe(spec, one, right=False, times=20)
    assert proposals(spec, one) == {}
    observe(spec, one, right=True, times=100)
    assert proposals(spec, one)


def test_other_sequences_are_not_slowed_down():
    one, other = copying(), sequence(range(50, 90))
    assert proposals(speculation({2: 1.0, 3: 1.2, 18: 1.3}), one, other) == {}
    assert proposals(speculation({2: 1.0, 3: 1.01, 18: 1.02}), one, other)


def test_proposals_fit_the_budget_and_the_answer():
    spec = speculation(FREE)
    assert 0 < sum(map(len, proposals(spec, copying(), budget=9).values())) <= 9
    one = copying(limit=55)
    assert len(proposals(spec, one)[one]) == 2, "with the sampled token, 52 tokens become 55"
    assert proposals(spec, copying(limit=53)) == {}


def test_a_request_can_switch_speculation_off():
    assert proposals(speculation(FREE), copying(speculation=False)) == {}


def test_an_answer_with_a_grammar_is_not_speculated():
    one = copying()
    one.constraint = object()
    assert proposals(speculation(FREE), one) == {}


def test_classes_of_matches_have_rates_of_their_own():
    drafter = Drafter()
    short, long = [1, 2, 3, 4, 9, 1, 2, 3], [*range(40), *range(12)]
    drafter.propose(short, 3)
    before = drafter.rate
    drafter.observe([4])
    drafter.propose(short, 3)
    assert drafter.rate > before
    assert drafter.tokens == (4, 9, 1)
    other = Drafter()
    other.propose(long, 3)
    assert other.rate > drafter.rate


def test_costs_between_and_beyond_measured_sizes():
    costs = speculation({1: 1.0, 9: 2.0}).costs
    assert costs.estimate(5, 1) == pytest.approx(1.5)
    assert 2.0 < costs.estimate(12, 1) < 3.0
    assert costs.estimate(9, 1) == 2.0


def test_a_size_measured_once_is_tried_again():
    costs = StepCosts()
    costs.record(1, 1.0)
    costs.record(2, 50.0)
    assert costs.estimate(2, 1) < 2
    costs.record(2, 40.0)
    assert costs.estimate(2, 1) == 40.0


def test_an_outlier_hardly_changes_a_cost():
    costs = StepCosts()
    for _ in range(10):
        costs.record(1, 1.0)
    costs.record(1, 100.0)
    assert costs.measured(1) < 1.1


def test_costs_follow_a_lasting_change():
    costs = StepCosts()
    for seconds in itertools.chain([1.0] * 5, [3.0] * 100):
        costs.record(1, seconds)
    assert costs.measured(1) == pytest.approx(3.0, rel=0.1)


def test_old_costs_are_forgotten():
    costs = speculation(FREE).costs
    for _ in range(REMEMBERED_STEPS + 1):
        costs.record(2, 1.0)
    assert costs.measured(1) is None
    assert costs.measured(2) == 1.0


def test_any_mix_of_sequences_has_an_estimate():
    draw = random.Random(0)
    for _ in range(300):
        base = draw.randrange(1, 70)
        costs = {draw.randrange(1, 200): draw.random() for _ in range(5)} | {base: 1.0}
        sequences = [copying() if draw.random() < 0.5 else sequence(range(9)) for _ in range(base)]
        out = proposals(speculation(costs), *sequences, budget=64)
        assert sum(map(len, out.values())) <= 64
