"""TGI's launcher flags: each does what it means here or says why not, and the environment surprises nobody."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from moesaic import cli
from moesaic.cli.launcher import PORT, TGI_PORT, Launch, translate
from moesaic.cli.launcher_flags import TABLE
from moesaic.cli.serving import model_entries
from moesaic.errors import InvalidParameter, InvalidRequest
from moesaic.llm import LLM
from moesaic.loading import memory_needed
from moesaic.serve.settings import TgiBounds

SEED = "--num-shard 2 --max-batch-total-tokens 1024000 --max-total-tokens 32000"
"""What seed 002 gives TGI 1.3.0's image, after --model-id."""


def launch(line: str = "", **environ: str) -> Launch:
    return translate(cli._parser().parse_args(["serve", *line.split()]), environ)


def said(found: Launch) -> str:
    return "\n".join(found.said)


def test_without_tgis_flags_its_environment_does_not_count():
    found = launch("./model", PORT="9", DTYPE="float16", MODEL_ID="org/other", QUANTIZE="awq", API_KEY="x")
    assert found.said == () and found.environment == {} and found.args.api_key is None
    assert (found.args.port, found.args.host, found.args.dtype) == (PORT, "127.0.0.1", "auto")
    assert (found.args.models, found.args.format) == (["./model"], None)
    assert TgiBounds(**found.bounds) == TgiBounds()
    assert launch(PORT="9").args.port == PORT


def test_a_model_id_in_the_environment_is_tgis_way():
    found = launch(MODEL_ID="org/name", PORT="9", NUM_SHARD="2", MAX_TOTAL_TOKENS="50", TRUST_REMOTE_CODE="true")
    assert found.args.models == ["name=org/name"] and found.args.port == 9 and found.args.context == 50
    assert "MODEL_ID=org/name: the model" in found.said and "TRUST_REMOTE_CODE=True: never" in said(found)
    assert launch("--port 7", MODEL_ID="x", PORT="9").args.port == 7
    assert launch("--dtype bfloat16", MODEL_ID="x", DTYPE="float16").args.dtype == "bfloat16"


def test_names_that_mean_something_else_are_not_read():
    found = launch("--num-shard 1", HOSTNAME="3f2a", ENV="production")
    assert found.args.host == "127.0.0.1" and "production" not in said(found)


def test_the_seeds_command():
    found = launch(f"--model-id mistralai/Mixtral-8x7B-Instruct-v0.1 {SEED}")
    assert (found.args.context, found.args.cache_tokens, found.args.port) == (32000, None, TGI_PORT)
    for words in (
        "--num-shard 2: ignored: a server is one process here",
        "--max-batch-total-tokens 1024000: a bound that is kept",
        "TGI 1.3 would have refused more than 1024",
        "--hostname is not given: listening on 127.0.0.1",
        "--port: 3000",
    ):
        assert words in said(found)
    assert "max_batch_total_tokens" not in found.told


def test_a_cache_that_was_asked_for_and_fits():
    found = launch("--max-batch-total-tokens 4000 --max-total-tokens 1000 --max-batch-size 3")
    assert (found.args.cache_tokens, found.args.sequences) == (4000, 3)
    assert found.told["max_batch_total_tokens"] == 4000
    assert "--max-batch-total-tokens 4000: --cache-tokens 4000" in found.said


def test_a_cache_that_can_never_be():
    with pytest.raises(InvalidParameter, match=r"cache_tokens: is \d+, which needs [\d.]+ GB, but the device has"):
        LLM.load(cache_tokens=10**12)


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
        ("--otlp-endpoint http://a:4318", "otel", True),
        ("--otel --otlp-endpoint http://a:4318", "otel", True),
    ],
)
def test_what_a_flag_becomes(flags, field, value):
    found = launch(flags)
    assert getattr(found.args, field) == value
    assert found.said


def test_what_libraries_read():
    found = launch("--otlp-endpoint http://a --otlp-service-name s --huggingface-hub-cache /data")
    assert found.environment == {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://a",
        "OTEL_SERVICE_NAME": "s",
        "HF_HUB_CACHE": "/data",
    }


