"""What TGI's routes share: their parameters with the ranges and the words of its refusals, and its errors.

The texts are TGI's own, for programs look for them. Follows the router of Text Generation Inference 3.3
(https://github.com/huggingface/text-generation-inference); what 1.3 had is a part of it.
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
"""Of a seed that we draw: a whole number that JavaScript reads exactly."""

INVALID = "Input validation error: "


class Parameters(Struct):
    """How to go on from a text. None and a missing field are the same; ranges are checked in ``checked``."""

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
    """A text, and how to go on from it; ``stream`` counts on ``/`` alone."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool | None = None


@dataclass(frozen=True)
class Wanted:
    """What was asked for, checked."""

    sampling: dict[str, Any]
    """Fields of ``moesaic.Sampling``, without the seed; all that a checkpoint could recommend is among them."""
    seeds: tuple[int, ...]
    """One for each answer to choose from."""
    greedy: bool
    details: bool
    prefill: bool
    full_text: bool
    grammar: tuple[str, Any] | None


def checked(parameters: Parameters | None, bounds: TgiBounds, *, stream: bool, full_text: bool = False) -> Wanted:
    """Return what the parameters ask for.

    Args:
        parameters: None: there were none, which in TGI is not the same as an empty object.
        bounds: what is allowed.
        stream: whether tokens are sent as they come.
        full_text: whether the prompt belongs to the answer where nothing is said.

    Raises:
        InvalidRequest: a value is out of range, in TGI's words.
    """
    given = parameters or Parameters(do_sample=True)
    best_of = _best_of(given, bounds, stream)
    _ranges(given, bounds)
    if given.watermark:
        raise InvalidRequest("`watermark` is not supported: send false, or leave it out")
    if given.adapter_id:
        raise InvalidRequest("`adapter_id` is not supported: no adapters are loaded")
    greedy = not (given.do_sample or _warped(given))
    drawn = given.seed if given.seed is not None else secrets.randbits(SEED_BITS)
    return Wanted(
        sampling=_sampling(given, greedy),
        seeds=(drawn, *(secrets.randbits(SEED_BITS) for _ in range(best_of - 1))),
        greedy=greedy,
        details=bool(given.details or given.decoder_input_details),
        prefill=bool(given.decoder_input_details),
        full_text=full_text if given.return_full_text is None else given.return_full_text,
        grammar=_grammar(given.grammar, bounds),
    )


def _best_of(given: Parameters, bounds: TgiBounds, stream: bool) -> int:
    best_of = 1 if given.best_of is None else given.best_of
    if stream and best_of != 1:
        raise InvalidRequest("`best_of` != 1 is not supported when streaming tokens")
    if stream and given.decoder_input_details:
        raise InvalidRequest("`decoder_input_details` == true is not supported when streaming tokens")
    if bounds.max_best_of == 1 and best_of != 1:
        raise InvalidRequest("`best_of` != 1 is not allowed for this endpoint")
    if not 0 < best_of <= bounds.max_best_of:
        raise InvalidRequest(f"`best_of` must be > 0 and <= {bounds.max_best_of}. Given: {best_of}")
    asks = (given.temperature, given.top_k, given.top_p, given.typical_p)
    if best_of > 1 and not (given.do_sample or any(each is not None for each in asks)):
        raise InvalidRequest("you must use sampling when `best_of` is > 1")
    if best_of > 1 and given.seed is not None:
        raise InvalidRequest("`seed` must not be set when `best_of` > 1")
    return best_of


