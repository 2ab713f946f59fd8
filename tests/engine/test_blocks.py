import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moesaic.engine.blocks import Blocks, extend


def digests(ids, salt="", size=4):
    out = []
    extend(out, salt, ids, size)
    return out


def test_a_digest_covers_everything_before_it_and_the_salt():
    ids = list(range(12))
    base = digests(ids)
    assert len(base) == 3
    assert digests(ids[:11]) == base[:2], "a block that is not full has none"
    assert digests(ids, salt="tenant") != base
    assert not set(digests(ids, salt="tenant")) & set(base)
    changed = digests([99, *ids[1:]])
    assert not set(changed) & set(base), "the first token is in every digest"
    assert digests([*ids[:11], 99])[:2] == base[:2]
    assert len(base[0]) == 32


def test_digests_extended_piece_by_piece_are_the_same():
    ids, out = list(range(40)), []
    for length in range(41):
        extend(out, "s", ids[:length], 4)
    assert out == digests(ids, "s")


def test_the_longest_unused_prefix_goes_first():
    blocks = Blocks(3, 4)
    names = digests(range(12))
    held = [blocks.take() for _ in range(3)]
    for block, name in zip(held, names, strict=True):
        blocks.publish(block, name)
    for block in (held[1], held[2], held[0]):
        assert blocks.drop(block)
    assert blocks.find(names) == held
    assert blocks.take() == held[1]
    assert blocks.find(names) == held[:1], "a chain ends where a block is lost"
    blocks.share(held[0])
    assert blocks.take() == held[2], "what is held is never taken"
    assert blocks.available == 0


def test_forgetting_frees_an_idle_block_and_leaves_a_held_one():
    blocks = Blocks(2, 4)
    a, b = blocks.take(), blocks.take()
    names = digests(range(8))
    blocks.publish(a, names[0])
    blocks.publish(b, names[1])
    blocks.drop(b)
    blocks.forget(a)
    blocks.forget(b)
    assert blocks.find(names[:1]) == blocks.find(names[1:]) == []
    blocks.check([[a]])


@pytest.mark.parametrize("tables", [[[0, 0]], [[]], [[1]]])
def test_the_check_sees_a_wrong_count(tables):
    blocks = Blocks(2, 4)
    assert blocks.take() == 0
    blocks.check([[-1, 0]])
    with pytest.raises(AssertionError):
        blocks.check(tables)


class Machine(RuleBasedStateMachine):
    """Tables that take, share, publish, drop and forget at random, beside a plain model of what is where."""

    def __init__(self):
        super().__init__()
        self.blocks = Blocks(6, 4)
        self.tables = []
        self.contents = {}  # block -> digest it was last published under

    @precondition(lambda self: self.blocks.available)
    @rule()
    def take(self):
        block = self.blocks.take()
        assert all(block not in table for table in self.tables)
        self.contents.pop(block, None)
        self.tables.append([block])

    @rule(name=st.binary(min_size=1, max_size=1), data=st.data())
    def publish(self, name, data):
        if self.tables:
            block = data.draw(st.sampled_from(self.tables))[0]
            known = self.blocks.find([name])
            self.blocks.publish(block, name)
            if not known and block not in self.contents:
                self.contents[block] = name

    @rule(name=st.binary(min_size=1, max_size=1))
    def share(self, name):
        for block in self.blocks.find([name]):
            assert self.contents[block] == name
            self.blocks.share(block)
            self.tables.append([block])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def drop(self, data):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        last = all(table != other for other in self.tables)
        assert self.blocks.drop(table[0]) == last

    @rule(block=st.integers(0, 5))
    def forget(self, block):
        self.blocks.forget(block)
        self.contents.pop(block, None)

    @invariant()
    def sound(self):
        self.blocks.check(self.tables)
        assert self.blocks.available == 6 - len({table[0] for table in self.tables})


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
