"""What a run needs, stage by stage, before anything is loaded: device memory, main memory, transfers and operations.

Everything is derived from the variant table and the order of tensors (`activation`, `text_tower`, the autoencoder's
plans); nothing is fitted. Live tensors are counted, not what an allocator reserves around them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .. import cost
from ..cost import Flops
from ..shapes import VideoShape
from ..vae.plan import DecodePlan, EncodePlan, plan_decode, plan_encode
from ..variants import Variant
from .activation import FLOAT, Forward
from .plan import Plan
from .sparsity import sparse_bytes
from .text_tower import encode_bytes

TEXT, ENCODE, SAMPLE, DECODE = "text encode", "encode", "sample", "decode"
TEMPLATE_TOK = 129  # positions of the longest template around a video's prompt; an image's has fewer
VISION_CELL_PX = 28  # a text position's side in a picture, which the vision tower sees at half size
RGB = 3


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are held: bytes per parameter, and of the modulation's parameters."""

    name: str
    weight: float
    modulation: float

    @property
    def computes_as(self) -> int:
        """Bytes of an activation."""
        return FLOAT if self.name == "fp32" else 2

    @property
    def stream(self) -> int:
        """Bytes of an activation of the residual stream: float16 is too narrow for it."""
        return FLOAT if self.name in ("fp16", "fp32") else 2


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("bf16", 2, 2),
        Precision("published", 2, FLOAT),  # the published files: bf16 with the modulation in float32
        Precision("fp16", 2, FLOAT),
        Precision("fp32", FLOAT, FLOAT),
        Precision("fp8", 1, 2),
        Precision("q8_0", 34 / 32, 2),  # GGUF: 32 values and a scale
        Precision("q4_k", 144 / 256, 2),
    )
}


