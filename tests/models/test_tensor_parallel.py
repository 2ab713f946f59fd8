"""Two ranks with half of a model each, connected by gloo, give the results of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from moesaic import checkpoints, formats, models
from moesaic.ops import Batch, Group
from tests.support.models import moesaic_model, transformers_model

IDS = [[1, 5, 9, 33, 2, 7, 61], [4, 4, 8]]


FAMILIES = ("Mixtral", "Llama")


def rank(number: int, folder: Path) -> None:
    """Compute the logits of each family's model with another rank, and save them."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=number, world_size=2)
    try:
        for family in FAMILIES:
            compute(number, folder / family)
    finally:
        torch.distributed.destroy_process_group()


def compute(number: int, folder: Path) -> None:
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
    size = sum(parameter.numel() for parameter in model.parameters())
    torch.save({"logits": logits, "size": torch.tensor(size)}, folder / f"{number}.pt")


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """Return a folder with a model of each family, and what two ranks computed with it."""
    folder = tmp_path_factory.mktemp("ranks")
    for family in FAMILIES:
        transformers_model(family, {"vocab_size": 96}).save_pretrained(folder / family)
    torch.multiprocessing.spawn(rank, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_equal_one(family, computed):
    whole = moesaic_model(computed / family)
    with torch.inference_mode():
        expected = whole.logits(whole(Batch.whole(IDS)))
    parts = [torch.load(computed / family / f"{number}.pt", weights_only=True) for number in range(2)]
    for part in parts:
        assert (part["logits"] - expected).abs().max() <= 1e-4
        assert part["size"] < 0.6 * sum(parameter.numel() for parameter in whole.parameters())
