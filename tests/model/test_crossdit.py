"""Laws of CrossDiT that need no peer: batches, padding, token order, gradients, seams, counts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import ShapeError
from comfyui_kandinsky5.kandinsky_core.model import CrossDiT, VisualBlock, attention, dense, layers, rotate
from comfyui_kandinsky5.kandinsky_core.variants import VARIANTS, CrossDiTSpec
from torch import Tensor, nn

SPEC = CrossDiTSpec(
    model_dim=64, ff_dim=128, time_dim=32, num_text_blocks=1, num_visual_blocks=2,
    axes_dims=(8, 12, 12), in_text_dim=24, in_text_dim2=16,
)  # fmt: skip
PUBLISHED = {
    "lite_t2v_5s_sft": (814, 2_007_702_848),
    "lite_t2i": (1246, 6_022_080_576),
    "lite_i2i": (1246, 6_022_254_656),
    "pro_t2v_5s_sd": (1514, 19_311_325_248),
}


def random_model(spec: CrossDiTSpec = SPEC, dtype: torch.dtype = torch.float32, ops=nn) -> CrossDiT:
    """A model whose modulation is not zero, so that every branch counts."""
    torch.manual_seed(0)
    model = CrossDiT(spec, ops=ops)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.7 * parameter.shape[1] ** -0.5)
    return model.eval().to(dtype)


def inputs(batch: int = 1, thw: tuple[int, int, int] = (3, 4, 6), text: int = 7, spec: CrossDiTSpec = SPEC):
    generator = torch.Generator().manual_seed(1)
    shapes = (
        (batch, *thw, spec.visual_embed_dim),
        (batch, text, spec.in_text_dim),
        (batch, spec.in_text_dim2),
    )
    return *(torch.randn(shape, generator=generator) for shape in shapes), torch.linspace(900, 100, batch)


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-6) -> bool:
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.fixture(params=["whole", "pieces"])
def path(request, monkeypatch):
    """Both execution paths: small inputs take the first unless told otherwise."""
    if request.param == "pieces":
        monkeypatch.setattr(layers, "PIECE_BYTES", 5 * 4 * 64)
        monkeypatch.setattr(layers, "HIDDEN_PIECE_BYTES", 8192)
        monkeypatch.setattr(attention, "PACKED_KEY_BYTES", 2048)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    state = CrossDiT(VARIANTS[name].spec, device="meta").state_dict()
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == PUBLISHED[name]


@torch.no_grad()
def test_batch_is_a_loop_of_singles(path):
    model = random_model()
    x, text, pooled, time = inputs(batch=3)
    mask = torch.arange(7) < torch.tensor([[7], [3], [1]])
    batched = model(x, text, pooled, time, text_mask_BL=mask, rope_scale=(1, 2, 2))
    for i in range(3):
        one = slice(i, i + 1)
        single = model(
            x[one], text[one], pooled[one], time[one], text_mask_BL=mask[one], rope_scale=(1, 2, 2)
        )
        assert close(batched[one], single)


@torch.no_grad()
def test_padding_is_trimming(path):
    model = random_model()
    x, text, pooled, time = inputs()
    trimmed = model(x, text[:, :4], pooled, time)
    masked = model(x, text, pooled, time, text_mask_BL=torch.arange(7)[None] < 4)
    assert close(masked, trimmed)
    assert not close(model(x, text, pooled, time), trimmed, 1e-3)


@torch.no_grad()
def test_inputs_and_weights_are_left_alone(path):
    model = random_model()
    given = inputs()
    before = [tensor.clone() for tensor in (*given, *model.parameters())]
    model(*given)
    assert all(torch.equal(a, b) for a, b in zip((*given, *model.parameters()), before, strict=True))


@torch.no_grad()
def test_blocks_leave_their_input_alone(path):
    """A host may keep a block's input, to skip blocks by their residual."""
    block = random_model().visual_transformer_blocks[0]
    x, text, time, rope = (
        torch.randn(1, 18, 64),
        torch.randn(1, 7, 64),
        torch.randn(1, 32),
        torch.randn(18, 16, 2),
    )
    before = x.clone()
    block(x, text, time, rope)
    assert torch.equal(x, before)