def precision_of(formats: Iterable[str]) -> str:
    """Return which of `PRECISIONS` stands for a file's packed formats; what has none of its own counts as a larger."""
    formats = list(formats)
    if any(name.startswith("F8") for name in formats):
        return "fp8"
    four_bits = any(name.startswith(("Q4", "NF4")) for name in formats)
    return "q4_k" if four_bits and "Q8_0" not in formats else "q8_0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run: what is made, with which weights and how much of everything."""

    row: Variant
    shape: VideoShape
    batch: int = 1
    precision: str = "bf16"  # of the transformer's weights, one of `PRECISIONS`
    text_itemsize: int = 2  # bytes of a parameter of the text tower; CLIP is float32
    vae_itemsize: int = 2
    kept: float = 1.0  # share of visual self-attention that is computed; below 1: block-sparse (NABLA)
    guidance: float | None = None  # None: as released; 1 runs no second pass
    in_one_batch: bool = False  # both prompts of guidance run together, as ComfyUI may do
    steps: int | None = None
    text_tok: int | None = None  # tokens the transformer sees of each prompt; None: as many as it takes
    has_start: bool = False  # a start image or a picture to edit is encoded
    is_cpu: bool = False  # computed on the processor: device memory is main memory

    @property
    def passes(self) -> int:
        """Prompts that each step evaluates."""
        guidance = self.row.guidance if self.guidance is None else self.guidance
        return 1 if abs(guidance - 1) <= 1e-6 else 2

    @property
    def tokens(self) -> int:
        """Text tokens of a prompt."""
        return self.row.qwen_tokens if self.text_tok is None else self.text_tok

    @property
    def is_sparse(self) -> bool:
        """Whether visual self-attention is block-sparse."""
        return self.kept < 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What one stage of a run needs at its peak."""

    name: str
    weight_bytes: int  # on the device at once
    work_bytes: int  # activations, states and caches on the device
    host_bytes: int = 0  # main memory: weights that travel, results; not the page cache of files
    bus_bytes: int = 0  # from main memory to the device in one step
    steps: int = 1
    flops: Flops  # of one step
    is_ahead: bool = True  # transfers overlap with computing

    @property
    def device_bytes(self) -> int:
        """Device memory at the peak."""
        return self.weight_bytes + self.work_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """All stages of a run, in order; one is in memory at a time."""

    job: Job
    plan: Plan
    stages: tuple[Stage, ...]

    @property
    def peak(self) -> Stage:
        """The stage that needs most of the device."""
        return max(self.stages, key=lambda stage: stage.device_bytes)

    @property
    def host_bytes(self) -> int:
        """Main memory at the peak."""
        return max(stage.host_bytes for stage in self.stages)

    def stage(self, name: str) -> Stage:
        """The stage called `name`."""
        return next(stage for stage in self.stages if stage.name == name)


def estimate(job: Job, plan: Plan) -> Estimate:
    """What `job` needs when it is run as `plan` says."""
    stages = [text_stage(job, plan)]
    if job.has_start:
        stages.append(encode_stage(job, plan))
    stages += [sample_stage(job, plan), decode_stage(job, plan)]
    return Estimate(job=job, plan=plan, stages=tuple(stages))


def text_stage(job: Job, plan: Plan) -> Stage:
    """Both prompts through both text towers, one after the other."""
    text, itemsize = job.row.text, job.text_itemsize
    patches = _vision_patches(job)
    positions = job.tokens + TEMPLATE_TOK
    layer = cost.tower_layer_parameters(text.qwen) * itemsize
    embeddings = text.qwen.vocabulary * text.qwen.width * itemsize
    layers = text.qwen.layers * layer
    clip = cost.clip_parameters(text.clip) * FLOAT
    vision = cost.vision_parameters(text) * itemsize if patches else 0
    if plan.streams_text:
        weights = min(plan.prefetch + 1, text.qwen.layers) * layer + max(clip, vision)
        host, bus = layers, layers
    else:
        weights, host, bus = layers + embeddings + clip + vision, 0, 0
    return Stage(
        name=TEXT,
        weight_bytes=weights,
        work_bytes=encode_bytes(text, positions, itemsize=itemsize, vision_patches=patches),
        host_bytes=host,
        bus_bytes=bus,
        steps=job.passes,
        flops=cost.text_flops(text, positions, patches),
        is_ahead=plan.prefetch > 0,
    )


def encode_stage(job: Job, plan: Plan) -> Stage:
    """The start image or the picture to edit through the autoencoder's encoder."""
    grid = (1, *job.shape.latent_thw[1:])
    encode = encode_plan(job, plan)
    pixels = RGB * job.shape.width_px * job.shape.height_px
    return Stage(
        name=ENCODE,
        weight_bytes=_autoencoder_bytes(job),
        work_bytes=encode.peak_bytes + pixels * job.vae_itemsize,
        host_bytes=pixels * FLOAT,
        flops=cost.encode_flops(job.row.vae, grid) * encode.work,
    )


def sample_stage(job: Job, plan: Plan) -> Stage:
    """All steps of the sampler."""
    row, precision = job.row, PRECISIONS[job.precision]
    count = cost.parameters(row.spec)
    batch = job.batch * (job.passes if job.in_one_batch else 1)
    block, text_block, rest = (round(part * precision.weight) for part in (count.block, count.text_block, count.rest))
    modulation = round(count.all_modulation * precision.modulation)
    resident = count.blocks if plan.resident_blocks is None else min(count.blocks, plan.resident_blocks)
    if streamed := count.blocks - resident:
        # The text blocks travel with the visual ones. The modulation's vectors of all steps are computed before, so
        # its weights do not.
        travelling = streamed * block + count.text_blocks * text_block
        evaluations = job.passes * (job.steps or row.steps)
        vectors = evaluations * (9 * count.blocks + 6 * count.text_blocks) * row.spec.model_dim * FLOAT
        weights = rest + resident * block + min(plan.prefetch + 1, streamed + count.text_blocks) * block
        host, bus = travelling + vectors, travelling * (1 if job.in_one_batch else job.passes)
    else:
        weights, host, bus = rest + count.blocks * block + count.text_blocks * text_block + modulation, 0, 0
    if precision.weight < precision.computes_as:
        weights += row.spec.model_dim * row.spec.ff_dim * precision.computes_as  # the layer that is widened
    once = cost.forward_flops(row.spec, job.shape.tokens, job.tokens, kept=job.kept).flops
    return Stage(
        name=SAMPLE,
        weight_bytes=weights,
        work_bytes=_state_bytes(job, batch) + _forward(job, plan, batch).peak_bytes(),
        host_bytes=host,
        bus_bytes=bus,
        steps=job.steps or row.steps,
        flops=once * (job.batch * job.passes),
        is_ahead=plan.prefetch > 0,
    )


