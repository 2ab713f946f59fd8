"""Keys of config.json that do not change what a model computes.

Programs write many more keys into config.json than a model needs: settings for training, for sampling, for tokenizers,
and records of their own. The readers of a configuration take the keys that describe the model, and pass the others to
``problem``. A key is accepted if it is in ``HARMLESS``, if it has a value in ``NEUTRAL``, or if its value switches
nothing on. Every other key may change the computation, so it is refused by name.

This module does not depend on models or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_RECORDS = (
    "_auto_class _commit_hash _diffusers_version _from_model_config _name_or_path architectures author auto_map "
    "base_model base_model_name_or_path finetuning_task language license model_name model_type name_or_path "
    "pretrained_model_name_or_path problem_type task_specific_params transformers.js_config transformers_version "
    "trust_remote_code unsloth_fixed unsloth_version"
)
"""Keys that record where a model comes from. Code that ``auto_map`` names is never run: the architecture is the one of
model_type."""
_LABELS = "classifier_bias classifier_dropout id2label label2id num_labels"
"""Keys of the classes of a classifier. A model with a classification head reads its names itself."""
_TRAINING = (
    "attention_dropout attention_probs_dropout_prob attn_pdrop aux_loss_alpha aux_loss_coef dropout embd_dropout "
    "embd_pdrop gradient_checkpointing hidden_dropout hidden_dropout_prob ignore_index initializer_factor "
    "initializer_range keys_to_ignore_at_inference label_smoothing layerdrop loss_type neftune_noise_alpha "
    "output_router_logits pretraining_tp resid_dropout resid_pdrop router_aux_loss_coef router_jitter_noise "
    "router_z_loss_coef seq_aux use_gradient_checkpointing z_loss_coef"
)
"""Keys that have an effect in training only. ``pretraining_tp`` splits products, and the sums stay the same."""
_EXECUTION = (
    "_attn_implementation _attn_implementation_autoset _attn_implementation_internal _experts_implementation "
    "_experts_implementation_internal _flash_attn_2_enabled attn_implementation cache_config cache_implementation "
    "chunk_size_feed_forward compile_config continuous_batching_config disable_compile dtype experts_implementation "
    "is_decoder low_cpu_mem_usage max_cache_len output_attentions output_hidden_states output_logits output_scores "
    "prefill_chunk_size return_dict return_dict_in_generate tf_legacy_loss tie_encoder_decoder "
    "tie_last_hidden_states torch_dtype torchscript use_bfloat16 use_cache use_flash_attention "
    "use_flash_attention_2 use_kernels use_return_dict use_sliding_window xla_device"
)
"""Keys that say how another program runs the model, and which results it returns. ``sliding_window`` alone defines the
window."""
_TOKENS = (
    "add_bos_token add_eos_token begin_suppress_tokens bos_token bos_token_id chat_template cls_token_id "
    "decoder_start_token_id eos_token eos_token_id forced_bos_token_id forced_eos_token_id mask_token_id "
    "max_seq_len max_seq_length max_sequence_length model_max_length pad_token pad_token_id padding_side prefix "
    "sep_token_id seq_length suppress_tokens tokenizer_class tokenizer_file tokenizer_model_max_length "
    "tokenizer_name tokenizer_padding_side truncation_side unk_token unk_token_id"
)
"""Keys of special tokens, and of lengths for which a tokenizer was configured. Other modules read the ids that begin
and end a text."""
_SAMPLING = (
    "assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind "
    "bad_words_ids constraints diversity_penalty do_sample dola_layers early_stopping encoder_no_repeat_ngram_size "
    "encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids "
    "frequency_penalty generation_config guidance_scale is_assistant length_penalty low_memory "
    "max_matching_ngram_size max_length max_new_tokens max_time min_length min_new_tokens min_p "
    "no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams "
    "num_return_sequences penalty_alpha presence_penalty prompt_lookup_num_tokens remove_invalid_values "
    "renormalize_logits repetition_penalty sequence_bias speculation_type stop_strings target_lookbehind "
    "temperature token_healing top_h top_k top_p typical_p use_mtp watermarking_config"
)
"""Keys of sampling defaults that older programs write to config.json; only generation_config.json is read for them."""

HARMLESS = frozenset(" ".join((_RECORDS, _LABELS, _TRAINING, _EXECUTION, _TOKENS, _SAMPLING)).split())
"""Keys that do not change the computation, whatever their value."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "activation_function": ("silu", "swish"),
    "causal": (True,),
    "embedding_multiplier": (1.0,),
    "hidden_activation": ("silu", "swish"),
    "is_causal": (True,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "norm_topk_prob": (True,),
    "partial_rotary_factor": (1.0,),
    "residual_multiplier": (1.0,),
    "rotary_pct": (1.0,),
    "use_rms_norm": (True,),
}
"""Keys of other architectures, and the values that describe what the architectures of this build compute."""

FULL, SLIDING = "full_attention", "sliding_attention"


def problem(keys: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the first of ``keys`` that may change the computation; None if there is none.

    Args:
        keys: the keys of a config.json that its reader did not take, and their values.
    """
    for name in sorted(keys.keys() - HARMLESS):
        value = keys[name]
        if value is not None and name in NEUTRAL:
            if value not in NEUTRAL[name]:
                supported = " or ".join(map(repr, NEUTRAL[name]))
                return f"the key {name!r} is {value!r}, which changes the computation; only {supported} is supported"
        elif value not in (None, False, "", [], {}):
            return f"the key {name!r} is not known and may change the computation; delete it if it does not"
    return None


def layer_types_problem(layer_types: Any, layers: int, window: int | None, max_length: int) -> str | None:
    """Return what is wrong with ``layer_types``, a list with the kind of attention of each layer; None if nothing is.

    All layers of a model of this build attend in the same way: within a window, or to the whole text. A window of
    ``max_length`` tokens or more is both.

    Args:
        layer_types: the value of the key; None if it is absent.
        layers: the number of layers.
        window: the sliding window of all layers in tokens; None if there is none.
        max_length: the maximum tokens of a text.
    """
    if layer_types is None:
        return None
    if not isinstance(layer_types, Sequence) or isinstance(layer_types, str) or len(layer_types) != layers:
        return f"layer_types is {layer_types!r}, expected one entry for each of the {layers} layers"
    if window is not None and window >= max_length:
        kinds: tuple[str, ...] = (FULL, SLIDING)
    else:
        kinds = (FULL,) if window is None else (SLIDING,)
    other = [kind for kind in layer_types if kind not in kinds]
    if other:
        having = "no sliding_window" if window is None else f"a sliding_window of {window}"
        return f"layer_types has {other[0]!r}, but with {having} only {kinds[0]!r} for all layers is supported"
    return None


def whole(value: Any) -> Any:
    """Return a float without a fraction, such as 1024.0, as an integer; return any other value unchanged."""
    return int(value) if type(value) is float and value.is_integer() else value
