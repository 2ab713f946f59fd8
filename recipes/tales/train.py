"""Train the model tales, a small Mixtral that tells tales.

    python recipes/tales/train.py --data WORK --out WORK/run

Training has two stages: first concatenated tales in rows of 512 tokens, then conversations, during which the learning
rate decays linearly. In the second stage only the assistant's tokens count for the loss. The model is Moesaic's, with
float32 weights and bfloat16 activations. Hooks on the routers add the load balancing loss (Switch Transformers,
arXiv:2101.03961 §2.2).

The state is saved to OUT/state.pt every --save steps; the same command resumes the training from there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic import formats, models
from moesaic.models._layers import Decoder, Router
from moesaic.ops import Batch, reference

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 192,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
BALANCE_WEIGHT = 0.01
"""Weight of the load balancing loss."""


class BalanceLoss:
    """Load balancing loss of a forward pass, collected by hooks on the routers."""

    def __init__(self, model: Decoder, k: int) -> None:
        self.k, self.losses = k, list[Tensor]()
        for module in model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(lambda _module, _args, logits: self.add(logits))

    def add(self, logits: Tensor) -> None:
        """Add the loss of one layer: E * sum over experts of (share of choices) * (mean probability)."""
        chosen = F.one_hot(logits.topk(self.k).indices, logits.shape[-1]).sum(1).float().mean(0)
        self.losses.append(logits.shape[-1] / self.k * (chosen * logits.softmax(-1).mean(0)).sum())

    def take(self) -> Tensor:
        """Return the mean loss over layers, which is 1 if perfectly balanced, and reset it."""
        mean = torch.stack(self.losses).mean()
        self.losses.clear()
        return mean


def initialize(model: Decoder, layers: int) -> None:
    """Initialize the weights with normal(0, 0.02) and the norms with 1.

    Matrices that write to the residual stream use 0.02 / sqrt(2 * layers).
    """
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        else:
            last = "wo" in name or "down" in name
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if last else 0.02)


def plain_rows(
    ids: np.ndarray, rows: int, length: int, seed: int
) -> Iterator[tuple[list[list[int]], list[list[bool]]]]:
    """Yield batches of rows of equal length from the concatenated tales, in a new random order each epoch."""
    rng = np.random.default_rng(seed)
    while True:
        begins = rng.permutation(np.arange(int(rng.integers(length)), len(ids) - length - 1, length))
        for offset in range(0, len(begins) - rows, rows):
            batch = [ids[begin : begin + length + 1].tolist() for begin in begins[offset : offset + rows]]
            yield batch, [[True] * length] * rows


def chat_rows(
    ids: np.ndarray, index: list[tuple[int, list[tuple[int, int]]]], tokens: int, seed: int
) -> Iterator[tuple[list[list[int]], list[list[bool]]]]:
    """Yield batches of whole conversations of similar length, about ``tokens`` tokens each, and masks.

    The mask is True for the assistant's tokens.
    """
    rng = np.random.default_rng(seed)
    begins = np.cumsum([0, *(length for length, _ in index)])
    lengths = np.array([length for length, _ in index])
    while True:
        order = np.argsort(lengths + rng.uniform(0, 200, len(lengths)))
        batches, batch, total = [], [], 0
        for row in order:
            batch.append(row)
            total += lengths[row]
            if total >= tokens:
                batches.append(batch)
                batch, total = [], 0
        for number in rng.permutation(len(batches)):
            rows, masks = [], []
            for row in batches[number]:
                rows.append(ids[begins[row] : begins[row + 1]].tolist())
                mask = np.zeros(lengths[row], dtype=bool)
                for begin, end in index[row][1]:
                    mask[begin:end] = True
                masks.append(mask[1:].tolist())
            yield rows, masks


def loss_of(model: Decoder, rows: list[list[int]], counted: list[list[bool]]) -> Tensor:
    """Return the mean cross entropy of the next tokens for which ``counted`` is True."""
    hidden = model(Batch.whole([row[:-1] for row in rows]))
    mask = torch.tensor([flag for row in counted for flag in row])
    targets = torch.tensor([token_id for row in rows for token_id in row[1:]])
    if not bool(mask.all()):
        hidden, targets = hidden[mask], targets[mask]
    return F.cross_entropy(model.logits(hidden), targets)


@torch.no_grad()
def perplexity(model: Decoder, ids: np.ndarray, balance: BalanceLoss, length: int = 512) -> float:
    """Return the perplexity per token of held-out text in rows of ``length`` tokens."""
    total, count = 0.0, 0
    for begin in range(0, len(ids) - length, length * 16):
        rows = [ids[b : b + length].tolist() for b in range(begin, min(begin + length * 16, len(ids) - length), length)]
        total += float(loss_of(model, rows, [[True] * (length - 1)] * len(rows))) * len(rows)
        count += len(rows)
        balance.losses.clear()
    return math.exp(total / count)


def rate(step: int, args: argparse.Namespace) -> float:
    """Return the learning rate: warm-up, then constant, then in the second stage a linear decay to 2 %."""
    if step < args.warmup:
        return float(args.lr * (step + 1) / args.warmup)
    if step < args.plain:
        return float(args.lr)
    return float(args.lr * max(0.02, 1 - (step - args.plain) / args.chat))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the training state")
    parser.add_argument("--plain", type=int, default=2000, help="steps on tales")
    parser.add_argument("--chat", type=int, default=1800, help="steps on conversations")
    parser.add_argument("--rows", type=int, default=16, help="rows of --length tokens in a step")
    parser.add_argument("--length", type=int, default=512, help="tokens in a row of tales")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="warm-up steps")
    parser.add_argument("--save", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    # Compiled, these two functions take a quarter of the time.
    reference.rms_norm = torch.compile(reference.rms_norm, dynamic=True)
    reference.rope = torch.compile(reference.rope, dynamic=True)
    args.out.mkdir(parents=True, exist_ok=True)
    model = models.build(CONFIG, args.data, formats.load("float32"), dtype=torch.bfloat16)
    model.requires_grad_(True)
    initialize(model, CONFIG["num_hidden_layers"])
    balance = BalanceLoss(model, CONFIG["num_experts_per_tok"])
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    step, elapsed = 0, 0.0
    state_file = args.out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = state["step"], state["spent"]
    valid = np.load(args.data / "valid.npy")
    plain = plain_rows(np.load(args.data / "plain.npy"), args.rows, args.length, args.seed + step)
    index = json.loads((args.data / "chat.json").read_text())
    chat = chat_rows(np.load(args.data / "chat.npy"), index, args.rows * args.length, args.seed + step)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {step}", flush=True)
    started, tokens, mean = time.monotonic() - elapsed, 0, None
    since = time.monotonic()
    while step < args.plain + args.chat:
        rows, counted = next(plain if step < args.plain else chat)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args)
        loss = loss_of(model, rows, counted)
        (loss + BALANCE_WEIGHT * balance.take()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens += sum(map(len, rows))
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if step % 10 == 0:
            speed = tokens / (time.monotonic() - since)
            print(f"step {step} loss {mean:.3f} {speed:.0f} tokens/s {time.monotonic() - started:.0f} s", flush=True)
            tokens, since = 0, time.monotonic()
        if step % args.save == 0 or step == args.plain + args.chat:
            print(f"step {step} held-out perplexity {perplexity(model, valid[:100_000], balance):.2f}", flush=True)
            elapsed = time.monotonic() - started
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": elapsed}
            torch.save(state, args.out / "state.new")
            (args.out / "state.new").rename(state_file)
            since = time.monotonic()


if __name__ == "__main__":
    main()
