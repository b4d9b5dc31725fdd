import numpy as np
import pytest
import torch

from vdit_quant.kernels.hadamard import hadamard, hadamard_matrix

SIZES = [("sylvester", b) for b in (1, 2, 16, 64, 128)] + [("regular", b) for b in (1, 4, 16, 64, 256)]


@pytest.mark.parametrize(("kind", "size"), SIZES)
def test_matrix_is_symmetric_orthogonal_and_plus_minus_one(kind: str, size: int) -> None:
    h = hadamard_matrix(size, kind)
    assert h.dtype == torch.float32
    assert torch.equal(h.abs(), torch.ones(size, size))
    assert torch.equal(h, h.t())
    assert torch.equal(h @ h, torch.eye(size) * size)
    assert hadamard_matrix(size, kind) is h


@pytest.mark.parametrize("size", [2, 16, 128])
def test_sylvester_is_scipys(size: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    assert np.array_equal(hadamard_matrix(size, "sylvester").numpy(), linalg.hadamard(size))


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_regular_has_equal_row_sums_and_no_constant_column(size: int) -> None:
    sums = hadamard_matrix(size, "regular").sum(dim=1)
    assert torch.equal(sums.abs(), torch.full((size,), size**0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "size"), [("sylvester", 32), ("regular", 64)])
def test_matches_the_block_diagonal_product(dtype: torch.dtype, kind: str, size: int, relative_rms) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 192, generator=g).to(dtype)
    signs = (torch.randint(0, 2, (192,), generator=g) * 2 - 1).to(torch.int8)
    whole = torch.block_diag(*[hadamard_matrix(size, kind)] * (192 // size)).double() / size**0.5
    y = hadamard(x, signs, size, kind)
    assert y.dtype == dtype
    assert relative_rms(y, (x.double() * signs) @ whole) < torch.finfo(dtype).eps * 2


@pytest.mark.parametrize(("kind", "size"), [("sylvester", 128), ("regular", 64)])
def test_is_its_own_inverse_and_keeps_norms(kind: str, size: int) -> None:
    x = torch.randn(7, 384, generator=torch.Generator().manual_seed(0))
    y = hadamard(x, None, size, kind)
    torch.testing.assert_close(hadamard(y, None, size, kind), x)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))


def test_matrix_cached_inside_odd_contexts_still_serves_everyone() -> None:
    with torch.inference_mode(), torch.device("meta"):
        h = hadamard_matrix(512, "sylvester")
    assert h.device.type == "cpu"
    assert not h.is_inference()


def test_errors_name_what_was_expected_and_found() -> None:
    x = torch.zeros(2, 48)
    with pytest.raises(ValueError, match="power of two for sylvester, found 12"):
        hadamard(x, None, 12, "sylvester")
    with pytest.raises(ValueError, match="power of four for regular, found 8"):
        hadamard(x, None, 8, "regular")
    with pytest.raises(ValueError, match="one of sylvester, regular, found 'walsh'"):
        hadamard(x, None, 16, "walsh")
    with pytest.raises(ValueError, match="multiple of block_size 32, found K=48"):
        hadamard(x, None, 32, "sylvester")
    with pytest.raises(ValueError, match=r"signs torch\.int8"):
        hadamard(x, torch.ones(48), 16, "sylvester")
