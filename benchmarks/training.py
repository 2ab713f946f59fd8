"""Measure fine-tuning: the memory of Mixtral's geometry, and SmolLM2 beside TRL with PEFT on the same data.

Every measurement runs in a process of its own. Memory is the largest that the process held. For Mixtral, it is
measured with one and with two layers and random weights; the difference is that of a layer, and the whole model has 32.
TRL gets the same token ids in the same order, the same first adapter and the same learning rates. It needs the
packages trl and datasets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from moesaic import adapters, builtin, loading, memory, plan
from moesaic.adapters import AdapterConfig
from moesaic.adapters import peft as adapter_files
from moesaic.bench import geometry, provenance
from moesaic.convert import convert
from moesaic.load_options import LoadOptions
from moesaic.models import Decoder
from moesaic.text import chat_choice
from moesaic.text.tokenizer import Tokenizer
from moesaic.train import Settings, data, order, train
from moesaic.train.examples import Encoder, Example, encode
from moesaic.train.state import Entry
from moesaic.train.tasks import Supervised

EXAMPLE = """example:
  python -m benchmarks.training --data chats.jsonl --out docs/results/training.json
"""
GEOMETRY, LAYERS, TOKENS = "mixtral-8x7b", 32, 2048
STEPS, BATCH, MAX_LENGTH, RATE = 10, 4, 384, 2e-4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def mixtral(layers: int) -> dict[str, Any]:
    """Return the figures of two steps with a number of Mixtral's layers in int4, and adapters of all weights."""
    found = geometry.checked_plan(GEOMETRY, layers, LoadOptions(format="q4"), memory.available())
    model = geometry.build(found).model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 32000, (8, TOKENS // 8), generator=generator).tolist()
    examples = [Example(tuple(row), (True,) * len(row)) for row in ids]
    settings = Settings(AdapterConfig(16, 32.0), steps=2, batch=8, micro_batch_tokens=TOKENS, save_every=1000)
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        train(model, Supervised(examples), settings, Path(folder) / "out", base=GEOMETRY, on_step=_timed(seconds))
    trained = sum(matrix.numel() for matrix in adapters.matrices(model).values())
    return {
        "layers": layers,
        "weight_bytes": found.weight_bytes,
        "trained_parameters": trained,
        "tokens_s": TOKENS / seconds[-1],
        "memory": provenance.resident(),
    }


def _timed(seconds: list[float]) -> Any:
    last = time.perf_counter()

    def on_step(_entry: Entry, _total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds.append(now - last)
        last = now

    return on_step


def _examples(folder: Path, file: Path) -> list[Example]:
    tokenizer = Tokenizer.open(folder)
    chat_format = chat_choice.select(None, tokenizer, folder, "llama")
    records = data.conversations(file)
    records = replace(records, good=records.good[: STEPS * BATCH * 2])
    found, _ = encode(records, Encoder(chat_format, tokenizer, MAX_LENGTH).conversation)
    return found[: STEPS * BATCH]


def _settings(checkpointing: bool) -> Settings:
    return Settings(
        AdapterConfig(16, 32.0, ATTENTION),
        steps=STEPS,
        batch=BATCH,
        learning_rate=RATE,
        warmup=0.0,
        max_length=MAX_LENGTH,
        micro_batch_tokens=1 << 20,
        checkpointing=checkpointing,
        save_every=1000,
    )


def _load(folder: Path, dtype: str) -> Decoder:
    return loading.load_model(plan.make_plan(folder, LoadOptions(dtype=dtype))).model


def ours(folder: Path, file: Path, dtype: str, checkpointing: bool) -> dict[str, Any]:
    """Return the losses, the speed and the memory of our training."""
    model, examples = _load(folder, dtype), _examples(folder, file)
    seconds: list[float] = []
    entries: list[Entry] = []
    timed = _timed(seconds)

    def on_step(entry: Entry, total: int) -> None:
        entries.append(entry)
        timed(entry, total)

    with tempfile.TemporaryDirectory() as out:
        settings = _settings(checkpointing)
        train(model, Supervised(examples), settings, Path(out) / "out", base="smollm2", on_step=on_step)
    rows = [sum(len(examples[item].ids) for item in items) for items in _order(examples)]
    return _figures([entry.loss for entry in entries], rows, seconds)


def _order(examples: Sequence[Example]) -> list[list[int]]:
    items = order.batches(len(examples), BATCH, 0)
    return [next(items) for _ in range(STEPS)]


def _figures(losses: list[float], tokens: list[int], seconds: list[float]) -> dict[str, Any]:
    """Return figures of a run; the first step is left out of the speed."""
    speeds = [count / each for count, each in zip(tokens[1:], seconds[1:], strict=True)]
    return {"losses": losses, "tokens_s": statistics.median(speeds), "memory": provenance.resident()}


def trl(folder: Path, file: Path, dtype: str, checkpointing: bool) -> dict[str, Any]:
    """Return the losses, the speed and the memory of TRL with the same data, order, adapter and learning rates."""
    import peft
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    examples, settings = _examples(folder, file), _settings(checkpointing)
    ordered = [examples[item] for items in _order(examples) for item in items]
    own = _load(folder, "float32")
    adapters.attach(own, settings.adapter, settings.seed)
    first = {name: tensor.detach().clone() for name, tensor in adapters.matrices(own).items()}
    del own
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=list(ATTENTION), lora_dropout=0.0)
    seconds: list[float] = []
    losses: list[float] = []

    class Sequential(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset or self.train_dataset)

    class Watch(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self._timed = _timed(seconds)

        def on_step_end(self, *_args: Any, **_named: Any) -> None:
            self._timed(None, 0)

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **_named: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as out:
        arguments = SFTConfig(
            output_dir=out,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            max_length=MAX_LENGTH,
            assistant_only_loss=True,
            activation_checkpointing=checkpointing,
            bf16=dtype == "bfloat16",
            use_cpu=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        rows = {
            "input_ids": [list(example.ids) for example in ordered],
            "assistant_masks": [[int(flag) for flag in example.learned] for example in ordered],
        }
        trainer = Sequential(model=model, args=arguments, train_dataset=Dataset.from_dict(rows), peft_config=config)
        trainer.add_callback(Watch())
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_A" in name:
                    weight = name.removeprefix(adapter_files.PREFIX).removesuffix(".lora_A.default.weight")
                    parameter.copy_(first[f"{weight}.a"])
        trainer.train()
    tokens = [sum(len(example.ids) for example in ordered[n : n + BATCH]) for n in range(0, len(ordered), BATCH)]
    return _figures(losses, tokens, seconds)


def _measure(*arguments: str) -> dict[str, Any]:
    """Return the figures of one measurement in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        subprocess.run([sys.executable, "-m", "benchmarks.training", "--one", str(file), *arguments], check=True)
        figures: dict[str, Any] = json.loads(file.read_text())
        return figures


def _one(kind: str, arguments: Sequence[str]) -> dict[str, Any]:
    if kind == "mixtral":
        return mixtral(int(arguments[0]))
    folder, file, dtype, checkpointing = arguments
    measure = ours if kind == "ours" else trl
    return measure(Path(folder), Path(file), dtype, checkpointing == "True")


def run(file: Path, folder: Path) -> dict[str, Any]:
    """Return all figures; ``folder`` is for SmolLM2 in the layout of Hugging Face."""
    source = builtin.find(builtin.SMOLLM2)
    assert source is not None
    convert(source, folder / "smollm2", "hf", decode=True)
    rows = []
    for dtype, checkpointing in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        for kind in ("ours", "trl"):
            found = _measure(kind, str(folder / "smollm2"), str(file), dtype, str(checkpointing))
            rows.append({"program": kind, "dtype": dtype, "checkpointing": checkpointing, **found})
            print(f"{kind} {dtype} checkpointing {checkpointing}: {found['tokens_s']:.0f} tok/s, {found['losses']}")
    one, two = (_measure("mixtral", str(layers)) for layers in (1, 2))
    layer = two["memory"]["peak"] - one["memory"]["peak"]
    whole = one["memory"]["peak"] + (LAYERS - 1) * layer
    print(f"{GEOMETRY}: {layer / 1e9:.2f} GB for a layer, {whole / 1e9:.1f} GB for all")
    settings = asdict(_settings(checkpointing=False))
    mixtral = {"measured": [one, two], "layer_bytes": layer, "all_layers_bytes": whole, "tokens": TOKENS}
    return {"settings": settings, "smollm2": rows, GEOMETRY: mixtral}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="conversations, as `moesaic train sft` reads them")
    parser.add_argument("--out", type=Path, help="write the figures to a JSON file")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        args.one.write_text(json.dumps(_one(args.arguments[0], args.arguments[1:])))
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = run(args.data, Path(folder))
    if args.out:
        provenance.write(args.out, provenance.record("python -m benchmarks.training", figures))


if __name__ == "__main__":
    main()
