"""GGUF models of the hub, from a local server: one file is downloaded, or all parts of a split model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic import cli, hub_files
from moesaic.cli.serving import model_entries
from moesaic.errors import DownloadError, InvalidParameter
from moesaic.hub_files import HubName
from moesaic.pull import pull
from tests.support.downloads import Server, downloads, use_as_hub
from tests.support.gguf_files import TinyFile

FILES = (
    *("config.json", "README.md", "mmproj-model-f16.gguf", "model.imatrix.gguf"),
    *("Tiny.Q4_K_M.gguf", "Tiny.Q4_K_S.gguf", "Tiny-IQ4_XS.gguf", "tiny_q8_0.gguf", "Tiny-UD-Q2_K_XL.gguf"),
    *("F16/tiny-00001-of-00002.gguf", "F16/tiny-00002-of-00002.gguf", "Tiny-BF16-00001-of-00001.gguf"),
    *("Tiny-UD-Q6_K.gguf", "Tiny-Q6_K.gguf", "a.Q5_0.gguf", "b.Q5_0.gguf", "special.gguf"),
)
PARTS = ["F16/tiny-00001-of-00002.gguf", "F16/tiny-00002-of-00002.gguf"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub with a repository in which each file holds its own name."""
    with downloads() as server:
        server.add_repository("org/name", {file: file.encode() for file in FILES})
        use_as_hub(server, tmp_path / "cache", monkeypatch)
        yield server


def chosen(choice: str | None, files: tuple[str, ...] = FILES) -> list[str]:
    return hub_files.select(HubName("org/name", None, choice), files).files


@pytest.mark.parametrize(
    ("choice", "files"),
    [
        ("Q4_K_M", ["Tiny.Q4_K_M.gguf"]),
        ("q4_k_s", ["Tiny.Q4_K_S.gguf"]),
        ("IQ4_XS", ["Tiny-IQ4_XS.gguf"]),
        ("Q8_0", ["tiny_q8_0.gguf"]),
        ("UD-Q2_K_XL", ["Tiny-UD-Q2_K_XL.gguf"]),
        ("Q2_K_XL", ["Tiny-UD-Q2_K_XL.gguf"]),
        ("Q6_K", ["Tiny-Q6_K.gguf"]),
        ("UD-Q6_K", ["Tiny-UD-Q6_K.gguf"]),
        ("F16", PARTS),
        ("BF16", ["Tiny-BF16-00001-of-00001.gguf"]),
        ("special.gguf", ["special.gguf"]),
        ("F16/tiny-00002-of-00002.gguf", PARTS),
        ("tiny-00001-of-00002.gguf", PARTS),
        ("a.Q5_0.gguf", ["a.Q5_0.gguf"]),
    ],
)
def test_a_quantization_or_a_file_chooses_a_model(choice, files):
    assert chosen(choice) == files


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("Q5_0", r"has several GGUF models 'Q5_0': add one of these after a colon: a\.Q5_0\.gguf, b\.Q5_0\.gguf$"),
        (
            "Q4_K",
            r"has no GGUF model 'Q4_K': add one of these .*: F16, BF16, IQ4_XS, Q6_K, .*, Q4_K_M, .*special\.gguf",
        ),
        ("K_M", "has no GGUF model 'K_M'"),
        ("0", "has no GGUF model '0'"),
        ("none.gguf", r"has no GGUF model 'none\.gguf'"),
        ("mmproj-model-f16.gguf", "has no GGUF model"),
        (None, "has several GGUF models: add one of these after a colon: F16"),
    ],
)
def test_an_unknown_or_ambiguous_choice_lists_the_choices(choice, message):
    with pytest.raises(InvalidParameter, match=message) as caught:
        chosen(choice)
    assert "\n" not in str(caught.value) and "mmproj" not in str(caught.value).partition(": add")[2]


def test_each_listed_choice_chooses_one_model():
    with pytest.raises(InvalidParameter) as caught:
        chosen(None)
    choices = str(caught.value).rpartition(": ")[2].split(", ")
    models = [chosen(choice)[0] for choice in choices]
    assert len(set(models)) == len(models) == sum(file.endswith(".gguf") for file in FILES) - 3


