"""The openai package against scripted answers; the second argument says which. Prints what it saw."""

import json
import sys

import openai
from pydantic import BaseModel, Field


class City(BaseModel):
    name: str = Field(max_length=12)
    people: int = Field(ge=0, le=999_999)


url, part = sys.argv[1:3]
client = openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=2)
ASK = {"model": sys.argv[3] if len(sys.argv) > 3 else "scripted", "messages": [{"role": "user", "content": "A city?"}]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}
ITEMS = {"model": ASK["model"], "input": "A city?"}


def chat_tools():
    tools = [{"type": "function", "function": FUNCTION}]
    whole = client.chat.completions.create(tools=tools, **ASK).choices[0]
    with client.chat.completions.stream(tools=tools, **ASK) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    calls = [[call.id, call.function.name, call.function.arguments] for call in whole.message.tool_calls]
    again = [[call.id, call.function.name, call.function.arguments] for call in final.message.tool_calls]
    return {"reason": whole.finish_reason, "calls": calls, "alike": calls == again, "kinds": sorted(set(kinds))}


def response_tools():
    tools = [{"type": "function", "strict": False, **FUNCTION}]
    whole = client.responses.create(tools=tools, **ITEMS)
    with client.responses.stream(tools=tools, **ITEMS) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    calls = [[item.call_id, item.name, item.arguments] for item in whole.output if item.type == "function_call"]
    again = [[item.call_id, item.name, item.arguments] for item in final.output if item.type == "function_call"]
    results = [{"type": "function_call_output", "call_id": call[0], "output": "rain"} for call in calls]
    goes_on = client.responses.create(model=ASK["model"], input=results, previous_response_id=whole.id)
    return {"calls": calls, "alike": calls == again, "kinds": sorted(set(kinds)), "status": goes_on.status}


def forced():
    """Let a model that would not call a tool by itself do so; by a name, and because any must be."""
    function = FUNCTION | {"parameters": {**SCHEMA, "properties": {"city": {"type": "string", "maxLength": 12}}}}
    tools, name = [{"type": "function", "function": function}], {"type": "function", "function": {"name": "weather"}}
    chat = client.chat.completions.create(
        tools=tools, tool_choice=name, parallel_tool_calls=False, max_tokens=100, **ASK
    ).choices[0]
    tools = [{"type": "function", "strict": False, **function}]
    response = client.responses.create(
        tools=tools, tool_choice="required", parallel_tool_calls=False, max_output_tokens=100, **ITEMS
    )
    [call], [item] = chat.message.tool_calls, response.output
    return {"chat": [call.function.name, call.function.arguments], "response": [item.name, item.arguments]}


def parse():
    most = {"max_tokens": 100} if len(sys.argv) > 3 else {}
    chat = client.chat.completions.parse(response_format=City, **ASK, **most).choices[0].message.parsed
    most = {"max_output_tokens": 100} if len(sys.argv) > 3 else {}
    response = client.responses.parse(text_format=City, **ITEMS, **most).output_parsed
    return {"chat": chat.model_dump(), "response": response.model_dump()}


def busy():
    try:
        client.chat.completions.create(**ASK)
    except openai.RateLimitError as error:
        return {"status": error.status_code, "message": error.message}
    return None


def broken():
    seen = []
    try:
        for chunk in client.chat.completions.create(stream=True, **ASK):
            seen += [choice.delta.content for choice in chunk.choices]
    except openai.APIError as error:
        seen.append(type(error).__name__)
    kinds = [event.type for event in client.responses.create(stream=True, **ITEMS)]
    return {"chat": seen, "response": kinds}


parts = {"chat-tools": chat_tools, "response-tools": response_tools, "forced": forced}
print(json.dumps((parts | {"parse": parse, "busy": busy, "broken": broken})[part]()))
