"""llama.cpp through the low-level functions of llama-cpp-python: no sampling and no Python code per token.

Formats have the names of ``llama-quantize``. With ``-norepack`` the weights stay as they are in the file; otherwise
llama.cpp may rearrange them for the processor, which is its default. The GGUF files are created here: Mixtral is the
architecture "llama" with experts, whose rotary rows are interleaved.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

LABEL = "llama.cpp"
MODULES, PACKAGES = ("llama_cpp", "gguf", "numpy"), ("llama-cpp-python", "gguf")
INSTALL = 'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python gguf'
READS_GGUF = True
FORMATS = ("Q8_0", "Q8_0-norepack", "Q4_0", "Q4_0-norepack", "Q4_K_S", "Q4_K_S-norepack", "Q2_K", "Q2_K-norepack")

MAX_BATCH_TOKENS = 2048
"""Maximum number of tokens in one call of ``llama_decode``: llama.cpp's default."""


def make(source: Path, folder: Path, weight_format: str) -> Path:
    """Return the GGUF file of a weight format inside ``folder``; create it if it does not exist.

    It is quantized from a bfloat16 file, which is created first from the Hugging Face checkpoint ``source``.
    """
    kind = weight_format.removesuffix("-norepack")
    target, plain = folder / f"llama-{kind}.gguf", folder / "llama-BF16.gguf"
    if target.exists():
        return target
    if not plain.exists():
        part = plain.with_suffix(".part")
        _write(source, part)
        part.rename(plain)
    if kind != "BF16":
        part = target.with_suffix(".part")
        _quantize(plain, part, kind)
        part.rename(target)
    return target