def test_without_a_choice_the_only_model_is_taken_and_safetensors_come_first():
    assert chosen(None, ("README.md", "tiny.Q4_0.gguf")) == ["tiny.Q4_0.gguf"]
    assert chosen(None, ("model.safetensors", "tiny.Q4_0.gguf")) == ["model.safetensors"]
    assert chosen("Q4_0", ("model.safetensors", "tiny.Q4_0.gguf")) == ["tiny.Q4_0.gguf"]
    with pytest.raises(DownloadError, match="org/name: the repository has no GGUF files"):
        chosen("Q4_0", ("model.safetensors",))
    with pytest.raises(DownloadError, match="no weights in a supported format"):
        chosen(None, ("README.md",))


def test_a_repository_without_a_part_is_refused():
    with pytest.raises(DownloadError, match=r"lacks tiny-00001-of-00002\.gguf, a part of the model"):
        chosen("tiny-00002-of-00002.gguf", ("tiny-00002-of-00002.gguf",))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", HubName("org/name")),
        ("org/name@v1.0", HubName("org/name", "v1.0")),
        ("org/name:Q4_K_M", HubName("org/name", None, "Q4_K_M")),
        ("org/name@pr/1:a b.gguf", None),
        ("org/name@pr/1:Q4/a+b(2).gguf", HubName("org/name", "pr/1", "Q4/a+b(2).gguf")),
        ("org/name:", None),
        ("name:Q4_K_M", None),
    ],
)
def test_names_on_the_hub(name, expected):
    assert HubName.parse(name) == expected


def test_only_the_chosen_file_is_downloaded(hub, tmp_path):
    path = pull("org/name:Q4_K_M")
    assert path.name == "Tiny.Q4_K_M.gguf" and path.read_bytes() == b"Tiny.Q4_K_M.gguf"
    assert path.is_relative_to(tmp_path / "cache")
    assert {path for path, _ in hub.requests if "/resolve/" in path} == {f"/org/name/resolve/{'c' * 40}/{path.name}"}
    assert pull("org/name@main:q4_k_m", tmp_path / "own") == tmp_path / "own" / path.name


def test_all_parts_of_a_split_model_are_downloaded(hub, tmp_path):
    path = pull("org/name:F16", tmp_path / "own")
    assert path == tmp_path / "own" / PARTS[0]
    assert [file.read_bytes().decode() for file in sorted(path.parent.iterdir())] == PARTS


def test_the_cache_is_used_offline_if_it_has_the_model(hub, monkeypatch):
    from huggingface_hub import constants

    paths = [pull("org/name:Q4_K_M"), pull("org/name:F16")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [pull("org/name:Q4_K_M"), pull("org/name:F16")] == paths
    paths[1].with_name("tiny-00002-of-00002.gguf").unlink()
    for name in ("org/name:F16", "org/name:Q8_0", "org/name"):
        with pytest.raises(DownloadError, match="cannot be reached, and the model is not in the cache"):
            pull(name)


def test_a_name_with_a_choice_runs_and_is_served_under_it(hub, tmp_path, capsys):
    tiny = TinyFile("Q4_K", experts=2)
    pieces = ["<end>", "<turn>", *(chr(code) for code in range(33, 126)), "\u0120"]
    tiny.metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [3, 3, *[1] * 94],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "<turn>{{ messages[0].content }}<turn>",
    }
    content = tiny.write(tmp_path / "tiny.gguf").read_bytes()
    hub.add_repository("org/tiny", {"tiny-Q4_K.gguf": content, "tiny-Q8_0.gguf": b"another"})
    assert cli.main(["chat", "org/tiny:Q4_K", "-m", "Hi", "--chat-format", "template", "--max-tokens", "2"]) == 0
    assert cli.main(["chat", "org/tiny", "-m", "Hi"]) != 0
    assert "org/tiny has several GGUF models: add one of these after a colon: Q4_K, Q8_0" in capsys.readouterr().err
    assert cli.main(["pull", "org/tiny:Q4_K"]) == 0
    assert Path(capsys.readouterr().out.strip()).read_bytes() == content
    models = ["org/tiny@main:Q4_K", "org/tiny:Q8_0"]
    entries = [entry.info for entry in model_entries(argparse.Namespace(models=models))]
    assert [(entry.name, entry.aliases) for entry in entries] == [
        ("tiny:Q4_K", ("org/tiny:Q4_K",)),
        ("tiny:Q8_0", ("org/tiny:Q8_0",)),
    ]
