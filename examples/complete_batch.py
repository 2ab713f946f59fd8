"""Complete several texts at once; each gets the same answer as if it were alone.

python examples/complete_batch.py
"""

from moesaic import LLM

PROMPTS = ["Once upon a time", "The old king said", "Deep in the wood"]

with LLM.load() as llm:
    together = llm.complete(PROMPTS, temperature=0, max_tokens=30)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        alone = llm.complete(prompt, temperature=0, max_tokens=30)
        assert alone.text == answer.text
        print(prompt + " ...", answer.text.strip(), "\n")
