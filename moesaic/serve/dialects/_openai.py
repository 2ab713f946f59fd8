"""Shared by OpenAI's routes: sampling fields with vLLM's extensions, model names, ids and usage.

Unknown fields are accepted and named in a header of the response, since OpenAI's clients expect that servers accept
them. With ``Settings.strict_fields`` they are refused. Follows https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from msgspec import Meta, Struct

from moesaic import __version__
from moesaic.backend import Backend, Delta, Event, Finished, ModelInfo, TokenInfo, TopToken
from moesaic.errors import InvalidParameter, NotFound, Unavailable
from moesaic.serve.context import RequestContext

DEFAULT_MODEL_NAMES = ("", "tgi", "dummy", "default")
"""Model names that stand for the default model, since some clients always send one of them."""

FINGERPRINT = f"moesaic-{__version__}"
"""Value of the field ``system_fingerprint`` of responses. TGI's older client requires this field."""

Probability = Annotated[float, Meta(ge=0, le=1)]
NonNegativeInt = Annotated[int, Meta(ge=0, le=2**31)]
PositiveInt = Annotated[int, Meta(ge=1, le=2**31)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
AnswerCount = Annotated[int, Meta(ge=1, le=128)]
TruncationLength = Annotated[int, Meta(ge=-1, le=2**31)]
StopStrings = str | Annotated[list[str], Meta(max_length=16)]


class StreamOptions(Struct):
    """Options of a streamed response."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's option: with ``include_usage``, each chunk has the token usage so far."""
    include_obfuscation: Any = None
    """Accepted without an effect: this server never adds random characters to hide the length of a chunk."""


class StructuredOutputs(Struct):
    """vLLM's ``structured_outputs``, which sets a grammar for the answer. Exactly one field is set."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class SamplingFields(Struct, kw_only=True):
    """Sampling parameters: OpenAI's fields and vLLM's extensions. None and a missing field mean the same."""

    model: Annotated[str, Meta(max_length=256)] | None = None
    n: AnswerCount | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    # Accepted without an effect: they concern the storage, the price or the statistics of OpenAI's service.
    user: str | None = None
    safety_identifier: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    # vLLM's
    top_k: Annotated[int, Meta(ge=-1, le=2**31)] | None = None
    min_p: Probability | None = None
    typical_p: Probability | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    stop_token_ids: Annotated[list[NonNegativeInt], Meta(max_length=256)] | None = None
    min_tokens: NonNegativeInt | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: TruncationLength | None = None
    bad_words: Annotated[list[str], Meta(max_length=256)] | None = None
    allowed_token_ids: list[NonNegativeInt] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    priority: Annotated[int, Meta(ge=-(2**30), le=2**30)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    include_stop_str_in_output: bool | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    # Moesaic's own
    speculation: bool | None = None


PASSED_THROUGH = (
    *("n", "seed", "temperature", "frequency_penalty", "presence_penalty", "min_p", "repetition_penalty"),
    *("min_tokens", "ignore_eos", "prompt_logprobs", "speculation"),
)
"""Fields that ``moesaic.Sampling`` has under the same name."""


def sampling(body: SamplingFields) -> dict[str, Any]:
    """Return the values that a body sets for fields of ``moesaic.Sampling``, by the name of the field.

    Raises:
        InvalidParameter: a key of ``logit_bias`` is not a token id.
    """
    out = {name: value for name in PASSED_THROUGH if (value := getattr(body, name)) is not None}
    for name in ("top_p", "typical_p"):
        if (mass := getattr(body, name)) is not None:
            out[name] = mass or 1e-9  # 0 means greedy: only the likeliest token is left
    if body.top_k is not None:
        out["top_k"] = max(0, body.top_k)  # vLLM's clients send -1 for "off"
    if body.stop is not None:
        out["stop"] = tuple(item for item in ([body.stop] if isinstance(body.stop, str) else body.stop) if item)
    if body.stop_token_ids:
        out["stop_token_ids"] = tuple(body.stop_token_ids)
    if bad_words := tuple(word for word in body.bad_words or () if word):
        out["bad_words"] = bad_words
    if body.allowed_token_ids is not None:
        out["allowed_token_ids"] = tuple(body.allowed_token_ids)
    if body.logit_bias:
        out["logit_bias"] = {_id(key): value for key, value in body.logit_bias.items()}
    return out


def _id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise InvalidParameter("logit_bias", f"{key!r:.40} is not a token id")
    return int(key)


def truncation(count: int | None) -> int | None:
    """Return ``count``, vLLM's ``truncate_prompt_tokens``, as the value of ``GenerationRequest.truncate``.

    Raises:
        InvalidParameter: ``count`` is 0, which would leave no prompt.
    """
    if count == 0:
        raise InvalidParameter("truncate_prompt_tokens", "is 0; expected at least 1, or -1 for the model's limit")
    return count


def grammar_fields(body: SamplingFields, param: str, wanted: tuple[str, Any] | None) -> dict[str, Any]:
    """Return the fields ``grammar`` and ``grammar_param`` of ``GenerationRequest``; empty if no grammar is set.

    Args:
        body: may set a grammar in one of vLLM's fields.
        param: the name of the API's own field for a grammar, such as ``response_format``.
        wanted: the grammar that the API's own field sets, which has precedence over vLLM's; None: it sets none.

    Raises:
        InvalidParameter: vLLM's fields set more than one grammar.
    """
    if wanted is not None:
        return {"grammar": wanted, "grammar_param": param}
    structured = body.structured_outputs or StructuredOutputs()
    named: tuple[tuple[str, str, Any], ...] = (
        ("structured_outputs", "json_schema", structured.json),
        ("guided_json", "json_schema", body.guided_json),
        ("guided_regex", "regex", body.guided_regex or None),
        ("guided_choice", "choice", body.guided_choice or None),
        ("guided_grammar", "lark", body.guided_grammar or None),
        ("structured_outputs", "regex", structured.regex),
        ("structured_outputs", "choice", structured.choice),
        ("structured_outputs", "lark", structured.grammar),
        ("structured_outputs", "json_object", {} if structured.json_object else None),
    )
    grammars = {kind: (name, value) for name, kind, value in reversed(named) if value is not None}
    if len(grammars) > 1:
        raise InvalidParameter("structured_outputs", "more than one grammar is set")
    if not grammars:
        return {}
    [(kind, (name, value))] = grammars.items()
    return {"grammar": (kind, value), "grammar_param": name}


def response_grammar(wanted: Mapping[str, Any] | None) -> tuple[str, Any] | None:
    """Return the grammar that a ``response_format`` sets, as its kind and its value; None: it sets none.

    The format is in OpenAI's form, or in TGI's (``{"type": ..., "value": ...}``).

    Raises:
        InvalidParameter: the format has an unknown form.
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


def find_model(backend: Backend, name: str | None, *, strict: bool = False) -> ModelInfo:
    """Return the model with a name or alias.

    Args:
        backend: has the models.
        name: the name or alias that the client sent; None: the default model.
        strict: whether the names in ``DEFAULT_MODEL_NAMES``, such as "tgi", are refused, not read as the default model.

    Raises:
        NotFound: no model has this name or alias.
        Unavailable: there are no models yet, as in a gateway that has just been started.
    """
    models = backend.models()
    if not models:
        raise Unavailable("no model is available yet: start a worker with `moesaic worker`, or try again later")
    for model in models:
        if name == model.name or name in model.aliases:
            return model
    if models and (name is None or (name in DEFAULT_MODEL_NAMES and not strict)):
        return models[0]
    names = ", ".join(model.name for model in models[:20])
    raise NotFound(f"unknown model {name!r:.120}; available models: {names}")


def model_name(context: RequestContext, name: str | None) -> str:
    """Return the name of the model that a client asks for by a name or an alias; None: the default model.

    Errors are those of ``find_model``.
    """
    return find_model(context.backend, name, strict=context.settings.strict_model_name).name


def new_id(prefix: str, separator: str = "-") -> str:
    """Return a new random id: the prefix, the separator and 24 hexadecimal digits."""
    return f"{prefix}{separator}{secrets.token_hex(12)}"


def now() -> int:
    """Return the current time in whole seconds since the Unix epoch."""
    return int(time.time())


def usage(finished: Iterable[Finished], *, shared_prompt: bool = True) -> dict[str, Any]:
    """Return OpenAI's ``usage`` object, summed over answers that have ended.

    With ``shared_prompt``, the tokens of a prompt with several answers (``n``) count once; otherwise per answer.
    """
    listed = list(finished)
    of_prompt = [item for item in listed if item.index == 0] if shared_prompt else listed
    prompt = sum(item.prompt_tokens for item in of_prompt)
    generated = sum(item.generated_tokens for item in listed)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(item.cached_tokens for item in of_prompt)},
    }


