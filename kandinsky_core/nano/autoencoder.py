"""Train the nano autoencoders: encoder onto the latent basis, then decoder from latents to pixels.

Video and image share everything but their phases. Both halves of the video autoencoder start on single pictures, where
every causal convolution is a 2-D one, and go on to short and whole clips; every phase mixes sizes, because group norms
see the whole picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..io.checkpoint import save_checkpoint
from ..io.load import VAE_KEY, VAES
from ..shapes import VAE_TEMPORAL
from ..vae.flux import FluxVAE
from ..vae.hunyuan import CausalConv3d, HunyuanVideoVAE
from ..variants import VAESpec
from .batch import Batch, Phase, drawn_batch, whole_clips
from .codec import VAE, clips, decoded, encoded
from .draw import scenes
from .latent_basis import LatentBasis, fit
from .layers import TRAINING_OPS
from .optimizer import autoencoder_optimizers
from .run import Run, train
from .score import decibels

Encode = Callable[[Tensor], Tensor]  # pixels [B,3,T,H,W] -> raw latents [B,C,t,h,w]
Decode = Callable[[Tensor], Tensor]  # and back

LOG_VARIANCE = -8.0  # of the posterior, in raw latent units: the code is nearly deterministic
BASIS_CLIPS = ((300, 64), (100, 128))  # (clips, side in px); one stream of scenes each
BASIS_PICTURES = ((200, 128), (50, 256))
TESTS = ((8, 64), (4, 128))  # unseen clips that watch the training
FRAMES = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The phases of one autoencoder."""

    encoder: tuple[Phase, ...]
    decoder: tuple[Phase, ...]  # on latents of the basis
    finish: tuple[Phase, ...]  # of the decoder, on what the finished encoder really gives


PICTURES = (Batch(clips=32), Batch(clips=8, size_px=128), Batch(clips=32), Batch(clips=2, size_px=256))
VIDEO = Schedule(
    encoder=(
        Phase(name="vae_encoder_picture", batches=PICTURES, steps=300, lr=3e-3),
        Phase(
            name="vae_encoder_clip", steps=700, lr=3e-3,
            batches=(
                Batch(clips=8, frames=5), Batch(clips=1, frames=17, size_px=128),
                Batch(clips=3, frames=17), Batch(clips=1, frames=5, size_px=256),
            ),
        ),
    ),
    decoder=(Phase(name="vae_decoder_picture", batches=PICTURES, steps=480, lr=3e-3),),
    # Gently: at the rate of the pictures' phase it would first unlearn them (30 dB fell to 24 dB in 200 steps).
    # Pictures stay in: without them the first frame of a clip and the same picture alone drift apart.
    finish=(
        Phase(
            name="vae_decoder_clip", steps=1000, lr=8e-4,
            batches=(
                Batch(clips=3, frames=17), Batch(clips=1, frames=17, size_px=128),
                Batch(clips=3, frames=21, later=True), Batch(clips=8, size_px=128),
                Batch(clips=3, frames=17), Batch(clips=1, frames=21, size_px=128, later=True),
                Batch(clips=24), Batch(clips=1, frames=5, size_px=256),
            ),
        ),
        # Small clips have the finest detail, such as the notches of a cross: they take most of the last steps.
        Phase(
            name="vae_decoder_detail", steps=660, lr=5e-4,
            batches=(
                Batch(clips=4, frames=17), Batch(clips=1, frames=17, size_px=128),
                Batch(clips=4, frames=17), Batch(clips=24),
                Batch(clips=4, frames=17), Batch(clips=4, frames=21, later=True),
                Batch(clips=4, frames=17), Batch(clips=8, size_px=128),
                Batch(clips=4, frames=17), Batch(clips=1, frames=21, size_px=128, later=True),
                Batch(clips=1, frames=5, size_px=256),
            ),
        ),
        Phase(
            name="vae_decoder_small", steps=480, lr=5e-4,
            batches=(
                Batch(clips=4, frames=17), Batch(clips=4, frames=17), Batch(clips=1, frames=17, size_px=128),
                Batch(clips=4, frames=17), Batch(clips=4, frames=17), Batch(clips=4, frames=21, later=True),
                Batch(clips=4, frames=17), Batch(clips=24),
            ),
        ),
    ),
)  # fmt: skip
IMAGE = Schedule(
    encoder=(Phase(name="image_vae_encoder", batches=PICTURES, steps=500, lr=3e-3),),
    decoder=(Phase(name="image_vae_decoder", batches=PICTURES, steps=700, lr=3e-3),),
    finish=(Phase(name="image_vae_finish", batches=PICTURES, steps=300, lr=2e-3),),
)


