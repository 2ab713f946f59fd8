"""Shared by TGI's routes: parameters with their ranges, and errors.

Error messages are TGI's own, since programs look for them. Follows the router of Text Generation Inference 3.3
(https://github.com/huggingface/text-generation-inference), which includes that of 1.3.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from msgspec import Struct

from moesaic.errors import InvalidRequest
from moesaic.serve.endpoint import Failure, Response
from moesaic.serve.settings import TgiBounds

SEED_BITS = 53
"""Number of bits of a seed that the server draws. JavaScript represents integers of this size exactly."""

VALIDATION_PREFIX = "Input validation error: "


class Parameters(Struct):
    """Generation parameters. None and a missing field mean the same. ``check_parameters`` checks the ranges."""

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool | None = None
    max_new_tokens: int | None = None
    return_full_text: bool | None = None
    stop: list[str] | None = None
    truncate: int | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: dict[str, Any] | None = None
    adapter_id: str | None = None


class GenerateBody(Struct):
    """The body of a generation request. ``stream`` is used only by ``/`` and routes that act like it."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool | None = None


@dataclass(frozen=True)
class CheckedParameters:
    """The generation parameters of a request after their ranges were checked."""

    sampling: dict[str, Any]
    """Values for fields of ``moesaic.Sampling``, without the seed. All that a checkpoint may recommend are included."""
    seeds: tuple[int, ...]
    """One seed for each candidate answer (``best_of``)."""
    greedy: bool
    details: bool
    prefill: bool
    full_text: bool
    grammar: tuple[str, Any] | None


def check_parameters(
    parameters: Parameters | None, bounds: TgiBounds, *, stream: bool, full_text: bool = False
) -> CheckedParameters:
    """Check the generation parameters of a request and return them for use.

    Args:
        parameters: None if the body has none; TGI then samples, while it is greedy for an empty object.
        bounds: limits of the server for TGI's routes.
        stream: whether the response is a stream.
        full_text: whether the answer includes the prompt if the body does not set ``return_full_text``.

    Raises:
        InvalidRequest: a value is out of range; the message is TGI's.
    """
    values = parameters or Parameters(do_sample=True)
    best_of = _best_of(values, bounds, stream)
    _ranges(values, bounds)
    if values.watermark:
        raise InvalidRequest("`watermark` is not supported: send false, or leave it out")
    if values.adapter_id:
        raise InvalidRequest("`adapter_id` is not supported: no adapters are loaded")
    greedy = not (values.do_sample or _warped(values))
    drawn = values.seed if values.seed is not None else secrets.randbits(SEED_BITS)
    return CheckedParameters(
        sampling=_sampling(values, greedy),
        seeds=(drawn, *(secrets.randbits(SEED_BITS) for _ in range(best_of - 1))),
        greedy=greedy,
        details=bool(values.details or values.decoder_input_details),
        prefill=bool(values.decoder_input_details),
        full_text=full_text if values.return_full_text is None else values.return_full_text,
        grammar=_grammar(values.grammar, bounds),
    )


def _best_of(values: Parameters, bounds: TgiBounds, stream: bool) -> int:
    best_of = 1 if values.best_of is None else values.best_of
    if stream and best_of != 1:
        raise InvalidRequest("`best_of` != 1 is not supported when streaming tokens")
    if stream and values.decoder_input_details:
        raise InvalidRequest("`decoder_input_details` == true is not supported when streaming tokens")
    if bounds.max_best_of == 1 and best_of != 1:
        raise InvalidRequest("`best_of` != 1 is not allowed for this endpoint")
    if not 0 < best_of <= bounds.max_best_of:
        raise InvalidRequest(f"`best_of` must be > 0 and <= {bounds.max_best_of}. Given: {best_of}")
    asks = (values.temperature, values.top_k, values.top_p, values.typical_p)
    if best_of > 1 and not (values.do_sample or any(item is not None for item in asks)):
        raise InvalidRequest("you must use sampling when `best_of` is > 1")
    if best_of > 1 and values.seed is not None:
        raise InvalidRequest("`seed` must not be set when `best_of` > 1")
    return best_of


def _ranges(values: Parameters, bounds: TgiBounds) -> None:
    stops, top_n, seed = values.stop or [], values.top_n_tokens or 0, values.seed or 0
    wrong = {
        "`temperature` must be strictly positive": _at_most_zero(values.temperature),
        "`repetition_penalty` must be strictly positive": _at_most_zero(values.repetition_penalty),
        "`frequency_penalty` must be >= -2.0 and <= 2.0": not -2 <= (values.frequency_penalty or 0) <= 2,
        "`top_p` must be > 0.0 and < 1.0": _no_mass(values.top_p),
        "`typical_p` must be > 0.0 and < 1.0": _no_mass(values.typical_p),
        "`top_k` must be strictly positive": _at_most_zero(values.top_k),
        "`max_new_tokens` must be strictly positive": _at_most_zero(values.max_new_tokens),
        f"`stop` supports up to {bounds.max_stop_sequences} stop sequences. Given: {len(stops)}": len(stops)
        > bounds.max_stop_sequences,
        f"`top_n_tokens` must be >= 0 and <= {bounds.max_top_n_tokens}. Given: {top_n}": not 0
        <= top_n
        <= bounds.max_top_n_tokens,
        f"`seed` must be >= 0 and < 2^64. Given: {seed}": not 0 <= seed < 2**64,
    }
    for text, is_wrong in wrong.items():
        if is_wrong:
            raise InvalidRequest(text)


