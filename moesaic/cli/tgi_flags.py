"""The flags of TGI's launcher, one row each: its meaning for ``moesaic serve``, or why it has none.

This module does not combine flags and does not read the environment; ``tgi_launcher`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moesaic.errors import InvalidRequest

Value = str | int | float | bool
Changes = dict[str, Any]
"""New values of parsed arguments of ``moesaic serve``, by the argument's name."""

STEP_TOKENS = 512
"""Default limit on the tokens of an engine step, prompts and answers together; see ``engine.Limits``."""
QUANTIZED = {
    "bitsandbytes": "q8",
    "bitsandbytes-nf4": "q4",
    "bitsandbytes-fp4": "q4",
    "eetq": "q8",
    "fp8": "q8",
}
UNSUPPORTED_QUANTIZATIONS = ("awq", "gptq", "marlin", "exl2", "compressed-tensors")


@dataclass(frozen=True)
class Flag:
    """A flag of TGI's launcher.

    A flag with neither ``argument`` nor ``convert`` is accepted and has no effect.
    """

    name: str
    kind: type
    meaning: str
    """Note that is printed at the start; ``{value}`` stands for the flag's value."""
    argument: str = ""
    """Argument of ``moesaic serve`` that gets the value."""
    convert: Callable[[Any], Changes] | None = None
    """Returns the arguments of ``moesaic serve`` that follow from the value, or raises InvalidRequest."""
    info_field: str = ""
    """Field of TGI's route /info that shows the value."""
    help: str = ""
    """Text for --help; a flag without it is documented in docs/how-to/migrate-from-tgi.md only."""
    aliases: tuple[str, ...] = ()
    env: bool = True
    """Whether an environment variable can set the flag."""

    @property
    def dest(self) -> str:
        """Attribute of the parsed arguments that holds the flag's value."""
        return f"tgi_{self.name.replace('-', '_')}"

    @property
    def variable(self) -> str:
        """Environment variable that sets the flag."""
        return self.name.replace("-", "_").upper()


def _quantize(value: str) -> Changes:
    if value in QUANTIZED:
        return {"format": QUANTIZED[value]}
    if value in UNSUPPORTED_QUANTIZATIONS:
        raise InvalidRequest(
            f"--quantize {value}: checkpoints in the {value} format are not supported: pass the original checkpoint "
            "with --quantize eetq (8 bits) or --quantize bitsandbytes-nf4 (4 bits)"
        )
    values = ", ".join((*QUANTIZED, *UNSUPPORTED_QUANTIZATIONS))
    raise InvalidRequest(f"--quantize: unknown value {value!r:.40}; TGI's values: {values}")


def _refused(why: str) -> Callable[[Any], Changes]:
    def refuse(_: Any) -> Changes:
        raise InvalidRequest(why)

    return refuse


def _traces(endpoint: str) -> Changes:
    return {"otel": True, "environment": {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}}


ONE_PROCESS = (
    "ignored: a server is one process here and uses all its cores, or the one GPU of --device. "
    "For more speed, start one server per machine or GPU; for less memory, use --quantize"
)
TUNING = "ignored: it tunes TGI's own kernels and batches and does not change answers"