class RunningUsage:
    """The token usage of a stream so far, over all its answers."""

    def __init__(self, options: StreamOptions | None) -> None:
        self.included = bool(options and options.include_usage)
        """Whether the stream ends with a chunk that has its token usage."""
        self.continuous = self.included and bool(options and options.continuous_usage_stats)
        """Whether each chunk of the stream has the token usage so far."""
        self._prompts: dict[int, int] = {}
        self._generated: dict[tuple[int, int], int] = {}

    def add(self, event: Event, prompt: int = 0) -> None:
        """Count the tokens of an event. ``prompt`` is the index of the prompt that the event's answer belongs to."""
        answer = prompt, event.index
        if isinstance(event, Delta):
            self._generated[answer] = self._generated.get(answer, 0) + len(event.tokens)
        elif isinstance(event, Finished):
            self._generated[answer] = event.generated_tokens
        else:
            self._prompts[prompt] = event.prompt_tokens

    def shown(self) -> dict[str, int] | None:
        """Return the usage so far, for the next chunk; None if the client did not ask for usage in each chunk."""
        if not self.continuous:
            return None
        prompt, generated = sum(self._prompts.values()), sum(self._generated.values())
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def finish_reason(finished: Finished) -> str:
    """Return OpenAI's ``finish_reason`` of an answer: "length" if it was cut off, even if it has tool calls."""
    if finished.reason == "length":
        return "length"
    return "tool_calls" if finished.has_tool_calls else "stop"


