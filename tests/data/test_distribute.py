"""Tokens are bitwise the same in every layout, on every rank that needs them; errors reach all."""

import hashlib
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megapipe.config import Config, load_config
from megapipe.data import distribute
from megapipe.data.distribute import ReplicaFeed, SlowReader
from megapipe.data.feed import Batch, BatchFeed
from megapipe.data.order.record import RECORD
from megapipe.data.order.rows import Name, PartOfUnit, RowStore
from megapipe.data.splitters import Raw
from megapipe.distributed.mesh import Mesh, build_mesh
from megapipe.errors import DataError
from megapipe.layout.axes import Axes
from megapipe.layout.layout import resolve
from megapipe.microbatch import MicroBatch
from megapipe.models.families import FAMILIES
from megapipe.step_sums import StepSums
from megapipe.train.waiting import Waiting
from tests.ranks import run_ranks

STEPS = 50
Seen = list[dict[int, dict[str, str]]]
"""For each step: sample -> what ("tokens", "targets", "documents") -> hash."""


def configured(corpus: Path, *overrides: str) -> Config:
    words = ["--data.mask_documents=true", "--train.global_batch_size=8", *overrides]
    return load_config(corpus / "run.toml", words, FAMILIES)


def open_feed(
    config: Config, mesh: Mesh, *, validation: bool = False, other: ReplicaFeed | None = None
) -> ReplicaFeed:
    layout = resolve(config, mesh.axes, FAMILIES["gpt"])
    return ReplicaFeed(layout, mesh, validation=validation, other=other)


def hashes(batches: Sequence[MicroBatch]) -> dict[int, dict[str, str]]:
    found: dict[int, dict[str, str]] = {}
    for batch in batches:
        parts = {
            "tokens": batch.tokens_BS,
            "targets": batch.targets_BS,
            "documents": batch.documents_BS,
        }
        for row, sample in enumerate(batch.samples_B.tolist()):
            found[sample] = {
                name: hashlib.sha256(tensor[row].contiguous().numpy().tobytes()).hexdigest()
                for name, tensor in parts.items()
                if tensor is not None
            }
    return found


def _mesh(layout: tuple[int, int, int]) -> Mesh:
    pipeline, data, tensor = layout
    return build_mesh(Axes.of(pipeline=pipeline, data=data, tensor=tensor), torch.device("cpu"))


def _read(config: Config, layout: tuple[int, int, int]) -> tuple[tuple[int, int], Seen]:
    """((pipeline rank, data rank), what this rank saw)."""
    mesh = _mesh(layout)
    feed = open_feed(config, mesh)
    seen = [hashes(feed.next()) for _ in range(STEPS)]
    feed.close()
    return (mesh.pipeline.rank, mesh.batch.rank), seen


@pytest.fixture(scope="module")
def alone(corpus: Path) -> Seen:
    """What one process sees."""
    _, seen = _read(configured(corpus), (1, 1, 1))
    rows = [row for step in seen for row in step.values()]
    assert len({row["tokens"] for row in rows}) == len(rows) == 8 * STEPS
    return seen


@pytest.mark.parametrize("layout", [(1, 2, 1), (1, 4, 1), (1, 1, 2), (2, 1, 1), (2, 2, 1)], ids=str)
def test_the_tokens_of_50_steps_are_the_same_in_every_layout(
    corpus: Path, alone: Seen, layout: tuple[int, int, int]
) -> None:
    pipeline, data, tensor = layout
    ranks = run_ranks(_read, pipeline * data * tensor, configured(corpus), layout)
    for (stage, replica), seen in ranks:
        needs = _needs(stage, pipeline)
        for step, rows in enumerate(seen):
            first = step * 8
            assert sorted(rows) == list(range(first + replica, first + 8, data))
            for sample, row in rows.items():
                assert row == {name: alone[step][sample][name] for name in needs}


def _needs(stage: int, stages: int) -> set[str]:
    """Tokens on the first stage only, targets on the last only, documents on all."""
    needs = {"documents"}
    if stage == 0:
        needs.add("tokens")
    if stage == stages - 1:
        needs.add("targets")
    return needs


