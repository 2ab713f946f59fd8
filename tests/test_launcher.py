"""Translation of TGI's launcher flags and environment variables into arguments of ``moesaic serve``."""

from __future__ import annotations

import argparse
import asyncio
import re
from pathlib import Path

import pytest

from moesaic import cli
from moesaic.cli.serving import model_entries
from moesaic.cli.tgi_flags import TABLE
from moesaic.cli.tgi_launcher import PORT, TGI_PORT, Launch, translate
from moesaic.errors import InvalidRequest, NotEnoughMemory
from moesaic.llm import LLM
from moesaic.load_options import LoadOptions
from moesaic.plan import make_plan
from moesaic.serve.settings import TgiBounds

TYPICAL = "--num-shard 2 --max-batch-total-tokens 1024000 --max-total-tokens 32000"
"""Usual flags of TGI 1.3.0's image, after --model-id."""


def launch(line: str = "", **environ: str) -> Launch:
    return translate(cli._parser().parse_args(["serve", *line.split()]), environ)


def notes(result: Launch) -> str:
    return "\n".join(result.notes)


def test_tgi_variables_are_ignored_without_tgi_flags():
    result = launch("./model", PORT="9", DTYPE="float16", MODEL_ID="org/other", QUANTIZE="awq", API_KEY="x")
    assert result.notes == () and result.environment == {} and result.args.api_key is None
    assert (result.args.port, result.args.host, result.args.dtype) == (PORT, "127.0.0.1", "auto")
    assert (result.args.models, result.args.format) == (["./model"], None)
    assert TgiBounds(**result.bounds) == TgiBounds()
    assert launch(PORT="9").args.port == PORT


def test_model_id_variable_enables_tgi_variables():
    result = launch(MODEL_ID="org/name", PORT="9", NUM_SHARD="2", MAX_TOTAL_TOKENS="50", TRUST_REMOTE_CODE="true")
    assert result.args.models == ["name=org/name"] and result.args.port == 9 and result.args.context == 50
    assert (
        "MODEL_ID=org/name: the model" in result.notes
        and "TRUST_REMOTE_CODE=True: ignored: code from a checkpoint is never run" in notes(result)
    )
    assert launch("--port 7", MODEL_ID="x", PORT="9").args.port == 7
    assert launch("--dtype bfloat16", MODEL_ID="x", DTYPE="float16").args.dtype == "bfloat16"


def test_hostname_and_env_variables_are_ignored():
    result = launch("--num-shard 1", HOSTNAME="3f2a", ENV="production")
    assert result.args.host == "127.0.0.1" and "production" not in notes(result)


def test_typical_tgi_command():
    result = launch(f"--model-id mistralai/Mixtral-8x7B-Instruct-v0.1 {TYPICAL}")
    assert (result.args.context, result.args.cache_tokens, result.args.port) == (32000, None, TGI_PORT)
    for words in (
        "--num-shard 2: ignored: a server is one process here",
        "--max-batch-total-tokens 1024000: an upper bound",
        "TGI 1.3 would have refused more than 1024",
        "--hostname is not given: listening on 127.0.0.1",
        "--port: 3000",
    ):
        assert words in notes(result)
    assert "max_batch_total_tokens" not in result.info


def test_small_cache_size_is_used():
    result = launch("--max-batch-total-tokens 4000 --max-total-tokens 1000 --max-batch-size 3")
    assert (result.args.cache_tokens, result.args.sequences) == (4000, 3)
    assert result.info["max_batch_total_tokens"] == 4000
    assert "--max-batch-total-tokens 4000: --cache-tokens 4000" in result.notes


def test_cache_larger_than_memory_is_refused():
    with pytest.raises(NotEnoughMemory, match=r"[\d.]+ GB of key/value cache .* --cache-tokens \d+ fits"):
        LLM.load("tales", cache_tokens=10**12)


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("--quantize bitsandbytes", "format", "q8"),
        ("--quantize bitsandbytes-nf4", "format", "q4"),
        ("--quantize bitsandbytes-fp4", "format", "q4"),
        ("--quantize eetq", "format", "q8"),
        ("--quantize fp8", "format", "q8"),
        ("--kv-cache-dtype fp8_e5m2", "kv_cache_dtype", "int8"),
        ("--max-concurrent-requests 7", "concurrent_requests", 7),
        ("--max-best-of 7", "max_best_of", 7),
        ("--max-stop-sequences 7", "max_stop_sequences", 7),
        ("--max-top-n-tokens 7", "max_top_n_tokens", 7),
        ("--max-input-length 7", "max_input_tokens", 7),
        ("--max-batch-prefill-tokens 7", "batch_tokens", 7),
        ("--max-batch-prefill-tokens 4096", "batch_tokens", 512),
        ("--max-client-batch-size 7", "prompts", 7),
        ("--hostname 0.0.0.0", "host", "0.0.0.0"),
        ("--api-key k", "api_key", "k"),
        ("--cors-allow-origin http://a,http://b", "cors_origin", ["http://a", "http://b"]),
        ("--payload-limit 7", "max_body", 7),
        ("-g 7", "drain_timeout", 7),
        ("--json-output", "log_format", "json"),
        ("--num-shard 1 -p 7", "port", 7),
        ("--speculate 3", "speculation", "ngram"),
        ("--speculate 0", "speculation", "off"),
        ("--otlp-endpoint http://a:4318", "otel", True),
        ("--otel --otlp-endpoint http://a:4318", "otel", True),
    ],
)
def test_flag_sets_argument(flags, field, value):
    result = launch(flags)
    assert getattr(result.args, field) == value
    assert result.notes


