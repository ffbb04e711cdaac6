"""A whole 4-step guided run equals diffusers' transformer and scheduler on the same weights.

The scheduler is given the released times (`sigmas`): its own `set_timesteps(N)` shifts twice.
"""

from __future__ import annotations

import types

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core import sampling
from comfyui_kandinsky5.kandinsky_core.model import CrossDiT
from comfyui_kandinsky5.kandinsky_core.sampling import Known, TextCondition
from comfyui_kandinsky5.kandinsky_core.variants import CrossDiTSpec

diffusers = pytest.importorskip("diffusers", reason="diffusers is a test dependency: pip install diffusers")

SPEC = CrossDiTSpec(
    model_dim=64, ff_dim=128, time_dim=32, num_text_blocks=2, num_visual_blocks=3, axes_dims=(8, 12, 12),
    in_text_dim=32, in_text_dim2=16, visual_cond=True,
)  # fmt: skip
ROPE_SCALE = (1.0, 2.0, 2.0)
STEPS, SHIFT, GUIDANCE = 4, 5.0, 5.0


@pytest.fixture
def peer(golden, monkeypatch):
    """Diffusers' transformer with the golden weights, its bfloat16 rounding after the rotation taken out."""
    from diffusers.models.transformers import transformer_kandinsky as module

    exact = types.SimpleNamespace(**{**vars(torch), "bfloat16": torch.float32})
    monkeypatch.setattr(module, "torch", exact)
    model = module.Kandinsky5Transformer3DModel(
        in_visual_dim=16, in_text_dim=32, in_text_dim2=16, time_dim=32, out_visual_dim=16, model_dim=64,
        ff_dim=128, num_text_blocks=2, num_visual_blocks=3, axes_dims=(8, 12, 12), visual_cond=True,
    )  # fmt: skip
    model.load_state_dict(_weights(golden))
    return model.eval()


@pytest.fixture
def ours(golden):
    model = CrossDiT(SPEC)
    model.load_state_dict(_weights(golden))
    return model.eval()


def _weights(golden):
    return {name: tensor.float() for name, tensor in golden("dit_video_lite_weights").items()}


def _texts():
    return [TextCondition(torch.randn(1, n, 32), torch.randn(1, 16)) for n in (13, 5)]


def _peer_run(peer, noise, texts, frame):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, STEPS + 1)[:-1].tolist())
    x = noise.movedim(1, -1)
    grid = (x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
    for t in scheduler.timesteps:
        full = torch.cat((x, torch.zeros(*x.shape[:-1], 17)), dim=-1)
        if frame is not None:
            full[:, :1, ..., :16] = frame.movedim(1, -1)
            full[:, :1, ..., -1] = 1
        v_text, v_null = (
            peer(
                hidden_states=full,
                encoder_hidden_states=text.features_BLD,
                pooled_projections=text.pooled_BP,
                timestep=t[None],
                visual_rope_pos=[torch.arange(n) for n in grid],
                text_rope_pos=torch.arange(text.features_BLD.shape[1]),
                scale_factor=ROPE_SCALE,
                return_dict=False,
            )
            for text in texts
        )
        x = scheduler.step(v_null + GUIDANCE * (v_text - v_null), t, x, return_dict=False)[0]
    x = x.movedim(-1, 1)
    return x if frame is None else torch.cat((frame, x[:, :, 1:]), dim=2)


def _our_run(ours, noise, texts, frame):
    known = Known(frames_BCTHW=frame)
    text, null = (
        sampling.velocity_of(ours, t, dtype=torch.float32, rope_scale=ROPE_SCALE, known=known) for t in texts
    )
    times = sampling.timesteps(STEPS, SHIFT)
    return sampling.sample(sampling.guide(text, null, GUIDANCE), noise, times, known=known)


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@torch.no_grad()
def test_four_steps_equal_diffusers(peer, ours, task):
    torch.manual_seed(0)
    noise = sampling.noise((1, 16, 5, 8, 12), seed=3)
    frame = torch.randn(1, 16, 1, 8, 12) if task == "i2v" else None
    texts = _texts()
    wanted = _peer_run(peer, noise, texts, frame)
    got = _our_run(ours, noise, texts, frame)
    assert (got - wanted).abs().max() / wanted.abs().max() < 5e-5
    # the comparison can fail: another shift is far outside the tolerance
    times = sampling.timesteps(STEPS, 3.0)
    other = sampling.sample(
        sampling.velocity_of(ours, texts[0], dtype=torch.float32, rope_scale=ROPE_SCALE), noise, times
    )
    assert (other - wanted).abs().max() / wanted.abs().max() > 1e-2
