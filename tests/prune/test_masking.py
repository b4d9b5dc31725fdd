"""Wrappers around blocks: what they compute, and that a pruned model is the masked one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vdit_quant.prune.masking import Adapters, Features, Gates, Inputs
from vdit_quant.prune.plan import PrunePlan, StackPlan, find_stacks
from vdit_quant.prune.student import build_student
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.family import find_family

Call = Callable[..., dict[str, Any]]


def _run(model: Any, call: dict[str, Any]) -> torch.Tensor:
    return model(**call, return_dict=False)[0]


def test_a_pruned_model_is_the_masked_model(named_model: tuple[str, Any], call: Call) -> None:
    """Every family: taking blocks out gives what masking them with zero gives, and kept blocks are not touched."""
    name, model = named_model
    stacks = find_stacks(model, find_family(model))
    kept = [tuple(range(stack.depth - 1, -1, -2))[::-1] for stack in stacks]
    plan = PrunePlan(tuple(StackPlan(s.name, s.depth_key, s.depth, k) for s, k in zip(stacks, kept, strict=True)))
    inputs, whole = call(name), _run(model, call(name))
    blocks = [stack.block(i) for stack in stacks for i in range(stack.depth)]
    masks = {b: torch.tensor(float(b in plan.kept_blocks().values())) for b in blocks}
    with Gates(model, blocks) as gates:
        assert torch.equal(_run(model, inputs), whole), "gates without masks change something"
        with gates.using(masks):
            masked = _run(model, inputs)
    student = build_student(model, plan)
    assert torch.equal(_run(student, inputs), masked)
    assert not torch.equal(masked, whole)
    assert torch.equal(_run(model, inputs), whole), "the original is not what it was"
    assert {key: student.config[key] for key in plan.depths} == plan.depths
    assert not any(module._forward_hooks for module in model.modules())


def test_each_sample_has_its_own_mask(named_model: tuple[str, Any], call: Call) -> None:
    name, model = named_model
    block = f"{find_stacks(model, find_family(model))[0].name}.1"
    inputs = call(name)
    with Gates(model, [block]) as gates:
        whole = _run(model, inputs)
        with gates.using({block: torch.zeros(())}):
            without = _run(model, inputs)
        with gates.using({block: torch.tensor([1.0, 0.0, 1.0])}):
            mixed = _run(model, inputs)
    torch.testing.assert_close(mixed, torch.stack([whole[0], without[1], whole[2]]))
    assert not torch.allclose(whole[1], without[1])


def test_a_mask_gets_a_gradient(dit: Any, call: Call) -> None:
    mask = torch.ones(3, requires_grad=True)
    with Gates(dit, ["transformer_blocks.2"]) as gates, gates.using({"transformer_blocks.2": mask}):
        _run(dit, call("dit")).square().sum().backward()
    assert mask.grad is not None
    assert (mask.grad != 0).all()


def test_adapters_start_at_nothing_and_learn(dit: Any, call: Call) -> None:
    whole = _run(dit, call("dit"))
    with Adapters(dit, ["transformer_blocks.0", "transformer_blocks.3"], rank=4, alpha=8, seed=0) as adapters:
        assert torch.equal(_run(dit, call("dit")), whole)
        names = {name.rpartition(".")[0] for name in adapters.parameters}
        assert "transformer_blocks.3.ff.net.0.proj" in names
        assert all(name.startswith(("transformer_blocks.0.", "transformer_blocks.3.")) for name in names)
        with torch.no_grad():
            layer, x = dit.transformer_blocks[3].ff.net[2], torch.randn(5, 128)
            plain = layer.weight @ x.T + layer.bias[:, None]
            up = adapters.parameters["transformer_blocks.3.ff.net.2.up"].normal_()
            down = adapters.parameters["transformer_blocks.3.ff.net.2.down"]
            torch.testing.assert_close(layer(x), (plain + 2.0 * up @ (down @ x.T)).T)
        with adapters.off():
            assert torch.equal(_run(dit, call("dit")), whole)
    assert torch.equal(_run(dit, call("dit")), whole)


def test_features_are_the_latents_stream(named_model: tuple[str, Any], call: Call) -> None:
    name, model = named_model
    stacks = find_stacks(model, find_family(model))
    blocks = [stack.block(i) for stack in stacks for i in range(2)]
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    with Features(model, blocks) as features, Inputs(model, blocks, lambda *row: seen.append(row)):
        _run(model, call(name))
    taken = features.take()
    assert [row[0] for row in seen] == blocks == list(taken)
    assert features.take() == {}
    for (_, before, after), output in zip(seen, taken.values(), strict=True):
        assert torch.equal(after, output)
        assert before.shape == after.shape
        assert not torch.equal(before, after)
    assert torch.equal(seen[1][1], seen[0][2]), "the second block does not read what the first gave"


def test_models_that_cannot_be_pruned_say_why(tiny_dit: Callable[..., Any]) -> None:
    import diffusers

    kind = diffusers.SD3Transformer2DModel
    size = {"num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8, "num_layers": 2}
    width = {
        "joint_attention_dim": 8,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 8,
    }
    model = kind(**size, **width)
    with pytest.raises(InputError, match="family 'sd3' are not interchangeable"):
        find_stacks(model, find_family(model))
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="needs a family file"):
        find_stacks(plain, find_family(plain))
    odd = tiny_dit()
    odd.transformer_blocks[1].ff.net[2] = torch.nn.Linear(8, 64)
    with pytest.raises(InputError, match=r"transformer_blocks\.1 differs from transformer_blocks\.0"):
        find_stacks(odd, find_family(odd))


def test_the_block_whose_embedder_the_output_reads_is_pinned(dit: Any) -> None:
    (stack,) = find_stacks(dit, find_family(dit))
    assert stack.pinned == ()
    with torch.no_grad():
        dit.transformer_blocks[3].norm1.emb.timestep_embedder.linear_1.bias.add_(1)
    (stack,) = find_stacks(dit, find_family(dit))
    assert stack.pinned == (0,)