def _stop_and_go_on(config: Config, layouts: list[tuple[int, int, int]]) -> Seen:
    """Each layout reads five steps from where the one before stopped. Rank 0 tells the others the
    state, as a checkpoint would."""
    seen: Seen = []
    state = None
    for layout in layouts:
        feed = open_feed(config, _mesh(layout))
        if state is not None:
            feed.load(state)
        for _ in range(5):
            seen.append(hashes(feed.next()))
        told = [feed.state()]
        dist.broadcast_object_list(told, src=0)
        state = told[0]
        feed.close()
    return seen


def test_data_goes_on_exactly_in_another_layout(corpus: Path, alone: Seen) -> None:
    layouts = [(1, 4, 1), (1, 1, 4), (2, 2, 1), (1, 2, 2), (1, 4, 1)]
    for seen in run_ranks(_stop_and_go_on, 4, configured(corpus), layouts):
        for step, rows in enumerate(seen):
            for sample, row in rows.items():
                expected = {name: alone[step][sample][name] for name in row}
                assert row == expected, f"step {step}, sample {sample}"


def _validation(config: Config, layout: tuple[int, int, int]) -> tuple[int, Seen]:
    mesh = _mesh(layout)
    feed = open_feed(config, mesh, validation=True)
    first = [hashes(feed.next()) for _ in range(2)]
    feed.restart()
    again = [hashes(feed.next()) for _ in range(2)]
    feed.close()
    assert again == first, "each validation loss is of the same text"
    return mesh.batch.rank, first


def test_validation_text_is_the_same_in_every_layout_and_none_of_the_training_text(
    corpus: Path, alone: Seen
) -> None:
    config = configured(corpus, "--data.validation_fraction=0.2")
    _, whole = _validation(config, (1, 1, 1))
    for _, seen in run_ranks(_validation, 2, config, (1, 2, 1)):
        for step, rows in enumerate(seen):
            assert rows == {sample: whole[step][sample] for sample in rows}
    _, training = _read(config, (1, 1, 1))
    trained = {row["tokens"] for step in training for row in step.values()}
    assert not trained & {row["tokens"] for step in whole for row in step.values()}


def _fails(config: Config, layout: tuple[int, int, int]) -> str:
    try:
        open_feed(config, _mesh(layout))
    except DataError as error:
        return str(error)
    return "no error"


def test_the_readers_error_is_raised_on_every_rank(corpus: Path) -> None:
    config = configured(corpus, "--data.sources.0.path=none/*.txt")
    said = run_ranks(_fails, 4, config, (2, 1, 2))
    assert len(set(said)) == 1
    assert "matches no file" in said[0]


def _second_reader_fails(config: Config, without_files: Config) -> str:
    """On two replicas of two ranks, 0 and 2, 1 and 3; rank 1's machine does not have the files."""
    return _fails(without_files if dist.get_rank() == 1 else config, (2, 2, 1))


def test_an_error_of_one_reader_is_raised_on_all_replicas(corpus: Path) -> None:
    without_files = configured(corpus, "--data.sources.0.path=none/*.txt")
    said = run_ranks(_second_reader_fails, 4, configured(corpus), without_files)
    assert len(set(said)) == 1
    assert "matches no file" in said[0]


def _fails_in_step_2(config: Config, layout: tuple[int, int, int]) -> tuple[list[bool], str]:
    """(whether this rank's feed says so in each step, the error), where the readers can't give
    their third batch."""
    give = BatchFeed.__next__

    def next_batch(self: BatchFeed) -> Batch:
        if self.state_dict()["step"] == 2:
            raise DataError("row 7: malformed")
        return give(self)

    BatchFeed.__next__ = next_batch  # type: ignore[method-assign]  # in a process of its own
    mesh = _mesh(layout)
    feed = open_feed(config, mesh)
    failed = []
    for _ in range(3):
        batches = feed.next()
        failed.append(feed.failed)
    assert all(batch.documents_BS is not None for batch in batches)
    assert not any(batch.documents_BS.any() for batch in batches if batch.documents_BS is not None)
    feed.take_back()
    assert feed.state().get("step", 2) == 2
    error = feed.shared_failure()
    feed.close()
    return failed, f"{type(error).__name__}: {error}"


