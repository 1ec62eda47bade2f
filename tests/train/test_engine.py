"""One engine step: what torch's own clipping and AdamW make of the same gradients, dropout off in
validation, the bfloat16 path, and losses by source."""

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megapipe.config import Config, load_config
from megapipe.data.synthetic import synthetic_tokens
from megapipe.distributed.mesh import Mesh
from megapipe.microbatch import IGNORED_TARGET, MicroBatch
from megapipe.models.families import FAMILIES
from megapipe.pipeline.p2p import gloo_channels
from megapipe.step_sums import Given, StepPart, StepSums
from megapipe.train.engine import Engine
from megapipe.train.source_metrics import SOURCE_LOSSES, SOURCE_TOKENS
from tests.layouts import engine_of, layout_of, mesh_of
from tests.ranks import run_ranks

CONFIG = Path(__file__).parents[1] / "configs" / "llama_shape.toml"
CPU = torch.device("cpu")


def config(*words: str) -> Config:
    return load_config(CONFIG, ["--parallel.data", "1", *words], FAMILIES)


def named(engine: Engine, kind: str) -> dict[str, Tensor]:
    """Copies of the global tensors of an engine that has all of them whole."""
    return {
        shard.name: view.clone()
        for buffer in engine.buffers
        for shard, view in buffer.shards(getattr(buffer, kind))
    }


class Rows(StepPart):
    """Gives quantities of its own in each step."""

    def register(self, sums: StepSums) -> None:
        sums.register("rows")
        sums.register("kinds", 2)

    def given(self) -> dict[str, Given]:
        return {"rows": 3, "kinds": {0: 4, 1: 5}}


class Loss(StepPart):
    """Gives a quantity that is the engine's."""

    def given(self) -> dict[str, Given]:
        return {"loss": 3}


def test_a_part_can_not_give_what_another_gives() -> None:
    engine = engine_of(config())
    engine.join(Loss())
    tokens = synthetic_tokens(engine.config)(0, Mesh.single(CPU))
    with pytest.raises(AssertionError, match=r"^loss given by two parts"):
        engine.train_step(tokens, 0.01)


@pytest.mark.parametrize("limit", [0.0, 0.05, 1e6])
def test_a_step_is_torchs_clipping_and_adamw(limit: float) -> None:
    given = config(f"--optimizer.clip_grad_norm={limit}")
    tokens = synthetic_tokens(given)(0, Mesh.single(CPU))
    probe = engine_of(given)
    probe.zero_gradients()
    probe._training.run(tokens)
    gradients = named(probe, "gradients")
    decayed = {shard.name for b in probe.buffers[:1] for shard, _ in b.shards(b.weights)}
    parameters = {name: nn.Parameter(value) for name, value in named(probe, "weights").items()}
    for name, parameter in parameters.items():
        parameter.grad = gradients[name] / (16 * given.train.sequence_length)
    norm = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
    if limit:
        # torch divides by the norm + 1e-6, where the engine divides by the norm.
        nn.utils.clip_grads_with_norm_(parameters.values(), limit, norm - 1e-6)
    rates = {"lr": 0.01, "betas": given.optimizer.betas, "eps": given.optimizer.epsilon}
    groups = [
        {"params": [p for n, p in parameters.items() if (n in decayed) == decays]}
        | {"weight_decay": given.optimizer.weight_decay if decays else 0.0}
        for decays in (True, False)
    ]
    torch.optim.AdamW(groups, **rates).step()

    engine = engine_of(given)
    engine.join(Rows())
    result = engine.train_step(tokens, 0.01)
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-12)
    assert (result.clip < 1) == (limit == 0.05), "the limits are on both sides of the norm"
    assert (result.totals["rows"], result.totals.all("kinds")) == (3, [4, 5])
    for name, weight in named(engine, "weights").items():
        torch.testing.assert_close(weight, parameters[name].data, rtol=1e-9, atol=1e-12)


def test_without_a_batch_nothing_is_learned() -> None:
    """The reader of this rank has failed, and the tokens are stand-ins."""
    engine = engine_of(config())
    tokens = synthetic_tokens(engine.config)(0, Mesh.single(CPU))
    before, steps = named(engine, "weights"), engine.optimizer.steps
    assert not engine.train_step(tokens, 0.01, ready=False).taken
    assert engine.validation_loss(tokens, ready=False) is None
    assert engine.optimizer.steps == steps
    for name, weight in named(engine, "weights").items():
        assert torch.equal(weight, before[name]), name
    assert engine.train_step(tokens, 0.01).taken
    assert engine.optimizer.steps == steps + 1


