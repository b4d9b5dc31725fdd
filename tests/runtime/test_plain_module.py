"""A model that is not from diffusers: compressed from memory, loaded into a fresh copy."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vdit_quant
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.recipe import Recipe
from vdit_quant.runtime.linear import CompressedLinear

OUTPUT_CLIP = {
    "step": [
        {"method": "rtn", "spec": "w4g16-a8tok", "roles": ["attention", "feed_forward"], "params": {"clip": "output"}}
    ]
}
W8A8 = Recipe.from_dict({"step": [{"method": "rtn", "spec": "w8-a8tok", "roles": ["attention", "feed_forward"]}]}, "w8")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.to_out(torch.softmax(q @ k.mT / 4, -1) @ v)
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    """A small transformer over tokens [batch, tokens, 8] with a table and a head that stay."""

    def __init__(self, width: int = 32, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 8)
        self.register_buffer("table", torch.randn(4, width))
        self.to(dtype)

    def forward(self, x: Tensor, shift: int = 0) -> Tensor:
        x = self.x_embedder(x) + self.table[shift]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(seed)
    return Model(dtype=dtype).eval()


@pytest.mark.parametrize(
    "data",
    [
        [torch.randn(2, 5, 8)],
        [(torch.randn(2, 5, 8), 1)],
        [{"x": torch.randn(2, 5, 8), "shift": 2}, {"x": torch.randn(1, 3, 8)}],
        lambda model: model(torch.randn(2, 5, 8)),
    ],
    ids=["tensors", "tuples", "mappings", "callable"],
)
@torch.no_grad()
def test_round_trip_through_a_fresh_model(data: object, tmp_path: Path, sqnr: Callable[..., float]) -> None:
    model, x = _model(), torch.randn(3, 6, 8)
    want = model(x)
    folder = vdit_quant.compress(model, tmp_path / "out", data=data, recipe=Recipe.from_dict(OUTPUT_CLIP, "test"))
    assert torch.equal(model(x), want), "compressing changed the caller's model"
    fresh = vdit_quant.load_into(_model(seed=7), folder)
    compressed = [name for name, m in fresh.named_modules() if isinstance(m, CompressedLinear)]
    assert len(compressed) == 8
    assert all(name.startswith("blocks.") for name in compressed)
    assert not fresh.training
    assert 15 < sqnr(fresh(x), want) < 60
    assert torch.equal(vdit_quant.load_into(_model(seed=8), folder)(x), fresh(x))


def test_without_data_a_method_that_needs_statistics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Model.*needs statistics.*data="):
        vdit_quant.compress(_model(), tmp_path / "out", recipe=Recipe.from_dict(OUTPUT_CLIP, "test"))
    assert not list(tmp_path.iterdir())


def test_a_method_without_statistics_needs_no_data(tmp_path: Path) -> None:
    assert vdit_quant.compress(_model(), tmp_path / "out", recipe=W8A8).is_dir()


def test_a_model_without_storage_is_refused(tmp_path: Path) -> None:
    folder = vdit_quant.compress(_model(), tmp_path / "out", recipe=W8A8)
    with pytest.raises(InputError, match=r"x_embedder\.weight.*meta.*to_empty"):
        vdit_quant.load_into(_model().to("meta"), folder)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = vdit_quant.compress(_model(), tmp_path / "out", recipe=W8A8)
    with pytest.raises(InputError, match="config and tensors disagree"):
        vdit_quant.load_into(Model(width=48), folder)
    with pytest.raises(InputError, match="selects no layer"):
        vdit_quant.load_into(nn.Sequential(nn.Linear(4, 4)), folder)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_what_stays_uncompressed_is_checked_too(damage: str, tmp_path: Path) -> None:
    folder = vdit_quant.compress(_model(), tmp_path / "out", recipe=W8A8)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if damage == "missing":
        del tensors["head.weight"]
    elif damage == "extra":
        tensors["head.extra"] = torch.zeros(3)
    else:
        tensors["head.weight"] = torch.zeros(8, 31)
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"head\.(weight|extra)"):
        vdit_quant.load_into(_model(), folder)


@torch.no_grad()
def test_tied_weights_are_stored_and_loaded(tmp_path: Path, sqnr: Callable[..., float]) -> None:
    model, x = _model(dtype=torch.bfloat16), torch.randn(3, 6, 8, dtype=torch.bfloat16)
    model.table = model.blocks[0].norm.weight.detach().expand(4, -1).contiguous()
    model.blocks[1].norm.weight = model.blocks[0].norm.weight
    folder = vdit_quant.compress(model, tmp_path / "out", recipe=W8A8)
    fresh = vdit_quant.load_into(_model(seed=7, dtype=torch.bfloat16), folder)
    assert sqnr(fresh(x), model(x)) > 25


def test_a_nan_weight_names_the_layer(tmp_path: Path) -> None:
    model = _model()
    model.blocks[1].to_out.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"blocks\.1\.to_out.*NaN"):
        vdit_quant.compress(model, tmp_path / "out", recipe=W8A8)
    assert not list(tmp_path.iterdir())


class Torchs(nn.Module):
    """Blocks of torch's own beside layers that can be compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict(self._parts()) for _ in range(2))

    @staticmethod
    def _parts() -> dict[str, nn.Module]:
        return {
            "attn": nn.MultiheadAttention(32, 4, batch_first=True),
            "mlp": nn.Linear(32, 32),
            "layer": nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
        }

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["attn"](x, x, x, need_weights=False)[0]
            x = block["layer"](x + block["mlp"](x))
        return x


def test_layers_whose_weights_torch_reads_itself_stay(tmp_path: Path, sqnr: Callable[..., float]) -> None:
    everything = ["attention", "feed_forward", "other"]
    recipe = Recipe.from_dict({"step": [{"method": "rtn", "spec": "w8-a8tok", "roles": everything}]}, "w8")
    torch.manual_seed(0)
    model, x = Torchs().eval(), torch.randn(3, 6, 32)
    folder = vdit_quant.compress(model, tmp_path / "out", recipe=recipe)
    fresh = vdit_quant.load_into(Torchs().eval(), folder)
    found = [name for name, m in fresh.named_modules() if isinstance(m, CompressedLinear)]
    assert found == ["blocks.0.mlp", "blocks.1.mlp"]
    for grad in (True, False):  # without, torch takes another way through its layers
        with torch.set_grad_enabled(grad):
            assert sqnr(fresh(x).detach(), model(x).detach()) > 30
