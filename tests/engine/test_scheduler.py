from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moesaic.engine import Done, Limits, PromptLogprobs, Request, Sampling, Token
from moesaic.engine.blocks import Blocks
from moesaic.engine.scheduler import Scheduler
from moesaic.engine.step import Outcome
from moesaic.errors import InvalidParameter, Overloaded, PromptTooLong


def says(ids):
    """Return the next token of a fake model, a function of all ids; 0 is EOS."""
    return hash(tuple(ids)) % 11


def answer(request, limit):
    ids = list(request.ids)
    while len(ids) < limit:
        ids.append(says(ids))
        if ids[-1] in request.stop_ids:
            break
    return ids[len(request.ids) :]


class Guesses:
    """Proposes tokens of which some are right, a function of the ids; ``most`` in all for each sequence."""

    def __init__(self, most):
        self.most, self.seen = most, []

    def propose(self, sequences, budget):
        out = {}
        for sequence in sequences:
            ids = list(sequence.ids)
            for place in range(min(self.most, budget)):
                ids.append(says(ids) if hash((place, tuple(ids))) % 4 else 5)
            out[sequence] = tuple(ids[len(sequence.ids) :])
            budget -= len(out[sequence])
        return out

    def observe(self, sequence, tokens):
        self.seen.append((list(sequence.ids), tokens))


