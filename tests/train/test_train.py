"""Training against transformers and PEFT, and runs that are stopped, continued, evaluated and refused."""

from __future__ import annotations

import csv
import json

import peft
import pytest
import torch
from torch.nn import functional as F

from moesaic import adapters
from moesaic.adapters import AdapterConfig
from moesaic.adapters import peft as files
from moesaic.errors import CheckpointError, InvalidParameter, InvalidRequest, NumericalError
from moesaic.train import Settings, losses, order, train
from moesaic.train.examples import Example, Pair
from moesaic.train.model import router_loss
from moesaic.train.state import LOG, STATE
from moesaic.train.tasks import Preferences, Supervised
from tests.support.models import moesaic_model, transformers_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT calls the old name

MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def example(seed, length, begin=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (length,), generator=generator).tolist()
    return Example(tuple(ids), tuple(place >= begin for place in range(length)))


EXAMPLES = [example(seed, 6 + seed % 5) for seed in range(12)]
TASK = Supervised(EXAMPLES)


@pytest.fixture
def folder(tmp_path):
    transformers_model("Mixtral", MIXTRAL).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def settings(**changes):
    given = {"adapter": AdapterConfig(rank=2, alpha=4), "steps": 6, "batch": 4, "learning_rate": 0.02, "warmup": 0.2}
    return Settings(**{**given, **changes})


def log(out):
    with (out / LOG).open(newline="") as file:
        return list(csv.DictReader(file))


def run(folder, out, task=TASK, weight_format="float32", **options):
    changes = options.pop("settings", settings())
    return train(moesaic_model(folder, weight_format), task, changes, out, base="base", **options)


def peft_losses(folder, chosen, router=0.0, first=None):
    """Return the losses of a loop of transformers and PEFT with the same adapter, data and order."""
    model = transformers_model("Mixtral", MIXTRAL | {"output_router_logits": bool(router)})
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(ATTENTION))).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                weight = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
                parameter.copy_(first[f"{weight}.a"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0)
    found, items = [], order.batches(len(EXAMPLES), chosen.batch, chosen.seed)
    for step in range(chosen.steps):
        for group in optimizer.param_groups:
            group["lr"] = chosen.rate(step, chosen.steps)
        each = [EXAMPLES[item] for item in next(items)]
        width = max(len(one.ids) for one in each)
        ids = torch.tensor([[*one.ids, *[0] * (width - len(one.ids))] for one in each])
        mask = torch.tensor([[1] * len(one.ids) + [0] * (width - len(one.ids)) for one in each])
        labels = torch.full_like(ids, -100)
        for row, one in enumerate(each):
            for place, flag in enumerate(one.learned):
                if flag:
                    labels[row, place] = one.ids[place]
        answer = model(input_ids=ids, attention_mask=mask, labels=labels)
        answer.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, chosen.clip)
        optimizer.step()
        optimizer.zero_grad()
        extra = router * float(answer.aux_loss.detach()) if router else 0.0
        found.append(float(answer.loss.detach()) - extra)
    return found


@pytest.mark.parametrize("router", [0.0, 0.5])
@pytest.mark.parametrize("micro_batch_tokens", [1000, 9])
def test_the_losses_are_those_of_transformers_and_peft(folder, tmp_path, router, micro_batch_tokens):
    """The router's loss is a mean over a whole step there, so its parts must not be smaller."""
    if router and micro_batch_tokens == 9:
        pytest.skip("the router's loss is computed for each part of a step")
    chosen = settings(
        adapter=AdapterConfig(rank=2, alpha=4, targets=ATTENTION),
        router_loss=router,
        micro_batch_tokens=micro_batch_tokens,
    )
    model = moesaic_model(folder)
    adapters.attach(model, chosen.adapter, chosen.seed)
    first = {name: tensor.detach().clone() for name, tensor in adapters.matrices(model).items()}
    run(folder, tmp_path / "out", settings=chosen)
    found = [float(row["loss"]) for row in log(tmp_path / "out")]
    expected = peft_losses(folder, chosen, router, first)
    assert found == pytest.approx(expected, rel=2e-4)
    assert abs(found[-1] - found[0]) > 0.05  # something was learned