class Peer:
    """A model in llama.cpp; each sequence has its own memory for keys and values."""

    def __init__(self, path: Path, weight_format: str, threads: int, context: int, sequences: int) -> None:
        import llama_cpp

        self._lib, self._log = llama_cpp, list[str]()
        self._log_callback = llama_cpp.llama_log_callback(self._add_log)
        llama_cpp.llama_log_set(self._log_callback, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.use_extra_bufts = not weight_format.endswith("-norepack")
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), options)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = sequences * (-(-context // 256) * 256)
        parameters.n_batch, parameters.n_seq_max, parameters.kv_unified = MAX_BATCH_TOKENS, sequences, False
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(self._model, parameters) if self._model else None
        if not self._context:
            raise RuntimeError("; ".join(self._log[-3:]) or "llama.cpp gave no reason")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(max(MAX_BATCH_TOKENS, sequences), 0, 1)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._length = self._position = 0
        self.about: dict[str, Any] = {
            "system_info": llama_cpp.llama_print_system_info().decode().strip(),
            "repack": bool(options.use_extra_bufts),
            "flash_attn": True,
            "n_ubatch": parameters.n_ubatch,
            "buffers": [line for line in self._log if "buffer size" in line],
        }
        self.weights = _weights(path)

    def prefill(self, ids: list[int]) -> None:
        self._lib.llama_memory_clear(self._memory, False)
        for start in range(0, len(ids), MAX_BATCH_TOKENS):
            chunk = ids[start : start + MAX_BATCH_TOKENS]
            is_last = start + len(chunk) == len(ids)
            tokens = [(token_id, start + index, 0) for index, token_id in enumerate(chunk)]
            self._decode(tokens, len(chunk) - 1 if is_last else None)

    def likeliest(self, ids: list[int], count: int) -> list[int]:
        self.prefill(ids)
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return sorted(range(self._vocab), key=lambda token_id: -logits[token_id])[:count]

    def fill(self, prompts: list[list[int]]) -> None:
        # Only one prompt is computed. A copy to another sequence copies the memory too.
        self.prefill(prompts[0])
        for sequence in range(1, len(prompts)):
            self._lib.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        self._length = len(prompts[0])

    def begin(self, batch: int, steps: int) -> None:
        self._position = self._length

    def step(self, ids: list[int]) -> None:
        self._decode([(token_id, self._position, sequence) for sequence, token_id in enumerate(ids)])
        self._position += 1

    def end(self) -> None:
        self._lib.llama_memory_seq_rm(self._memory, -1, self._length, -1)

    def _decode(self, tokens: list[tuple[int, int, int]], logits_row: int | None = -1) -> None:
        """Compute tokens, each (id, position, sequence), in one call.

        ``logits_row`` is the index of the token whose logits are computed; -1: those of all tokens; None: of none.
        """
        batch = self._batch
        batch.n_tokens = len(tokens)
        for row, (token_id, position, sequence) in enumerate(tokens):
            batch.token[row], batch.pos[row] = token_id, position
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
            batch.logits[row] = logits_row in (-1, row)
        if code := self._lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}: {'; '.join(self._log[-2:])}")
        self._lib.llama_synchronize(self._context)

    def _add_log(self, level: int, text: bytes, data: Any) -> None:
        self._log.append(text.decode(errors="replace").strip())


def _weights(path: Path) -> tuple[int, int]:
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    experts = sum(size for name, size in sizes.items() if "_exps." in name)
    embedding = sizes["token_embd.weight"] if "output.weight" in sizes else 0  # else it is the head, too
    return experts, sum(sizes.values()) - experts - embedding


def _quantize(source: Path, target: Path, kind: str) -> None:
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.nthread = len(os.sched_getaffinity(0))
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not quantize to {kind}")


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the GGUF file.

    ``parts`` has the name of its source in the checkpoint: one tensor, or one for each expert.
    """

    name: str
    parts: list[str]
    rotary_heads: int = 0
    """Number of heads whose rotary rows are reordered from half-split to interleaved; 0: no rows are reordered."""
    plain: bool = False
    """Whether the tensor is stored in float32, which llama.cpp requires for norms and routers."""


def _tensors(config: dict[str, Any]) -> Iterator[_Tensor]:
    yield _Tensor("token_embd.weight", ["model.embed_tokens.weight"])
    yield _Tensor("output_norm.weight", ["model.norm.weight"], plain=True)
    yield _Tensor("output.weight", ["lm_head.weight"])
    rotary = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        target, source = f"blk.{layer}", f"model.layers.{layer}"
        yield _Tensor(f"{target}.attn_norm.weight", [f"{source}.input_layernorm.weight"], plain=True)
        yield _Tensor(f"{target}.ffn_norm.weight", [f"{source}.post_attention_layernorm.weight"], plain=True)
        for kind in "qkv":
            yield _Tensor(
                f"{target}.attn_{kind}.weight", [f"{source}.self_attn.{kind}_proj.weight"], rotary.get(kind, 0)
            )
        yield _Tensor(f"{target}.attn_output.weight", [f"{source}.self_attn.o_proj.weight"])
        yield _Tensor(f"{target}.ffn_gate_inp.weight", [f"{source}.block_sparse_moe.gate.weight"], plain=True)
        for name, matrix in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            experts = range(config["num_local_experts"])
            parts = [f"{source}.block_sparse_moe.experts.{expert}.{matrix}.weight" for expert in experts]
            yield _Tensor(f"{target}.ffn_{name}_exps.weight", parts)


class _Stored:
    """Reader of a safetensors file in bfloat16, which returns its tensors as 16-bit words."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            self._entries = json.loads(stream.read(length))
        self._file, self._data = file, 8 + length

    def shape(self, tensor: _Tensor) -> tuple[int, ...]:
        shape = tuple(self._entries[tensor.parts[0]]["shape"])
        return (len(tensor.parts), *shape) if len(tensor.parts) > 1 else shape

    def read(self, tensor: _Tensor) -> Any:
        import numpy

        words = [self._words(name) for name in tensor.parts]
        if tensor.plain:
            return (words[0].astype(numpy.uint32) << 16).view(numpy.float32)
        if tensor.rotary_heads:
            rows, columns = words[0].shape
            halves = words[0].reshape(tensor.rotary_heads, 2, rows // tensor.rotary_heads // 2, columns)
            return numpy.ascontiguousarray(halves.swapaxes(1, 2))
        return numpy.stack(words) if len(words) > 1 else words[0]

    def _words(self, name: str) -> Any:
        import numpy

        entry = self._entries[name]
        offset = self._data + entry["data_offsets"][0]
        return numpy.fromfile(self._file, numpy.uint16, prod(entry["shape"]), offset=offset).reshape(entry["shape"])


def _write(source: Path, target: Path) -> None:
    """Write a checkpoint as a GGUF file in bfloat16, one tensor in memory at a time."""
    import gguf
    import numpy

    config = json.loads((source / "config.json").read_text())
    stored, tensors = _Stored(source / "model.safetensors"), list(_tensors(config))
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for tensor in tensors:
        shape = stored.shape(tensor)
        kind = gguf.GGMLQuantizationType.F32 if tensor.plain else gguf.GGMLQuantizationType.BF16
        size = prod(shape) * (4 if tensor.plain else 2)
        writer.add_tensor_info(tensor.name, shape, numpy.dtype("float32"), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(stored.read(tensor))
    writer.close()