class World:
    """A scheduler, and a fake cache that records which prefix was written to each slot."""

    def __init__(self, count, size, limits, context=200, window=None, proposals=0):
        guesses = Guesses(proposals) if proposals else None
        self.scheduler = Scheduler(Blocks(count, size), limits, context, window, guesses)
        self.size, self.window, self.memory = size, window, {}
        self.live, self.events = [], {}

    def submit(self, ids, priority=0, salt="", cuts=(), scored_from=0, **sampling):
        request = Request(tuple(ids), Sampling(**sampling), (0,), priority, salt, prompt_logprobs_start=scored_from)
        whole = answer(request, min(self.scheduler.capacity, len(ids) + (request.sampling.max_tokens or 200)))
        request = replace(request, resume=tuple(whole[:cut] for cut in cuts))
        sequences = self.scheduler.prepare(request, 0)
        self.scheduler.add(sequences)
        self.live += [sequence for sequence in sequences if not sequence.ended]
        self.events |= {sequence: [*sequence.resumed_events] for sequence in sequences}
        return sequences

    def start(self):
        step = self.scheduler.schedule()
        if step:
            self.write(step)
        return step

    def write(self, step):
        """Use the cache as a model would, and assert that no sequence writes to a shared block."""
        slots = [self.slot(run.sequence, p) for run in step.runs for p in self.places(run)]
        assert len(set(slots)) == len(slots), "a slot is used twice in a step"
        assert len({run.sequence for run in step.runs}) == len(step.runs)
        assert sum(run.count for run in step.runs) <= self.scheduler.limits.batch_tokens
        assert all(run.count > 0 and not run.sequence.ended for run in step.runs)
        for run in step.runs:
            for p in self.places(run):
                slot = self.slot(run.sequence, p)
                holders = [s for s in self.scheduler.sequences() if slot // self.size in s.table]
                assert holders == [run.sequence], "a shared block is written to"
                self.memory[slot] = (run.sequence.request.salt, self.ids(run)[: p + 1])
        for run in step.runs:
            sequence, end = run.sequence, run.sequence.cached + run.count
            assert len(sequence.ids) + len(run.proposals) < sequence.limit or not run.proposals
            first = 0 if self.window is None else max(0, sequence.cached - self.window + 1)
            for p in range(first, end):
                seen = self.memory[self.slot(sequence, p)]
                assert seen == (sequence.request.salt, self.ids(run)[: p + 1]), "a slot holds another prefix"

    def ids(self, run):
        return (*run.sequence.ids, *run.proposals)

    def places(self, run):
        return range(run.sequence.cached, run.sequence.cached + run.count)

    def slot(self, sequence, p):
        block = sequence.table[p // self.size]
        assert block >= 0, "a visible block was freed"
        return block * self.size + p % self.size

    def finish(self, step):
        tokens = {run.sequence: self.sample(run) for run in step.runs if run.samples}
        scores = {run.sequence: self.scores(run) for run in step.runs if run.sequence.scores_prompt}
        for sequence, events in self.scheduler.update(step, Outcome(tokens, scores)):
            self.tell(sequence, events)
        for run in step.runs:
            used = 0 if run.sequence.ended else -(-run.sequence.cached // self.size)
            assert len(run.sequence.table) == used, "a block without tokens is kept"
            assert run.sequence.ended or run.sequence not in tokens or run.sequence.pending == 1

    def sample(self, run):
        """Return the tokens that a sampler draws, up to the first that differs from its proposal."""
        tokens, ids = [], list(run.sequence.ids)
        for proposal in (*run.proposals, None):
            tokens.append(Token(says(ids)))
            ids.append(tokens[-1].id)
            if tokens[-1].id != proposal:
                break
        return tokens

    def scores(self, run):
        """Return the prompt tokens that follow the tokens of this run, with their places as log-probabilities."""
        request, places = run.sequence.request, range(run.sequence.cached + 1, run.sequence.cached + run.count + 1)
        first = max(1, request.prompt_logprobs_start)
        return [Token(request.ids[p], float(p)) for p in places if first <= p < len(request.ids)]

    def tell(self, sequence, events):
        assert not any(isinstance(event, Done) for event in self.events[sequence]), "something comes after Done"
        self.events[sequence] += events
        if sequence.ended:
            self.live.remove(sequence)

    def cancel(self, sequence):
        done = self.scheduler.cancel(sequence)
        if done:
            self.tell(sequence, [done])

    def drain(self, steps=5000):
        while (step := self.start()) is not None:
            self.finish(step)
            steps -= 1
            assert steps, "a sequence starves"

    def check(self):
        self.scheduler.blocks.check(sequence.table for sequence in self.scheduler.sequences())
        assert set(self.scheduler.sequences()) == set(self.live)
        assert self.scheduler.running <= self.scheduler.limits.sequences

    def check_answers(self):
        for sequence, events in self.events.items():
            *tokens, done = events
            assert isinstance(done, Done)
            ids = [token.id for token in tokens if isinstance(token, Token)]
            expected = answer(sequence.request, sequence.limit)
            if done.reason == "cancelled":
                assert ids == expected[: len(ids)]
            else:
                assert ids == expected
                assert done.reason == ("stop" if ids[-1] == 0 else "length")
            assert done.completion_tokens == len(ids)
            prompts = [event for event in tokens if isinstance(event, PromptLogprobs)]
            assert prompts == tokens[: len(prompts)]
            assert len(prompts) == (sequence.scores_prompt and bool(ids))
            for prompt in prompts:
                assert tuple(token.id for token in prompt.tokens) == sequence.request.ids
                first = max(1, sequence.request.prompt_logprobs_start)
                places = [float(p) if p >= first else None for p in range(sequence.prompt)]
                assert [token.logprob for token in prompt.tokens] == places


class Machine(RuleBasedStateMachine):
    @initialize(
        count=st.integers(1, 24),
        size=st.integers(1, 8),
        sequences=st.integers(1, 6),
        extra=st.integers(0, 20),
        aging_steps=st.integers(1, 50),
        window=st.none() | st.integers(1, 12),
        proposals=st.integers(0, 9),
    )
    def begin(self, count, size, sequences, extra, aging_steps, window, proposals):
        limits = Limits(sequences + extra, sequences, queue=12, aging_steps=aging_steps)
        self.world = World(count, size, limits, context=60, window=window, proposals=proposals)
        self.step = None

    @rule(
        ids=st.lists(st.integers(1, 2), min_size=1, max_size=40),
        priority=st.integers(-1, 1),
        salt=st.sampled_from(["", "a"]),
        max_tokens=st.integers(1, 20),
        n=st.integers(1, 3),
        scores=st.sampled_from([None, None, 0]),
        scored_from=st.integers(0, 41),
        cuts=st.lists(st.integers(0, 20), max_size=3),
    )
    def submit(self, ids, priority, salt, max_tokens, n, scores, scored_from, cuts):
        options = {"max_tokens": max_tokens, "n": n, "prompt_logprobs": scores}
        try:
            self.world.submit(ids, priority, salt, cuts[:n], scored_from, **options)
        except PromptTooLong as error:
            assert len(ids) + 1 > self.world.scheduler.capacity == error.limit + 1
        except Overloaded:
            assert self.world.scheduler.waiting + n > 12

    @precondition(lambda self: self.step is None)
    @rule()
    def start(self):
        self.step = self.world.start()

    @precondition(lambda self: self.step is not None)
    @rule()
    def finish(self):
        self.world.finish(self.step)
        self.step = None

    @precondition(lambda self: self.world.live)
    @rule(data=st.data())
    def cancel(self, data):
        self.world.cancel(data.draw(st.sampled_from(self.world.live)))

    @precondition(lambda self: self.world.live)
    @rule(data=st.data())
    def fail(self, data):
        sequence = data.draw(st.sampled_from(self.world.live))
        for block in self.world.scheduler.fail(sequence):
            for place in range(self.world.size):
                self.world.memory.pop(block * self.world.size + place, None)
        self.world.live.remove(sequence)
        del self.world.events[sequence]

    @invariant()
    def sound(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            if self.step:
                self.finish()
            self.world.drain()
            self.world.check()
            self.world.check_answers()
            assert self.world.scheduler.blocks.available == self.world.scheduler.blocks.count, "blocks leaked"


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def world(count=32, size=4, batch_tokens=16, sequences=4, context=200, window=None, proposals=0, **limits):
    return World(count, size, Limits(batch_tokens, sequences, **limits), context, window, proposals)


def counts(step):
    return {run.sequence.arrival: run.count for run in step.runs}


def test_a_long_prompt_runs_in_chunks_beside_decoding():
    w = world(batch_tokens=8)
    [first] = w.submit([1, 2], max_tokens=10, ignore_eos=True)
    w.finish(w.start())
    [second] = w.submit([1] * 20, max_tokens=2)
    seen = []
    while second.generated == 0:
        step = w.start()
        seen.append(counts(step))
        w.finish(step)
    assert seen == [{0: 1, 1: 7}, {0: 1, 1: 7}, {0: 1, 1: 6}]
    assert first.generated == 4


def test_an_older_prompt_leaves_every_running_sequence_a_token():
    w = world(batch_tokens=8)
    w.submit([1, 2], max_tokens=10, ignore_eos=True)
    w.finish(w.start())
    w.submit([1] * 30, priority=-1, max_tokens=2)
    assert counts(w.start()) == {0: 1, 1: 7}


def test_order_is_by_priority_then_arrival():
    w = world(sequences=1)
    arrivals = [w.submit([1, 2], priority=p, max_tokens=1)[0] for p in (1, 0, 1, -5, 0)]
    order = []
    while (step := w.start()) is not None:
        order += [arrivals.index(run.sequence) for run in step.runs]
        w.finish(step)
    assert order == [3, 1, 4, 0, 2]


def test_only_a_better_priority_preempts():
    w = world(sequences=1)
    [low] = w.submit([1] * 6, priority=3, max_tokens=8)
    w.finish(w.start())
    [equal] = w.submit([2] * 6, priority=3, max_tokens=1)
    [high] = w.submit([3] * 6, priority=2, max_tokens=1)
    step = w.start()
    assert [run.sequence for run in step.runs] == [high]
    assert (low.preemptions, low.cached, low.table) == (1, 0, [])
    w.finish(step)
    step = w.start()
    assert [run.sequence for run in step.runs] == [low], "it was there before the equal one"
    assert low.cached == 4, "what the prefix cache still holds is not computed again"
    assert equal.preemptions == 0
    w.finish(step)
    w.drain()
    assert w.events[low][-1].cached_tokens == 0, "its own blocks are no gift of the prefix cache"


def test_memory_pressure_preempts_the_last_in_order():
    w = world(count=6, size=2, sequences=3)
    a, b = (w.submit([n] * 4, max_tokens=8)[0] for n in (1, 2))
    w.drain()
    assert (a.preemptions, b.preemptions) == (0, 1)
    w.check_answers()


def test_a_new_sequence_is_not_admitted_to_be_preempted():
    w = world(count=6, size=2, sequences=3, batch_tokens=16)
    w.submit([1] * 6, max_tokens=6)
    w.finish(w.start())  # holds 3 of 6 blocks, and will need a fourth next
    [second] = w.submit([2] * 4, max_tokens=1)
    assert counts(w.start()) == {0: 1}, "its 2 blocks would leave nothing to grow into"
    assert second.table == []


def test_reused_cached_blocks_do_not_count_as_available():
    w = world(count=6, size=2, sequences=3)
    w.submit([2] * 4, max_tokens=1)
    w.finish(w.start())  # leaves 2 known blocks
    w.submit([1] * 5, max_tokens=6, ignore_eos=True)
    w.finish(w.start())  # holds 3, so that one is free
    [third] = w.submit([2] * 4 + [3] * 3, max_tokens=1)
    assert counts(w.start()) == {1: 1}
    assert third.table == []


def test_no_admission_while_earlier_sequences_fill_the_step():
    w = world(batch_tokens=8)
    w.submit([1] * 20)
    w.submit([2] * 4)
    assert counts(w.start()) == {0: 8}


def test_the_prompts_logprobs_survive_a_preemption():
    w = world(sequences=1, batch_tokens=4)
    [low] = w.submit(range(1, 12), priority=3, prompt_logprobs=0, max_tokens=2)
    w.finish(w.start())
    w.submit([1], max_tokens=1)
    w.drain()
    assert low.preemptions == 1
    w.check_answers()


def test_aging_bounds_the_wait_behind_better_priorities():
    w = world(sequences=1, aging_steps=20, queue=1000)
    [low] = w.submit([2, 2], priority=9, max_tokens=5)
    for _ in range(100):
        w.submit([1, 2], priority=0, max_tokens=1)
        w.finish(w.start())
        if low.ended:
            break
    assert low.ended
    assert 20 <= w.scheduler.steps <= 30


def test_an_aged_sequence_is_not_preempted_by_priority():
    w = world(sequences=1, aging_steps=5, queue=1000)
    [low] = w.submit([1, 2], priority=9, max_tokens=50, ignore_eos=True)
    for _ in range(200):
        w.submit([1, 2], priority=0, max_tokens=1)
        w.finish(w.start())
        if low.ended or low.generated == 50:
            break
    assert low.preemptions <= 1


def test_followers_wait_for_the_leader_and_reuse_its_prompt():
    w = world(batch_tokens=8)
    leader, *followers = w.submit([1] * 17, n=3, max_tokens=3)
    for _ in range(2):
        step = w.start()
        assert [run.sequence for run in step.runs] == [leader]
        w.finish(step)
    w.finish(w.start())
    assert leader.generated == 1
    step = w.start()
    assert {run.sequence: run.count for run in step.runs} == {leader: 1, followers[0]: 1, followers[1]: 1}
    assert followers[0].table[:4] == followers[1].table[:4] == leader.table[:4]
    assert followers[0].table[4] != leader.table[4], "the last block is being written and is nobody else's"
    w.finish(step)
    w.drain()
    assert [events[-1].cached_tokens for events in w.events.values()] == [0, 16, 16]


def test_followers_do_not_wait_for_an_ended_leader():
    w = world()
    leader, follower = w.submit([1] * 5, n=2, max_tokens=3)
    w.cancel(leader)
    assert [run.sequence for run in w.start().runs] == [follower]


def test_the_last_prompt_token_always_runs():
    w = world()
    for _ in range(2):
        [sequence] = w.submit([1] * 8, max_tokens=1)
        w.finish(w.start())
    assert w.events[sequence][-1].cached_tokens == 4


def test_a_follow_up_reuses_the_whole_conversation():
    w = world()
    [first] = w.submit([1] * 6, max_tokens=7, ignore_eos=True)
    w.drain()
    [second] = w.submit([*first.ids, 5, 6], max_tokens=1)
    w.drain()
    assert w.events[second][-1].cached_tokens == (len(first.ids) - 1) // 4 * 4


def test_salts_isolate_tenants():
    w = world()
    for salt, hits in (("a", 0), ("b", 0), ("a", 8), ("", 0)):
        [sequence] = w.submit([1] * 9, salt=salt, max_tokens=1)
        w.drain()
        assert w.events[sequence][-1].cached_tokens == hits


def test_cancel_frees_blocks_at_once_even_during_a_step():
    w = world()
    [a] = w.submit([1] * 9, max_tokens=5)
    [b] = w.submit([2] * 9, max_tokens=5)
    step = w.start()
    w.cancel(a)
    w.check()
    w.finish(step)
    assert [type(event) for event in w.events[a]] == [Done]
    w.cancel(b)
    assert w.scheduler.cancel(b) is None
    assert w.scheduler.blocks.available == 32
    assert w.start() is None


def test_blocks_of_a_failed_sequence_leave_the_prefix_cache():
    w = world()
    [a] = w.submit([1] * 9, max_tokens=5)
    w.finish(w.start())
    assert len(w.scheduler.fail(a)) == 3
    w.live.remove(a)
    [b] = w.submit([1] * 9, max_tokens=1)
    w.finish(w.start())
    assert w.events[b][-1].cached_tokens == 0


def test_only_unreferenced_blocks_of_a_failure_are_wiped():
    w = world()
    leader, follower = w.submit([1] * 9, n=2, max_tokens=5, ignore_eos=True)
    w.finish(w.start())
    w.finish(w.start())
    assert follower.table[:2] == leader.table[:2]
    own = leader.table[2:]
    assert w.scheduler.fail(leader) == own[::-1]


def test_blocks_outside_the_window_are_freed():
    w = world(count=5, size=2, context=100, window=5, batch_tokens=4)
    [a] = w.submit([1] * 30, max_tokens=20, ignore_eos=True)
    w.drain()
    assert len(a.ids) == 50
    assert w.scheduler.capacity == 100
    w.check_answers()


def test_a_window_wider_than_the_cache_adds_no_capacity():
    assert world(count=5, size=2, context=100, window=30).scheduler.capacity == 10


def test_an_answer_is_limited_to_the_capacity():
    w = world(count=2, size=4)
    [a] = w.submit([1] * 5, max_tokens=100, stop_token_ids=(), ignore_eos=True)
    w.drain()
    assert w.events[a][-1].reason == "length"
    assert len(a.ids) == 8


@pytest.mark.parametrize(("count", "context", "limit"), [(2, 100, 7), (10, 6, 5)])
def test_a_prompt_that_can_never_fit_is_an_error(count, context, limit):
    w = world(count=count, size=4, context=context)
    w.submit([1] * limit)
    with pytest.raises(PromptTooLong) as caught:
        w.submit([1] * (limit + 1))
    assert (caught.value.tokens, caught.value.limit) == (limit + 1, limit)


def test_a_full_queue_rejects():
    w = world(queue=3, queue_tokens=10)
    w.submit([1], n=2)
    with pytest.raises(Overloaded):
        w.submit([1], n=2)
    with pytest.raises(Overloaded):
        w.submit([1] * 9)
    assert w.scheduler.waiting == 2
    w.submit([1] * 8)


def test_an_empty_queue_accepts_one_long_prompt():
    w = world(queue_tokens=10)
    w.submit([1] * 20)


@pytest.mark.parametrize("change", [{"batch_tokens": 3}, {"queue": 0}, {"aging_steps": 0}, {"sequences": -1}])
def test_invalid_limits_are_errors(change):
    with pytest.raises(InvalidParameter):
        Limits(**({"batch_tokens": 8, "sequences": 4} | change))


def test_proposals_run_only_while_no_prompt_does():
    w = world(batch_tokens=8, proposals=3)
    w.submit([1, 2], max_tokens=20, ignore_eos=True)
    w.finish(w.start())
    assert counts(w.start()) == {0: 4}


def test_a_prompt_is_not_delayed_by_proposals():
    w = world(batch_tokens=8, proposals=3)
    w.submit([1, 2], max_tokens=20, ignore_eos=True)
    w.finish(w.start())
    w.submit([1] * 20, max_tokens=2)
    assert counts(w.start()) == {0: 1, 1: 7}


def test_proposals_never_preempt_and_return_their_blocks():
    w = world(count=4, size=2, sequences=2, proposals=9)
    a, b = (w.submit([n] * 2, max_tokens=2, ignore_eos=True)[0] for n in (1, 2))
    w.finish(w.start())
    w.drain()
    assert (a.preemptions, b.preemptions) == (0, 0)
    assert w.scheduler.blocks.available == 4


def test_proposals_share_the_token_budget():
    w = world(batch_tokens=8, proposals=9)
    for n in (1, 2, 3):
        w.submit([n], max_tokens=20, ignore_eos=True)
    w.finish(w.start())
    assert sum(counts(w.start()).values()) == 8


def test_accepted_and_rejected_proposals_are_counted_and_observed():
    w = world(proposals=4)
    [a] = w.submit([1, 2], max_tokens=60, ignore_eos=True)
    w.drain()
    scheduler, guesses = w.scheduler, w.scheduler._proposer
    assert 0 < scheduler.accepted < scheduler.proposed
    assert scheduler.steps < 60
    assert [token_id for _, tokens in guesses.seen for token_id in tokens][:60] == a.ids[2:]
    w.check_answers()
