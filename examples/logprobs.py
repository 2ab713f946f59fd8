"""Show the probability of each token and its most likely alternatives.

python examples/logprobs.py
"""

from math import exp

from moesaic import LLM

with LLM.load() as llm:
    answer = llm.complete("Once upon a time there was a", temperature=0, max_tokens=8, logprobs=3)
    for token in answer.tokens:
        others = ", ".join(f"{llm.tokenizer.piece(token_id)!r} {exp(logprob):.0%}" for token_id, logprob in token.top)
        print(f"{llm.tokenizer.piece(token.id)!r:12} {exp(token.logprob or 0):4.0%}   of {others}")
