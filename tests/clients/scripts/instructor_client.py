"""instructor, by schema and by a tool; the second argument says which. Prints what it saw."""

import json
import sys

import instructor
import openai
from pydantic import BaseModel, Field


class City(BaseModel, extra="forbid"):  # else a model may go on with fields of its own
    name: str = Field(max_length=12)
    people: int = Field(ge=0, le=999_999)


url, mode, model = sys.argv[1:]
client = instructor.from_openai(
    openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0), mode=instructor.Mode[mode]
)
ask = {"model": model, "messages": [{"role": "user", "content": "A city?"}], "max_retries": 0, "max_tokens": 100}
print(json.dumps(client.chat.completions.create(response_model=City, **ask).model_dump()))
