"""The weight gradient's product: the Triton kernel against torch and float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapipe.kernels import UnsupportedError, WeightGradBackend, add_weight_grad
from megapipe.kernels import weight_grad as module
from tests.kernels.proof import assert_as_accurate, assert_same_bits, programs_in_reverse


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def added(
    main_grad: Tensor, grad_out: Tensor, inputs: Tensor, backend: WeightGradBackend
) -> list[Tensor]:
    result = main_grad.clone()
    add_weight_grad(result, grad_out, inputs, backend=backend)
    return [result]


def small_tiles(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "_settings", lambda *_: module.Settings(16, 32, 16, 4, 1))
    patch.setattr(module, "GROUP", 2)


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)


@pytest.mark.usefixtures("_small_tiles")
@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(0, 40),
    shape=st.one_of(
        st.tuples(st.integers(8, 50), st.integers(8, 70)),
        st.sampled_from([(1, 67), (65, 1), (2, 33)]),
    ),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_as_accurate_as_torch(tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """At least 64 numbers: of fewer, luck decides whose errors are larger."""
    rows, columns = shape
    main_grad = random((rows, columns), torch.float32, 0)
    grad_out, inputs = random((tokens, rows), dtype, 1), random((tokens, columns), dtype, 2)
    (kernel,) = added(main_grad, grad_out, inputs, "triton")
    exact = main_grad.double() + grad_out.double().t() @ inputs.double()
    assert_as_accurate([kernel], added(main_grad, grad_out, inputs, "torch"), [exact])


@pytest.mark.parametrize("few", [0, 128])
def test_the_tiles_that_run_on_gpus(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of each size, with edges; the factors are views of more dimensions."""
    monkeypatch.setattr(module, "FEW", few)
    grad_out = random((3, 30, 2 * 130), torch.float16, 1)[..., ::2]
    inputs = random((30, 3, 140), torch.float16, 2).transpose(0, 1)
    main_grad = random((130, 140), torch.float32, 0)
    (kernel,) = added(main_grad, grad_out, inputs, "triton")
    product = grad_out.double().flatten(0, 1).t() @ inputs.double().flatten(0, 1)
    reference = added(main_grad, grad_out, inputs, "torch")
    assert_as_accurate([kernel], reference, [main_grad.double() + product])


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (5, 2)])
def test_few_numbers_are_within_their_bound(shape: tuple[int, int]) -> None:
    """At most a rounding for each product and each addition, of the sum of magnitudes."""
    rows, columns = shape
    for tokens in (0, 1, 11, 40):
        main_grad = random(shape, torch.float32, 0)
        grad_out = random((tokens, rows), torch.float32, 1)
        inputs = random((tokens, columns), torch.float32, 2)
        (kernel,) = added(main_grad, grad_out, inputs, "triton")
        exact = main_grad.double() + grad_out.double().t() @ inputs.double()
        magnitude = main_grad.abs().double() + grad_out.abs().double().t() @ inputs.abs().double()
        assert ((kernel - exact).abs() <= (tokens + 1) * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize(("width", "tile"), [(130, (64, 128)), (2048, (128, 128))])
def test_few_tiles_are_smaller(width: int, tile: tuple[int, int]) -> None:
    assert module._settings(2, False, width, width)[:2] == tile


@pytest.mark.usefixtures("_small_tiles")
def test_any_order_and_what_is_not_finite() -> None:
    main_grad = random((40, 50), torch.float32, 0)
    grad_out, inputs = random((9, 40), torch.float32, 1), random((9, 50), torch.float32, 2)
    in_order = added(main_grad, grad_out, inputs, "triton")
    with programs_in_reverse():
        assert_same_bits(in_order, added(main_grad, grad_out, inputs, "triton"))
    inputs[3, 7] = torch.nan
    (found,) = added(main_grad, grad_out, inputs, "triton")
    assert found[:, 7].isnan().all()
    assert found.isnan().sum() == 40


@pytest.mark.usefixtures("_small_tiles")
def test_nothing_is_written_beyond_the_main_gradient() -> None:
    """In a buffer, other gradients follow. What is masked adds 0, which shows on -0.0 alone."""
    buffer = torch.full((64 + 17 * 35 + 64,), -0.0)
    main_grad = buffer[64:-64].view(17, 35)
    grad_out, inputs = random((9, 17), torch.float32, 1), random((9, 35), torch.float32, 2)
    add_weight_grad(main_grad, grad_out, inputs, backend="triton")
    assert buffer[:64].signbit().all()
    assert buffer[-64:].signbit().all()


# --- By torch.addmm ------------------------------------------------------------------------------


def exactly(main_grad: Tensor, grad_out: Tensor, inputs: Tensor) -> None:
    main_grad.addmm_(grad_out.t().float(), inputs.float())


def with_a_narrow_product(main_grad: Tensor, grad_out: Tensor, inputs: Tensor) -> None:
    main_grad.add_(grad_out.t() @ inputs)


def with_a_narrow_sum(main_grad: Tensor, grad_out: Tensor, inputs: Tensor) -> None:
    exactly(main_grad, grad_out, inputs)
    main_grad.copy_(main_grad.bfloat16())


def in_a_copy(main_grad: Tensor, grad_out: Tensor, inputs: Tensor) -> None:
    exactly(main_grad.clone(), grad_out, inputs)


def without_a_kernel(*_: Tensor) -> None:
    raise NotImplementedError("could not run 'aten::addmm.dtype_out' on this device")


def without_the_argument(*_: Tensor) -> None:
    raise TypeError("addmm() received an invalid combination of arguments")


@pytest.mark.parametrize(
    ("way", "adds"),
    [
        (exactly, True),
        (with_a_narrow_product, False),
        (with_a_narrow_sum, False),
        (in_a_copy, False),
        (without_a_kernel, False),
        (without_the_argument, False),
    ],
)
def test_the_trial_tells_what_adds_without_rounding(
    way: Callable[[Tensor, Tensor, Tensor], None], adds: bool
) -> None:
    assert module.matmul_adds(torch.device("cpu"), way) is adds


def test_factors_of_the_sums_dtype_need_no_trial() -> None:
    operands = [random(shape, torch.float32, i) for i, shape in enumerate([(5, 6), (3, 5), (3, 6)])]
    assert_same_bits(added(*operands, "matmul"), added(*operands, "torch"))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(512, 768, 3072), (300, 77, 130)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_addmm_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    gpu = torch.device("cuda")
    if torch.version.hip is None:
        assert module.matmul_adds(gpu), "every supported torch can on CUDA"
    elif not module.matmul_adds(gpu):
        pytest.skip("this torch has no such product on ROCm")
    tokens, rows, columns = shape
    main_grad = random((rows, columns), torch.float32, 0).to(gpu)
    grad_out, inputs = (random((tokens, n), dtype, n).to(gpu) for n in (rows, columns))
    (found,) = added(main_grad, grad_out, inputs, "matmul")
    exact = main_grad.double() + grad_out.double().t() @ inputs.double()
    assert_as_accurate([found], added(main_grad, grad_out, inputs, "torch"), [exact])


# --- Errors, and the operator --------------------------------------------------------------------


def test_refusals() -> None:
    wide, narrow = torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.float16)
    for operands in ((narrow, narrow, narrow), (wide, wide, narrow)):
        with pytest.raises(UnsupportedError, match="float32 sum and factors of one dtype"):
            add_weight_grad(*operands, backend="triton")


def test_operator() -> None:
    arguments = (torch.zeros(5, 6), torch.rand(3, 5), torch.rand(3, 6))
    torch.library.opcheck(torch.ops.megapipe.add_weight_grad, arguments)
