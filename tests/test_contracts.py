"""Every file of a registry folder keeps its folder's contract, before its author has written a test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moesaic import checkpoints, formats, models, ops, registry
from moesaic.errors import CheckpointError, NotFound
from moesaic.formats import Packed
from tests.tiny import ours, theirs


@pytest.fixture(params=registry.names("formats"))
def format(request) -> type[Packed]:
    return formats.load(request.param)


class TestFormats:
    @pytest.mark.parametrize("shape", [(3, 64), (4, 3, 64)])
    def test_bytes_are_as_announced(self, format, shape):
        packed = format.pack(torch.randn(shape))
        real = sum(part.numel() * part.element_size() for part in packed.parts().values())
        assert format.nbytes(shape) == real
        assert {name: (tuple(part.shape), part.dtype) for name, part in packed.parts().items()} == dict(
            format.layout(shape)
        )

    def test_round_trip_within_the_stated_error(self, format):
        weight = torch.randn(5, 128)
        error = (format.pack(weight).dequantize() - weight).norm() / weight.norm()
        assert error <= format.error

    def test_an_entry_of_a_stack_is_packed_as_if_alone(self, format):
        weight = torch.randn(4, 6, 64)
        stack = format.pack(weight)
        for e in range(4):
            alone = format.pack(weight[e])
            assert torch.equal(stack.dequantize(index=e), alone.dequantize())

    def test_store_writes_one_entry_and_no_other(self, format):
        stack = format.pack(torch.zeros(3, 4, 64))
        weight = torch.randn(4, 64)
        stack.store(weight, 1)
        assert torch.equal(stack.dequantize(index=1), format.pack(weight).dequantize())
        assert not stack.dequantize(index=0).any()
        assert not stack.dequantize(index=2).any()

    def test_takes_no_memory_on_the_meta_device(self, format):
        packed = format.empty((10**6, 10**6), device="meta")
        assert all(part.is_meta for part in packed.parts().values())

    def test_its_name_is_its_file(self, format):
        assert format.__module__ == f"moesaic.formats.{format.name}"


@pytest.mark.parametrize("name", registry.names("ops"))
class TestOps:
    def test_says_what_it_runs(self, name):
        backend = registry.load("ops", name)
        for op in ops.OPS:
            why = backend.why_not(op, "cpu", "float32")
            assert why is None or isinstance(why, str)
            if why is None:
                assert callable(getattr(backend, op))


FAMILIES = {"mixtral": "Mixtral", "llama": "Llama"}


@pytest.mark.parametrize("name", registry.names("models"))
class TestModels:
    def test_equals_an_independent_implementation(self, name, tmp_path):
        model = theirs(FAMILIES[name], {})
        model.save_pretrained(tmp_path)
        mine = ours(tmp_path)
        ids = [1, 5, 9, 33, 2, 7]
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0]
            found = mine.logits(mine(ops.Batch.whole([ids])))
        assert (found - expected).abs().max() <= 1e-4

    def test_says_what_an_engine_needs(self, name, tmp_path):
        model = theirs(FAMILIES[name], {"sliding_window": 11} if name == "mixtral" else {})
        model.save_pretrained(tmp_path)
        mine = ours(tmp_path)
        assert (mine.vocab_size, mine.max_length) == (97, 128)
        assert mine.cache_shapes == [(2, 16), (2, 16)]
        assert mine.window == (11 if name == "mixtral" else None)

    def test_one_model_type_has_one_file(self, name):
        for kind in registry.load("models", name).MODEL_TYPES:
            assert models.types()[kind] == name


@pytest.mark.parametrize("layout", registry.names("checkpoints"))
class TestCheckpoints:
    @pytest.fixture
    def written(self, layout, tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
        """A tiny Mixtral in this layout, and its weights."""
        theirs("Mixtral", {"num_local_experts": 4}).save_pretrained(tmp_path / "source")
        with checkpoints.open(tmp_path / "source") as source:
            registry.load("checkpoints", layout).write(source, tmp_path / "written", 1, lambda _count: None)
            weights = {name: source.read(name) for name in source.tensors}
        return tmp_path / "written", weights

    def test_write_then_read(self, layout, written):
        folder, weights = written
        assert checkpoints.detect(folder).__name__.endswith(layout)
        with checkpoints.open(folder) as checkpoint:
            assert checkpoint.layout == layout
            assert checkpoint.tensors.keys() == weights.keys()
            assert all(torch.equal(checkpoint.read(name), weight) for name, weight in weights.items())

    @pytest.mark.parametrize("change", ["missing", "surplus"])
    def test_a_missing_and_a_surplus_tensor_are_errors(self, layout, written, change):
        folder, _ = written
        with checkpoints.open(folder) as checkpoint:
            model = models.build(checkpoint.config, folder, formats.load("float32"), dtype=torch.float32)
            slots = list(model.slots())
            if change == "surplus":
                slots = [slot for slot in slots if slot.name != "model.norm.weight"]
            else:
                extra = slots[0]
                slots.append(formats.Slot("model.extra.weight", extra.shape, extra.index, extra.store))
            with pytest.raises(CheckpointError) as caught:
                checkpoints.fill(slots, checkpoint)
        named = "model.norm.weight" if change == "surplus" else "model.extra.weight"
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_says_what_it_looks_for(self, layout, tmp_path):
        assert registry.load("checkpoints", layout).LOOKS_FOR
        assert registry.load("checkpoints", layout).detect(tmp_path) is False


def test_an_unknown_name_is_refused_with_what_exists():
    with pytest.raises(NotFound, match="bfloat16, float16, float32"):
        formats.load("int99")
