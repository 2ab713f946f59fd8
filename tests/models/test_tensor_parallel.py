"""Two ranks with half of a model each, connected by gloo, give the results of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from moesaic import checkpoints, formats, models
from moesaic.ops import Batch, Group
from tests.support.models import ours, theirs

IDS = [[1, 5, 9, 33, 2, 7, 61], [4, 4, 8]]


def rank(number: int, folder: Path, out: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{out}/meeting", rank=number, world_size=2)
    try:
        with checkpoints.open_checkpoint(folder) as checkpoint:
            model = models.build(
                checkpoint.config,
                folder,
                formats.load("float32"),
                dtype=torch.float32,
                group=Group(number, 2),
            )
            checkpoints.load_weights(model.slots(), checkpoint)
        with torch.inference_mode():
            logits = model.logits(model(Batch.whole(IDS)))
        held = sum(parameter.numel() for parameter in model.parameters())
        torch.save({"logits": logits, "held": torch.tensor(held)}, out / f"{number}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", ["Mixtral", "Llama"])
def test_two_ranks_equal_one(family, tmp_path):
    theirs(family, {"vocab_size": 96}).save_pretrained(tmp_path / "model")
    whole = ours(tmp_path / "model")
    with torch.inference_mode():
        expected = whole.logits(whole(Batch.whole(IDS)))
    torch.multiprocessing.spawn(rank, (tmp_path / "model", tmp_path), nprocs=2)
    parts = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2)]
    for part in parts:
        assert (part["logits"] - expected).abs().max() <= 1e-4
        assert part["held"] < 0.6 * sum(parameter.numel() for parameter in whole.parameters())
