"""What ``bench offline`` makes, refuses and counts; how fast anything is, no test says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesaic import cli
from moesaic.bench import geometry, offline
from moesaic.bench.offline import Wish, Work
from moesaic.cli import bench
from moesaic.errors import InvalidParameter
from moesaic.formats import Packed
from moesaic.models import Experts

TINY = {
    "model_type": "mixtral",
    "vocab_size": 8000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "SAMPLE", 512)  # quantizing them is what takes the time


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(geometry.GEOMETRIES, "tiny", TINY)  # type: ignore[arg-type]
    return "tiny"


@pytest.mark.parametrize(
    ("name", "count"),
    [  # as their authors publish them
        ("mixtral-8x7b", 46_702_792_704),
        ("mixtral-8x22b", 140_620_634_112),
        ("mistral-7b", 7_241_732_096),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
    ],
)
def test_the_geometries_have_as_many_parameters_as_the_models(name: str, count: int) -> None:
    config = geometry.configuration(name)
    plain, small = (geometry.need(config, format, "bfloat16", 8192) for format in ("bfloat16", "q2"))
    assert plain.parameters == small.parameters == count
    assert plain.weights == pytest.approx(2 * count, rel=1e-3)
    assert small.weights < 0.4 * plain.weights


def test_the_command_line_names_every_geometry() -> None:
    assert tuple(geometry.GEOMETRIES) == bench.GEOMETRIES


def test_mixtral_8x7b_in_two_bits_takes_less_than_20_gb() -> None:
    assert geometry.need(geometry.configuration("mixtral-8x7b"), "q2", "bfloat16", 8192).total < 20e9


@pytest.mark.parametrize(
    ("name", "free", "hint"),
    [
        ("mixtral-8x7b", 22, "--format q3 or --layers 24 or --packed DIR would fit"),
        ("mixtral-8x22b", 22, "--layers 14 or --packed DIR would fit"),
        ("mixtral-8x22b", 4, "--layers 1 or --packed DIR would fit"),
        ("mixtral-8x7b", 1, "nothing of it would fit"),
    ],
)
def test_what_does_not_fit_is_refused_and_told_what_would(name: str, free: int, hint: str) -> None:
    with pytest.raises(InvalidParameter, match=f"^geometry: {name} in q4 takes .* are free: {hint}$"):
        geometry.check(name, None, "q4", "bfloat16", 8192, free * 10**9)


def test_what_would_fit_does() -> None:
    geometry.check("mixtral-8x7b", None, "q3", "bfloat16", 8192, 22 * 10**9)
    geometry.check("mixtral-8x7b", 24, "q4", "bfloat16", 8192, 22 * 10**9)
    geometry.check("mixtral-8x7b", None, "q4", "bfloat16", 8192, 22 * 10**9, mapped=True)
    with pytest.raises(InvalidParameter):
        geometry.check("mixtral-8x7b", 25, "q4", "bfloat16", 8192, 22 * 10**9)


@pytest.mark.parametrize("format", ["q2", "q4", "bfloat16"])
def test_weights_are_random_and_each_its_own(format: str) -> None:
    model = geometry.build(TINY | {"num_hidden_layers": 2}, "tiny", format, "bfloat16").model
    weights = [module for module in model.modules() if isinstance(module, Packed)]
    plain = [weight.dequantize() for weight in weights]
    for weight in plain[1:]:  # the first is the embedding
        assert weight.std() == pytest.approx(geometry.SPREAD, rel=0.3) and abs(weight.mean()) < 0.1 * geometry.SPREAD
    stacks = [weight for weight in plain if weight.dim() == 3]
    experts = [expert for stack in stacks for expert in stack]
    assert len({expert.numpy().tobytes() for expert in experts}) == len(experts) == 48
    norms = [part for name, part in model.named_parameters() if "norm" in name]
    assert all(bool((norm == 1).all()) for norm in norms) and len(norms) == 5


@pytest.mark.parametrize(("format", "batch"), [("q2", 1), ("bfloat16", 3)])
def test_what_is_measured(tiny: str, format: str, batch: int) -> None:
    torch.manual_seed(0)
    work = Work(prompt=40, tokens=24, batch=batch)
    seen: list[tuple[int, int]] = []
    found = offline.run(None, Wish(tiny, format=format), work, progress=lambda *step: seen.append(step), buffer=0.01)
    json.dumps(found)
    assert seen[-1] == (found["model"]["weight_bytes"],) * 2
    model, reads = found["model"], found["reads"]
    assert (model["name"], model["layout"], model["layers"], model["context"]) == (tiny, "random", 24, 4096)
    assert model["cache_bytes"] == 4096 * 24 * 2 * 2 * 64 * 2
    assert 0 < found["speed"]["decode_tokens"] <= batch * (work.generated - 1)
    # In 24 layers of a random router, choices spread.
    assert 2 <= reads["experts_per_layer"] <= 2 * batch and reads["busiest_share"] < 0.5
    per_expert = model_bytes(format)["experts"] / 24 / 8
    assert reads["experts"] == pytest.approx(24 * reads["experts_per_layer"] * per_expert, abs=1)
    assert reads["dense"] == model_bytes(format)["dense"]
    assert reads["cache"] == batch * (40 + work.generated // 2) * 24 * 2 * 2 * 64 * 2
    text = "\n".join(offline.lines(found))
    assert "24 layers" in text and "tokens/s" in text and "experts" in text


def test_speeds_are_of_the_time_in_which_all_answers_run() -> None:
    times = [[1.0, 2.0, 3.0], [1.5, 2.25, 4.0]]  # after the second has begun, until the first ends
    speed = offline._speed(0.5, times, Work(prompt=40, tokens=3, batch=2), disk_bytes=7)
    assert speed == offline.Speed(0.5, 2 * 40 / 1.0, 3 / 1.5, 3, (1.0 + 0.75) / 2, 7)


def model_bytes(format: str) -> dict[str, int]:
    """Return the bytes of the experts, and of everything that every token needs."""
    model = geometry.build(TINY, "tiny", format, "bfloat16").model
    stacks = sum(part.nbytes for each in model.modules() if isinstance(each, Experts) for part in each.parameters())
    embedding = sum(part.nbytes for part in model.embed.parameters())
    return {"experts": stacks, "dense": sum(part.nbytes for part in model.parameters()) - stacks - embedding}


def test_a_checkpoint_is_measured_too(talker: Path) -> None:
    found = offline.run(talker, Wish(format="q4", context=100), Work(prompt=20, tokens=8), buffer=0.01)
    assert found["model"]["weights"] == {"float32": 1, "int4": 14, "int8": 1}
    assert found["model"]["cache_bytes"] == 112 * 2 * 2 * 2 * 8 * 4  # whole blocks


def test_random_weights_on_disk(tiny: str, tmp_path: Path) -> None:
    wish, work = Wish(tiny, layers=2, format="q2", packed=tmp_path / "new"), Work(prompt=20, tokens=8)
    made = offline.run(None, wish, work, buffer=0.01)
    assert made["model"]["layout"] == "packed" and made["model"]["layers"] == 2
    again = offline.run(tmp_path / "new", Wish(), work, buffer=0.01)
    assert again["model"] | {"name": tiny} == made["model"]
    assert again["reads"] | {"gb_s": 0} == made["reads"] | {"gb_s": 0}  # the same tokens
    with pytest.raises(InvalidParameter, match="exists already"):
        offline.run(None, wish, work, buffer=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_and_cache_are_written_memory() -> None:
    """Counted by the system, in a process that has little else."""
    program = f"""
