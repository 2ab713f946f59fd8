"""Presets of a worker: the gateway offers them as models, and learns of changes."""

from __future__ import annotations

from pathlib import Path

from moesaic.llm import LLM
from moesaic.local_backend import LocalBackend
from moesaic.serve.presets import Preset, PresetBackend
from tests.support.cluster import running_cluster
from tests.support.wait import eventually

SYSTEM = "You tell of the sea."


def test_a_gateway_offers_the_presets_of_its_workers(tmp_path: Path) -> None:
    offered = [Preset("sailor", "tales", "Tells of the sea.", SYSTEM, {"temperature": 0.0, "max_tokens": 6})]
    llm = LLM.load("tales")

    async def made() -> PresetBackend[LocalBackend]:
        return PresetBackend(LocalBackend(llm), lambda: tuple(offered))

    with running_cluster(tmp_path / "jobs.sqlite", lease=1.0) as cluster, llm:
        backend = cluster.run(made())
        worker = cluster.start_worker(backend)

        def entries() -> dict[str, tuple[str | None, str | None]]:
            data = cluster.client.get("/v1/models").json()["data"]
            return {model["id"]: (model["parent"], model["description"]) for model in data}

        def chat(model: str, *messages: dict[str, str], **more: object) -> dict[str, object]:
            question = {"role": "user", "content": "Tell of a fox."}
            sent = {"model": model, "messages": [*messages, question], **more}
            response = cluster.client.post("/v1/chat/completions", json=sent)
            assert response.status_code == 200, response.text
            return {
                "message": response.json()["choices"][0]["message"],
                "usage": response.json()["usage"]["total_tokens"],
            }

        assert entries() == {"tales": (None, None), "sailor": ("tales", "Tells of the sea.")}
        expected = chat("tales", {"role": "system", "content": SYSTEM}, temperature=0, max_tokens=6)
        assert chat("sailor") == expected
        offered.append(Preset("cook", "tales"))
        cluster.server.call(backend.reload)
        eventually(lambda: "cook" in entries())
        assert chat("cook", max_tokens=3)["message"]
        assert worker.worker.connected.is_set() and not worker.future.done()