def test_router_loss_is_k_when_experts_are_balanced(folder, tmp_path):
    run(folder, tmp_path / "out", settings=settings(router_loss=0.1))
    assert all(1.5 < float(row["router_loss"]) < 3.5 for row in log(tmp_path / "out"))
    assert router_loss(moesaic_model(folder)) is None


@pytest.mark.parametrize("weight_format", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_lowers_the_loss_and_leaves_the_model_as_it_is(folder, tmp_path, weight_format, checkpointing):
    model = moesaic_model(folder, weight_format)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = settings(steps=12, checkpointing=checkpointing)
    outcome = train(model, TASK, chosen, tmp_path / "out", base="base")
    rows = log(tmp_path / "out")
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.3
    assert outcome.steps == 12 and outcome.tokens == sum(map(len, (one.ids for one in EXAMPLES))) * 4
    after = {name.replace("base.", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not (tmp_path / "out" / STATE).exists()


def test_the_adapter_on_disk_has_the_loss_of_the_log(folder, tmp_path):
    run(folder, tmp_path / "out", held_out=TASK, settings=settings(evaluate_every=3))
    held = [float(row["held_out_loss"]) for row in log(tmp_path / "out") if row["held_out_loss"]]
    file = files.read(tmp_path / "out", experts=4, hidden_size=64)
    assert file.base == "base" and file.config.rank == 2
    model = moesaic_model(folder)
    adapters.attach(model, file.config)
    adapters.load(model, file.tensors)
    with torch.no_grad():
        found = losses.token_losses(model, EXAMPLES)
    assert float(found.mean()) == pytest.approx(min(held), rel=1e-5)


class Stop(Exception):
    """Ends a run as a crash would."""


@pytest.mark.parametrize("last", [1, 4, 5])
def test_a_stopped_run_continues_to_the_same_adapter(folder, tmp_path, last):
    """The state is saved each second step, so a run that stops in between repeats a step."""
    chosen = settings(save_every=2, evaluate_every=3)
    run(folder, tmp_path / "whole", held_out=TASK, settings=chosen)

    def stop(entry, total):
        if entry.step == last:
            raise Stop

    with pytest.raises(Stop):
        run(folder, tmp_path / "stopped", held_out=TASK, settings=chosen, on_step=stop)
    assert not (tmp_path / "stopped" / files.WEIGHTS).exists()
    steps = []
    run(folder, tmp_path / "stopped", held_out=TASK, settings=chosen, on_step=lambda entry, _: steps.append(entry.step))
    assert steps == list(range(last // 2 * 2 + 1, 7))
    whole, continued = (tmp_path / name / files.WEIGHTS for name in ("whole", "stopped"))
    assert whole.read_bytes() == continued.read_bytes()
    columns = ("step", "loss", "learning_rate", "gradient", "tokens", "held_out_loss")
    rows = [[[row[column] for column in columns] for row in log(tmp_path / name)] for name in ("whole", "stopped")]
    assert rows[0] == rows[1]


def test_an_interrupted_run_is_saved_at_once(folder, tmp_path):
    def stop(entry, total):
        if entry.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", on_step=stop)
    steps = []
    run(folder, tmp_path / "out", on_step=lambda entry, _: steps.append(entry.step))
    assert steps == [4, 5, 6]


def test_a_run_with_other_settings_does_not_continue(folder, tmp_path):
    def stop(entry, total):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, on_step=stop)
    with pytest.raises(InvalidRequest, match="learning_rate"):
        run(folder, out, settings=settings(learning_rate=0.01))
    with pytest.raises(InvalidRequest, match="items"):
        run(folder, out, Supervised(EXAMPLES[1:]))
    (out / STATE).write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match="damaged"):
        run(folder, out)


def test_a_folder_with_other_files_is_refused(folder, tmp_path):
    run(folder, tmp_path / "out")
    with pytest.raises(InvalidRequest, match="exists"):
        run(folder, tmp_path / "out")


def test_training_stops_early_when_nothing_improves(folder, tmp_path):
    other = Supervised([example(seed + 50, 9) for seed in range(8)])
    chosen = settings(steps=40, learning_rate=0.05, evaluate_every=1, patience=3)
    outcome = run(folder, tmp_path / "out", held_out=other, settings=chosen)
    assert outcome.stopped_early and outcome.steps == outcome.best_step + 3 < 40
    held = [float(row["held_out_loss"]) for row in log(tmp_path / "out")]
    assert outcome.held_out_loss == pytest.approx(min(held)) and held.index(min(held)) + 1 == outcome.best_step


def test_a_loss_that_is_not_finite_ends_the_run(folder, tmp_path):
    model = moesaic_model(folder)
    model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="step 1"):
        train(model, TASK, settings(), tmp_path / "out", base="base")
    assert not (tmp_path / "out" / files.WEIGHTS).exists()


def test_preferences_are_learned(folder, tmp_path):
    pairs = [Pair(example(seed, 8), example(seed + 30, 9)) for seed in range(6)]
    pairs = [
        Pair(one.chosen, Example(one.chosen.ids[:3] + one.rejected.ids[3:], one.rejected.learned)) for one in pairs
    ]
    outcome = run(folder, tmp_path / "out", Preferences(pairs, 0.5), settings=settings(steps=15, batch=6))
    rows = log(tmp_path / "out")
    assert float(rows[0]["loss"]) == pytest.approx(torch.log(torch.tensor(2.0)).item())  # the adapter is still zero
    assert outcome.loss < 0.3 and float(rows[-1]["accuracy"]) == 1.0


def test_the_preference_loss_is_that_of_its_paper(folder):
    """Equation 7 of arXiv:2305.18290, from log-probabilities that are computed one sequence at a time."""
    model, reference = moesaic_model(folder), moesaic_model(folder)
    adapters.attach(model, AdapterConfig(rank=2))
    for name, parameter in adapters.matrices(model).items():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.1)
    pairs = [Pair(example(seed, 8), example(seed + 30, 9)) for seed in range(3)]

    @torch.no_grad()
    def log_probability(of, one):
        return -losses.token_losses(of, [one]).sum()

    expected = torch.zeros(())
    for pair in pairs:
        gains = [log_probability(model, one) - log_probability(reference, one) for one in (pair.chosen, pair.rejected)]
        expected -= F.logsigmoid(0.3 * (gains[0] - gains[1]))
    found, margins = losses.preference(model, pairs, 0.3)
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-4) and len(margins) == 3


