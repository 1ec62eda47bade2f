"""The model is the one that it says: it has the logits of transformers' GPT-2, Llama, Mistral and
Qwen with the same weights; and keeps its own promises on caches, documents and recompute."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megapipe import kernels
from megapipe.data_parallel.buffer import build_buffers
from megapipe.distributed.mesh import Axis
from megapipe.kernel_choice import KernelChoice
from megapipe.layout.parameters import shard_of
from megapipe.microbatch import MicroBatch
from megapipe.models.gpt.attention import KeyValueCache
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.model import GPTStage
from megapipe.models.gpt.parameters import parameter_table
from megapipe.models.gpt.presets import PRESETS
from megapipe.parameter_role import Role
from megapipe.stage import StageBuild
from megapipe.tensor_parallel.parameter import StageParameters, sharded_parameters
from megapipe.tensor_parallel.weight_grad import WeightGradStore

CPU, FLOAT64 = torch.device("cpu"), torch.float64
LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
GPT2_NAMES = {
    "embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "attention.output": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def build(model: GPTConfig, weights: dict[str, Tensor], *, recompute: bool = False) -> GPTStage:
    """The whole model on one process, with given global weights, in float64."""
    shards = {
        spec.name: shard_of(spec, tensor_rank=0, tensor_size=1, sequence_parallel=False)
        for spec in parameter_table(model)
    }
    whole = StageBuild(
        model=model,
        layers=range(model.num_layers),
        first=True,
        last=True,
        parameters=StageParameters(shards, dtype=FLOAT64, device=CPU),
        tensor=Axis("tensor"),
        sequence_parallel=False,
        recompute=recompute,
        dtype=FLOAT64,
        device=CPU,
        seed=0,
        store=WeightGradStore(),
        kernels=KernelChoice("torch", "torch", "torch"),
    )
    stage = GPTStage(model, whole)
    for parameter in sharded_parameters(stage):
        for shard in parameter.shards:
            shard.view(parameter.data).copy_(weights[shard.name])
    build_buffers([stage], [Role], main_dtype=FLOAT64, replicas=1)
    return stage


def random_weights(model: GPTConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        spec.name: torch.randn(spec.shape, dtype=FLOAT64, generator=generator) * 0.2
        for spec in parameter_table(model)
    }


def hugging_face(preset: str, model: GPTConfig) -> torch.nn.Module:
    """transformers' model of the same shape, with random weights."""
    import transformers as hf

    common = {"vocab_size": model.vocab_size, "tie_word_embeddings": model.tie_embeddings}
    if model.position == "learned":
        config = hf.GPT2Config(
            n_positions=model.max_sequence_length,
            n_embd=model.hidden_size,
            n_layer=model.num_layers,
            n_head=model.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    else:
        kinds = {
            "llama": hf.LlamaConfig,
            "mistral": hf.MistralConfig,
            "qwen2": hf.Qwen2Config,
            "qwen3": hf.Qwen3Config,
        }
        extra = {"sliding_window": model.sliding_window} if "mistral" in preset else {}
        config = kinds[preset.split("-")[0]](
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            max_position_embeddings=model.max_sequence_length,
            rms_norm_eps=model.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            **extra,
            **common,
        )
    theirs = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    generator = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():
        noise = torch.randn(parameter.shape, dtype=FLOAT64, generator=generator)
        parameter.data.copy_(noise * 0.2 + (parameter.dim() == 1))
    return theirs.eval()


def weights_of(theirs: torch.nn.Module, model: GPTConfig) -> dict[str, Tensor]:
    """Their weights under our names."""
    state = {name: tensor.detach() for name, tensor in theirs.state_dict().items()}
    gpt2 = model.position == "learned"
    names, layers = (GPT2_NAMES, "transformer.h") if gpt2 else (LLAMA_NAMES, "model.layers")
    weights = {}
    for spec in parameter_table(model):
        prefix, _, kind = spec.name.rpartition(".")
        layer = spec.places[0]
        part = prefix.removeprefix(f"layers.{layer}.")
        place = f"{layers}.{layer}." if isinstance(layer, int) else ""
        linear = gpt2 and part.startswith(("attention.", "mlp.")) and kind == "weight"
        if gpt2 and part in ("attention.q", "attention.k", "attention.v"):
            fused = state[f"{place}attn.c_attn.{kind}"]
            value = fused.chunk(3, dim=-1)["qkv".index(part[-1])]
        else:
            value = state[f"{place}{names[part]}.{kind}"]
        weights[spec.name] = value.t() if linear else value  # GPT-2's layers hold [in, out]
    return weights


MICRO = ["gpt2-micro", "llama-micro", "mistral-micro", "qwen2-micro", "qwen3-micro"]


@pytest.mark.parametrize("preset", MICRO)
def test_logits_are_those_of_transformers(preset: str) -> None:
    model = GPTConfig(**PRESETS[preset])
    theirs = hugging_face(preset, model)
    ours = build(model, weights_of(theirs, model)).eval()
    tokens = torch.arange(80).view(2, 40) * 31 % model.vocab_size
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = ours.logits(tokens).transpose(0, 1)
    assert expected.std() > 0.1
    # Their norms and rotary angles are float32 inside, in any dtype of the model.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("preset", ["gpt2-micro", "qwen3-micro", "mistral-micro"])
def test_a_cache_changes_nothing(preset: str) -> None:
    model = GPTConfig(**PRESETS[preset])
    stage = build(model, random_weights(model)).eval()
    tokens = torch.arange(30).view(1, 30) * 7 % model.vocab_size
    with torch.no_grad():
        whole = stage.logits(tokens)
        caches = [KeyValueCache() for _ in range(model.num_layers)]
        parts = [stage.logits(part, caches) for part in tokens.split([20, 1, 1, 5, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts), whole)


def loss_and_gradients(stage: GPTStage, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    for parameter in stage.parameters():
        parameter.main_grad.zero_()
    loss = stage(None, batch)
    loss.backward()
    return loss.detach(), {
        shard.name: shard.view(parameter.main_grad).clone()
        for parameter in sharded_parameters(stage)
        for shard in parameter.shards
    }


@pytest.mark.parametrize("preset", MICRO)
def test_masked_documents_are_as_if_each_were_alone(preset: str) -> None:
    """Three documents packed into one sequence give the sum of their own losses and gradients."""
    model = GPTConfig(**PRESETS[preset])
    stage = build(model, random_weights(model))
    tokens = torch.arange(49).view(1, 49) * 13 % model.vocab_size
    cuts = [0, 11, 12, 48]
    documents = torch.tensor(
        [[sum(position >= cut for cut in cuts[1:]) for position in range(48)]], dtype=torch.int32
    )
    samples = torch.zeros(1, dtype=torch.long)
    packed = MicroBatch(tokens[:, :-1], tokens[:, 1:], documents, samples)
    loss, gradients = loss_and_gradients(stage, packed)

    alone = [
        loss_and_gradients(
            stage, MicroBatch(tokens[:, a:b], tokens[:, a + 1 : b + 1], None, samples)
        )
        for a, b in pairwise(cuts)
    ]
    torch.testing.assert_close(loss, torch.stack([one for one, _ in alone]).sum())
    for name, gradient in gradients.items():
        expected = torch.stack([grads[name] for _, grads in alone]).sum(0)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11)


def test_all_layers_share_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as large as the sequence is long, squared, and kept for the backward pass."""
    model = GPTConfig(**PRESETS["llama-micro"])
    stage = build(model, random_weights(model))
    masks, attention = [], kernels.attention

    def watched(*tensors: Tensor, **options: Any) -> Tensor:
        masks.append(options["mask"])
        return attention(*tensors, **options)

    monkeypatch.setattr(kernels, "attention", watched)
    tokens = torch.arange(9).view(1, 9)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]])
    stage(None, MicroBatch(tokens[:, :-1], tokens[:, 1:], documents, torch.tensor([0])))
    assert len(masks) == model.num_layers
    assert masks[0].shape == (1, 1, 8, 8)
    assert all(mask is masks[0] for mask in masks)


@pytest.mark.parametrize("preset", ["gpt2-micro", "llama-micro"])
def test_recompute_keeps_every_bit_dropout_included(preset: str) -> None:
    shape = PRESETS[preset] | {"dropout": 0.2, "attention_dropout": 0.2}
    model = GPTConfig(**shape)
    weights = random_weights(model)
    tokens = torch.arange(34).view(2, 17) * 5 % model.vocab_size
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], None, torch.tensor([3, 4]))
    plain = loss_and_gradients(build(model, weights), batch)
    again = loss_and_gradients(build(model, weights, recompute=True), batch)
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(plain[1][name], again[1][name]) for name in plain[1])
    other = MicroBatch(batch.tokens_BS, batch.targets_BS, None, torch.tensor([3, 5]))
    assert not torch.equal(plain[0], loss_and_gradients(build(model, weights), other)[0])
