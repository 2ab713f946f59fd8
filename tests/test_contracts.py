"""Contract tests: they run over every file of a registry folder, so a new file is tested without changes here."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic import checkpoints, formats, models, ops, registry
from moesaic.bench import endpoints
from moesaic.bench.endpoints import Answer, Endpoint, Request, RequestFailed, RequestOptions, _http
from moesaic.checkpoints._write import WriteOptions
from moesaic.cluster import launch
from moesaic.errors import CheckpointError, InvalidRequest, NotFound
from moesaic.formats import WeightFormat
from moesaic.serve.endpoint import Endpoint as HttpEndpoint
from moesaic.serve.endpoint import Failure
from tests.support import grouped
from tests.support.models import moesaic_model, transformers_model
from tests.support.scripted_server import CONTEXT, TEMPLATE, Script, serving


@pytest.fixture(params=[*registry.names("formats"), *grouped.TEXTS])
def weight_format(request) -> WeightFormat:
    return formats.load(request.param)


class TestFormats:
    @pytest.mark.parametrize("shape", [(3, 64), (4, 3, 64)])
    def test_nbytes_and_layout_match_the_packed_parts(self, weight_format, shape):
        packed = weight_format.pack(torch.randn(shape))
        real = sum(part.numel() * part.element_size() for part in packed.parts().values())
        assert weight_format.nbytes(shape) == real
        assert {name: (tuple(part.shape), part.dtype) for name, part in packed.parts().items()} == dict(
            weight_format.layout(shape)
        )

    def test_round_trip_within_the_stated_error(self, weight_format):
        weight = torch.randn(64, 256)
        error = (weight_format.pack(weight).dequantize() - weight).norm() / weight.norm()
        assert error <= weight_format.largest_error()

    def test_stacked_entries_are_packed_independently(self, weight_format):
        weight = torch.randn(4, 6, 64)
        stack = weight_format.pack(weight)
        for e in range(4):
            alone = weight_format.pack(weight[e])
            assert torch.equal(stack.dequantize(index=e), alone.dequantize())

    def test_store_writes_only_one_entry(self, weight_format):
        stack = weight_format.pack(torch.zeros(3, 4, 64))
        weight = torch.randn(4, 64)
        stack.store(weight, 1)
        assert torch.equal(stack.dequantize(index=1), weight_format.pack(weight).dequantize())
        assert not stack.dequantize(index=0).any()
        assert not stack.dequantize(index=2).any()

    def test_takes_no_memory_on_the_meta_device(self, weight_format):
        packed = weight_format.empty((10**6, 10**6), device="meta")
        assert all(part.is_meta for part in packed.parts().values())

    def test_the_name_is_the_file_name(self, weight_format):
        assert type(weight_format).__module__ == f"moesaic.formats.{weight_format.name}"

    def test_its_text_names_it(self, weight_format):
        assert formats.load(str(weight_format)) == weight_format == weight_format.pack(torch.randn(4, 64)).format

    def test_rows_are_those_of_the_plain_weight(self, weight_format):
        packed, ids = weight_format.pack(torch.randn(70, 96)), torch.tensor([3, 69, 32, 3, 0])
        assert torch.equal(packed.rows(ids, torch.float32), packed.dequantize()[ids])


@pytest.mark.parametrize("name", registry.names("ops"))
class TestOps:
    def test_every_supported_operation_exists(self, name):
        backend = registry.load("ops", name)
        for op in ops.OPS:
            reason = backend.why_not(op, "cpu", "float32")
            if reason is None:
                assert callable(getattr(backend, op))
            else:
                assert isinstance(reason, str) and reason


FAMILIES = {"mixtral": "Mixtral", "llama": "Llama"}


@pytest.mark.parametrize("name", registry.names("models"))
class TestModels:
    def test_logits_match_transformers(self, name, tmp_path):
        model = transformers_model(FAMILIES[name], {})
        model.save_pretrained(tmp_path)
        decoder = moesaic_model(tmp_path)
        ids = [1, 5, 9, 33, 2, 7]
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0]
            logits = decoder.logits(decoder(ops.Batch.whole([ids])))
        assert (logits - expected).abs().max() <= 1e-4

    def test_sizes_and_window_of_the_cache(self, name, tmp_path):
        model = transformers_model(FAMILIES[name], {"sliding_window": 11} if name == "mixtral" else {})
        model.save_pretrained(tmp_path)
        decoder = moesaic_model(tmp_path)
        assert (decoder.vocab_size, decoder.max_length) == (97, 128)
        assert decoder.cache_shapes == [(2, 16), (2, 16)]
        assert decoder.window == (11 if name == "mixtral" else None)

    def test_one_model_type_has_one_file(self, name):
        for model_type in registry.load("models", name).MODEL_TYPES:
            assert models.types()[model_type] == name


LAYOUTS = registry.names("checkpoints")
WRITTEN = [name for name in LAYOUTS if hasattr(registry.load("checkpoints", name), "write")]


def test_layouts_are_tried_in_one_order():
    priorities = {name: registry.load("checkpoints", name).PRIORITY for name in LAYOUTS}
    assert len(set(priorities.values())) == len(LAYOUTS)
    assert sorted(LAYOUTS, key=priorities.__getitem__) == ["hf", "meta", "mistral", "gguf"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_folder_is_not_detected(layout, tmp_path):
    assert registry.load("checkpoints", layout).LOOKS_FOR
    assert registry.load("checkpoints", layout).detect(tmp_path) is False


@pytest.mark.parametrize("layout", WRITTEN)
class TestCheckpoints:
    @pytest.fixture
    def written(self, layout, tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
        """Folder of a tiny Mixtral in this layout, and its weights."""
        transformers_model("Mixtral", {"num_local_experts": 4}).save_pretrained(tmp_path / "source")
        with checkpoints.open_checkpoint(tmp_path / "source") as source:
            registry.load("checkpoints", layout).write(source, tmp_path / "written", WriteOptions())
            weights = {name: source.read(name) for name in source.tensors}
        return tmp_path / "written", weights

    def test_write_then_read(self, layout, written):
        folder, weights = written
        assert checkpoints.detect_layout(folder).__name__.endswith(layout)
        with checkpoints.open_checkpoint(folder) as checkpoint:
            assert checkpoint.layout == layout
            assert checkpoint.tensors.keys() == weights.keys()
            assert all(torch.equal(checkpoint.read(name), weight) for name, weight in weights.items())

    @pytest.mark.parametrize("change", ["missing", "unexpected"])
    def test_missing_and_unexpected_tensors_are_errors(self, layout, written, change):
        folder, _ = written
        with checkpoints.open_checkpoint(folder) as checkpoint:
            model = models.build(checkpoint.config, folder, formats.load("float32"), dtype=torch.float32)
            slots = list(model.slots())
            if change == "unexpected":
                slots = [slot for slot in slots if slot.name != "model.norm.weight"]
            else:
                extra = slots[0]
                slots.append(formats.Slot("model.extra.weight", extra.shape, extra.index, extra.store))
            with pytest.raises(CheckpointError) as caught:
                checkpoints.load_weights(slots, checkpoint)
        tensor = "model.norm.weight" if change == "unexpected" else "model.extra.weight"
        assert tensor in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", registry.names(endpoints.FOLDER))
class TestEndpoints:
    """Every client dialect of the benchmark, against a scripted server."""

    def ask(self, name: str, script: Script, act: Callable[[Endpoint], Awaitable[Any]], **manner: Any) -> Any:
        """Return the result of ``act`` on the endpoint ``name``."""

        async def run() -> Any:
            async with _http.connect(script.url, "secret", {"X-Who": "me"}) as client:
                dialect = name.replace("_", "-")
                return await act(
                    await endpoints.open_endpoint(client, RequestOptions(poll=0.001, **manner), dialect, None)
                )

        with serving(script):
            return asyncio.run(run())

    async def answer(self, endpoint: Endpoint, request: Request | None = None) -> Answer:
        answer = Answer()
        await endpoint.send(request or Request("one two three", 9), answer)
        return answer

    def test_the_name_is_the_file_name(self, name):
        dialect = endpoints.load(name.replace("_", "-"))
        assert dialect.name == name.replace("_", "-") and not inspect.isabstract(dialect)
        assert dialect.__module__ == f"moesaic.bench.endpoints.{name}"

    def test_every_piece_and_the_usage_are_recorded(self, name):
        answer = self.ask(name, Script(key="secret"), self.answer)
        assert len(answer.arrivals) == 5 and list(answer.arrivals) == sorted(answer.arrivals)
        assert (answer.tokens, answer.prompt_tokens) == (5, TEMPLATE + 6)

    def test_usage_may_be_missing(self, name):
        answer = self.ask(name, Script(counts=False), self.answer)
        assert len(answer.arrivals) == 5
        assert (answer.tokens, answer.prompt_tokens) == (None, None)

    @pytest.mark.parametrize(
        ("fault", "kind"),
        [
            ("error", "error event"),
            ("cut", "cut stream"),
            ("short", "cut stream"),
            ("refuse", "status 429"),
            ("page", "bad reply"),
        ],
    )
    def test_a_failure_has_a_kind_and_the_next_request_works(self, name, fault, kind):
        async def twice(endpoint: Endpoint) -> tuple[RequestFailed, Answer]:
            with pytest.raises(RequestFailed) as caught:
                await self.answer(endpoint)
            return caught.value, await self.answer(endpoint)

        failed, second = self.ask(name, Script(faults=deque([fault])), twice)
        assert failed.kind == kind
        assert failed.retry_after == ("7" if fault == "refuse" else None)
        assert ("it broke" in failed.detail) == (fault == "error")
        assert "\n" not in str(failed)
        assert len(second.arrivals) == 5

    def test_request_options_are_sent(self, name):
        script, dialect = Script(), endpoints.load(name.replace("_", "-"))
        manner = {"temperature": 0.5, "extra": {"top_k": 7}, "ignore_eos": dialect.supports_ignore_eos}
        self.ask(name, script, self.answer, **manner)
        [(path, headers, body)] = script.requests
        assert path == (dialect.path or "/tiny") and headers["x-who"] == "me"
        assert headers["authorization"] == "Bearer secret"
        body = body | body.get("parameters", {})
        assert (body["temperature"], body["top_k"]) == (0.5, 7)
        assert body.get("ignore_eos", False) == dialect.supports_ignore_eos
        assert 9 in body.values()

    def test_unsupported_options_are_refused(self, name):
        if endpoints.load(name.replace("_", "-")).supports_ignore_eos:
            assert len(self.ask(name, Script(), self.answer, ignore_eos=True).arrivals) == 5
        else:
            with pytest.raises(InvalidRequest, match="ignore-eos"):
                self.ask(name, Script(), self.answer, ignore_eos=True)

    def test_chat_messages_are_sent(self, name):
        messages = (
            {"role": "user", "content": "a b"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        )
        script = Script()
        self.ask(name, script, lambda endpoint: self.answer(endpoint, Request("", 9, messages)))
        body = str(script.requests[0][2])
        if endpoints.load(name.replace("_", "-")).supports_messages:
            assert all(word in body for word in ("a b", "assistant", "d"))
        else:
            assert "a b" not in body and "assistant" not in body

    def test_the_dialect_is_detected(self, name):
        detectable = endpoints.load(name.replace("_", "-")).probe_order is not None

        async def detect(script: Script) -> str:
            async with _http.connect(script.url) as client:
                return (await endpoints.open_endpoint(client, RequestOptions(), "auto", None)).name

        for speaks in ((name,), ("nothing",)):
            with serving(Script(dialects=speaks)) as script:
                if speaks == (name,):
                    assert (asyncio.run(detect(script)) == name.replace("_", "-")) == detectable
                else:
                    with pytest.raises(InvalidRequest, match="--dialect"):
                        asyncio.run(detect(script))

    def test_the_context_length_is_read(self, name):
        async def context(endpoint: Endpoint) -> int | None:
            return endpoint.context

        assert self.ask(name, Script(), context) == (None if name == "aime" else CONTEXT)


@pytest.mark.parametrize("name", registry.names("serve/dialects"))
class TestDialects:
    def test_defines_endpoints(self, name):
        endpoints = registry.load("serve/dialects", name).ENDPOINTS
        assert endpoints and all(isinstance(endpoint, HttpEndpoint) for endpoint in endpoints)
        routes = [(endpoint.method, endpoint.path) for endpoint in endpoints]
        assert len(routes) == len(set(routes))
        for endpoint in endpoints:
            assert endpoint.method in ("GET", "POST", "DELETE") and endpoint.path.startswith("/")
            assert inspect.iscoroutinefunction(endpoint.run) and endpoint.summary
            assert endpoint.body is None or endpoint.method == "POST"

    def test_errors_are_json(self, name):
        for endpoint in registry.load("serve/dialects", name).ENDPOINTS:
            content = endpoint.failure(Failure(400, "validation", "it is wrong"))
            assert "it is wrong" in json.dumps(getattr(content, "content", content))

    def test_routes_are_unique_to_a_dialect(self, name):
        def routes(dialect: str) -> set[tuple[str, str]]:
            return {(endpoint.method, endpoint.path) for endpoint in registry.load("serve/dialects", dialect).ENDPOINTS}

        for other in set(registry.names("serve/dialects")) - {name}:
            assert not routes(name) & routes(other)


@pytest.mark.parametrize("name", launch.names())
class TestLaunchers:
    WORKER = ("/srv/model", "--gateway", "https://chat.example.org")

    def test_writes_files_or_runs_workers(self, name):
        launcher = launch.load(name)
        files = launcher.files(launch.Plan(self.WORKER, program="/bin/true"))
        assert files or callable(launcher.run)
        for file, text in files.items():
            assert Path(file).name == file and text.endswith("\n")
            assert all(flag in text for flag in self.WORKER)


def test_an_unknown_name_lists_the_available_ones():
    with pytest.raises(NotFound, match="bfloat16, float16, float32"):
        formats.load("int99")