def _at_most_zero(value: float | None) -> bool:
    return value is not None and value <= 0


def _no_mass(value: float | None) -> bool:
    """Return whether ``value``, such as ``top_p``, is set but not in (0, 1]. Unlike in TGI, 1 is allowed: no limit."""
    return value is not None and not 0 < value <= 1


def _warped(values: Parameters) -> bool:
    """Return whether a parameter changes the distribution of tokens.

    TGI then samples even without ``do_sample`` (see its class ``NextTokenChooser``).
    """
    shares = (values.top_p, values.typical_p)
    return bool(values.temperature not in (None, 1.0) or values.top_k or any(p is not None and p < 1 for p in shares))


def _sampling(values: Parameters, greedy: bool) -> dict[str, Any]:
    def or_default(value: Any, default: Any) -> Any:
        return default if value is None else value

    out = {
        "temperature": 0.0 if greedy else or_default(values.temperature, 1.0),
        "top_k": or_default(values.top_k, 0),
        "top_p": or_default(values.top_p, 1.0),
        "min_p": 0.0,
        "typical_p": or_default(values.typical_p, 1.0),
        "repetition_penalty": or_default(values.repetition_penalty, 1.0),
        "frequency_penalty": or_default(values.frequency_penalty, 0.0),
        "max_tokens": values.max_new_tokens,
        "stop": tuple(values.stop or ()),
        "logprobs": values.top_n_tokens or 0,
    }
    return out | ({"prompt_logprobs": 0} if values.decoder_input_details else {})


def _grammar(values: dict[str, Any] | None, bounds: TgiBounds) -> tuple[str, Any] | None:
    """Return the grammar that the field ``grammar`` sets, as its kind and its value; None: it sets none.

    The field's type is ``json``, ``json_object``, ``json_schema`` or ``regex``.
    """
    if values is None:
        return None
    kind, value = values.get("type"), values.get("value")
    if not bounds.grammar or kind not in ("json", "json_object", "json_schema", "regex"):
        raise InvalidRequest("grammar is not supported")
    if kind == "regex":
        if not isinstance(value, str):
            raise InvalidRequest("grammar is not valid: a regex must be a string")
        return "regex", value
    if isinstance(value, str):  # TGI accepts a schema as a JSON string as well
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"grammar is not valid: {error or 'nested too deeply'}") from None
    if kind == "json_schema" and isinstance(value, dict) and isinstance(value.get("schema"), dict):
        value = value["schema"]
    if value is None and kind == "json_object":
        return "json_object", {}
    if not isinstance(value, dict):
        raise InvalidRequest("grammar is not supported")
    return "json_schema", value


def check_truncate(bounds: TgiBounds, context: int | None, truncate: int | None) -> None:
    """Check ``truncate``, the number of tokens to keep of a prompt: at least 1, at most the limit of prompts.

    None, no truncation, is accepted. ``context`` is the model's context length, as for ``total_tokens``.

    Raises:
        InvalidRequest: ``truncate`` is out of range; the message is TGI's.
    """
    longest = input_tokens(bounds, context)
    if truncate is not None and (truncate <= 0 or (longest is not None and truncate > longest)):
        raise InvalidRequest(f"`truncate` must be strictly positive and less than {longest}. Given: {truncate}")


def total_tokens(bounds: TgiBounds, context: int | None) -> int | None:
    """Return the largest number of tokens of prompt and answer together; None if it is unknown.

    ``context`` is the model's context length in tokens; None: unknown.
    """
    limits = [item for item in (bounds.max_total_tokens, context) if item is not None]
    return min(limits) if limits else None


def input_tokens(bounds: TgiBounds, context: int | None) -> int | None:
    """Return the largest number of tokens of a prompt; None if it is unknown. Arguments are as for ``total_tokens``."""
    total = total_tokens(bounds, context)
    limits = [item for item in (bounds.max_input_tokens, None if total is None else total - 1) if item is not None]
    return min(limits) if limits else None


# Errors


def failure(reason: Failure) -> Response:
    """Return an error response in TGI's form. Clients choose their exception class by its ``error_type``."""
    text, status = _message(reason), reason.status
    if status in (401, 404, 405, 413, 415):
        return Response({"error": text}, status)  # without a type, clients raise their exception for the status
    if status == 400:
        return Response({"error": VALIDATION_PREFIX + text, "error_type": "validation"}, 422)
    if status == 429:
        full = reason.kind == "Overloaded"
        return Response({"error": "Model is overloaded" if full else text, "error_type": "overloaded"}, status)
    if status == 503:
        return Response({"error": text, "error_type": "unhealthy"}, status)
    if status == 504:
        return Response({"error": text, "error_type": "incomplete_generation"}, status)
    shown = {"error": f"Request failed during generation: {text}", "error_type": "generation"}
    return Response(shown, 424 if reason.kind == "NumericalError" else status)


def _message(reason: Failure) -> str:
    """Return the message of an error. If the prompt is too long, it is TGI's own message."""
    if reason.tokens is None or reason.limit is None:
        return reason.message
    return f"`inputs` must have less than {reason.limit} tokens. Given: {reason.tokens}"


def broken(reason: Failure) -> bytes:
    """Return an error, encoded as the last event of a stream in TGI's form."""
    shown = failure(reason).content
    if reason.status == 503:
        shown = {"error": f"Request failed during generation: {reason.message}", "error_type": "generation"}
    return b"data:" + json.dumps(shown).encode() + b"\n\n"