import json
from moesaic.bench import geometry, offline
geometry.GEOMETRIES["tiny"] = {TINY | {"max_position_embeddings": 32768}}
wish = offline.Wish("tiny", format="q4", context=32768)
print(json.dumps(offline.run(None, wish, offline.Work(prompt=8, tokens=4), buffer=0.01)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    ours = found["model"]["weight_bytes"] + found["model"]["cache_bytes"]
    assert ours > 400e6
    assert ours < found["memory"]["anonymous"] <= found["memory"]["peak"] < ours + geometry.WORK


def test_what_is_refused(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    for numbers in ({"prompt": 0}, {"tokens": 1}, {"batch": 0}):
        with pytest.raises(InvalidParameter, match=next(iter(numbers))):
            Work(**numbers)
    for wish, words in (
        (Wish("gpt"), "'gpt' is unknown: there are mixtral-8x7b"),
        (Wish(tiny, layers=25), "tiny has 1 to 24"),
        (Wish(layers=2), "layers: goes with a geometry"),
        (Wish(packed=Path("new")), "packed: goes with a geometry"),
        (Wish(tiny, context=5000), "made for 4096 tokens"),
        (Wish(tiny, context=500), "prompt and its answer have 576"),
        (Wish(tiny, format="q5"), "'q5' is unknown"),
    ):
        with pytest.raises(InvalidParameter, match=words):
            offline.run(None, wish, Work(), buffer=0.01)
    assert cli.main(["bench", "offline", "some/model", "--geometry", "mixtral-8x7b"]) == 2
    assert "goes without MODEL" in capsys.readouterr().err
