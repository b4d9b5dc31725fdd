"""Checkpoints in TerDiT's layout, made here byte by byte, as artifacts that run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vdit_quant
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.spec import FormatSpec, LayerSpec
from vdit_quant.runtime.linear import CompressedLinear
from vdit_quant.runtime.terdit import import_terdit, unpack_rows

WIDTH = 32
ALPHAS = {"layers.0.attention.wq": -0.02, "layers.0.feed_forward.w1": 0.013, "layers.0.adaLN_modulation.1": 0.4}


class Layer(nn.Module):
    """The published model's names: an RMSNorm follows the adaLN layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = nn.Module(), nn.Module()
        self.attention.wq = nn.Linear(WIDTH, WIDTH, bias=False)
        self.feed_forward.w1 = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 3 * WIDTH), nn.RMSNorm(3 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.feed_forward.w1(self.attention.wq(x)) * self.adaLN_modulation(c)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer()])
        self.final_layer = nn.Linear(3 * WIDTH, 4)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.final_layer(self.layers[0](x, c))


def _pack(q: Tensor) -> Tensor:
    """q in -1, 0, 1 [N, K] -> uint8 [N/4, K], as the paper's code packs it."""
    quarter = len(q) // 4
    packed = torch.zeros(quarter, q.shape[1], dtype=torch.uint8)
    for r in range(quarter):
        for k in range(q.shape[1]):
            rows = [int(q[r + i * quarter, k]) + 1 for i in range(4)]
            packed[r, k] = rows[0] * 64 + rows[1] * 16 + rows[2] * 4 + rows[3]
    return packed


@pytest.fixture
def reference() -> Model:
    """The model in floats, its ternary layers on their grids."""
    torch.manual_seed(0)
    model = Model().eval()
    for name, alpha in ALPHAS.items():
        weight = model.get_submodule(name).weight
        weight.data = torch.randint(-1, 2, weight.shape).float() * alpha
    model.layers[0].adaLN_modulation[2].weight.data.uniform_(0.5, 1.5)
    return model


def _checkpoint(model: Model) -> dict[str, Tensor]:
    tensors = dict(model.state_dict())
    for name, alpha in ALPHAS.items():
        tensors[f"{name}.weight"] = _pack((tensors[f"{name}.weight"] / alpha).round())
        tensors[f"{name}.alphas"] = torch.tensor([alpha])
    return tensors


@pytest.fixture
def write(tmp_path: Path, reference: Model) -> Callable[..., Path]:
    """Writes the published layout, with some tensors replaced (None: left out)."""

    def make(**changed: Tensor | None) -> Path:
        tensors = _checkpoint(reference) | {name.replace("__", "."): t for name, t in changed.items()}
        save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, tmp_path / "ema.safetensors")
        return tmp_path / "ema.safetensors"

    return make


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(7, WIDTH), torch.randn(1, WIDTH)


@torch.no_grad()
@pytest.mark.parametrize("activation", [None, FormatSpec("int8")])
def test_an_imported_model_computes_what_the_original_does(
    activation: FormatSpec | None, write, reference: Model, inputs: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    shapes = import_terdit(write(), tmp_path / "out", activation)
    assert shapes == {name: tuple(reference.get_submodule(name).weight.shape) for name in ALPHAS}
    model = vdit_quant.load_into(Model(), tmp_path / "out")
    for name in ALPHAS:
        layer = model.get_submodule(name)
        assert isinstance(layer, CompressedLinear)
        assert layer.spec == LayerSpec(FormatSpec("ternary"), activation)
        assert torch.equal(layer.dequantized(), reference.get_submodule(name).weight)
    got, want = model(*inputs), reference(*inputs)
    assert float((got - want).norm() / want.norm()) < (1e-5 if activation is None else 0.03)


def test_the_rest_of_the_file_is_kept_as_it_was(write, reference: Model, tmp_path: Path) -> None:
    import_terdit(write(), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    for name, tensor in reference.state_dict().items():
        if name.rpartition(".")[0] not in ALPHAS or name.endswith("bias"):
            assert torch.equal(stored[name], tensor), name
    assert stored["layers.0.feed_forward.w1.weight"].nbytes == 3 * WIDTH * WIDTH // 4


def test_a_scale_a_row_is_kept(write, tmp_path: Path) -> None:
    scales = torch.linspace(-1, 1, WIDTH)
    import_terdit(write(layers__0__attention__wq__alphas=scales), tmp_path / "out")
    layer = vdit_quant.load_into(Model(), tmp_path / "out").layers[0].attention.wq
    assert torch.equal(layer.weight_scale, scales)


def test_rows_lie_a_quarter_apart() -> None:
    packed = torch.tensor([[0b00_01_10_00], [0b10_10_01_01]], dtype=torch.uint8)
    assert unpack_rows(packed)[:, 0].tolist() == [0, 2, 1, 2, 2, 1, 0, 1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.full((8, WIDTH), 255, dtype=torch.uint8)}, "1,024 of 1,024 codes are 3"),
        ({"weight": torch.zeros(WIDTH, WIDTH)}, r"expected uint8 \[N/4, K\] beside its alphas, found torch.float32"),
        ({"weight": None}, "found no such tensor"),
        ({"alphas": torch.ones(5)}, r"expected 1 or 32 alphas and a bias \[32\], found 5 and"),
        ({"bias": torch.ones(5)}, r"found 1 and \[5\]"),
        ({"alphas": torch.tensor([float("nan")])}, "alphas are NaN or infinite"),
        ({"alphas": None}, r"uint8 \[8, 32\]: expected layers\.0\.attention\.wq\.alphas beside it, found none"),
        ({"weight": torch.zeros(0, WIDTH, dtype=torch.uint8)}, r"found torch.uint8 \[0, 32\]"),
    ],
)
def test_a_layer_in_another_layout_is_refused(
    changed: dict[str, Tensor | None], message: str, write, tmp_path: Path
) -> None:
    file = write(**{f"layers__0__attention__wq__{key}": value for key, value in changed.items()})
    with pytest.raises(InputError, match=rf"layers\.0\.attention\.wq.*{message}"):
        import_terdit(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_in_what_is_kept_is_refused(write, tmp_path: Path) -> None:
    file = write(final_layer__bias=torch.tensor([0.0, float("nan"), 1.0, 2.0]))
    with pytest.raises(InputError, match=r"ema\.safetensors: final_layer\.bias: 1 of 4 values are NaN"):
        import_terdit(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, message in (
        ("a.pth", "a pickle, .*expected safetensors"),
        ("a.safetensors", "not a complete safetensors"),
    ):
        (tmp_path / name).write_bytes(b"no")
        with pytest.raises(InputError, match=message):
            import_terdit(tmp_path / name, tmp_path / "out")
    save_file({"x.weight": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match="expected a ternary checkpoint of TerDiT"):
        import_terdit(tmp_path / "plain.safetensors", tmp_path / "out")