def test_validation_has_no_dropout() -> None:
    dropout = ("--model.dropout=0.3", "--model.attention_dropout=0.3")
    with_dropout, without = engine_of(config(*dropout)), engine_of(config())
    tokens = synthetic_tokens(without.config)(0, Mesh.single(CPU))
    found = [engine.validation_loss(tokens) for engine in (with_dropout, without)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0]["loss"] == found[1]["loss"]
    for switch in dropout:
        trained = engine_of(config(switch)).train_step(tokens, 0.0).loss
        assert abs(trained - without.train_step(tokens, 0.0).loss) > 1e-4, switch


def bf16_gradients(given: Config) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Called on each rank: (start, gradient) of each shard that this rank holds."""
    engine = engine_of(given)
    engine.train_step(synthetic_tokens(given)(0, engine.mesh), 0.0)
    return {
        f"{shard.name} {shard.start}": (shard.start, view.clone())
        for buffer in engine.buffers
        for shard, view in buffer.shards(buffer.gradients)
        if view.numel() > 0
    }


LAYOUTS = {
    "one process": (1, ()),
    "tp2 pp2": (4, ("--parallel.tensor=2", "--parallel.pipeline=2")),
    "tp2 pp2 sp": (
        4,
        ("--parallel.tensor=2", "--parallel.pipeline=2", "--parallel.sequence_parallel=true"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_gradients_are_those_of_float64(layout: str) -> None:
    """8 microbatches summed in float32. Each rounding is 2^-9 relative; some twenty follow each
    other between a weight and the loss, and a sum of random ones grows with the root: 2^-9 * 5."""
    ranks, words = LAYOUTS[layout]
    exact = engine_of(config())
    exact.train_step(synthetic_tokens(exact.config)(0, Mesh.single(CPU)), 0.0)
    expected = named(exact, "gradients")
    given = config("--train.precision=bf16", *words)
    seen = set()
    for own in run_ranks(bf16_gradients, ranks, given):
        for label, (start, gradient) in own.items():
            name = label.split()[0]
            box = tuple(slice(s, s + n) for s, n in zip(start, gradient.shape, strict=True))
            assert gradient.dtype == torch.float32
            error = (gradient.double() - expected[name][box]).norm() / expected[name][box].norm()
            assert error < 0.02, (name, float(error))
            seen.add(name)
    assert seen == set(expected)


# --- Losses by source ----------------------------------------------------------------------------

THREE_SOURCES = [
    f"--data.sources.{number}={{name='more{number}', path='more.txt'}}" for number in (1, 2)
]
Z_LOSS = "--train.z_loss=1e-2"
FUSED = "--train.linear_cross_entropy=true"


def some_ignored(given: Config, mesh: Mesh, step: int = 0) -> list[MicroBatch]:
    """Synthetic batches in which every fifth target counts towards nothing."""
    batches = synthetic_tokens(given)(step, mesh)
    for batch in batches:
        assert batch.targets_BS is not None
        batch.targets_BS[:, ::5] = IGNORED_TARGET
    return batches


@pytest.mark.parametrize("words", [(), (FUSED, Z_LOSS)])
def test_losses_by_source_are_those_of_the_logits(words: tuple[str, ...]) -> None:
    """With the z-loss in training, without it in validation."""
    engine = engine_of(config(*THREE_SOURCES, *words))
    batches = some_ignored(engine.config, engine.mesh)
    (stage,) = engine.stages.values()
    with torch.no_grad():
        logits_SBV = [stage.logits(batch.tokens_BS) for batch in batches]
    logits = torch.cat([one.transpose(0, 1) for one in logits_SBV]).movedim(-1, 1)
    targets, sources = (
        torch.cat([getattr(batch, name) for batch in batches])
        for name in ("targets_BS", "sources_BS")
    )
    plain = F.cross_entropy(logits, targets, reduction="none")
    trained = plain + engine.config.train.z_loss * logits.logsumexp(1).square()
    counted = [(sources == source) & (targets != IGNORED_TARGET) for source in range(3)]
    for found, losses in (
        (engine.validation_loss(batches), plain),
        (engine.train_step(batches, 0.0).totals, trained),
    ):
        assert found is not None
        assert found.all(SOURCE_TOKENS) == [int(own.sum()) for own in counted]
        expected = [float(losses[own].sum()) for own in counted]
        assert found.all(SOURCE_LOSSES) == pytest.approx(expected, rel=1e-12)
        assert sum(found.all(SOURCE_LOSSES)) == pytest.approx(found["loss"], rel=1e-12)


def test_batches_may_leave_their_sources_out() -> None:
    """And their loss is the same bits."""
    engine = engine_of(config("--train.precision=fp32", *THREE_SOURCES))
    batches = some_ignored(engine.config, engine.mesh)
    nameless = [replace(batch, sources_BS=None) for batch in batches]
    named, plain = (engine.train_step(one, 0.0) for one in (batches, nameless))
    assert plain.totals.all(SOURCE_TOKENS) == [0.0] * 3
    assert (plain.loss, plain.grad_norm) == (named.loss, named.grad_norm)


def parts_and_whole(*configs: Config) -> list[tuple[float, float]]:
    """Called on each rank: the sum of the losses by source and the loss, of two steps each."""
    found = []
    for given in configs:
        engine = engine_of(given)
        for step in range(2):
            totals = engine.train_step(some_ignored(given, engine.mesh, step), 1e-2).totals
            assert sum(totals.all(SOURCE_TOKENS)) == totals["tokens"]
            found.append((sum(totals.all(SOURCE_LOSSES)), totals["loss"]))
    return found


def test_losses_by_source_add_up_in_narrow_precision() -> None:
    """On four ranks, with dropout and documents."""
    features = ("--model.dropout=0.1", "--data.mask_documents=true", *THREE_SOURCES)
    layouts = [
        ("tensor=2", "pipeline=2", "sequence_parallel=true"),
        ("tensor=2", "data=2"),
        ("pipeline=2", "virtual=2", "schedule=zb-v", "data=2"),
    ]
    configs = [
        config(
            "--train.precision=bf16", *features, *loss, *(f"--parallel.{word}" for word in words)
        )
        for words, loss in zip(layouts, [(FUSED, Z_LOSS), (Z_LOSS,), (FUSED,)], strict=True)
    ]
    for found in run_ranks(parts_and_whole, 4, *configs):
        assert len(found) == 6
        for parts, whole in found:
            assert parts == pytest.approx(whole, rel=1e-6)


# --- Ranks that are late -----------------------------------------------------------------------


def _waits_for_those_that_are_late() -> list[str]:
    """What becomes of a reduction over each group to which all but rank 0 come late: when the
    engine is patient, and then with a short limit."""
    given = config("--parallel.pipeline=3", "--model.tie_embeddings=true")
    mesh = mesh_of(given)
    engine = Engine(layout_of(given), mesh, gloo_channels(mesh))
    engine.wait_at_most(timedelta(milliseconds=200))
    with engine.patient():
        patient = []
        for group in mesh.groups:
            time.sleep(min(mesh.rank, 1))
            patient.append(_reduce(group))
    return patient + [_reduce_too_late(group, mesh.rank) for group in mesh.groups]


def _reduce_too_late(group: dist.ProcessGroup, rank: int) -> str:
    """The others come when rank 0 has given up, however slow the machine is."""
    store, key = dist.distributed_c10d._get_default_store(), f"rank 0 has left {group.group_name}"
    if rank > 0:
        store.wait([key], timedelta(minutes=5))
    found = _reduce(group)
    store.set(key, "")
    return found


def _reduce(group: dist.ProcessGroup) -> str:
    try:
        dist.all_reduce(torch.zeros(1), group=group)
    except RuntimeError as error:
        return "late" if "Timed out" in str(error) else "lost"
    return "done"


def test_a_rank_that_is_late_fails_a_step_but_no_save() -> None:
    """Over the groups of the mesh's axes, and that of the tied embedding: the first stage and the
    last."""
    first, middle, last = run_ranks(_waits_for_those_that_are_late, 3)
    assert first == ["done"] * 3 + ["late"] * 3
    for groups, others in ((3, last), (2, middle)):
        assert others[:groups] == ["done"] * groups
        assert len(others) == 2 * groups
        assert "done" not in others[groups:]
