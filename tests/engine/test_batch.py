import torch

from moesaic.engine.batch import assemble
from moesaic.engine.request import Request, Sampling, Sequence
from moesaic.engine.step import Run, Step
from moesaic.ops import Cache


def sequence(ids, cached, table, prompt):
    out = Sequence(Request(tuple(ids[:prompt]), Sampling()), 0, 0, 0, 99, list(ids), [])
    out.cached, out.table = cached, table
    return out


def test_a_step_of_a_prompt_a_piece_and_an_answer():
    memory = [torch.zeros(9, 4, 1, 2)]
    whole = Run(sequence([10, 11, 12], 0, [7], 3), 3)
    piece = Run(sequence(range(20, 30), 3, [2, 5], 10), 4)
    decode = Run(sequence([40, 41, 42, 43, 44, 45, 46, 47, 48], 8, [-1, 8, 0], 4), 1)
    batch = assemble(Step((whole, piece, decode)), Cache(memory, memory), torch.device("cpu"))
    assert batch.tokens.tolist() == [10, 11, 12, 23, 24, 25, 26, 48]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 8]
    assert batch.starts == (0, 3, 7, 8)
    assert batch.lengths == (3, 7, 9)
    assert batch.slots.tolist() == [28, 29, 30, 11, 20, 21, 22, 0]
    assert batch.tables.tolist() == [[7, -1, -1], [2, 5, -1], [-1, 8, 0]]
    assert batch.outputs.tolist() == [2, 7], "a piece that is not the last gives no token"
    assert {t.dtype for t in (batch.tokens, batch.positions, batch.slots, batch.tables, batch.outputs)} == {torch.int64}


def test_a_step_without_outputs():
    memory = [torch.zeros(9, 4, 1, 2)]
    batch = assemble(Step((Run(sequence(range(9), 0, [1], 9), 4),)), Cache(memory, memory), torch.device("cpu"))
    assert batch.outputs.tolist() == []
    assert batch.outputs.dtype == torch.int64
