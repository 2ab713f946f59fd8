"""Compare the quality of quantized models: to nearest, calibrated, and by llama.cpp with an importance matrix.

All rows read the same windows of the same documents, and all are calibrated on the same text, which the model wrote.
Each row is compared with its own engine on the unquantized weights. Bits count the weights that are quantized, with
scales and padding; the embedding, which is also the head of SmolLM2, stays float32 in all rows.

The models are

- ``stored``: SmolLM2 as the package holds it, decoded. Its weights lie on the grid of Q4_1, which favours types whose
  grid is alike.
- ``moved``: the same, with each weight moved at random by at most half a step of that grid.
- ``upcycled``: a Mixtral with the function of ``stored``; each of its experts is the feed-forward network.
- ``tales``: the built-in toy model.

llama.cpp quantizes and runs a padded model of the same function, because its K and IQ types need rows of whole
superblocks. Finished rows are kept in --folder, and a run that was stopped continues with the others.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks import quantization_models as makers
from benchmarks.gguf_quality import HERE, TEXTS, ask_llama_cpp
from moesaic import builtin, calibration, checkpoints, convert, gguf, packed
from moesaic.bench import provenance, quality
from moesaic.bench.divergence import Divergence, Reference, Values, comparison
from moesaic.bench.windows import Corpus
from moesaic.calibration import texts
from moesaic.formats._tiles import Tiled
from moesaic.load_options import LoadOptions
from moesaic.loading import Loaded, load_model
from moesaic.models._layers import Linear
from moesaic.ops import Batch
from moesaic.plan import make_plan
from moesaic.text.tokenizer import Tokenizer

EXAMPLE = """example:
  python -m benchmarks.quantization --folder work --llama-python llama/bin/python --out docs/results/quantization.json