def test_each_epoch_has_every_item_once_in_another_order():
    items = order.batches(10, 4, seed=1)
    drawn = [item for _ in range(5) for item in next(items)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    assert next(order.batches(10, 4, seed=1, skip=2)) == drawn[8:12]


def test_parts_stay_below_their_limit():
    assert list(order.parts("abcd", [3, 3, 5, 1], 6)) == [["a", "b"], ["c", "d"]]
    assert list(order.parts("ab", [9, 1], 6)) == [["a"], ["b"]]


def test_the_learning_rate_warms_up_and_falls_to_zero():
    chosen = Settings(steps=10, learning_rate=1.0, warmup=0.2)
    rates = [chosen.rate(step, 10) for step in range(11)]
    assert rates[:3] == [0.0, 0.5, 1.0] and rates[-1] == pytest.approx(0) and rates[2:] == sorted(rates[2:])[::-1]


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 0}, {"epochs": 0}, {"learning_rate": float("nan")}, {"warmup": 2}, {"steps": 0}, {"max_length": 1}],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InvalidParameter, match=next(iter(wrong))):
        Settings(**wrong)


def test_the_configuration_is_one_that_peft_reads(folder, tmp_path):
    run(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / files.CONFIG).read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 4 and "gate" not in config["target_modules"]
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "out")).r == 2
