"""The openai package against a real model: everything that needs no scripted answer. Prints what it saw."""

import json
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="any", max_retries=0)
MODEL = "tales"
ASK = [{"role": "user", "content": "Tell a story about a king."}]
GREEDY = {"model": MODEL, "temperature": 0}


def refused(call):
    try:
        call()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.param, error.code]
    return "not refused"


def chat():
    whole = client.chat.completions.create(messages=ASK, max_tokens=24, **GREEDY)
    stream = client.chat.completions.create(
        messages=ASK, max_tokens=24, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    joined = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    several = client.chat.completions.create(messages=ASK, max_tokens=8, n=3, seed=1, model=MODEL, temperature=1)
    scored = client.chat.completions.create(messages=ASK, max_tokens=4, logprobs=True, top_logprobs=3, **GREEDY)
    with client.chat.completions.stream(messages=ASK, max_tokens=24, **GREEDY) as helper:
        for _ in helper:
            pass
        final = helper.current_completion_snapshot.choices[0].message.content
    return {
        "text": whole.choices[0].message.content,
        "reason": whole.choices[0].finish_reason,
        "tokens": whole.usage.completion_tokens,
        "alike": joined == whole.choices[0].message.content == final,
        "streamed_tokens": chunks[-1].usage.completion_tokens,
        "several": [choice.index for choice in several.choices],
        "different": len({choice.message.content for choice in several.choices}),
        "logprobs": [len(entry.top_logprobs) for entry in scored.choices[0].logprobs.content],
    }


def complete():
    found = client.completions.create(prompt="Once upon a", max_tokens=4, echo=True, logprobs=2, **GREEDY)
    [choice] = found.choices
    streamed = client.completions.create(prompt="Once upon a", max_tokens=4, stream=True, **GREEDY)
    return {
        "text": choice.text,
        "first": choice.logprobs.token_logprobs[0],
        "tops": [len(top) for top in choice.logprobs.top_logprobs[1:]],
        "alike": "Once upon a" + "".join(chunk.choices[0].text for chunk in streamed) == choice.text,
        "several": len(client.completions.create(prompt=["One", "Two"], max_tokens=2, **GREEDY).choices),
    }


def embed():
    packed = client.embeddings.create(model=MODEL, input=["a king", "a queen"])
    plain = client.embeddings.create(model=MODEL, input="a king", encoding_format="float")
    ours, theirs = packed.data[0].embedding, plain.data[0].embedding
    return {"same": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-6, "count": len(packed.data)}


def respond():
    first = client.responses.create(input="Tell a story about a king.", max_output_tokens=24, **GREEDY)
    with client.responses.stream(input="Tell a story about a king.", max_output_tokens=24, **GREEDY) as stream:
        kinds = [event.type for event in stream]
    raw = client.responses.create(input="Tell a story about a king.", max_output_tokens=24, stream=True, **GREEDY)
    numbers = [event.sequence_number for event in raw]
    second = client.responses.create(input="And then?", previous_response_id=first.id, max_output_tokens=4, **GREEDY)
    listed = client.responses.input_items.list(second.id)
    again = client.responses.retrieve(first.id)
    client.responses.delete(first.id)
    return {
        "text": first.output_text,
        "status": first.status,
        "reason": first.incomplete_details.reason,
        "kinds": list(dict.fromkeys(kinds)),
        "numbered": numbers == list(range(len(numbers))),
        "longer": second.usage.input_tokens > first.usage.total_tokens,
        "items": [item.content[0].text for item in listed],
        "same": again.output_text == first.output_text,
        "gone": refused(lambda: client.responses.retrieve(first.id)),
        "cancel": refused(lambda: client.responses.cancel(second.id)),
        "background": refused(lambda: client.responses.create(input="Hi", background=True, model=MODEL)),
    }


def refusals():
    chat = client.chat.completions.create
    return {
        "model": refused(lambda: chat(messages=ASK, model="gpt-4")),
        "value": refused(lambda: chat(messages=ASK, model=MODEL, temperature=-1)),
        "role": refused(lambda: chat(messages=[{"role": "king", "content": ""}], model=MODEL)),
        "long": refused(lambda: chat(messages=[{"role": "user", "content": "king " * 3000}], model=MODEL)),
    }


found = {"version": openai.__version__, "models": [model.id for model in client.models.list()]}
found["model"] = client.models.retrieve(MODEL).id
for part in (chat, complete, embed, respond, refusals):
    found[part.__name__] = part()
print(json.dumps(found))
