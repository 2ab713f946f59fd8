"""Have a short conversation with a running server, at MOESAIC_BASE_URL or on this machine.

moesaic serve &
python examples/client_chat.py "Tell me a story about a fox."
"""

import sys

from moesaic.client import Client

questions = sys.argv[1:] or ["Tell me a story about a rabbit.", "And what did the fox say?"]
conversation = []
with Client() as client:
    for question in questions:
        conversation.append({"role": "user", "content": question})
        answer = client.chat(conversation, max_tokens=60, seed=1)
        conversation.append(answer.message)
        print(f"> {question}\n{answer.text}\n[{answer.usage.total_tokens} tokens, ended by {answer.reason}]")