def decode_stage(job: Job, plan: Plan) -> Stage:
    """The latent through the autoencoder's decoder, clip after clip."""
    decode = decode_plan(job, plan)
    shape = job.shape
    frames = RGB * shape.width_px * shape.height_px * shape.frames * job.batch * FLOAT
    return Stage(
        name=DECODE,
        weight_bytes=_autoencoder_bytes(job),
        work_bytes=decode.peak_bytes,
        host_bytes=frames,
        flops=cost.decode_flops(job.row.vae, shape.latent_thw) * (decode.work * job.batch),
    )


def decode_plan(job: Job, plan: Plan) -> DecodePlan:
    """The plan's way to decode, or the best one that its budget has room for."""
    if plan.decode is not None:
        return plan.decode
    free = plan.budget_bytes - _autoencoder_bytes(job)
    return plan_decode(
        job.row.vae, job.shape.latent_thw, free_bytes=free, itemsize=job.vae_itemsize, mode=plan.decode_mode
    )


def encode_plan(job: Job, plan: Plan) -> EncodePlan:
    """The plan's way to encode a picture, or the best one that its budget has room for."""
    if plan.encode is not None:
        return plan.encode
    free = plan.budget_bytes - _autoencoder_bytes(job)
    grid = (1, *job.shape.latent_thw[1:])
    return plan_encode(job.row.vae, grid, free_bytes=free, itemsize=job.vae_itemsize)


def _autoencoder_bytes(job: Job) -> int:
    """Both halves: an autoencoder is loaded as a whole."""
    halves = (cost.autoencoder_parameters(job.row.vae, is_decoder=is_decoder) for is_decoder in (False, True))
    return sum(halves) * job.vae_itemsize


def _forward(job: Job, plan: Plan, batch: int) -> Forward:
    itemsize = PRECISIONS[job.precision].computes_as
    sparse = None
    if job.is_sparse:
        sparse = sparse_bytes(
            job.row.spec, job.shape.token_thw, batch=batch, itemsize=itemsize, is_cpu=job.is_cpu, kept=job.kept
        )
    return Forward(
        spec=job.row.spec, batch=batch, visual_tok=job.shape.tokens, text_tok=job.tokens, itemsize=itemsize,
        stream_itemsize=PRECISIONS[job.precision].stream, is_cpu=job.is_cpu, hidden_pieces=plan.hidden_pieces,
        head_groups=plan.head_groups, sparse=sparse,
    )  # fmt: skip


def _state_bytes(job: Job, batch: int) -> int:
    """Latents of the sampler around a forward, all float32: see `sampling/flow.py`.

    Start, noise, the state, the last velocity and the last clean latent, with guidance also the other prompt's
    velocity; then the network's input and the prompts.
    """
    spec, itemsize = job.row.spec, PRECISIONS[job.precision].computes_as
    t, h, w = job.shape.latent_thw
    latent = job.batch * t * h * w
    one = latent * spec.out_visual_dim * FLOAT
    channels = spec.visual_embed_dim
    given = batch * t * h * w * channels * itemsize
    if channels == spec.out_visual_dim and itemsize == FLOAT:
        given = 0  # the state itself
    prompt = job.tokens * spec.in_text_dim * (0 if itemsize == FLOAT and job.is_cpu else itemsize)
    return one * (4 + job.passes) + given + prompt


def _vision_patches(job: Job) -> int:
    """Patches that Qwen2.5-VL sees of a picture to edit, halved first."""
    if job.row.spec.instruct_type is None or not job.has_start:
        return 0
    rows, columns = (max(1, round(side / 2 / VISION_CELL_PX)) for side in (job.shape.height_px, job.shape.width_px))
    return rows * columns * cost.VISION_MERGE
