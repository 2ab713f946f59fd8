"""What OpenAI's routes share: fields, errors, ids, usage; vLLM's common extras among the fields.

Fields that are not known, or mean nothing here, are accepted and ignored, as OpenAI's own clients expect of
servers that are not OpenAI's. Follows https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from msgspec import Meta, Struct

from moesaic import __version__
from moesaic.backend import Backend, Finished, ModelInfo, TokenInfo
from moesaic.errors import InvalidParameter, NotFound, Unavailable
from moesaic.serve.context import RequestContext

STAND_INS = ("", "tgi", "dummy", "default")
"""Names under which clients ask for whatever model there is."""

FINGERPRINT = f"moesaic-{__version__}"
"""What answers with the same seed have in common, as far as the server goes; TGI's older client asks for it."""

Probability = Annotated[float, Meta(ge=0, le=1)]
Whole = Annotated[int, Meta(ge=0, le=2**31)]
Positive = Annotated[int, Meta(ge=1, le=2**31)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Stops = str | Annotated[list[str], Meta(max_length=16)]


class StreamOptions(Struct):
    """What else a stream is to carry."""

    include_usage: bool = False


class StructuredOutputs(Struct):
    """vLLM's way to name a grammar."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class SamplingFields(Struct, kw_only=True):
    """How tokens are chosen: OpenAI's fields, and vLLM's beside them. None and a missing field are the same."""

    model: Annotated[str, Meta(max_length=256)] | None = None
    n: Annotated[int, Meta(ge=1, le=8)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    user: str | None = None
    # vLLM's
    top_k: Annotated[int, Meta(ge=-1, le=2**31)] | None = None
    min_p: Probability | None = None
    typical_p: Probability | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    stop_token_ids: Annotated[list[Whole], Meta(max_length=256)] | None = None
    min_tokens: Whole | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: Positive | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    priority: Annotated[int, Meta(ge=-(2**30), le=2**30)] | None = None
    return_token_ids: bool | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None


PASSED = (
    *("n", "seed", "temperature", "frequency_penalty", "presence_penalty", "min_p", "repetition_penalty"),
    *("min_tokens", "ignore_eos", "prompt_logprobs"),
)
"""Fields that go on under their own names."""


def sampling(body: SamplingFields) -> dict[str, Any]:
    """Return the fields of ``moesaic.Sampling`` that a body asks for.

    Raises:
        InvalidParameter: a key of ``logit_bias`` is no token id.
    """
    out = {name: value for name in PASSED if (value := getattr(body, name)) is not None}
    for name in ("top_p", "typical_p"):
        if (mass := getattr(body, name)) is not None:
            out[name] = mass or 1e-9  # a mass of nothing leaves the likeliest token
    if body.top_k is not None:
        out["top_k"] = max(0, body.top_k)  # vLLM's clients say -1 for off
    if body.stop is not None:
        out["stop"] = tuple(each for each in ([body.stop] if isinstance(body.stop, str) else body.stop) if each)
    if body.stop_token_ids:
        out["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.logit_bias:
        out["logit_bias"] = {_id(key): value for key, value in body.logit_bias.items()}
    return out


def _id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise InvalidParameter("logit_bias", f"{key!r:.40} is no token id")
    return int(key)


def grammar(body: SamplingFields) -> tuple[str, Any] | None:
    """Return the grammar that a body asks for by one of vLLM's fields."""
    asked = body.structured_outputs or StructuredOutputs()
    named: tuple[tuple[str, Any], ...] = (
        ("json_schema", body.guided_json if asked.json is None else asked.json),
        ("regex", body.guided_regex or asked.regex),
        ("choice", body.guided_choice or asked.choice),
        ("lark", body.guided_grammar or asked.grammar),
        ("json_object", {} if asked.json_object else None),
    )
    found = [(kind, value) for kind, value in named if value is not None]
    if len(found) > 1:
        raise InvalidParameter("structured_outputs", "names more than one grammar")
    return found[0] if found else None


def response_grammar(wanted: Mapping[str, Any] | None) -> tuple[str, Any] | None:
    """Return the grammar of a ``response_format``, in OpenAI's form or in TGI's (``{"type", "value"}``).

    Raises:
        InvalidParameter: it is of no known form.
    """
    if wanted is None:
        return None
    kind, value = wanted.get("type"), wanted.get("value")
    if kind == "text":
        return None
    if kind == "regex" and isinstance(value, str):
        return "regex", value
    if kind in ("json", "json_object", "json_schema"):
        inner = wanted.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else value
        if schema is None and kind == "json_object":
            return "json_object", {}
        if isinstance(schema, dict):
            return "json_schema", schema
    raise InvalidParameter("response_format", "expected type text, json_object, or json_schema with a schema")


def card_of(backend: Backend, name: str | None, *, strict: bool = False) -> ModelInfo:
    """Return the model that is meant.

    Raises:
        NotFound: there is none of that name.
        Unavailable: there are none at all, as in a gateway that has just been started again.
    """
    cards = backend.models()
    if not cards:
        raise Unavailable("there is no model yet: try again later, or start one with `moesaic worker`")
    for card in cards:
        if name == card.name or name in card.aliases:
            return card
    if cards and (name is None or (name in STAND_INS and not strict)):
        return cards[0]
    known = ", ".join(card.name for card in cards[:20])
    raise NotFound(f"the model {name!r:.120} does not exist; there is {known}")


def model_of(context: RequestContext, name: str | None) -> str:
    """Return the name of the model that a request means."""
    return card_of(context.backend, name, strict=context.settings.strict_model_name).name


def new_id(prefix: str, between: str = "-") -> str:
    return f"{prefix}{between}{secrets.token_hex(12)}"


def now() -> int:
    return int(time.time())


def usage(ended: Iterable[Finished], *, shared_prompt: bool = True) -> dict[str, Any]:
    """Return what answers cost; the prompt of ``n`` answers to one question counts once."""
    listed = list(ended)
    of_prompt = [each for each in listed if each.index == 0] if shared_prompt else listed
    prompt = sum(each.prompt_tokens for each in of_prompt)
    generated = sum(each.generated_tokens for each in listed)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in of_prompt)},
    }


def finish_reason(ended: Finished) -> str:
    """Return why an answer ended, in OpenAI's words."""
    if ended.has_tool_calls:
        return "tool_calls"
    return "length" if ended.reason == "length" else "stop"


def stop_reason(ended: Finished) -> str | int | None:
    """Return vLLM's field: the stop string, or the token, that ended the answer."""
    return ended.stop if ended.stop is not None else ended.stop_id


def logprob_entry(mark: TokenInfo, top: int) -> dict[str, Any]:
    """Return one token of a chat answer's ``logprobs``."""

    def one(text: str, value: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": -9999.0 if value is None else value, "bytes": list(text.encode())}

    return one(mark.text, mark.logprob) | {"top_logprobs": [one(text, value) for _, text, value in mark.top[:top]]}