def _ranges(given: Parameters, bounds: TgiBounds) -> None:
    stops, top_n, seed = given.stop or [], given.top_n_tokens or 0, given.seed or 0
    wrong = {
        "`temperature` must be strictly positive": _at_most_zero(given.temperature),
        "`repetition_penalty` must be strictly positive": _at_most_zero(given.repetition_penalty),
        "`frequency_penalty` must be >= -2.0 and <= 2.0": not -2 <= (given.frequency_penalty or 0) <= 2,
        "`top_p` must be > 0.0 and < 1.0": _no_mass(given.top_p),
        "`typical_p` must be > 0.0 and < 1.0": _no_mass(given.typical_p),
        "`top_k` must be strictly positive": _at_most_zero(given.top_k),
        "`max_new_tokens` must be strictly positive": _at_most_zero(given.max_new_tokens),
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
    """Tell whether a share is out of range; unlike TGI we take 1, which is off: sliders go there."""
    return value is not None and not 0 < value <= 1


def _warped(given: Parameters) -> bool:
    """Tell whether a parameter changes the distribution, which makes TGI draw from it (``NextTokenChooser``)."""
    shares = (given.top_p, given.typical_p)
    return bool(given.temperature not in (None, 1.0) or given.top_k or any(p is not None and p < 1 for p in shares))


def _sampling(given: Parameters, greedy: bool) -> dict[str, Any]:
    def told(value: Any, default: Any) -> Any:
        return default if value is None else value

    out = {
        "temperature": 0.0 if greedy else told(given.temperature, 1.0),
        "top_k": told(given.top_k, 0),
        "top_p": told(given.top_p, 1.0),
        "min_p": 0.0,
        "typical_p": told(given.typical_p, 1.0),
        "repetition_penalty": told(given.repetition_penalty, 1.0),
        "frequency_penalty": told(given.frequency_penalty, 0.0),
        "max_tokens": given.max_new_tokens,
        "stop": tuple(given.stop or ()),
        "logprobs": given.top_n_tokens or 0,
    }
    return out | ({"prompt_logprobs": 0} if given.decoder_input_details else {})


def _grammar(given: dict[str, Any] | None, bounds: TgiBounds) -> tuple[str, Any] | None:
    """Return the grammar: ``json`` or its other name ``json_object``, ``json_schema``, ``regex``."""
    if given is None:
        return None
    kind, value = given.get("type"), given.get("value")
    if not bounds.grammar or kind not in ("json", "json_object", "json_schema", "regex"):
        raise InvalidRequest("grammar is not supported")
    if kind == "regex":
        if not isinstance(value, str):
            raise InvalidRequest("grammar is not valid: a regex must be a string")
        return "regex", value
    if isinstance(value, str):  # TGI takes a schema as text, too
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
    """Refuse to cut a prompt to nothing, or to more than is allowed.

    Raises:
        InvalidRequest: in TGI's words.
    """
    longest = input_tokens(bounds, context)
    if truncate is not None and (truncate <= 0 or (longest is not None and truncate > longest)):
        raise InvalidRequest(f"`truncate` must be strictly positive and less than {longest}. Given: {truncate}")


def total_tokens(bounds: TgiBounds, context: int | None) -> int | None:
    """Return the most tokens of prompt and answer; None where it is not known yet."""
    known = [each for each in (bounds.max_total_tokens, context) if each is not None]
    return min(known) if known else None


def input_tokens(bounds: TgiBounds, context: int | None) -> int | None:
    """Return the most tokens of a prompt; None where it is not known yet."""
    total = total_tokens(bounds, context)
    known = [each for each in (bounds.max_input_tokens, None if total is None else total - 1) if each is not None]
    return min(known) if known else None


# Errors


def failure(reason: Failure) -> Response:
    """Return an error as TGI's clients read it: they make a typed exception of ``error_type``."""
    text, status = reason.message, reason.status
    if status in (401, 404, 405, 413, 415):
        return Response({"error": text}, status)  # without a type: the client's own exception for the status is right
    if status == 400:
        return Response({"error": INVALID + text, "error_type": "validation"}, 422)
    if status == 429:
        full = reason.kind == "Overloaded"
        return Response({"error": "Model is overloaded" if full else text, "error_type": "overloaded"}, status)
    if status == 503:
        return Response({"error": text, "error_type": "unhealthy"}, status)
    if status == 504:
        return Response({"error": text, "error_type": "incomplete_generation"}, status)
    shown = {"error": f"Request failed during generation: {text}", "error_type": "generation"}
    return Response(shown, 424 if reason.kind == "NumericalError" else status)


def broken(reason: Failure) -> bytes:
    """Return an error as an event in a stream that has begun; nothing follows it."""
    shown = failure(reason).content
    if reason.status == 503:
        shown = {"error": f"Request failed during generation: {reason.message}", "error_type": "generation"}
    return b"data:" + json.dumps(shown).encode() + b"\n\n"
