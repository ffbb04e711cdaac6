"""Train the nano autoencoder: encoder onto the latent basis, then decoder from latents to pixels.

Both halves start on single pictures, where every causal convolution is a 2-D one, and go on to short and whole clips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..vae.hunyuan import CausalConv3d, HunyuanVideoVAE
from ..variants import VAESpec
from .draw import draw, scenes
from .latent_basis import LatentBasis, fit
from .layers import TRAINING_OPS
from .optimizer import optimizers
from .run import Run, train

Encode = Callable[[Tensor], Tensor]  # pixels [B,3,4k+1,8h,8w] -> raw latents [B,C,k+1,h,w]

LOG_VARIANCE = -8.0  # of the posterior, in raw latent units: the code is nearly deterministic


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of training; the learning rate falls to nearly zero inside it."""

    name: str
    batches: tuple[tuple[int, int], ...]  # (frames, clips), taken in turn
    steps: int
    lr: float


ENCODER = (
    Phase(name="encoder_picture", batches=((1, 32),), steps=300, lr=3e-3),
    Phase(name="encoder_clip", batches=((5, 12), (17, 4)), steps=400, lr=3e-3),
)
DECODER = (
    Phase(name="decoder_picture", batches=((1, 32),), steps=400, lr=3e-3),
    Phase(name="decoder_short", batches=((5, 8),), steps=700, lr=2.5e-3),
)
# On what the finished encoder really gives, instead of the basis it imitates. Pictures stay in: without them the
# first frame of a clip and the same picture alone drift apart, because group norms see the whole clip.
DECODER_FINISH = (Phase(name="decoder_clip", batches=((17, 3), (17, 3), (1, 24)), steps=600, lr=2e-3),)


def new_vae(spec: VAESpec) -> HunyuanVideoVAE:
    """Build the autoencoder with layers that train in bfloat16; only the newest temporal tap starts non-zero."""
    vae = HunyuanVideoVAE(spec, ops=TRAINING_OPS)
    for module in vae.modules():
        if isinstance(module, CausalConv3d):
            module.margin = 0  # FoldedConv3d pads by itself
    with torch.no_grad():
        for weight in vae.parameters():
            if weight.ndim == 5 and weight.shape[2] > 1:
                now = weight.sum(2) / math.sqrt(weight.shape[2])
                weight.zero_()[:, :, -1] = now
        latents = spec.latent_channels
        vae.quant_conv.weight[latents:] = 0
        vae.quant_conv.bias[latents:] = LOG_VARIANCE
    return vae


def drawn(seed: int, count: int, *, size_px: int, frames: int, unseen: bool | None) -> Tensor:
    """Return clips as `[N,T,H,W,3]` uint8."""
    clips = (draw(scene, size_px=size_px, frames=frames) for scene in scenes(seed, count, unseen=unseen))
    return torch.stack([(clip * 255).round().byte() for clip in clips])


def to_pixels(clips_BTHWC: Tensor, device: torch.device) -> Tensor:
    """Turn bytes `[B,T,H,W,3]` into `[B,3,T,H,W]` in -1…1."""
    return clips_BTHWC.to(device).movedim(-1, 1).float() / 127.5 - 1


def batch_at(run: Run, phase: Phase, clips: Tensor, step: int) -> Tensor:
    """Return the pixels of a step: random clips, cut to a length of the phase at a random frame."""
    frames, count = phase.batches[step % len(phase.batches)]
    generator = run.generator(phase.name, step)
    rows = torch.randint(len(clips), (count,), generator=generator)
    starts = torch.randint(clips.shape[1] - frames + 1, (count,), generator=generator)
    cut = [clips[row, at : at + frames] for row, at in zip(rows.tolist(), starts.tolist(), strict=True)]
    return to_pixels(torch.stack(cut), run.device)


def reconstruction_loss(out_BCTHW: Tensor, x_BCTHW: Tensor) -> Tensor:
    """L1 + squared error + L1 of the spatial gradients: sharp edges count, but colours count first."""
    error = out_BCTHW.float() - x_BCTHW
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def psnr(out: Tensor, x: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each clip, pixels -1…1, `[B]`."""
    error = (out.float().clamp(-1, 1) - x).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error)


def fit_basis(run: Run, clips: Tensor, spec: VAESpec) -> LatentBasis:
    """Fit the latent basis to drawn clips, scaled to the raw units of `spec`."""
    basis = fit(to_pixels(clips, torch.device("cpu")), spec.latent_channels)
    return LatentBasis(basis.mean.to(run.device), (basis.project / spec.scaling_factor).to(run.device))


def train_encoder(
    run: Run, vae: HunyuanVideoVAE, basis: LatentBasis, clips: Tensor, test: Tensor,
    phases: Sequence[Phase] = ENCODER,
) -> None:  # fmt: skip
    """Regress the encoder's mean onto the latent basis."""
    half = nn.ModuleDict({"encoder": vae.encoder, "quant_conv": vae.quant_conv}).to(run.device)
    scale = vae.spec.scaling_factor
    x_test = to_pixels(test, run.device)

    def latent_error(x: Tensor) -> Tensor:
        return (scale * (vae.encode(x.to(run.dtype)).mean.float() - basis.encode(x))).square().mean()

    @torch.no_grad()
    def watch() -> dict[str, float]:
        return {"latent_rmse": latent_error(x_test).sqrt().item()}

    _run_phases(run, half, phases, clips, latent_error, watch)


def train_decoder(
    run: Run, vae: HunyuanVideoVAE, encode: Encode, clips: Tensor, test: Tensor, phases: Sequence[Phase] = DECODER,
) -> None:  # fmt: skip
    """Train the decoder on the raw latents that `encode` gives for pixels."""
    half = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).to(run.device)
    x_test = to_pixels(test, run.device)

    def decoded(x: Tensor) -> Tensor:
        with torch.no_grad():
            z = encode(x)
        return vae.decode(z.to(run.dtype))

    @torch.no_grad()
    def watch() -> dict[str, float]:
        whole, picture = psnr(decoded(x_test), x_test), psnr(decoded(x_test[:, :, :1]), x_test[:, :, :1])
        return {"psnr_clip": whole.mean().item(), "psnr_picture": picture.mean().item()}

    _run_phases(run, half, phases, clips, lambda x: reconstruction_loss(decoded(x), x), watch)


def encoding(run: Run, vae: HunyuanVideoVAE) -> Encode:
    """Return the trained encoder as a function from pixels to raw latents."""
    return lambda x: vae.encode(x.to(run.dtype)).mean.float()


def _run_phases(
    run: Run, module: nn.Module, phases: Sequence[Phase], clips: Tensor,
    loss: Callable[[Tensor], Tensor], watch: Callable[[], dict[str, float]],
) -> None:  # fmt: skip
    for phase in phases:
        train(
            run, phase.name, module, optimizers(module, phase.lr),
            lambda step, phase=phase: loss(batch_at(run, phase, clips, step)),
            steps=phase.steps, lr=phase.lr, watch=watch,
        )  # fmt: skip
