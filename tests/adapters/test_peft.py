"""Adapters in PEFT's files: what PEFT writes is read, what we write is read by PEFT, and both compute the same."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic import adapters, checkpoints
from moesaic.adapters import AdapterConfig
from moesaic.adapters import peft as files
from moesaic.convert import convert
from moesaic.errors import CheckpointError, InvalidParameter, NotFound
from moesaic.ops import Batch
from tests.support.models import moesaic_model, transformers_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT calls the old name
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning"),  # PEFT's own, for experts
]

IDS = [1, 5, 9, 42, 17, 3, 88, 61, 4]
MIXTRAL = ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2})
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(params=["Mixtral", "Llama"])
def base(request, tmp_path):
    """A tiny model of transformers, and the folder that holds it."""
    model = transformers_model(*(MIXTRAL if request.param == "Mixtral" else ("Llama", {})))
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


def logits(model):
    with torch.no_grad():
        return model.logits(model(Batch.whole([IDS])))


def reference(model):
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def randomized(model):
    """Draw the second matrices too, which are zero at first."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def attached(folder, file):
    model = moesaic_model(folder)
    adapters.attach(model, file.config)
    adapters.load(model, file.tensors)
    return model


@pytest.mark.parametrize("alpha", [4, 7.5])
def test_what_we_write_is_what_peft_reads(base, tmp_path, alpha):
    theirs, folder = base
    model = moesaic_model(folder)
    config = AdapterConfig(rank=3, alpha=alpha)
    adapters.attach(model, config)
    before = logits(model)
    for name, parameter in adapters.matrices(model).items():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.1)
    files.write(tmp_path / "adapter", config, "base", adapters.matrices(model))
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert (logits(model) - before).abs().max() > 0.1
    assert (logits(model) - reference(loaded)).abs().max() < 1e-4
    with adapters.switched_off(model):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["k_proj", "o_proj"]])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_writes_is_read(base, tmp_path, modules, rslora):
    theirs, folder = base
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=modules, use_rslora=rslora)
    model = randomized(peft.get_peft_model(theirs, config).eval())
    model.save_pretrained(tmp_path / "adapter")
    found = attached(folder, files.read(tmp_path / "adapter"))
    assert (logits(found) - reference(model)).abs().max() < 1e-4


@pytest.fixture
def fused(tmp_path):
    """A tiny Mixtral with an adapter of PEFT for its fused experts, and their folders."""
    theirs = transformers_model(*MIXTRAL)
    theirs.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=FUSED)
    model = randomized(peft.get_peft_model(theirs, config).eval())
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "base", tmp_path / "adapter"


def test_fused_experts_are_read(fused):
    model, folder, adapter = fused
    found = attached(folder, files.read(adapter, experts=4, hidden_size=64))
    assert set(found.blocks[0].mlp.experts.parts) == {"w1", "w2", "w3"}
    assert (logits(found) - reference(model)).abs().max() < 1e-4


def test_fused_experts_of_an_older_peft_are_read_by_their_shapes(fused):
    """It took the weights for transposed, so A and B are exchanged."""
    model, folder, adapter = fused
    path = adapter / files.WEIGHTS
    tensors = load_file(path)
    for name in [name for name in tensors if ".experts." in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name], tensors[other]
        wide = a.reshape(4, 3, -1)
        tall = b.reshape(len(b), 3, 4).permute(2, 0, 1)
        tensors[name] = tall.transpose(1, 2).reshape(12, -1).contiguous()
        tensors[other] = wide.permute(2, 1, 0).reshape(-1, 12).contiguous()
    save_file(tensors, path)
    found = attached(folder, files.read(adapter, experts=4, hidden_size=64))
    assert (logits(found) - reference(model)).abs().max() < 1e-4


@pytest.mark.parametrize("to", ["hf", "mistral"])
def test_a_merged_checkpoint_computes_what_peft_computes(fused, tmp_path, to):
    model, folder, adapter = fused
    convert(folder, tmp_path / "merged", to, adapter=adapter)
    with checkpoints.open_checkpoint(tmp_path / "merged") as checkpoint:
        assert checkpoint.layout == to
    assert (logits(moesaic_model(tmp_path / "merged")) - reference(model)).abs().max() < 1e-4


def test_an_adapter_of_another_model_is_refused(fused, tmp_path):
    _, _, adapter = fused
    other = transformers_model("Mixtral", {"num_local_experts": 4, "hidden_size": 32, "head_dim": 16})
    other.save_pretrained(tmp_path / "other")
    with pytest.raises((InvalidParameter, CheckpointError), match=r"hidden size|does not fit"):
        convert(tmp_path / "other", tmp_path / "merged", "hf", adapter=adapter)
    assert not (tmp_path / "merged").exists()
    with pytest.raises(InvalidParameter, match="does not fit"):
        attached(tmp_path / "other", files.read(adapter, experts=4, hidden_size=64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "x"}, "lora_alpha"),
    ],
)
def test_what_is_not_supported_is_refused(fused, change, message):
    _, _, adapter = fused
    path = adapter / files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        files.read(adapter, experts=4, hidden_size=64)


def test_damaged_files_are_refused(fused):
    _, _, adapter = fused
    with pytest.raises(CheckpointError, match="experts"):
        files.read(adapter, experts=5, hidden_size=64)
    (adapter / files.WEIGHTS).write_bytes(b"1234567890")
    with pytest.raises(CheckpointError, match="damaged"):
        files.read(adapter)
    (adapter / files.WEIGHTS).unlink()
    with pytest.raises(NotFound, match="no such file"):
        files.read(adapter)
    (adapter / files.CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="no JSON"):
        files.read(adapter)


def test_only_weights_that_exist_get_an_adapter(base):
    _, folder = base
    model = moesaic_model(folder)
    kinds = {"w1"} if model.blocks[0].mlp.__class__.__name__ != "SwiGLU" else {"gate_proj"}
    wrong = ("gate_proj",) if kinds == {"w1"} else ("w1",)
    with pytest.raises(InvalidParameter, match="no such weight"):
        adapters.attach(model, AdapterConfig(targets=wrong))
    adapters.attach(model, AdapterConfig(targets=("q_proj",)))
    with pytest.raises(InvalidParameter, match="already"):
        adapters.attach(model, AdapterConfig())


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": 10_000}, {"alpha": 0.0}, {"targets": ("gate",)}])
def test_sizes_out_of_range_are_refused(wrong):
    with pytest.raises(InvalidParameter):
        AdapterConfig(**wrong)