@torch.no_grad()
def test_token_order_is_free():
    """Reordering tokens and rotary table alike reorders the result: what sparse attention relies on."""
    model = random_model()
    x, text, time, rope = (
        torch.randn(1, 18, 64),
        torch.randn(1, 7, 64),
        torch.randn(1, 32),
        torch.randn(18, 16, 2),
    )
    order = torch.randperm(18)
    reordered = model.run_blocks(x[:, order], text, time, rope[order])
    assert close(reordered, model.run_blocks(x, text, time, rope)[:, order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kept", [True, False], ids=["modulation float32", "modulation like the rest"])
@torch.no_grad()
def test_dtype_in_is_dtype_out(dtype, kept, path):
    reference = random_model().to(dtype).float()
    model = random_model(dtype=dtype)
    if kept:
        for name, module in model.named_modules():
            if "modulation" in name or "time_embeddings" in name:
                module.float()
    *given, time = inputs()
    out = model(*(tensor.to(dtype) for tensor in given), time)
    assert out.dtype == dtype
    assert close(out.float(), reference(*(t.to(dtype).float() for t in given), time), 3e-2)


def test_sixteen_bit_modulation_is_computed_in_float32():
    modulation = layers.Modulation(32, 64, 9, nn).to(torch.bfloat16)
    nn.init.normal_(modulation.out_layer.weight)
    time = torch.randn(2, 32)
    got = modulation(time)
    assert got.dtype == torch.float32
    assert close(got, modulation.float()(time))


def test_modulation_starts_at_zero():
    model = CrossDiT(SPEC)
    zero = {name for name, parameter in model.named_parameters() if not parameter.any()}
    norms = {"text_embeddings.norm.bias", "pooled_text_embeddings.norm.bias"}
    linears = {f"{n}.out_layer.{k}" for n, m in model.named_modules() if "Modulation" in type(m).__name__
               for k in ("weight", "bias")}  # fmt: skip
    assert zero == linears | norms and len(linears) == 2 * (1 + 2 + 1)


def test_gradients():
    """Against finite differences in float64 directions: every input and one weight of each kind."""
    model = random_model()
    x, text, pooled, time = (tensor.requires_grad_() for tensor in inputs(thw=(2, 2, 4), text=3))
    loss = model(x, text, pooled, time, text_mask_BL=torch.tensor([[True, True, False]])).square().mean()
    loss.backward()
    assert text.grad[:, 2].abs().max() == 0  # a masked token has no influence
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    for tensor in (x, text, pooled, model.visual_embeddings.in_layer.weight):
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
        expected = (tensor.grad * direction).sum().item()
        losses = []
        with torch.no_grad():
            for sign in (1, -1):
                tensor += sign * 1e-2 * direction
                out = model(x, text, pooled, time, text_mask_BL=torch.tensor([[True, True, False]]))
                losses.append(out.square().mean().item())
                tensor -= sign * 1e-2 * direction
        assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("batch", [1, 2])
def test_bfloat16_gradients_follow_float32(batch):
    """Mixed weights as published: modulation and time layers in float32, the rest in bfloat16."""
    model = random_model(dtype=torch.bfloat16)
    reference = copy.deepcopy(model).float()
    for name, module in model.named_modules():
        if "modulation" in name or "time_embeddings" in name:
            module.float()
    *given, time = inputs(batch=batch)
    given = [tensor.bfloat16() for tensor in given]
    model(*given, time).float().square().mean().backward()
    reference(*(tensor.float() for tensor in given), time).square().mean().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        difference = (parameter.grad.float() - expected[name].grad).norm() / expected[name].grad.norm()
        assert difference <= 6e-2, name


@torch.no_grad()
def test_no_text_at_all_gives_a_velocity():
    """The editing template crops an empty prompt to nothing."""
    x, text, pooled, time = inputs()
    assert random_model()(x, text[:, :0], pooled, time).isfinite().all()


def test_rotation_is_the_same_when_compiled(monkeypatch):
    x, table = torch.randn(2, 5, 3, 8), torch.randn(5, 4, 2)
    eager = rotate(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert close(rotate(x, table), eager)


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_block_traces_without_graph_breaks(dynamic):
    block = random_model().visual_transformer_blocks[0]
    x, text, time, rope = (
        torch.randn(1, 18, 64),
        torch.randn(1, 7, 64),
        torch.randn(1, 32),
        torch.randn(18, 16, 2),
    )
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=dynamic)
    assert close(compiled(x, text, time, rope), block(x, text, time, rope))


@torch.no_grad()
def test_attention_is_a_value_per_block():
    model = random_model()
    given = inputs()
    calls = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape)
        return dense(q, k, v)

    assert torch.equal(model(*given, attend=counted), model(*given))
    assert calls == [(1, 2, 18, 32)] * 2
    calls.clear()
    assert torch.equal(model(*given, attend=(dense, counted)), model(*given))
    assert len(calls) == 1
    with pytest.raises(ValueError, match="shorter"):
        model(*given, attend=(dense,))


@torch.no_grad()
def test_on_block_is_called_before_each_block_and_can_cancel():
    class Cancelled(Exception):
        pass

    seen = []

    def cancel(index: int, total: int) -> None:
        seen.append((index, total))
        if index == 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        random_model()(*inputs(), on_block=cancel)
    assert seen == [(0, 2), (1, 2)]


@torch.no_grad()
def test_only_the_given_layer_classes_hold_weights():
    """A host's classes, which cast their weights to the input's dtype, are all there is."""

    class Casting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias if self.bias is None else
                                        self.bias.to(x.dtype))  # fmt: skip

    class CastingRMSNorm(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)

    class Ops:
        Linear, LayerNorm, RMSNorm = Casting, nn.LayerNorm, CastingRMSNorm

    model = random_model(ops=Ops, dtype=torch.bfloat16)
    holders = {
        type(module) for module in model.modules() if next(module.parameters(recurse=False), None) is not None
    }
    assert holders == {Casting, nn.LayerNorm, CastingRMSNorm}
    *given, time = inputs()
    given = [tensor.bfloat16() for tensor in given]
    assert torch.equal(model(*given, time), random_model(dtype=torch.bfloat16)(*given, time))


@pytest.mark.parametrize(("shape", "said"), [
    ((1, 3, 5, 6, 16), "3x5x6"), ((1, 3, 4, 7, 16), "3x4x7"), ((1, 0, 4, 6, 16), "0x4x6"),
    ((1, 3, 4, 6, 33), "33 channels"),
])  # fmt: skip
def test_a_latent_that_does_not_fit_is_refused(shape, said):
    _, *rest = inputs()
    with pytest.raises(ShapeError, match=said):
        random_model()(torch.zeros(shape), *rest)


def test_channels_follow_the_spec():
    assert random_model(replace(SPEC, visual_cond=True)).visual_embeddings.in_layer.in_features == 132
    assert random_model(replace(SPEC, instruct_type="channel")).visual_embeddings.in_layer.in_features == 132
    assert isinstance(random_model().visual_transformer_blocks[0], VisualBlock)
