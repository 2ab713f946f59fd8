"""The anthropic package against scripted answers; the second argument says which. Prints what it saw."""

import json
import sys

import anthropic
from pydantic import BaseModel, Field


class City(BaseModel):
    name: str = Field(max_length=12)
    people: int = Field(ge=0, le=999_999)


url, part = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key="any", max_retries=2)
ASK = {"model": "scripted", "max_tokens": 50, "messages": [{"role": "user", "content": "A city?"}]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"name": "weather", "description": "Tells it.", "input_schema": SCHEMA}]


def tools():
    whole = client.messages.create(tools=TOOLS, tool_choice={"type": "any"}, **ASK)
    with client.messages.stream(tools=TOOLS, **ASK) as stream:
        final = stream.get_final_message()
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "rain"}
        for block in whole.content
        if block.type == "tool_use"
    ]
    turns = [{"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
    client.messages.create(tools=TOOLS, **ASK | {"messages": ASK["messages"] + turns})
    calls = [[block.id, block.name, block.input] for block in whole.content if block.type == "tool_use"]
    again = [[block.id, block.name, block.input] for block in final.content if block.type == "tool_use"]
    return {"reason": whole.stop_reason, "calls": calls, "alike": calls == again}


def parse():
    return client.messages.parse(output_format=City, **ASK).parsed_output.model_dump()


def busy():
    try:
        client.messages.create(**ASK)
    except anthropic.RateLimitError as error:
        return error.status_code


def broken():
    seen = []
    try:
        with client.messages.stream(**ASK) as stream:
            for text in stream.text_stream:
                seen.append(text)
    except anthropic.APIStatusError as error:
        seen.append(error.body["error"]["type"])
    return seen


print(json.dumps({"tools": tools, "parse": parse, "busy": busy, "broken": broken}[part]()))