"""
MODELS = ("stored", "moved", "upcycled", "tales")
FORMATS = ("int8", "int4", "int3", "2.5", "int2")
"""Formats, and a number of bits for which calibration chooses a format for each weight."""
NEAREST, CALIBRATED = "to nearest", "calibrated"
TYPES = ("Q8_0", "Q4_0", "Q4_K_S", "IQ4_XS", "IQ4_NL", "Q3_K_M", "Q3_K_S", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_S")
"""File types of llama.cpp."""
SEED = 1
EXPERTS, CHOSEN = 4, 2
ROWS = 64
"""Rows whose probabilities exist at once."""


@dataclass(frozen=True)
class Setup:
    """The files and sizes of a comparison."""

    folder: Path
    python: Path | None
    documents: int
    length: int
    tokens: int


@dataclass(frozen=True)
class Row:
    """The quality of a quantized model.

    Attributes:
        model: one of ``MODELS``.
        engine: moesaic or llama.cpp.
        name: format, or file type of llama.cpp.
        method: how weights were rounded; empty for unquantized weights.
        bits: bits of a quantized weight, with scales.
        types: share of the quantized weights in each format or type.
        tokens: number of predicted tokens.
        perplexity, kl_divergence, log_ratio: value and standard error; the divergence and the logarithm of the ratio of
            perplexities compare with the unquantized weights in the same engine.
        commit: Git commit of the source that measured the row.
    """

    model: str
    engine: str
    name: str
    method: str
    bits: float
    types: dict[str, float]
    tokens: int
    perplexity: tuple[float, float]
    kl_divergence: tuple[float, float] = (0.0, 0.0)
    log_ratio: tuple[float, float] = (0.0, 0.0)
    commit: str | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.model, self.engine, self.name, self.method


class Results:
    """The finished rows, in a file."""

    def __init__(self, file: Path) -> None:
        self._file, self._commit = file, provenance.commit()  # of the source that runs, also if it changes later
        self.rows = [Row(**entry) for entry in json.loads(file.read_text())] if file.exists() else []

    def add(self, key: tuple[str, str, str, str], measure: Callable[[], Row]) -> None:
        """Measure a row, unless it is finished."""
        if not any(row.key == key for row in self.rows):
            row = replace(measure(), commit=self._commit)
            self.rows.append(row)
            print(*row.key, f"{row.bits:.3f}", row.perplexity[0], *row.kl_divergence, flush=True)
            self._file.write_text(json.dumps([asdict(row) for row in self.rows], indent=1))


# models


def model(setup: Setup, name: str) -> Path:
    """Return the folder of a model, which is made on the first call."""
    if name == "tales":
        return builtin.TALES_FOLDER
    path = setup.folder / name
    if not path.exists():
        original = builtin.resolve(builtin.SMOLLM2)[0]
        if name == "stored":
            convert.convert(original, path, "hf")
        elif name == "moved":
            makers.move(model(setup, "stored"), original, path, SEED)
        else:
            makers.upcycle(model(setup, "stored"), path, EXPERTS, CHOSEN, SEED)
    return path


def calibration_text(setup: Setup, name: str) -> list[list[int]]:
    """Return the ids of the calibration text, which SmolLM2 writes for all models that have its vocabulary."""
    writer = "tales" if name == "tales" else builtin.SMOLLM2
    file = setup.folder / f"{writer}-{setup.tokens}.json"
    if not file.exists():
        file.write_text(json.dumps(texts.self_written(builtin.resolve(writer)[0], setup.tokens)))
    return [list(ids) for ids in json.loads(file.read_text())]


def load(path: Path, *, plain: bool = False) -> Loaded:
    """Return a model; ``plain`` decodes its weights to float32."""
    options = LoadOptions(format="float32", dtype="float32") if plain else LoadOptions()
    return load_model(make_plan(path, options))


def windows(setup: Setup, loaded: Loaded) -> Corpus:
    documents = quality.read_texts(TEXTS)[: setup.documents]
    return quality.prepare(loaded, Tokenizer.open(loaded.path), documents, setup.length, "documents")


# rows of Moesaic


def measure_moesaic(setup: Setup, results: Results, name: str, formats: Sequence[str]) -> None:
    """Measure a model unquantized, and in each format."""
    path = model(setup, name)
    with ExitStack() as stack:
        reference: list[Reference] = []

        def measure(make: Callable[[Path], object] | None, key: tuple[str, str, str, str]) -> Row:
            if not reference:
                plain = load(path, plain=True)
                reference.append(stack.enter_context(Reference(plain, windows(setup, plain), name, "float32")))
            if make is None:
                return _compared(reference[0], load(path, plain=True), key)
            with tempfile.TemporaryDirectory(dir=setup.folder) as folder:
                make(Path(folder) / "model")
                return _compared(reference[0], load(Path(folder) / "model"), key)

        keys = [(name, "moesaic", text, method) for text in formats for method in (CALIBRATED, NEAREST)]
        for key in ((name, "moesaic", "float32", ""), *keys):
            make = quantizer(setup, name, *key[2:]) if key[3] else None
            if key[2:] != ("int8", CALIBRATED):  # int8 is always rounded to nearest
                results.add(key, lambda make=make, key=key: measure(make, key))  # type: ignore[misc]


def _compared(reference: Reference, loaded: Loaded, key: tuple[str, str, str, str]) -> Row:
    measured, distance = reference.compare(loaded, reference.text)
    return row(key, bits_and_types(loaded), measured, distance)


def row(
    key: tuple[str, str, str, str], size: tuple[float, dict[str, float]], measured: quality.Quality, found: Divergence
) -> Row:
    """Return a row from its measurements."""
    perplexity = measured.perplexity, measured.standard_error
    divergence, ratio = ((value.value, value.standard_error) for value in (found.mean, found.log_ratio))
    return Row(*key, *size, measured.tokens, perplexity, divergence, ratio)


def quantizer(setup: Setup, name: str, text: str, method: str) -> Callable[[Path], object]:
    """Return a function that writes the folder of a model in a format."""
    path = model(setup, name)
    bits = None if text.startswith("int") else float(text)
    chosen = setup.folder / f"{name}-{text}.json"
    settings = calibration.Settings(
        format=None if bits else text, bits=bits, dtype="float32", tokens=setup.tokens, text="written by the model"
    )

    def calibrate(dst: Path) -> None:
        calibration.quantize(path, dst, settings, lambda: calibration_text(setup, name))
        chosen.write_text(json.dumps(dict(packed.read_manifest(dst).formats)))

    def round_to_nearest(dst: Path) -> None:
        if bits is None:
            packed.pack(path, dst, text, "float32")
            return
        if not chosen.exists():
            calibrate(dst.with_name("calibrated"))
        formats = json.loads(chosen.read_text())
        dst.mkdir()
        with checkpoints.open_checkpoint(path) as checkpoint:
            generation = dict(checkpoint.generation)
            manifest = packed.PackedManifest("float32", formats, dict(checkpoint.config), generation)
            packed.create(dst, manifest, lambda built: checkpoints.load_weights(built.slots(), checkpoint))
            checkpoints._write.copy_tokenizer(checkpoint, dst)

    return calibrate if method == CALIBRATED else round_to_nearest


def bits_and_types(loaded: Loaded) -> tuple[float, dict[str, float]]:
    """Return the bits of a quantized weight, and the share of these weights in each format."""
    weights: dict[str, float] = {}
    nbytes = 0
    for slot in loaded.model.slots():
        if isinstance(slot.format, Tiled):
            count = slot.shape[0] * slot.shape[1]
            weights[slot.format.name] = weights.get(slot.format.name, 0) + count
            nbytes += slot.format.nbytes(slot.shape)
    return _shares(weights, nbytes)


def _shares(weights: dict[str, float], nbytes: float) -> tuple[float, dict[str, float]]:
    total = sum(weights.values())
    if not total:
        return 32.0, {"float32": 1.0}
    return 8 * nbytes / total, {name: count / total for name, count in sorted(weights.items())}


# rows of llama.cpp


def measure_llama_cpp(setup: Setup, results: Results, name: str, types: Sequence[str]) -> None:
    """Quantize and measure a model with llama.cpp in each type, compared with llama.cpp on float32 weights."""
    padded = setup.folder / f"{name}-padded"
    if not padded.exists():
        makers.pad(model(setup, name), padded)
    plain, matrix = (padded.with_suffix(suffix) for suffix in (".gguf", ".npz"))
    if not plain.exists():
        convert.convert(padded, plain, "gguf")
    if not matrix.exists():
        numpy.savez(matrix, **importances(padded, calibration_text(setup, name)))
    text = windows(setup, load(padded, plain=True))
    expected = llama_cpp_logits(setup, plain, text)
    results.add(
        (name, "llama.cpp", "float32", ""),
        lambda: llama_cpp_row((name, "llama.cpp", "float32", ""), plain, text, expected, expected),
    )
    for kind in types:

        def measure(kind: str = kind) -> Row:
            with tempfile.TemporaryDirectory(dir=setup.folder) as folder:
                file = Path(folder) / f"{kind}.gguf"
                command = [setup.python, HERE / "llama_cpp_quantize.py", plain, file, kind, matrix]
                subprocess.run([str(part) for part in command], check=True)
                found = llama_cpp_logits(setup, file, text)
                key = (name, "llama.cpp", kind, "importance matrix")
                return llama_cpp_row(key, file, text, expected, found)

        results.add((name, "llama.cpp", kind, "importance matrix"), measure)


@torch.inference_mode()
def importances(path: Path, sequences: Sequence[list[int]]) -> dict[str, Any]:
    """Return the mean square of each input of each linear layer, by the name of the weight in GGUF files."""
    built = load(path, plain=True).model
    sums: dict[str, Tensor] = {}
    names = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }

    def count(layer: Linear, inputs: tuple[Tensor, ...]) -> None:
        if layer.name.startswith("model.layers."):
            parts = layer.name.split(".")
            name = f"blk.{parts[2]}.{names[parts[-1]]}.weight"
            sums[name] = sums.get(name, torch.zeros(inputs[0].shape[1])) + inputs[0].square().sum(0)

    for module in built.modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(count)
    for ids in sequences:
        built(Batch.whole([ids]))
    tokens = sum(map(len, sequences))
    return {name: (total / tokens).numpy() for name, total in sums.items()}


def llama_cpp_logits(setup: Setup, file: Path, text: Corpus) -> Path:
    """Return the file of llama.cpp's logits [tokens, vocabulary] of the windows."""
    target = file.with_suffix(".npy")
    if not target.exists():
        assert setup.python is not None
        sequences = [window.ids for window in text.windows]
        ask_llama_cpp(setup.python, file.parent, model=str(file), sequences=sequences, logits=str(target))
    return target


