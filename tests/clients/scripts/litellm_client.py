"""litellm, by OpenAI's dialect and by Anthropic's. Prints what it saw."""

import json
import sys
from importlib.metadata import version

import litellm

litellm.suppress_debug_info = True
url, part = sys.argv[1:]
ASK = {"messages": [{"role": "user", "content": "Tell a story about a king."}], "temperature": 0}
OPENAI = {"api_base": url + "/v1", "api_key": "any"}
ANTHROPIC = {"api_base": url, "api_key": "any"}


def streamed(**options):
    return "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(stream=True, **options))


def model():
    whole = litellm.completion("openai/tales", max_tokens=24, **ASK, **OPENAI)
    other = litellm.completion("anthropic/tales", max_tokens=24, **ASK, **ANTHROPIC)
    text = litellm.text_completion(model="text-completion-openai/tales", prompt="Once upon a", max_tokens=4, **OPENAI)
    vectors = litellm.embedding("openai/tales", input=["a king", "a queen"], **OPENAI)
    newer = litellm.responses(
        model="openai/tales", input="Tell a story about a king.", max_output_tokens=24, temperature=0, **OPENAI
    )
    return {
        "version": version("litellm"),
        "text": whole.choices[0].message.content,
        "usage": [whole.usage.completion_tokens, other.usage.completion_tokens],
        "prompts": [whole.usage.prompt_tokens, other.usage.prompt_tokens],
        "reasons": [whole.choices[0].finish_reason, other.choices[0].finish_reason],
        "texts": [
            other.choices[0].message.content,
            streamed(model="openai/tales", max_tokens=24, **ASK, **OPENAI),
            streamed(model="anthropic/tales", max_tokens=24, **ASK, **ANTHROPIC),
            newer.output[0].content[0].text,
        ],
        "completion": bool(text.choices[0].text),
        "vectors": [len(entry["embedding"]) for entry in vectors.data],
    }


def tools():
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    found = []
    for name, where in (("openai", OPENAI), ("anthropic", ANTHROPIC)):
        options = {"model": f"{name}/scripted", "tools": [{"type": "function", "function": function}], **where}
        whole = litellm.completion(messages=ASK["messages"], **options)
        chunks = list(litellm.completion(messages=ASK["messages"], stream=True, **options))
        for answer in (whole, litellm.stream_chunk_builder(chunks)):
            [call] = answer.choices[0].message.tool_calls
            reason = answer.choices[0].finish_reason
            found.append([reason, call.id, call.function.name, json.loads(call.function.arguments)])
    return found


def refusals():
    found = []
    for name, where in (("openai/none", OPENAI), ("anthropic/none", ANTHROPIC)):
        try:
            litellm.completion(name, max_tokens=4, messages=ASK["messages"], **where)
        except litellm.NotFoundError as error:
            found.append(error.status_code)
    return found


print(json.dumps({"model": model, "tools": tools, "refusals": refusals}[part]()))
