"""Configs of runs that start from another model, and a small model of transformers."""

from functools import partial
from pathlib import Path

import torch
import transformers

from megapipe.config import Config, load_config
from megapipe.conversion.model_at import lend_model
from megapipe.models.families import FAMILIES
from tests.config.examples import write

TOKENS, STEPS = 131, 20
MODEL = """\
[model]
num_layers = 2
hidden_size = 8
num_heads = 2
vocab_size = 11
max_sequence_length = 16

"""
TEXT = """\
[train]
run_dir = "run"
steps = 20
global_batch_size = 4
sequence_length = 16
precision = "fp32"

[optimizer]
learning_rate = 3e-3
warmup_steps = 2
schedule = "constant"
clip_grad_norm = 0.5

[data]
tokenizer = "tokenizer.json"
streams = 4

[[data.sources]]
name = "text"
path = "text/*.txt"
"""


def save_llama(folder: Path) -> Path:
    """The directory of a small model of transformers."""
    torch.manual_seed(5)
    shape = transformers.LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def make_config(folder: Path, load_from: Path, *words: str) -> Config:
    """A run in `folder` whose [model] comes from the model that is loaded."""
    given = [f"--train.run_dir={folder}/run", f"--checkpoint.load_from={load_from}", *words]
    lender = partial(lend_model, families=FAMILIES)
    return load_config(write(folder, TEXT), given, FAMILIES, lender)
