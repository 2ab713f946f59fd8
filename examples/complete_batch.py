"""Complete several texts in one batch; the answers are the same as without batching.

python examples/complete_batch.py
"""

from moesaic import LLM

PROMPTS = ["Once upon a time", "The old king said", "Deep in the wood"]

with LLM.load() as llm:
    answers = llm.complete(PROMPTS, temperature=0, max_tokens=30)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        single = llm.complete(prompt, temperature=0, max_tokens=30)
        assert single.text == answer.text
        print(prompt + " ...", answer.text.strip(), "\n")
