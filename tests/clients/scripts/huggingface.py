"""huggingface_hub's InferenceClient: texts whole and streamed, chat, forms of answers, errors, and a known program."""

import json
import sys
import threading

import huggingface_hub
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError, ValidationError

url = sys.argv[1]
client = InferenceClient(url)
out = {"version": huggingface_hub.__version__}

PROMPT = "Once upon a time"
whole = client.text_generation(PROMPT, max_new_tokens=20, details=True, decoder_input_details=True, top_n_tokens=2)
stream = list(client.text_generation(PROMPT, max_new_tokens=20, details=True, stream=True, top_n_tokens=2))
out["whole"] = {
    "text": whole.generated_text,
    "reason": whole.details.finish_reason,
    "tokens": [token.text for token in whole.details.tokens],
    "prefill": [token.logprob for token in whole.details.prefill],
    "tops": [len(top) for top in whole.details.top_tokens],
}
out["stream"] = {
    "tokens": [event.token.text for event in stream],
    "text": stream[-1].generated_text,
    "reason": stream[-1].details.finish_reason,
    "input_length": stream[-1].details.input_length,
    "tops": [len(event.top_tokens) for event in stream],
    "ended": [event.details is not None for event in stream],
}
out["plain"] = client.text_generation(PROMPT, max_new_tokens=20, return_full_text=False)
out["with prompt"] = client.text_generation(PROMPT, max_new_tokens=20)
out["plain stream"] = "".join(client.text_generation(PROMPT, max_new_tokens=20, stream=True))
best = client.text_generation(PROMPT, max_new_tokens=8, do_sample=True, best_of=2, details=True)
out["best of"] = [best.details.seed is not None, len(best.details.best_of_sequences)]
stopped = client.text_generation(PROMPT, max_new_tokens=60, stop=["the"], details=True, return_full_text=False)
out["stopped"] = [stopped.generated_text, stopped.details.finish_reason]

# InferenceClient(base_url=".../v1/") posts to /v1/ (huggingface_hub#2804)
out["under v1"] = InferenceClient(f"{url}/v1/").text_generation(PROMPT, max_new_tokens=20, return_full_text=False)

messages = [{"role": "user", "content": "Tell me a story about a rabbit."}]
chat = client.chat_completion(messages, max_tokens=20, temperature=0.0001, seed=1)
chunks = list(client.chat_completion(messages, max_tokens=20, temperature=0.0001, seed=1, stream=True))
out["chat"] = [chat.choices[0].message.content, chat.choices[0].finish_reason, chat.usage.completion_tokens]
out["chat stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

schema = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}},
    "required": ["name"],
    "additionalProperties": False,
}
forms = {
    "json_schema": {"type": "json_schema", "json_schema": {"name": "who", "schema": schema}},
    "json_object": {"type": "json_object", "value": schema},
}
out["forms"] = {
    name: client.chat_completion(messages, max_tokens=60, seed=1, response_format=form).choices[0].message.content
    for name, form in forms.items()
}
grammar = {"type": "regex", "value": "[0-9]{3}"}
out["regex"] = client.text_generation("The number is", grammar=grammar, max_new_tokens=9, return_full_text=False)

refused = {}
for name, wrong in {
    "top_p": {"top_p": 0.0},
    "max_new_tokens": {"max_new_tokens": 0},
    "length": {"truncate": 0},
}.items():
    for streamed in (False, True):
        try:
            list(client.text_generation(PROMPT, stream=streamed, **wrong))
            refused[f"{name} {streamed}"] = "taken"
        except ValidationError as error:
            refused[f"{name} {streamed}"] = str(error)
out["refused"] = refused
try:
    client.chat_completion(messages, model=None, max_tokens=0)
except HfHubHTTPError as error:
    out["chat refused"] = [error.response.status_code, "max_tokens" in str(error)]


async def asked_later():
    async with AsyncInferenceClient(url) as later:
        stream = await later.text_generation(PROMPT, max_new_tokens=20, stream=True)
        return "".join([token async for token in stream])


import asyncio  # noqa: E402

out["async"] = asyncio.run(asked_later())


# A program that was written for TGI, as it stands in a tutorial on Mixtral: only the page around it is left out.


def format_prompt(message, history):
    prompt = "<s>"
    for user_prompt, bot_response in history:
        prompt += f"[INST] {user_prompt} [/INST]"
        prompt += f" {bot_response}</s> "
    prompt += f"[INST] {message} [/INST]"
    return prompt


def generate(
    prompt,
    history,
    system_prompt,
    temperature=0.9,
    max_new_tokens=256,
    top_p=0.95,
    repetition_penalty=1.0,
):
    temperature = float(temperature)
    if temperature < 1e-2:
        temperature = 1e-2
    top_p = float(top_p)
    generate_kwargs = dict(  # noqa: C408
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        do_sample=True,
        seed=42,
    )
    formatted_prompt = format_prompt(f"{system_prompt}, {prompt}", history)
    stream = client.text_generation(
        formatted_prompt, **generate_kwargs, stream=True, details=True, return_full_text=False
    )
    output = ""
    for response in stream:
        output += response.token.text
        yield output
    return output


said = []
history = []
for question in ("Tell me about the sea.", "And about the king?"):
    *_, answer = generate(question, history, "Be brief", max_new_tokens=24)
    history.append((question, answer))
*_, again = generate("Tell me about the sea.", [], "Be brief", max_new_tokens=24)
out["program"] = {"history": history, "again": again}
*_, out["slider at its ends"] = generate("Hello", [], "Be brief", temperature=0, max_new_tokens=8, top_p=1)

# the page lets 20 people ask at the same time
answers = {}


def ask(place):
    *_, answers[place] = generate("Tell me about the sea.", [], "Be brief", max_new_tokens=24)


people = [threading.Thread(target=ask, args=(place,)) for place in range(20)]
for each in people:
    each.start()
for each in people:
    each.join()
out["twenty"] = sorted(set(answers.values())), len(answers)

print(json.dumps(out))