def llama_cpp_row(key: tuple[str, str, str, str], file: Path, text: Corpus, expected: Path, found: Path) -> Row:
    """Return the row of a GGUF file from llama.cpp's logits for it, and for the unquantized weights."""
    targets = torch.tensor([token for window in text.windows for token in window.targets])
    logits = [numpy.load(path, mmap_mode="r") for path in (expected, found)]
    parts = []
    for begin in range(0, len(targets), ROWS):
        p, q = (torch.from_numpy(array[begin : begin + ROWS].copy()) for array in logits)
        parts.append(comparison(p, q, targets[begin : begin + ROWS]))
    values = Values(*torch.cat(parts).unbind(1))
    return row(key, llama_cpp_size(file), quality.Quality.of(text, values.losses), Divergence.of(values, text))


def llama_cpp_size(file: Path) -> tuple[float, dict[str, float]]:
    """Return the bits of a quantized weight in a GGUF file, and the share of these weights in each type."""
    weights: dict[str, float] = {}
    nbytes = 0.0
    with gguf.GgufFile(file) as header:
        for tensor in header.tensors.values():
            if tensor.name.startswith("blk.") and tensor.type.name != "F32":
                weights[tensor.type.name] = weights.get(tensor.type.name, 0) + math.prod(tensor.shape)
                nbytes += tensor.nbytes
    return _shares(weights, nbytes)


