"""``bench offline``: models with random weights, refused options, and counts; no test checks a speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesaic import cli, published
from moesaic.bench import arithmetic, geometry, offline, offline_text
from moesaic.bench.offline import Options, Work
from moesaic.errors import InvalidParameter
from moesaic.formats import Packed
from moesaic.hardware.limits import Limits
from moesaic.load_options import LoadOptions
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
    monkeypatch.setattr(geometry, "SAMPLE_ROWS", 512)  # quantizing them is what takes the time


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(published.CONFIGURATIONS, "tiny", TINY)  # type: ignore[arg-type]
    return "tiny"


def sizes(weight_format: str) -> LoadOptions:
    """Return options of a model in a format with a cache of 8192 tokens."""
    return LoadOptions(format=weight_format, context=8192, cache_tokens=8192)


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
def test_geometries_have_the_published_parameters(name: str, count: int) -> None:
    config = published.configuration(name)
    plain, small = (geometry.random_plan(config, name, sizes(form)) for form in ("bfloat16", "q2"))
    assert plain.parameters == small.parameters == count
    assert plain.weight_bytes == pytest.approx(2 * count, rel=1e-3)
    assert small.weight_bytes < 0.4 * plain.weight_bytes


def test_mixtral_8x7b_in_q2_needs_less_than_20_gb() -> None:
    config = published.configuration("mixtral-8x7b")
    plan = geometry.random_plan(config, "mixtral-8x7b", sizes("q2"))
    assert plan.bytes + geometry.PROCESS_BYTES < 20e9
    assert geometry.random_plan(config, "mixtral-8x7b", sizes("q2"), mapped=True).bytes == plan.cache_bytes


@pytest.mark.parametrize(
    ("name", "free", "hint"),
    [
        ("mixtral-8x7b", 22, "--format q3 or --layers 25 or --packed DIR would fit"),
        ("mixtral-8x22b", 22, "--layers 15 or --packed DIR would fit"),
        ("mixtral-8x22b", 4, "--layers 1 or --packed DIR would fit"),
        ("mixtral-8x7b", 1, "no part of it would fit"),
    ],
)
def test_too_large_geometry_is_refused_with_hints(name: str, free: int, hint: str) -> None:
    with pytest.raises(InvalidParameter, match=f"^geometry: {name} in q4 takes .* are free: {hint}$"):
        geometry.checked_plan(name, None, sizes("q4"), free * 10**9)


def test_suggested_options_fit() -> None:
    geometry.checked_plan("mixtral-8x7b", None, sizes("q3"), 22 * 10**9)
    geometry.checked_plan("mixtral-8x7b", 25, sizes("q4"), 22 * 10**9)
    geometry.checked_plan("mixtral-8x7b", None, sizes("q4"), 22 * 10**9, mapped=True)
    with pytest.raises(InvalidParameter):
        geometry.checked_plan("mixtral-8x7b", 26, sizes("q4"), 22 * 10**9)


@pytest.mark.parametrize("weight_format", ["q2", "q4", "bfloat16"])
def test_weights_are_random_and_distinct(weight_format: str) -> None:
    plan = geometry.random_plan(TINY | {"num_hidden_layers": 2}, "tiny", LoadOptions(format=weight_format))
    model = geometry.build(plan).model
    assert plan.weight_bytes == sum(part.nbytes for part in model.parameters())
    weights = [module for module in model.modules() if isinstance(module, Packed)]
    plain = [weight.dequantize() for weight in weights]
    for weight in plain[1:]:  # the first is the embedding
        assert (
            weight.std() == pytest.approx(geometry.WEIGHT_STD, rel=0.3)
            and abs(weight.mean()) < 0.1 * geometry.WEIGHT_STD
        )
    stacks = [weight for weight in plain if weight.dim() == 3]
    experts = [expert for stack in stacks for expert in stack]
    assert len({expert.numpy().tobytes() for expert in experts}) == len(experts) == 48
    norms = [part for name, part in model.named_parameters() if "norm" in name]
    assert all(bool((norm == 1).all()) for norm in norms) and len(norms) == 5


@pytest.mark.parametrize(("weight_format", "batch"), [("q2", 1), ("bfloat16", 3)])
def test_figures_of_a_random_model(tiny: str, weight_format: str, batch: int) -> None:
    torch.manual_seed(0)
    work = Work(prompt=40, tokens=24, batch=batch)
    seen: list[tuple[int, int]] = []
    results = offline.run(
        None,
        Options(tiny, load=LoadOptions(format=weight_format)),
        [work],
        progress=lambda *step: seen.append(step),
        buffer=0.01,
    )
    json.dumps(results)
    assert seen[-1] == (results["model"]["weight_bytes"],) * 2
    model, reads = results["model"], results["reads"]
    assert (model["name"], model["layout"], model["layers"], model["context"]) == (tiny, "random", 24, 4096)
    assert model["cache_bytes"] == 4096 * 24 * 2 * 2 * 64 * 2
    assert 0 < results["speed"]["decode_tokens"] <= batch * (work.generated - 1)
    # In 24 layers of a random router, choices spread.
    assert 2 <= reads["experts_per_layer"] <= 2 * batch and reads["busiest_share"] < 0.5
    per_expert = model_bytes(weight_format)["experts"] / 24 / 8
    assert reads["experts"] == pytest.approx(24 * reads["experts_per_layer"] * per_expert, abs=1)
    assert reads["dense"] == model_bytes(weight_format)["dense"]
    assert reads["cache"] == batch * (40 + work.generated // 2) * 24 * 2 * 2 * 64 * 2
    text = "\n".join(offline_text.lines(results))
    assert "24 layers" in text and "tokens/s" in text and "experts" in text
    assert "speculation, copying task" in text and "speculation, random task" in text
    for row in results["speculation"].values():
        assert row["same"] and row["tokens_s"] > 0


def test_several_measurements_share_one_load(tiny: str) -> None:
    works = [Work(prompt=prompt, tokens=48, batch=batch) for prompt in (20, 40) for batch in (1, 3)]
    results = offline.run(None, Options(tiny, layers=2, load=LoadOptions(format="q4")), works, buffer=0.01)
    json.dumps(results)
    found = offline_text.settings(results)
    assert [(each["work"]["prompt"], each["work"]["batch"]) for each in found] == [(20, 1), (20, 3), (40, 1), (40, 3)]
    assert found[3]["reads"]["cache"] > found[2]["reads"]["cache"] > found[0]["reads"]["cache"]
    assert all(each["prompt_share"] > 0 and each["read_share"] > 0 for each in found)
    table = [line.split() for line in offline_text.lines(results) if line.startswith("prompts of")]
    assert [row[2:4] for row in table] == [["20", "1"], ["20", "3"], ["40", "1"], ["40", "3"]]
    assert results["model"]["format"] == "q4" and "settings" not in found[0]


def test_cache_holds_the_largest_measurement(tiny: str) -> None:
    options, works = LoadOptions(context=100), [Work(prompt=20, tokens=8), Work(prompt=60, tokens=8, batch=4)]
    assert offline._sizes(options, 4096, works).cache_tokens == 4 * 80 > 112
    assert offline._sizes(LoadOptions(), 32768, [Work(prompt=20000)]).context == 20064


def test_prompt_limit_is_that_of_the_multiplications() -> None:
    plan = geometry.random_plan(TINY | {"num_hidden_layers": 1}, "tiny", LoadOptions(format="bfloat16"))
    machine = Limits(read_gb_s=1, streams=1, ahead=0, int8_gop_s=1, bf16_gop_s=1, vnni_gop_s=1)
    weights = 256 * (256 + 2 * 128 + 256) + 2 * 3 * 256 * 512  # attention, and two of eight experts
    attention = 4 * 256 * 10 / 2
    found = arithmetic.prompt_limit(geometry.build(plan).model, 10, machine)
    assert found == pytest.approx(1e9 / (2 * weights + attention))


def test_decode_speed_counts_only_while_all_answers_run() -> None:
    times = [[1.0, 2.0, 3.0], [1.5, 2.25, 4.0]]  # after the second has begun, until the first ends
    speed = offline._speed(0.5, times, Work(prompt=40, tokens=3, batch=2), disk_bytes=7)
    assert speed == offline.Speed(0.5, 2 * 40 / 1.0, 3 / 1.5, 3, (1.0 + 0.75) / 2, 7)


def test_answers_that_never_run_together_are_refused() -> None:
    with pytest.raises(InvalidParameter, match=r"^tokens: is 2, but an answer ended before"):
        offline._speed(0.5, [[1.0, 2.0], [2.5, 3.0]], Work(prompt=40, tokens=2, batch=2), disk_bytes=0)


def model_bytes(weight_format: str) -> dict[str, int]:
    """Return the bytes of the experts, and of everything that every token needs."""
    model = geometry.build(geometry.random_plan(TINY, "tiny", LoadOptions(format=weight_format))).model
    stacks = sum(part.nbytes for each in model.modules() if isinstance(each, Experts) for part in each.parameters())
    embedding = sum(part.nbytes for part in model.embed.parameters())
    return {"experts": stacks, "dense": sum(part.nbytes for part in model.parameters()) - stacks - embedding}


def test_figures_of_a_checkpoint(talker: Path) -> None:
    options = Options(load=LoadOptions(format="q4", context=100))
    results = offline.run(talker, options, [Work(prompt=20, tokens=8)], buffer=0.01)
    assert results["model"]["weights"] == {"float32": 1, "int4": 14, "int8": 1}
    assert results["model"]["cache_bytes"] == 112 * 2 * 2 * 2 * 8 * 4  # whole blocks


def test_random_weights_in_a_packed_folder(tiny: str, tmp_path: Path) -> None:
    options, work = Options(tiny, 2, tmp_path / "new", LoadOptions(format="q2")), Work(prompt=20, tokens=8)
    made = offline.run(None, options, [work], buffer=0.01)
    assert made["model"]["layout"] == "packed" and made["model"]["layers"] == 2
    again = offline.run(tmp_path / "new", Options(), [work], buffer=0.01)
    assert again["model"] | {"name": tiny, "format": "q2"} == made["model"]
    assert again["reads"] | {"gb_s": 0} == made["reads"] | {"gb_s": 0}  # the same tokens
    with pytest.raises(InvalidParameter, match="exists already"):
        offline.run(None, options, [work], buffer=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_and_cache_are_written_memory() -> None:
    """Counted by the system, in a process that has little else."""
    program = f"""
