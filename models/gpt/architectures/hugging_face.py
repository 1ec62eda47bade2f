"""What all of Hugging Face's configs and weight names have in common."""

from typing import Any

from megapipe.config.problems import show
from megapipe.layout.foreign_config import ForeignConfig
from megapipe.models.gpt.config import GPTConfig, RopeScaling

ABOUT_TEXT = (
    "_name_or_path",
    "_attn_implementation_autoset",
    "architectures",
    "begin_suppress_tokens",
    "bos_token_id",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "label2id",
    "model_type",
    "pad_token_id",
    "prefix",
    "problem_type",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "transformers.js_config",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
)
"""Keys that say nothing of what the network computes: token ids, metadata, settings of text
generation and of other heads."""

GENERATION = (
    "bad_words_ids",
    "chunk_size_feed_forward",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "temperature",
    "tf_legacy_loss",
    "top_k",
    "top_p",
    "torchscript",
    "typical_p",
)
"""Keys that old versions of transformers wrote into every config."""


def read_common(config: ForeignConfig, name: str, model_type: str) -> None:
    """Ask for the keys of every config."""
    config.require("model_type", model_type, model_type)
    config.require("architectures", [name], [name])
    for key, default in (
        ("is_decoder", False),
        ("is_encoder_decoder", False),
        ("add_cross_attention", False),
        ("cross_attention_hidden_size", None),
        ("tie_encoder_decoder", False),
    ):
        config.require(key, default, default)
    config.require("is_causal", True, True)
    config.require("pruned_heads", {}, {})
    config.ignore(ABOUT_TEXT)
    config.ignore(GENERATION)


def read_heads(
    config: ForeignConfig, kv_heads: int | None, head_dim: int | None = None
) -> dict[str, Any]:
    """Our keys of [model] for the width and the heads. Where the config lacks them, there are
    `kv_heads` (None: as many as heads) of width `head_dim` (None: hidden size / heads)."""
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    width = config.optional_count("head_dim") or head_dim
    if width is None and hidden % heads and not config.problems:
        config.problem(
            "hidden_size",
            f"= {hidden} is no multiple of num_attention_heads = {heads}, and there is no head_dim",
        )
    return {
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": config.optional_count("num_key_value_heads", kv_heads) or heads,
        "head_dim": width or hidden // heads,
    }


def read_dropout(config: ForeignConfig, residual: str, embedding: str, default: float) -> float:
    """The dropout of residual branches and embedding, which here have the same."""
    dropout, other = config.rate(residual, default), config.rate(embedding, default)
    if dropout != other:
        config.problem(embedding, f"= {other} and {residual} = {dropout} are one number here")
    return dropout


def read_rope(config: ForeignConfig) -> dict[str, Any]:
    """Our keys of [model] for rotary positions.

    Version 5 of transformers writes them all into `rope_parameters`; version 4 knows `rope_theta`
    and `rope_scaling`, which wins where both are there.
    """
    theta = config.positive("rope_theta", 10000.0)
    config.require("partial_rotary_factor", 1.0, 1.0, 1)
    config.require("rope_interleaved", False, False)
    kept: dict[str, Any] = {"position": "rope", "rope_theta": theta, "rope_scaling": None}
    for key in ("rope_parameters", "rope_scaling"):
        table = config.table(key)
        if table is not None:
            kept |= _read_rope_table(table, theta)
            config.join(table)
    return kept


def _read_rope_table(table: ForeignConfig, theta: float) -> dict[str, Any]:
    kind = table.take("rope_type", str, table.take("type", str, "default"))
    theta = table.positive("rope_theta", theta)
    table.require("partial_rotary_factor", 1.0, 1.0, 1)
    scaling = None
    if kind == "llama3":
        scaling = _read_llama3(table)
    elif kind != "default":
        table.problem(
            "rope_type",
            f'= {show(kind)} is not supported (supported: "default" or "llama3")',
        )
    return {"rope_theta": theta, "rope_scaling": scaling}


def _read_llama3(table: ForeignConfig) -> RopeScaling | None:
    """Llama 3's scaling; None where its factor is 1, which changes nothing."""
    factor = table.positive("factor")
    low, high = table.positive("low_freq_factor"), table.positive("high_freq_factor")
    original = table.count("original_max_position_embeddings")
    if factor < 1:
        table.problem("factor", f"= {factor} is not supported (supported: 1 or more)")
    if low >= high:
        table.problem("low_freq_factor", f"= {low} is not below high_freq_factor = {high}")
    if table.problems or factor == 1:
        return None
    return RopeScaling(
        factor=factor,
        low_frequency_factor=low,
        high_frequency_factor=high,
        original_max_sequence_length=original,
    )


def write_shape(model: GPTConfig, name: str, model_type: str) -> dict[str, object]:
    """The keys that are called alike wherever positions are rotary."""
    return {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_sequence_length,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": model.attention_dropout,
        **_write_rope(model),
    }


def _write_rope(model: GPTConfig) -> dict[str, object]:
    """Rotary positions in the words of version 5 and of version 4 of transformers."""
    scaling: dict[str, object] | None = None
    if model.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": model.rope_scaling.factor,
            "low_freq_factor": model.rope_scaling.low_frequency_factor,
            "high_freq_factor": model.rope_scaling.high_frequency_factor,
            "original_max_position_embeddings": model.rope_scaling.original_max_sequence_length,
        }
    return {
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            "rope_theta": model.rope_theta,
            **(scaling or {"rope_type": "default"}),
        },
    }
