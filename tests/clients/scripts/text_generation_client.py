"""The text-generation package's clients: Client and AsyncClient, texts whole and streamed, chat, errors.

Its chat in a stream is left out: it demands ``tool_calls`` in every piece, which TGI 3 does not send either.
"""

import asyncio
import json
import sys
from importlib.metadata import version

from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError

url = sys.argv[1]
client = Client(url, timeout=60)
out = {"version": version("text-generation"), "hub": version("huggingface-hub")}
PROMPT = "Once upon a time"

whole = client.generate(PROMPT, max_new_tokens=20, decoder_input_details=True, top_n_tokens=2)
stream = list(client.generate_stream(PROMPT, max_new_tokens=20))
out["whole"] = {
    "text": whole.generated_text,
    "reason": whole.details.finish_reason.value,
    "tokens": [token.text for token in whole.details.tokens],
    "prefill": [token.logprob for token in whole.details.prefill],
    "seed": whole.details.seed,
}
out["stream"] = {
    "tokens": [event.token.text for event in stream],
    "text": stream[-1].generated_text,
    "reason": stream[-1].details.finish_reason.value,
}
drawn = client.generate(PROMPT, max_new_tokens=20, do_sample=True, temperature=0.8, top_p=0.9, seed=42)
out["drawn"] = [drawn.generated_text, drawn.details.seed]
best = client.generate(PROMPT, max_new_tokens=8, do_sample=True, best_of=2)
out["best of"] = len(best.details.best_of_sequences)
stopped = client.generate(PROMPT, max_new_tokens=60, stop_sequences=["the"])
out["stopped"] = [stopped.generated_text, stopped.details.finish_reason.value]

chat = client.chat([{"role": "user", "content": "Tell me a story."}], max_tokens=10, temperature=0.01, seed=1)
out["chat"] = chat.choices[0].message.content

try:
    client.generate(PROMPT, truncate=100000)
except ValidationError as error:
    out["refused"] = str(error)


async def asked_later():
    later = AsyncClient(url, timeout=60)
    whole = await later.generate(PROMPT, max_new_tokens=20)
    parts = [event.token.text async for event in later.generate_stream(PROMPT, max_new_tokens=20)]
    return [whole.generated_text, "".join(parts)]


out["async"] = asyncio.run(asked_later())
print(json.dumps(out))