def stop_reason(finished: Finished) -> str | int | None:
    """Return vLLM's ``stop_reason``: the stop string or token id that ended the answer; None if none did."""
    return finished.stop if finished.stop is not None else finished.stop_id


def token_text(token: TokenInfo | TopToken, *, as_id: bool = False) -> str:
    """Return the text that represents a token in a response.

    A token that is only a part of a character becomes ``bytes:...``, as in OpenAI's responses.

    Args:
        token: the token.
        as_id: return ``token_id:...`` instead of any text (vLLM's ``return_tokens_as_token_ids``).
    """
    if as_id:
        return f"token_id:{token.id}"
    if "\ufffd" in token.text and token.data and token.data != token.text.encode():
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)
    return token.text


def top_tokens(token: TokenInfo, top: int) -> list[TokenInfo | TopToken]:
    """Return the ``top`` most likely tokens at the place of ``token``, and ``token`` itself if it is not among them.

    If ``top`` is 0, the list is empty.
    """
    shown: list[TokenInfo | TopToken] = list(token.top[:top])
    if shown and token.id not in [item.id for item in shown]:
        shown.append(token)
    return shown


def token_logprob(token: TokenInfo, top: int, *, as_ids: bool = False) -> dict[str, Any]:
    """Return the entry of a token in a chat answer's ``logprobs``, with ``top`` alternatives.

    With ``as_ids``, tokens are named ``token_id:...``. The bytes of all entries, joined, are the answer's text.
    """

    def one(item: TokenInfo | TopToken) -> dict[str, Any]:
        value = -9999.0 if item.logprob is None else item.logprob
        return {"token": token_text(item, as_id=as_ids), "logprob": value, "bytes": list(item.data)}

    return one(token) | {"top_logprobs": [one(item) for item in top_tokens(token, top)]}
