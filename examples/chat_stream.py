"""Ask the default model for a story and print it as it is generated.

python examples/chat_stream.py "Tell me a story about a fox."
"""

import sys

from moesaic import LLM

question = sys.argv[1] if len(sys.argv) > 1 else "Tell me a story about a rabbit."
with LLM.load() as llm:
    reply = llm.chat([{"role": "user", "content": question}], stream=True, max_tokens=200, seed=1)
    for piece in reply:
        print(piece.text, end="", flush=True)
    print(f"\n[{len(reply.answer.tokens)} tokens, ended by {reply.answer.reason}]")