def basis_facts() -> dict[str, object]:
    """Return what the bases are fitted to, for JSON."""
    return {"clips": BASIS_CLIPS, "pictures": BASIS_PICTURES, "frames": FRAMES}


def video_basis(run: Run, spec: VAESpec) -> LatentBasis:
    """Fit the latent basis of clips, in model units."""
    return _basis(run, spec, BASIS_CLIPS, FRAMES, VAE_TEMPORAL)


def image_basis(run: Run, spec: VAESpec) -> LatentBasis:
    """Fit the latent basis of pictures, in model units."""
    return _basis(run, spec, BASIS_PICTURES, 1, 1)


def train_video_vae(run: Run, spec: VAESpec, schedule: Schedule) -> HunyuanVideoVAE:
    """Train the video autoencoder."""
    return _train(run, new_vae(run, spec), video_basis(run, spec), schedule, FRAMES)


def train_image_vae(run: Run, spec: VAESpec, schedule: Schedule) -> FluxVAE:
    """Train the image autoencoder."""
    return _train(run, new_vae(run, spec), image_basis(run, spec), schedule, 1)


def save_vae(path: Path, vae: VAE, facts: dict[str, str]) -> None:
    """Save an autoencoder in float16, as it ships; `facts` join its metadata."""
    halves = {name: value.detach().cpu().half() for name, value in vae.state_dict().items()}
    save_checkpoint(path, halves, {VAE_KEY: json.dumps(asdict(vae.spec)), **facts})


def recipe_facts(schedule: Schedule) -> dict[str, list[object]]:
    """Say for each phase what the weights were trained with, for their metadata."""
    phases = (*schedule.encoder, *schedule.decoder, *schedule.finish)
    return {phase.name: [phase.steps, phase.lr, list(map(astuple, phase.batches))] for phase in phases}


def new_vae(run: Run, spec: VAESpec) -> VAE:
    """Build an autoencoder with layers that train in bfloat16; only the newest temporal tap starts non-zero."""
    torch.manual_seed(run.seed)
    vae = VAES[spec.kind](spec, ops=TRAINING_OPS)
    moments = vae.quant_conv if isinstance(vae, HunyuanVideoVAE) else vae.encoder.conv_out
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, CausalConv3d):
                module.margin = 0  # FoldedConv3d pads by itself
        for weight in vae.parameters():
            if weight.ndim == 5 and weight.shape[2] > 1:
                now = weight.sum(2) / math.sqrt(weight.shape[2])
                weight.zero_()[:, :, -1] = now
        moments.weight[spec.latent_channels :] = 0
        moments.bias[spec.latent_channels :] = LOG_VARIANCE
    return vae.to(run.device)


def reconstruction_loss(out_BCTHW: Tensor, x_BCTHW: Tensor) -> Tensor:
    """L1 + root of each clip's squared error + L1 of the spatial gradients.

    The root weighs clips and sizes alike: a large sharp picture has a tenth of the squared error of a small one.
    """
    error = out_BCTHW.float() - x_BCTHW
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + (error.square().flatten(1).mean(1) + 1e-6).sqrt().mean() + 0.5 * edges