TABLE: tuple[Flag, ...] = (
    Flag("model-id", str, "the model", argument="models", help="the model: a folder, or org/name on the hub"),
    Flag(
        "revision",
        str,
        "the model is fetched at this revision",
        argument="revision",
        help="revision of the model on the hub",
    ),
    Flag(
        "quantize",
        str,
        "--format {format}",
        convert=_quantize,
        help="bitsandbytes and eetq mean q8, bitsandbytes-nf4 means q4",
    ),
    Flag("num-shard", int, ONE_PROCESS, help="ignored: a server is one process on one device"),
    Flag("sharded", str, ONE_PROCESS),
    Flag(
        "max-concurrent-requests",
        int,
        "requests beyond {value} get 429",
        argument="concurrent_requests",
        info_field="max_concurrent_requests",
        help="maximum concurrent requests; further requests get 429",
    ),
    Flag("max-best-of", int, "as in TGI", argument="max_best_of", help="maximum best_of (default 2)"),
    Flag(
        "max-stop-sequences",
        int,
        "as in TGI",
        argument="max_stop_sequences",
        help="maximum stop sequences of a request (default 4)",
    ),
    Flag(
        "max-top-n-tokens",
        int,
        "as in TGI",
        argument="max_top_n_tokens",
        help="maximum top_n_tokens of a request (default 5)",
    ),
    Flag(
        "max-input-tokens",
        int,
        "longer prompts are refused on TGI's routes",
        argument="max_input_tokens",
        help="maximum tokens of a prompt; default: the context less one token",
        aliases=("max-input-length",),
    ),
    Flag(
        "max-total-tokens",
        int,
        "--context {value}",
        argument="context",
        help="maximum tokens of prompt and answer together",
    ),
    Flag(
        "max-batch-prefill-tokens",
        int,
        f"a step has at most {{step}} tokens; prompts are read in chunks of at most {STEP_TOKENS} tokens in any case, "
        "so that they do not delay running answers",
        argument="batch_tokens",
        help=f"maximum tokens of an engine step, up to {STEP_TOKENS}",
    ),
    Flag(
        "max-batch-total-tokens",
        int,
        "{cache}",
        argument="cache_tokens",
        info_field="max_batch_total_tokens",
        help="capacity of the key/value cache in tokens",
    ),
    Flag("max-batch-size", int, "--sequences {value}", argument="sequences", help="maximum concurrent answers"),
    Flag(
        "max-client-batch-size",
        int,
        "as in TGI",
        argument="prompts",
        info_field="max_client_batch_size",
        help="maximum prompts of a request (default 128)",
    ),
    Flag("hostname", str, "--host {value}", argument="host", help="the same as --host", env=False),
    Flag(
        "api-key",
        str,
        "the API key that clients must send",
        argument="api_key",
        help="the API key that clients must send; --keys FILE is more secure",
    ),
    Flag(
        "cors-allow-origin",
        str,
        "--cors-origin; the default is no origin, where TGI's is any origin",
        convert=lambda value: {"cors_origin": [origin.strip() for origin in value.split(",") if origin.strip()]},
        help="the same as --cors-origin",
    ),
    Flag("payload-limit", int, "--max-body {value}", argument="max_body", help="the same as --max-body"),
    Flag(
        "graceful-termination-timeout",
        float,
        "--drain-timeout {value:g}",
        argument="drain_timeout",
        help="the same as --drain-timeout",
        aliases=("g",),
    ),
    Flag("json-output", bool, "--log-format json", convert=lambda _: {"log_format": "json"}, help="write logs as JSON"),
    Flag(
        "otlp-endpoint",
        str,
        "--otel, over HTTP (usually port 4318); TGI uses gRPC (port 4317)",
        convert=_traces,
        help="address for OpenTelemetry traces, over HTTP",
    ),
    Flag(
        "otlp-service-name",
        str,
        "the service's name in traces",
        convert=lambda value: {"environment": {"OTEL_SERVICE_NAME": value}},
    ),
    Flag(
        "huggingface-hub-cache",
        str,
        "the folder for models from the hub",
        convert=lambda value: {"environment": {"HF_HUB_CACHE": value}},
        help="folder for models from the hub",
    ),
    Flag(
        "disable-grammar-support",
        bool,
        "`grammar` is refused on TGI's routes",
        convert=lambda _: {"no_grammar": True},
    ),
    Flag(
        "rope-scaling",
        str,
        "",
        convert=_refused("--rope-scaling changes the model's results: set rope_scaling in its config.json instead"),
    ),
    Flag(
        "rope-factor",
        float,
        "",
        convert=_refused("--rope-factor changes the model's results: set rope_scaling in its config.json instead"),
    ),
    Flag(
        "lora-adapters",
        str,
        "",
        convert=_refused("--lora-adapters: LoRA adapters are not supported; merge them into the model first"),
    ),
    Flag(
        "trust-remote-code",
        bool,
        "ignored: code from a checkpoint is never run, because it could do anything on this machine. "
        "The supported models need none",
    ),
    Flag(
        "tokenizer-config-path",
        str,
        "ignored: the chat format comes from the checkpoint or from --chat-format",
    ),
    Flag("enable-prefill-logprobs", bool, "always on"),
    Flag("validation-workers", int, "ignored: two threads tokenize", info_field="validation_workers"),
    Flag("waiting-served-ratio", float, TUNING, info_field="waiting_served_ratio"),
    Flag("max-waiting-tokens", int, TUNING, info_field="max_waiting_tokens"),
    Flag(
        "speculate",
        int,
        "--speculation ngram, or off with 0; the number of proposed tokens follows from their measured gain",
        convert=lambda value: {"speculation": "ngram" if value else "off"},
        help="0: the same as --speculation off",
    ),
    Flag("cuda-graphs", str, TUNING),
    Flag("cuda-memory-fraction", float, "ignored: --max-batch-total-tokens and --memory limit the memory"),
    Flag("disable-custom-kernels", bool, TUNING),
    Flag("prometheus-port", int, "ignored: /metrics is served on the main port"),
    Flag("shard-uds-path", str, ONE_PROCESS),
    Flag("master-addr", str, ONE_PROCESS),
    Flag("master-port", int, ONE_PROCESS),
    Flag("weights-cache-override", str, "ignored: pass the folder with --model-id"),
    Flag("watermark-gamma", float, "ignored: watermarks are not supported"),
    Flag("watermark-delta", float, "ignored: watermarks are not supported"),
    Flag("ngrok", bool, "ignored: tunnels are not supported; use a reverse proxy"),
    Flag("ngrok-authtoken", str, "ignored: tunnels are not supported"),
    Flag("ngrok-edge", str, "ignored: tunnels are not supported"),
    Flag("usage-stats", str, "always off: no usage data is sent"),
    Flag(
        "env",
        bool,
        "ignored: the environment is not printed, because it may contain secrets",
        aliases=("e",),
        env=False,
    ),
)
