"""langchain-openai; the third argument says which answers are expected. Prints what it saw."""

import json
import sys

import langchain_openai
from langchain_core.tools import tool
from pydantic import BaseModel, Field

url, part = sys.argv[1:3]
MODEL = sys.argv[3]
BASE = {"base_url": url + "/v1", "api_key": "any"}


class City(BaseModel):
    """A city."""

    name: str = Field(description="what it is called", max_length=12)
    people: int = Field(ge=0, le=999_999)


@tool
def weather(city: str) -> str:
    """Tell the weather."""
    return f"rain in {city}"


def chat(**options):
    return langchain_openai.ChatOpenAI(model=MODEL, max_retries=0, **BASE, **options)


def model():
    ask = "Tell a story about a king."
    plain = chat(temperature=0, max_completion_tokens=24)
    whole = plain.invoke(ask)
    pieces = list(chat(temperature=0, max_completion_tokens=24, stream_usage=True).stream(ask))
    total = pieces[0]
    for piece in pieces[1:]:
        total += piece
    newer = chat(temperature=0, max_completion_tokens=24, use_responses_api=True)
    batch = plain.batch([ask, "Tell a story about the sea."])
    vectors = langchain_openai.OpenAIEmbeddings(model=MODEL, check_embedding_ctx_length=False, **BASE)
    return {
        "text": whole.content,
        "tokens": whole.usage_metadata["output_tokens"],
        "reason": whole.response_metadata["finish_reason"],
        "alike": total.content == whole.content == batch[0].content,
        "streamed_tokens": total.usage_metadata["output_tokens"],
        "response": newer.invoke(ask).text == whole.content,
        "response_stream": "".join(piece.text for piece in newer.stream(ask)) == whole.content,
        "vectors": [len(vector) for vector in vectors.embed_documents(["a king", "a queen"])],
    }


def tools():
    found = {}
    for name, options in (("chat", {}), ("response", {"use_responses_api": True})):
        bound = chat(**options).bind_tools([weather])
        whole = bound.invoke("The weather in Oslo?")
        total = None
        for piece in bound.stream("The weather in Oslo?"):
            total = piece if total is None else total + piece
        turns = [("user", "The weather in Oslo?"), whole, *(weather.invoke(call) for call in whole.tool_calls)]
        bound.invoke(turns)
        calls = [[call["id"], call["name"], call["args"]] for call in whole.tool_calls]
        again = [[call["id"], call["name"], call["args"]] for call in total.tool_calls]
        found[name] = {"calls": calls, "alike": calls == again}
    return found


def parse():
    schema = chat().with_structured_output(City, method="json_schema")
    return schema.invoke("A city?").model_dump()


def function():
    return chat().with_structured_output(City, method="function_calling").invoke("A city?").model_dump()


print(json.dumps({"model": model, "tools": tools, "parse": parse, "function": function}[part]()))