def decoding_loss(decode: Decode, z_BCTHW: Tensor, x_BCTHW: Tensor, *, later: bool) -> Tensor:
    """Compare decoded latents with their pixels, as the first or a later window of a longer clip.

    The first latent of a later window holds four frames; the decoder gives one frame for it, which is dropped.
    """
    if not later:
        return reconstruction_loss(decode(z_BCTHW), x_BCTHW)
    return reconstruction_loss(decode(z_BCTHW[:, :, 1:])[:, :, 1:], x_BCTHW[:, :, 1 + VAE_TEMPORAL :])


def _basis(
    run: Run, spec: VAESpec, sizes: Sequence[tuple[int, int]], frames: int, block_frames: int
) -> LatentBasis:
    samples = (
        part
        for stream, (count, size_px) in enumerate(sizes, run.seed)
        for part in whole_clips(scenes(stream, count, unseen=False), size_px=size_px, frames=frames)
    )
    return fit(samples, spec.latent_channels, block_frames).to(run.device)


def _train(run: Run, vae: VAE, basis: LatentBasis, schedule: Schedule, frames: int) -> VAE:
    raw = basis.scaled(1 / vae.spec.scaling_factor)
    tests = [
        part.to(run.device)
        for count, size_px in TESTS
        for part in whole_clips(scenes(run.seed + 2, count, unseen=True), size_px=size_px, frames=frames)
    ]
    _train_encoder(run, vae, raw, tests, schedule.encoder)
    _train_decoder(run, vae, raw.encode, tests, schedule.decoder)
    _train_decoder(run, vae, lambda x: encoded(vae, x.to(run.dtype)).float(), tests, schedule.finish)
    return vae


def _train_encoder(
    run: Run, vae: VAE, basis: LatentBasis, tests: Sequence[Tensor], phases: Sequence[Phase]
) -> None:
    """Regress the encoder's mean onto the latent basis."""

    def error(x: Tensor) -> Tensor:
        difference = encoded(vae, x.to(run.dtype)).float() - basis.encode(x)
        return (vae.spec.scaling_factor * difference).square().mean()

    @torch.no_grad()
    def watch() -> dict[str, float]:
        return {f"latent_rmse_{x.shape[-1]}px": error(x).sqrt().item() for x in tests}

    half = _half(vae, "encoder", "quant_conv")
    _run_phases(run, half, phases, lambda x, _: error(x), watch)


def _train_decoder(
    run: Run, vae: VAE, encode: Encode, tests: Sequence[Tensor], phases: Sequence[Phase]
) -> None:
    """Train the decoder on the raw latents that `encode` gives for pixels."""

    def decode(z: Tensor) -> Tensor:
        return decoded(vae, z.to(run.dtype))

    def loss(x: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            z = encode(x)
        return decoding_loss(decode, z, x, later=batch.later)

    @torch.no_grad()
    def watch() -> dict[str, float]:
        return {
            f"psnr_{x.shape[-1]}px": decibels(clips(decode(encode(x))), clips(x))["psnr_mean_db"] for x in tests
        }

    half = _half(vae, "decoder", "post_quant_conv")
    _run_phases(run, half, phases, loss, watch)


def _half(vae: VAE, *names: str) -> nn.ModuleDict:
    return nn.ModuleDict({name: module for name, module in vae.named_children() if name in names})


def _run_phases(
    run: Run, module: nn.Module, phases: Sequence[Phase],
    loss: Callable[[Tensor, Batch], Tensor], watch: Callable[[], dict[str, float]],
) -> None:  # fmt: skip
    for phase in phases:
        train(
            run, phase.name, module, autoencoder_optimizers(module, phase.lr),
            lambda step, phase=phase: loss(drawn_batch(run, phase, step), phase.batches[step % len(phase.batches)]),
            steps=phase.steps, lr=phase.lr, watch=watch,
            recipe={"batches": [asdict(batch) for batch in phase.batches], "basis": basis_facts()},
        )  # fmt: skip
