"""The anthropic package against a real model. Prints what it saw."""

import json
import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="any", max_retries=0)
ASK = {"model": "tales", "messages": [{"role": "user", "content": "Tell a story about a king."}]}
GREEDY = {"temperature": 0}  # which this version of the package knows no more


def refused(call):
    try:
        call()
    except anthropic.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.body["error"]["type"]]
    return "not refused"


whole = client.messages.create(max_tokens=24, extra_body=GREEDY, **ASK)
with client.messages.stream(max_tokens=24, extra_body=GREEDY, **ASK) as stream:
    joined = "".join(stream.text_stream)
    final = stream.get_final_message()
kinds = [event.type for event in client.messages.create(max_tokens=4, stream=True, **ASK)]
prefill = [*ASK["messages"], {"role": "assistant", "content": "Once upon a"}]
goes_on = client.messages.create(max_tokens=4, extra_body=GREEDY, model="tales", messages=prefill)
stopped = client.messages.create(max_tokens=100, extra_body=GREEDY, stop_sequences=["the"], **ASK)
image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
create = client.messages.create
print(
    json.dumps(
        {
            "version": anthropic.__version__,
            "text": whole.content[0].text,
            "reason": whole.stop_reason,
            "alike": joined == whole.content[0].text == final.content[0].text,
            "usage": [final.usage.output_tokens, whole.usage.output_tokens],
            "kinds": list(dict.fromkeys(kinds)),
            "counted": client.messages.count_tokens(**ASK).input_tokens,
            "read": whole.usage.input_tokens + whole.usage.cache_read_input_tokens,
            "goes_on": goes_on.content[0].text,
            "stopped": [stopped.stop_reason, stopped.stop_sequence, "the" in stopped.content[0].text],
            "models": [model.id for model in client.models.list()],
            "created": client.models.retrieve("tales").created_at.year,
            "model": refused(lambda: create(model="none", max_tokens=4, messages=ASK["messages"])),
            "value": refused(lambda: create(max_tokens=4, extra_body={"top_p": 7}, **ASK)),
            "image": refused(
                lambda: create(model="tales", max_tokens=4, messages=[{"role": "user", "content": [image]}])
            ),
        }
    )
)
