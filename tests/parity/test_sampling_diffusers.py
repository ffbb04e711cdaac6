"""A whole 4-step guided run equals diffusers' transformer and scheduler on the same weights.

The scheduler is given the released times (`sigmas`): its own `set_timesteps(N)` shifts twice.
"""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core import sampling
from comfyui_kandinsky5.kandinsky_core.model import CrossDiT
from comfyui_kandinsky5.kandinsky_core.sampling import Known, TextCondition
from comfyui_kandinsky5.kandinsky_core.variants import CrossDiTSpec

SPEC = CrossDiTSpec(
    model_dim=64, ff_dim=128, time_dim=32, num_text_blocks=2, num_visual_blocks=3, axes_dims=(8, 12, 12),
    in_text_dim=32, in_text_dim2=16, visual_cond=True,
)  # fmt: skip
TASKS = {
    "t2v": SPEC,
    "i2v": SPEC,
    "t2i": replace(SPEC, visual_cond=False),
    "edit": replace(SPEC, visual_cond=False, instruct_type="channel"),
}
ROPE_SCALE = (1.0, 2.0, 2.0)
STEPS, SHIFT, GUIDANCE = 4, 5.0, 5.0


@pytest.fixture(params=TASKS)
def pair(request, golden, monkeypatch):
    """(task, ours, diffusers') on the same weights; diffusers' bfloat16 rounding after the rotation is taken out.

    Video weights are the golden ones; models with other channels get random ones.
    """
    from diffusers.models.transformers import transformer_kandinsky as module

    monkeypatch.setattr(module, "torch", types.SimpleNamespace(**{**vars(torch), "bfloat16": torch.float32}))
    spec = TASKS[request.param]
    names = (
        "model_dim", "ff_dim", "time_dim", "num_text_blocks", "num_visual_blocks", "axes_dims", "in_text_dim",
        "in_text_dim2", "in_visual_dim", "out_visual_dim",
    )  # fmt: skip
    torch.manual_seed(0)
    peer = module.Kandinsky5Transformer3DModel(
        **{name: getattr(spec, name) for name in names}, visual_cond=spec.visual_embed_dim == 33
    ).eval()
    if spec is SPEC:
        peer.load_state_dict({k: v.float() for k, v in golden("dit_video_lite_weights").items()})
    else:
        for parameter in peer.parameters():  # modulation starts at zero, which would hide most of the network
            torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim == 2 else None
    ours = CrossDiT(spec)
    ours.load_state_dict(peer.state_dict())
    return request.param, ours.eval(), peer


def _peer_run(peer, noise, texts, condition_BTHWC):
    """Diffusers' scheduler and transformer; `condition_BTHWC` holds the channels behind the latent, and frame 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, STEPS + 1)[:-1].tolist())
    x = noise.movedim(1, -1)
    grid = (x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
    for t in scheduler.timesteps:
        v_text, v_null = (
            peer(
                hidden_states=condition_BTHWC(x),
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
    return x.movedim(-1, 1)


def _peer_input(task, given):
    """What each task's transformer sees, written out independently of the code under test."""
    if task == "t2i":
        return lambda x: x
    if task == "edit":
        return lambda x: torch.cat((x, given.movedim(1, -1), torch.ones_like(x[..., :1])), dim=-1)

    def video(x):
        full = torch.cat((x, torch.zeros(*x.shape[:-1], 17)), dim=-1)
        if task == "i2v":
            full[:, :1, ..., :16] = given.movedim(1, -1)
            full[:, :1, ..., -1] = 1
        return full

    return video


@torch.no_grad()
def test_four_steps_equal_diffusers(pair):
    task, ours, peer = pair
    torch.manual_seed(0)
    frames = 1 if task in ("t2i", "edit") else 5
    noise = sampling.noise((1, 16, frames, 8, 12), seed=3)
    given = torch.randn(1, 16, 1, 8, 12)
    texts = [TextCondition(torch.randn(1, n, 32), torch.randn(1, 16)) for n in (13, 5)]
    known = {"i2v": Known(frames_BCTHW=given), "edit": Known(edit_BCTHW=given)}.get(task, Known())

    wanted = _peer_run(peer, noise, texts, _peer_input(task, given))
    if task == "i2v":
        wanted[:, :, :1] = given
    text, null = (
        sampling.velocity_of(ours, t, dtype=torch.float32, rope_scale=ROPE_SCALE, known=known) for t in texts
    )

    def run(shift):
        return sampling.sample(
            sampling.guide(text, null, GUIDANCE), noise, sampling.timesteps(STEPS, shift), known=known
        )

    assert (run(SHIFT) - wanted).abs().max() / wanted.abs().max() < 5e-5
    # The comparison can fail: another shift is far outside the tolerance.
    assert (run(3.0) - wanted).abs().max() / wanted.abs().max() > 1e-2