# command line


def write(setup: Setup, results: Results, out: Path) -> None:
    """Write the finished rows and their origin to a JSON file."""
    command = f"python -m benchmarks.quantization --folder work --llama-python llama/bin/python --out {out}"
    rows = sorted(results.rows, key=lambda found: (MODELS.index(found.model), found.engine, -found.bits))
    figures = {"documents": setup.documents, "length": setup.length, "calibration_tokens": setup.tokens}
    provenance.write(out, provenance.record(command, figures | {"rows": [asdict(found) for found in rows]}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="folder for models and finished rows")
    parser.add_argument(
        "--llama-python", type=Path, help="interpreter that has llama-cpp-python; default: no rows of it"
    )
    parser.add_argument("--models", default=",".join(MODELS), help="models, separated by commas; default: all")
    parser.add_argument("--formats", default=",".join(FORMATS), help="formats and bits; default: all")
    parser.add_argument("--types", default=",".join(TYPES), help="file types of llama.cpp; default: all")
    parser.add_argument("--documents", type=int, default=12, help="documents to read (default 12)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (default 512)")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens (default 16384)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    setup = Setup(args.folder.resolve(), args.llama_python, args.documents, args.length, args.tokens)
    setup.folder.mkdir(parents=True, exist_ok=True)
    results = Results(setup.folder / "rows.json")
    for name in args.models.split(","):
        measure_moesaic(setup, results, name, args.formats.split(","))
        if args.llama_python and name in ("stored", "moved"):
            measure_llama_cpp(setup, results, name, args.types.split(","))
    if args.out:
        write(setup, results, args.out)


if __name__ == "__main__":
    main()