def test_flags_set_environment_variables_for_libraries():
    result = launch("--otlp-endpoint http://a --otlp-service-name s --huggingface-hub-cache /data")
    assert result.environment == {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://a",
        "OTEL_SERVICE_NAME": "s",
        "HF_HUB_CACHE": "/data",
    }


def test_bounds_and_info_fields():
    flags = "--max-best-of 3 --max-total-tokens 90 --max-input-tokens 40 --disable-grammar-support"
    result = launch(f"{flags} --validation-workers 5 --waiting-served-ratio 1.2 --max-waiting-tokens 9")
    bounds = TgiBounds(**result.bounds)
    assert (bounds.max_best_of, bounds.max_total_tokens, bounds.max_input_tokens) == (3, 90, 40)
    assert not bounds.grammar and "TGI 1.3" not in notes(result)
    assert bounds.launcher_info == {"validation_workers": 5, "waiting_served_ratio": 1.2, "max_waiting_tokens": 9}


@pytest.mark.parametrize(
    ("line", "environ", "words"),
    [
        ("--quantize awq", {}, "checkpoints in the awq format are not supported"),
        ("--quantize q4", {}, "unknown value 'q4'; TGI's values: bitsandbytes,"),
        ("--rope-scaling dynamic", {}, "set rope_scaling in its config.json"),
        ("--lora-adapters x", {}, "adapters are not supported"),
        ("--max-input-tokens 50 --max-total-tokens 50", {}, "`max_input_tokens` must be < `max_total_tokens`"),
        (
            "--max-total-tokens 50 --max-batch-total-tokens 40",
            {},
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 50 and 40",
        ),
        ("--max-batch-size 0", {}, "--max-batch-size 0: expected more than 0"),
        ("--max-total-tokens 5 --context 6", {}, "--max-total-tokens and --context mean the same"),
        ("--model-id a b", {}, "--model-id and MODEL mean the same"),
        ("--revision main", {}, "--revision goes with --model-id"),
        ("--num-shard 1", {"MAX_TOTAL_TOKENS": "many"}, "MAX_TOTAL_TOKENS=many: expected a number"),
        ("--num-shard 1", {"DTYPE": "float8"}, "DTYPE=float8: expected"),
        ("--num-shard 1", {"KV_CACHE_DTYPE": "x"}, "KV_CACHE_DTYPE=x: expected"),
    ],
)
def test_unsupported_flags_are_refused_in_one_line(line, environ, words):
    with pytest.raises(InvalidRequest) as caught:
        launch(line, **environ)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_command_line_overrides_environment():
    result = launch("--context 60 --quantize eetq", MAX_TOTAL_TOKENS="50", QUANTIZE="awq")
    assert (result.args.context, result.args.format) == (60, "q8")
    assert "MAX_TOTAL_TOKENS=50: ignored: --context is given" in result.notes


def test_notes_hide_secrets():
    result = launch("--api-key hidden --ngrok-authtoken hidden")
    assert "hidden" not in notes(result) and "process list" in notes(result)


def test_hub_name_is_an_alias_of_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.cli.serving.folder", lambda model: tmp_path)
    for line in ("--model-id org/name --revision v1", "--model-id org/name"):
        [entry] = model_entries(launch(line).args)
        assert (entry.info.name, entry.info.aliases) == ("name", ("org/name",))
    path = tmp_path / "a=b"
    path.mkdir()
    [entry] = model_entries(launch(f"--model-id {path}").args)
    assert (entry.info.name, entry.info.aliases) == ("a-b", ())


def test_memory_budget_counts_weights_and_cache(talker):
    line = f"--memory 20 --format q4 --cache-tokens 512 {talker}"
    [entry] = model_entries(launch(line).args)
    plan = make_plan(talker, LoadOptions(format="q4", cache_tokens=512))
    assert asyncio.run(entry.make_plan()).bytes == plan.bytes


def test_every_flag_has_a_meaning_and_a_known_argument():
    parser = cli._parser()
    arguments = vars(parser.parse_args(["serve"])).keys() | launch().args.__dict__.keys()
    for flag in TABLE:
        assert flag.meaning or flag.convert
        assert not flag.argument or flag.argument in arguments
    assert len({flag.name for flag in TABLE}) == len(TABLE)


def test_public_address_requires_a_key(capsys):
    assert cli.main(["serve", "--hostname", "0.0.0.0", "--port", "0"]) == 2
    assert "--api-key" in capsys.readouterr().err


def test_docs_list_every_flag():
    page = (Path(__file__).parent.parent / "docs/how-to/migrate-from-tgi.md").read_text()
    for flag in TABLE:
        assert re.search(rf"`--{flag.name}`", page), flag.name


def test_help_lists_only_flags_with_help_text(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert "--max-total-tokens V" in shown and "--cuda-graphs" not in shown
    assert isinstance(cli._parser(), argparse.ArgumentParser)
