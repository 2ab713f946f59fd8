"""Show how sure the model was of each token, and what it might have said instead.

python examples/logprobs.py
"""

from math import exp

from moesaic import LLM

with LLM.load() as llm:
    answer = llm.complete("Once upon a time there was a", temperature=0, max_tokens=8, logprobs=3)
    for token in answer.tokens:
        others = ", ".join(f"{llm.tokenizer.piece(id)!r} {exp(p):.0%}" for id, p in token.top)
        print(f"{llm.tokenizer.piece(token.id)!r:12} {exp(token.logprob or 0):4.0%}   of {others}")