def test_bounds_and_what_info_tells():
    flags = "--max-best-of 3 --max-total-tokens 90 --max-input-tokens 40 --disable-grammar-support"
    found = launch(f"{flags} --validation-workers 5 --waiting-served-ratio 1.2 --max-waiting-tokens 9")
    bounds = TgiBounds(**found.bounds)
    assert (bounds.max_best_of, bounds.max_total_tokens, bounds.max_input_tokens) == (3, 90, 40)
    assert not bounds.grammar and "TGI 1.3" not in said(found)
    assert bounds.launcher_info == {"validation_workers": 5, "waiting_served_ratio": 1.2, "max_waiting_tokens": 9}


@pytest.mark.parametrize(
    ("line", "environ", "words"),
    [
        ("--quantize awq", {}, "a checkpoint that awq has packed"),
        ("--quantize q4", {}, "q4 is not known; TGI has bitsandbytes,"),
        ("--rope-scaling dynamic", {}, "write it into its config.json"),
        ("--lora-adapters x", {}, "adapters cannot be loaded"),
        ("--max-input-tokens 50 --max-total-tokens 50", {}, "`max_input_tokens` must be < `max_total_tokens`"),
        (
            "--max-total-tokens 50 --max-batch-total-tokens 40",
            {},
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 50 and 40",
        ),
        ("--max-batch-size 0", {}, "--max-batch-size 0: expected more than 0"),
        ("--max-total-tokens 5 --context 6", {}, "--max-total-tokens and --context say the same"),
        ("--model-id a b", {}, "--model-id and MODEL say the same"),
        ("--revision main", {}, "--revision goes with --model-id"),
        ("--num-shard 1", {"MAX_TOTAL_TOKENS": "many"}, "MAX_TOTAL_TOKENS=many: expected a number"),
        ("--num-shard 1", {"DTYPE": "float8"}, "DTYPE=float8: expected"),
        ("--num-shard 1", {"KV_CACHE_DTYPE": "x"}, "KV_CACHE_DTYPE=x: expected"),
    ],
)
def test_what_cannot_be_is_one_clear_line(line, environ, words):
    with pytest.raises(InvalidRequest) as caught:
        launch(line, **environ)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_line_goes_before_the_environment():
    found = launch("--context 60 --quantize eetq", MAX_TOTAL_TOKENS="50", QUANTIZE="awq")
    assert (found.args.context, found.args.format) == (60, "q8")
    assert "MAX_TOTAL_TOKENS=50: ignored: --context is given" in found.said


def test_secrets_are_not_said():
    found = launch("--api-key hidden --ngrok-authtoken hidden")
    assert "hidden" not in said(found) and "whoever may list processes" in said(found)


def test_the_model_keeps_its_whole_name_as_another(tmp_path, monkeypatch):
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
    assert entry.bytes == memory_needed(talker, weight_format="q4", cache_tokens=512)


def test_every_flag_says_something_and_changes_what_exists():
    parser = cli._parser()
    known = vars(parser.parse_args(["serve"])).keys() | launch().args.__dict__.keys()
    for flag in TABLE:
        assert flag.means or flag.take
        assert not flag.to or flag.to in known
    assert len({flag.name for flag in TABLE}) == len(TABLE)


def test_off_loopback_a_key_is_needed(capsys):
    assert cli.main(["serve", "--hostname", "0.0.0.0", "--port", "0"]) == 2
    assert "--api-key" in capsys.readouterr().err


def test_the_page_has_every_flag():
    page = (Path(__file__).parent.parent / "docs/how-to/migrate-from-tgi.md").read_text()
    for flag in TABLE:
        assert re.search(rf"`--{flag.name}`", page), flag.name


def test_help_shows_the_useful_ones(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert "--max-total-tokens V" in shown and "--cuda-graphs" not in shown
    assert isinstance(cli._parser(), argparse.ArgumentParser)