import json
from moesaic import published
from moesaic.bench import geometry, offline
published.CONFIGURATIONS["tiny"] = {TINY | {"max_position_embeddings": 32768}}
options = offline.Options("tiny", load=offline.LoadOptions(format="q4", context=32768))
print(json.dumps(offline.run(None, options, [offline.Work(prompt=8, tokens=4)], buffer=0.01)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    ours = results["model"]["weight_bytes"] + results["model"]["cache_bytes"]
    assert ours > 400e6
    assert ours < results["memory"]["anonymous"] <= results["memory"]["peak"] < ours + geometry.PROCESS_BYTES


def test_invalid_options_are_refused(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    for numbers in ({"prompt": 0}, {"tokens": 1}, {"batch": 0}):
        with pytest.raises(InvalidParameter, match=next(iter(numbers))):
            Work(**numbers)
    for options, words in (
        (Options("gpt"), "'gpt' is unknown; available geometries: mixtral-8x7b"),
        (Options(tiny, layers=25), "expected 1 to 24, the layers of tiny"),
        (Options(layers=2), "layers: requires a geometry"),
        (Options(packed=Path("new")), "packed: requires a geometry"),
        (Options(tiny, load=LoadOptions(context=5000)), "made for 4096 tokens"),
        (Options(tiny, load=LoadOptions(context=500)), "prompt and its answer have 576"),
        (Options(tiny, load=LoadOptions(format="q5")), "'q5' is unknown"),
    ):
        with pytest.raises(InvalidParameter, match=words):
            offline.run(None, options, [Work()], buffer=0.01)
    assert cli.main(["bench", "offline", "some/model", "--geometry", "mixtral-8x7b"]) == 2
    assert "exclude each other" in capsys.readouterr().err
