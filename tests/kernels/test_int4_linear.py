import pytest
import torch

from vdit_quant.kernels.int4_linear import int4_linear, int4_to_int8, int4_to_int8_many, int4_weight_linear
from vdit_quant.kernels.int8_linear import int8_linear, int8_weight_linear
from vdit_quant.kernels.pack import pack_int4


@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_decode_of_every_code_with_every_group_scale(group: int) -> None:
    q = torch.arange(-8, 8, dtype=torch.int32).repeat(256, group // 16)
    group_scale = torch.arange(256, dtype=torch.uint8).view(256, 1)
    decoded = int4_to_int8(pack_int4(q), group_scale, group)
    want = torch.div(q.long() * group_scale.long() + 8, 16, rounding_mode="floor")
    assert torch.equal(decoded.long(), want)
    assert int(want.abs().max()) == 127


def test_groups_are_consecutive_channels() -> None:
    q = torch.ones(1, 48, dtype=torch.int8)
    decoded = int4_to_int8(pack_int4(q), torch.tensor([[16, 32, 160]], dtype=torch.uint8), 48)
    assert decoded.tolist() == [[1] * 16 + [2] * 16 + [10] * 16]


@pytest.mark.parametrize("group", [None, 16, 64, 128])
def test_many_weights_decode_as_each_alone(group: int | None, make_layer) -> None:
    layers = [make_layer(1, k, n, group) for n, k in ((5, 128), (7, 384), (3, 256))]
    flat = torch.cat([a.packed.flatten() for a in layers])
    scales = None if group is None else torch.cat([a.group_scale.flatten() for a in layers])
    found = int4_to_int8_many(flat, scales, [(5, 128), (7, 384), (3, 256)])
    for got, a in zip(found, layers, strict=True):
        assert torch.equal(got, int4_to_int8(a.packed, a.group_scale, got.shape[1]))


def test_many_weights_must_add_up(make_layer) -> None:
    a = make_layer(1, 128, 5, 64)
    with pytest.raises(ValueError, match=r"int4_to_int8_many: expected packed weights torch.uint8 \[384\]"):
        int4_to_int8_many(a.packed.flatten(), None, [(6, 128)])
    with pytest.raises(ValueError, match="every K to be a multiple of 128"):
        int4_to_int8_many(a.packed.flatten(), None, [(10, 64)])
    with pytest.raises(ValueError, match=r"expected group scales torch.uint8 \[640/group\]"):
        int4_to_int8_many(a.packed.flatten(), a.group_scale.flatten()[:-1], [(5, 128)])


@pytest.mark.parametrize(("k", "group"), [(33, None), (192, None), (192, 16), (192, 64), (256, 128)])
def test_both_linears_equal_decode_then_int8(k: int, group: int | None, make_layer) -> None:
    a = make_layer(17, k, 40, group)
    decoded = int4_to_int8(a.packed, a.group_scale, k)
    got = int4_linear(a.codes, a.scale, a.packed, a.weight_scale, a.group_scale, a.bias, torch.bfloat16)
    assert torch.equal(got, int8_linear(a.codes, a.scale, decoded, a.weight_scale, a.bias, torch.bfloat16))
    got = int4_weight_linear(a.x, a.packed, a.weight_scale, a.group_scale, a.bias)
    assert torch.equal(got, int8_weight_linear(a.x, decoded, a.weight_scale, a.bias))


@pytest.mark.parametrize("batch", [2, 17, 129])
def test_a_row_does_not_depend_on_its_batch(batch: int, make_layer) -> None:
    a = make_layer(129, 192, 40, 64)
    rest = (a.packed, a.weight_scale, a.group_scale, a.bias, torch.float32)
    whole = int4_linear(a.codes[:batch], a.scale[:batch], *rest)
    for row in (0, batch - 1):
        assert torch.equal(whole[row : row + 1], int4_linear(a.codes[row : row + 1], a.scale[row : row + 1], *rest))


def test_errors_name_the_op_what_was_expected_and_found(make_layer) -> None:
    a = make_layer(3, 64, 5, 32)
    with pytest.raises(ValueError, match=r"int4_to_int8: expected packed weight torch.uint8 \[N, 33\] for K=66"):
        int4_to_int8(a.packed, None, 66)
    for columns in (3, 0, 64):
        bad = torch.zeros(5, columns, dtype=torch.uint8)
        with pytest.raises(ValueError, match=rf"int4_linear: expected group_scale columns .* found {columns} columns"):
            int4_linear(a.codes, a.scale, a.packed, a.weight_scale, bad, None, torch.float32)
    with pytest.raises(ValueError, match=r"int4_weight_linear: expected group_scale torch.uint8 \[5, K/group\]"):
        int4_weight_linear(a.x, a.packed, a.weight_scale, a.group_scale.float(), None)
