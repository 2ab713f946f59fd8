"""The flags of TGI's launcher, one row each: what it means for ``moesaic serve``, or why it means nothing.

Knows flags and words. Does not know how they come together, nor the environment (``launcher``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moesaic.errors import InvalidRequest

Value = str | int | float | bool
Changes = dict[str, Any]
"""Arguments of ``moesaic serve``, by their names among what argparse found."""

STEP = 512
"""Tokens that a step has at most, prompts and answers together; see ``engine.Limits``."""
QUANTIZED = {
    "bitsandbytes": "q8",
    "bitsandbytes-nf4": "q4",
    "bitsandbytes-fp4": "q4",
    "eetq": "q8",
    "fp8": "q8",
}
PACKED_ELSEWHERE = ("awq", "gptq", "marlin", "exl2", "compressed-tensors")


@dataclass(frozen=True)
class Flag:
    """A flag of TGI's launcher.

    ``means`` is said at the start; ``{value}`` in it is what was given. Where neither ``to`` nor ``take`` is there,
    the flag is accepted and does nothing.
    """

    name: str
    kind: type
    means: str
    to: str = ""
    """The argument of ours that gets the value."""
    take: Callable[[Any], Changes] | None = None
    """Makes arguments of ours of the value, or raises InvalidRequest."""
    told: str = ""
    """The field of /info that shows the value."""
    help: str = ""
    """Without it the flag is not in --help, but in docs/how-to/migrate-from-tgi.md."""
    also: tuple[str, ...] = ()
    env: bool = True

    @property
    def dest(self) -> str:
        """Its name among what argparse found."""
        return f"tgi_{self.name.replace('-', '_')}"

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return self.name.replace("-", "_").upper()


def _quantize(value: str) -> Changes:
    if value in QUANTIZED:
        return {"format": QUANTIZED[value]}
    if value in PACKED_ELSEWHERE:
        raise InvalidRequest(
            f"--quantize {value} is for a checkpoint that {value} has packed, which is not read here: "
            "name the original checkpoint, and --quantize eetq (8 bits) or --quantize bitsandbytes-nf4 (4 bits)"
        )
    known = ", ".join((*QUANTIZED, *PACKED_ELSEWHERE))
    raise InvalidRequest(f"--quantize {value:.40} is not known; TGI has {known}")


def _refused(why: str) -> Callable[[Any], Changes]:
    def refuse(_: Any) -> Changes:
        raise InvalidRequest(why)

    return refuse


def _traces(endpoint: str) -> Changes:
    return {"otel": True, "environment": {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}}


NO_SHARDS = (
    "ignored: a server is one process here, which uses all cores it is given, or the one GPU of --device. "
    "For more speed start one server for each machine or GPU; for less memory use --quantize"
)
SPEED = "ignored: it only tunes how TGI's own kernels and batches work; answers are the same"

TABLE: tuple[Flag, ...] = (
    Flag("model-id", str, "the model", to="models", help="a folder, or org/name on the hub"),
    Flag("revision", str, "fetched at this revision", to="revision", help="of the model on the hub"),
    Flag("quantize", str, "--format {format}", take=_quantize, help="bitsandbytes, eetq: q8; bitsandbytes-nf4: q4"),
    Flag("num-shard", int, NO_SHARDS, help="ignored: one process, one device"),
    Flag("sharded", str, NO_SHARDS),
    Flag(
        "max-concurrent-requests",
        int,
        "requests beyond {value} get 429",
        to="concurrent_requests",
        told="max_concurrent_requests",
        help="more get 429",
    ),
    Flag("max-best-of", int, "as in TGI", to="max_best_of", help="default 2"),
    Flag("max-stop-sequences", int, "as in TGI", to="max_stop_sequences", help="default 4"),
    Flag("max-top-n-tokens", int, "as in TGI", to="max_top_n_tokens", help="default 5"),
    Flag(
        "max-input-tokens",
        int,
        "longer prompts are refused on TGI's routes",
        to="max_input_tokens",
        help="of a prompt; default: all but one",
        also=("max-input-length",),
    ),
    Flag("max-total-tokens", int, "--context {value}", to="context", help="of prompt and answer"),
    Flag(
        "max-batch-prefill-tokens",
        int,
        f"a step has at most {{step}} tokens; prompts are read in pieces of at most {STEP} anyway, "
        "so that they hold up no answers",
        to="batch_tokens",
        help=f"tokens in a step; at most {STEP} are taken",
    ),
    Flag(
        "max-batch-total-tokens",
        int,
        "{cache}",
        to="cache_tokens",
        told="max_batch_total_tokens",
        help="places in the key/value cache",
    ),
    Flag("max-batch-size", int, "--sequences {value}", to="sequences", help="answers at the same time"),
    Flag(
        "max-client-batch-size",
        int,
        "as in TGI",
        to="prompts",
        told="max_client_batch_size",
        help="prompts in one request (default 128)",
    ),
    Flag("hostname", str, "--host {value}", to="host", help="the same as --host", env=False),
    Flag("api-key", str, "the key that clients must send", to="api_key", help="the one key; better: --keys FILE"),
    Flag(
        "cors-allow-origin",
        str,
        "--cors-origin; TGI's default is any origin, here it is none",
        take=lambda value: {"cors_origin": [each.strip() for each in value.split(",") if each.strip()]},
        help="the same as --cors-origin",
    ),
    Flag("payload-limit", int, "--max-body {value}", to="max_body", help="the same as --max-body"),
    Flag(
        "graceful-termination-timeout",
        float,
        "--drain-timeout {value:g}",
        to="drain_timeout",
        help="the same as --drain-timeout",
        also=("g",),
    ),
    Flag("json-output", bool, "--log-format json", take=lambda _: {"log_format": "json"}, help="logs as JSON"),
    Flag(
        "otlp-endpoint",
        str,
        "--otel, over HTTP (usually port 4318), where TGI speaks gRPC (4317)",
        take=_traces,
        help="where traces go; over HTTP",
    ),
    Flag(
        "otlp-service-name",
        str,
        "the service's name in traces",
        take=lambda value: {"environment": {"OTEL_SERVICE_NAME": value}},
    ),
    Flag(
        "huggingface-hub-cache",
        str,
        "models are fetched into it",
        take=lambda value: {"environment": {"HF_HUB_CACHE": value}},
        help="where fetched models lie",
    ),
    Flag(
        "disable-grammar-support",
        bool,
        "`grammar` is refused on TGI's routes",
        take=lambda _: {"no_grammar": True},
    ),
    Flag(
        "rope-scaling",
        str,
        "",
        take=_refused("--rope-scaling changes what the model computes: write it into its config.json (rope_scaling)"),
    ),
    Flag(
        "rope-factor",
        float,
        "",
        take=_refused("--rope-factor changes what the model computes: write it into its config.json (rope_scaling)"),
    ),
    Flag(
        "lora-adapters",
        str,
        "",
        take=_refused("--lora-adapters: adapters cannot be loaded here; merge them into the model first"),
    ),
    Flag(
        "trust-remote-code",
        bool,
        "never: code that comes with a checkpoint could do anything on this machine. "
        "The models that are known here need none",
    ),
    Flag(
        "tokenizer-config-path",
        str,
        "ignored: the chat format comes with the checkpoint or is named by --chat-format",
    ),
    Flag("enable-prefill-logprobs", bool, "always so"),
    Flag("validation-workers", int, "ignored: two threads tokenize, which is enough", told="validation_workers"),
    Flag("waiting-served-ratio", float, SPEED, told="waiting_served_ratio"),
    Flag("max-waiting-tokens", int, SPEED, told="max_waiting_tokens"),
    Flag("speculate", int, "ignored: one token of an answer is computed at a time; answers are the same"),
    Flag("cuda-graphs", str, SPEED),
    Flag("cuda-memory-fraction", float, "ignored: --max-batch-total-tokens and --memory bound the memory"),
    Flag("disable-custom-kernels", bool, SPEED),
    Flag("prometheus-port", int, "ignored: /metrics is on the port of everything else"),
    Flag("shard-uds-path", str, NO_SHARDS),
    Flag("master-addr", str, NO_SHARDS),
    Flag("master-port", int, NO_SHARDS),
    Flag("weights-cache-override", str, "ignored: name the folder with --model-id"),
    Flag("watermark-gamma", float, "ignored: nothing is watermarked"),
    Flag("watermark-delta", float, "ignored: nothing is watermarked"),
    Flag("ngrok", bool, "ignored: no tunnels are dug; put a reverse proxy in front"),
    Flag("ngrok-authtoken", str, "ignored: no tunnels are dug"),
    Flag("ngrok-edge", str, "ignored: no tunnels are dug"),
    Flag("usage-stats", str, "always off: nothing is reported to anybody"),
    Flag("env", bool, "ignored: the environment may hold secrets and is not printed", also=("e",), env=False),
)