def test_a_batch_that_can_not_be_read_is_known_to_the_reader_and_then_told(corpus: Path) -> None:
    """In the step's own reduction, with `failed`; the other rank goes through the step as well."""
    reader, other = run_ranks(_fails_in_step_2, 2, configured(corpus), (2, 1, 1))
    assert reader == ([False, False, True], "DataError: row 7: malformed")
    assert other == ([False, False, False], "DataError: row 7: malformed")


def test_the_record_of_the_data_leaves_a_folder_of_the_users_alone(
    corpus: Path, tmp_path: Path
) -> None:
    """Where people train in the directory that their data lies in, as data/web.json."""
    theirs = tmp_path / "data" / "web.json"
    theirs.parent.mkdir()
    theirs.write_text("{}")
    config = configured(corpus, f"--train.run_dir={tmp_path}", "--data.sources.0.name=web")
    feed = open_feed(config, _mesh((1, 1, 1)))
    feed.next()
    feed.close()
    assert theirs.read_text() == "{}"
    assert (tmp_path / RECORD / "web.json").exists()


def test_an_error_of_the_device_is_not_one_of_the_text(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(mesh: Mesh, wire: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    feed = open_feed(configured(corpus), _mesh((1, 1, 1)))
    monkeypatch.setattr(distribute, "_broadcast", broken)
    with pytest.raises(RuntimeError, match="CUDA error"):
        feed.next()
    assert not feed.failed
    feed.close()


def test_validation_rows_of_the_same_files_open_them_once(corpus: Path) -> None:
    config = configured(corpus, "--data.validation_fraction=0.2")
    feed = open_feed(config, _mesh((1, 1, 1)))
    validation = open_feed(config, _mesh((1, 1, 1)), validation=True, other=feed)
    assert feed.reader is not None
    assert validation.reader is not None
    for own, others in zip(validation.reader.sources, feed.reader.sources, strict=True):
        assert own is others
    _, alone = _validation(config, (1, 1, 1))
    assert [hashes(validation.next()) for _ in range(2)] == alone
    feed.close()
    validation.close()


def _one_disk_is_slow(config: Config) -> tuple[list[SlowReader | None], list[str]]:
    """On two replicas, of which the second reads one source slowly."""
    read = RowStore.row

    def slow(self: RowStore, name: Name, part: PartOfUnit, number: int) -> Raw | None:
        if dist.get_rank() == 1 and name[0] == "far":
            time.sleep(0.1)
        return read(self, name, part, number)

    RowStore.row = slow  # type: ignore[method-assign]  # in a process of its own
    mesh = _mesh((1, 2, 1))
    feed = open_feed(config, mesh)
    sums = StepSums(torch.device("cpu"), mesh.world)
    feed.register(sums)
    waiting, slowest, lines = Waiting(), [], []
    for step in range(20):
        began = time.perf_counter()
        feed.next()
        slowest.append(feed.slowest(sums.reduce(feed.given())))
        line = waiting.after(step + 1, slowest[-1], time.perf_counter() - began)
        lines += [line] if line else []
    feed.close()
    return slowest, lines


def test_the_reader_that_others_wait_for_is_named_within_20_steps(corpus: Path) -> None:
    words = ["--data.prefetch=1", "--data.sources.1.name=far", "--data.sources.1.documents=line"]
    config = configured(corpus, *words, f"--data.sources.1.path={corpus}/text/*.txt")
    found = run_ranks(_one_disk_is_slow, 2, config)
    for slowest, (line,) in found:
        waited: defaultdict[tuple[int, str], float] = defaultdict(float)
        for slow in slowest:
            assert slow is not None
            waited[slow.replica, slow.source] += slow.wait_seconds
        assert max(waited, key=waited.__getitem__) == (1, "far"), waited
        assert all(part in line for part in ("replica 1", '"far"', "/text/"))
