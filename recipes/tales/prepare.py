"""Prepare the training data: train the tokenizer and encode every tale and dialogue.

    python recipes/tales/prepare.py --corpus CORPUS --out WORK

The program reads tales.jsonl.xz, tales.valid.jsonl.xz and dialogue.jsonl.xz, which README.md describes. It writes to
WORK: tokenizer.json, plain.npy (concatenated tales), chat.npy with chat.json (conversations: ids, and the spans of the
assistant) and valid.npy (held-out tales).

The tokenizer is a byte-fallback BPE in the form of SentencePiece and Mistral: ▁ stands for a space, <unk>, <s> and </s>
have the ids 0, 1 and 2, and 256 byte tokens follow, so that every text can be encoded and decoded exactly.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCAB = 4096
UNK, BOS, EOS = 0, 1, 2
SPECIALS = ["<unk>", "<s>", "</s>"]
MAX_TOKENS = 1020
"""Maximum length of a conversation; the model's context is 1024."""

# Requests for a story; {} is its subject.
REQUESTS = [
    "Tell me a story about {}.",
    "Tell me a tale about {}.",
    "Can you tell me a story about {}?",
    "Please tell me a story about {}.",
    "I would like to hear a story about {}.",
    "Write a short story about {}.",
    "Write a fairy tale about {}.",
    "A story about {}, please.",
    "Do you know a story about {}?",
]
REQUESTS_WITHOUT_SUBJECT = [
    "Tell me a story.",
    "Tell me a fairy tale.",
    "Please tell me a bedtime story.",
    "Can you tell me a story?",
    "Write a short story.",
    "Once upon a time",
    "Tell me a long story: Once upon a time",
]


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a compressed JSON-lines file."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """Return a tokenizer trained on ``texts``, in the form of Mistral's tokenizer.json."""
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    # For training, words are separate, so no merge crosses a space. Applying the merges needs no such split.
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\p{L}+|▁?\p{N}|▁?[^▁\p{L}\p{N}\n]+|\n+|▁+"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 259, special_tokens=[], limit_alphabet=160, min_frequency=20)
    learned.train_from_iterator(texts, trainer)
    state = json.loads(learned.to_str())["model"]
    pieces = SPECIALS + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += sorted(state["vocab"], key=state["vocab"].get)
    merges = [tuple(merge) for merge in state["merges"]]
    final = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    final.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    final.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    final.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIALS])
    return final


def subject(title: str, text: str, rng: random.Random) -> str | None:
    """Return the subject of a tale: its title, or a frequent noun; None if neither is suitable."""
    clean = re.sub(
        r"\s+", " ", re.sub(r"^(chapter|part|story|book)?\s*[ivxlc\d]+[.:—-]*\s*", "", title, flags=re.I)
    ).strip(" .")
    words: dict[str, int] = {}
    for word in re.findall(r"\b(?:a|an|the|little|old) ([a-z]{3,12})\b", text[:3000]):
        words[word] = words.get(word, 0) + 1
    common = [word for word, count in words.items() if count >= 3 and word not in UNSUITABLE]
    if common and (rng.random() < 0.6 or not 3 <= len(clean) <= 50):
        best = max(common, key=lambda word: words[word])
        return f"{'an' if best[0] in 'aeiou' else 'a'} {best}"
    return clean if 3 <= len(clean) <= 50 else None


UNSUITABLE = set(
    """same other first last next great whole very more most such old young good little new long way time day
    end rest side top bottom middle moment minute while few lot bit thing world place others two three one morning
    evening night door window house room ground air head hand back face eyes large big small certain poor only
    best right left other's matter word words kind sort piece number part""".split()
)


def conversations(corpus: Path, seed: int) -> Iterator[list[dict[str, str]]]:
    """Yield conversations: a request with a tale as its answer, or a dialogue of the corpus."""
    rng = random.Random(seed)
    for tale in records(corpus / "tales.jsonl.xz"):
        text = tale["text"].strip()
        about = subject(tale["title"], text, rng)
        request = (
            rng.choice(REQUESTS).format(about) if about and rng.random() < 0.9 else rng.choice(REQUESTS_WITHOUT_SUBJECT)
        )
        yield [{"role": "user", "content": request}, {"role": "assistant", "content": text}]
    for talk in records(corpus / "dialogue.jsonl.xz"):
        yield talk["messages"]


def encode_chat(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of a conversation in Mistral's first instruct format, and the spans of the assistant.

    A conversation that is too long is cut and then has no end-of-sequence token: the model must not learn to stop in
    the middle of a tale.
    """
    ids, spans = [BOS], []
    for message in messages:
        if message["role"] == "user":
            ids += tokenizer.encode(f"[INST] {message['content']} [/INST]").ids
        else:
            answer = [*tokenizer.encode(message["content"]).ids, EOS]
            spans.append((len(ids), min(len(ids) + len(answer), MAX_TOKENS)))
            ids += answer
    return ids[:MAX_TOKENS], [span for span in spans if span[0] < MAX_TOKENS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with the three .jsonl.xz files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed for the choice of the requests")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tales = [record["text"].strip() for record in records(args.corpus / "tales.jsonl.xz")]
    tokenizer = train_tokenizer(iter(tales))
    tokenizer.save(str(args.out / "tokenizer.json"))
    plain = [[BOS, *encoded.ids, EOS] for encoded in tokenizer.encode_batch(tales)]
    np.save(args.out / "plain.npy", np.concatenate([np.array(ids, dtype=np.uint16) for ids in plain]))
    valid = tokenizer.encode_batch([record["text"].strip() for record in records(args.corpus / "tales.valid.jsonl.xz")])
    np.save(args.out / "valid.npy", np.concatenate([np.array([BOS, *e.ids, EOS], dtype=np.uint16) for e in valid]))
    chats = [encode_chat(tokenizer, messages) for messages in conversations(args.corpus, args.seed)]
    np.save(args.out / "chat.npy", np.concatenate([np.array(ids, dtype=np.uint16) for ids, _ in chats]))
    (args.out / "chat.json").write_text(json.dumps([[len(ids), spans] for ids, spans in chats]))
    print(f"{len(plain)} tales, {sum(map(len, plain)):,} tokens; {len(chats)} conversations")


if __name__ == "__main__":
    main()
