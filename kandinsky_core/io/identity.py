"""Tell from tensor shapes and metadata which Kandinsky 5 variant a checkpoint is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from ..errors import CheckpointError, VariantError
from ..variants import VARIANTS, CrossDiTSpec, Variant, variant
from .checkpoint import Checkpoint
from .signature import describe, recognise

SPEC_KEY = "kandinsky5.spec"  # safetensors metadata: JSON of CrossDiTSpec, for sizes no table row has
VARIANT_KEY = "kandinsky5.variant"  # safetensors metadata: name of the table row

# What makes a model of one row's kind, whatever its size: how its input channels are laid out and meant.
FAMILY_FIELDS = ("visual_cond", "instruct_type", "patch_size", "in_visual_dim", "out_visual_dim")

# Words in file and folder names that hint at tasks and tags of a row; the first match of a group counts.
NAME_WORDS: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        (r"i2v|image.?to.?video", "i2v"),
        (r"t2v|text.?to.?video", "t2v"),
        (r"i2i|edit", "i2i"),
        (r"t2i", "t2i"),
    ),
    ((r"distil|16.?steps", "distilled"), (r"no.?cfg", "nocfg"), (r"pre.?train", "pretrain"), (r"sft", "sft")),
    ((r"(?<!\d)10.?s(ec)?(?![a-z])", "10s"), (r"(?<!\d)5.?s(ec)?(?![a-z])", "5s")),
    ((r"(?<![a-z])hd(?![a-z])", "hd"), (r"(?<![a-z])sd(?![a-z])", "sd")),
)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a checkpoint is: the architecture is certain; the row within its family may be a guess.

    `certain` is False when `variant` was guessed from a file name or a default; `hint` says how, in words for the
    user. `candidates` are the rows that share the architecture.
    """

    spec: CrossDiTSpec
    variant: Variant
    certain: bool
    hint: str
    candidates: tuple[str, ...]


def identify(checkpoint: Checkpoint, choice: str | None = None) -> Identity:
    """Identify a CrossDiT checkpoint; `choice` names the row the user wants instead of the guess.

    Foreign weights and unknown dimensions raise `CheckpointError`, a row of another family `VariantError`.
    """
    spec = read_spec(checkpoint)
    named = checkpoint.metadata.get(VARIANT_KEY)
    if named and named not in VARIANTS:
        raise CheckpointError(
            f"{checkpoint.path} calls itself {named!r}, which is unknown. Known: {', '.join(VARIANTS)}."
        )
    if named and SPEC_KEY in checkpoint.metadata:
        _check_family(checkpoint, spec, variant(named))
        rows = (replace(variant(named), spec=spec),)
    else:
        rows = tuple(row for row in VARIANTS.values() if row.spec == spec)
        if not rows:
            raise CheckpointError(f"{checkpoint.path} looks like a Kandinsky-style CrossDiT of unknown dimensions: "
                                  f"{_dimensions(spec)}. Known: {_known()}.")  # fmt: skip
    names = tuple(row.name for row in rows)
    by_name = dict(zip(names, rows, strict=True))

    if choice is not None:
        if choice not in by_name:
            variant(choice)
            raise VariantError(f"{checkpoint.path} holds {_dimensions(spec)}; variant {choice!r} is another model. "
                               f"Possible: {', '.join(names)}.")  # fmt: skip
        return Identity(spec, by_name[choice], True, f"'{choice}' as chosen.", names)
    if named:
        if named not in by_name:
            raise CheckpointError(
                f"{checkpoint.path} calls itself {named!r}, but its tensors are {_dimensions(spec)}."
            )
        return Identity(spec, by_name[named], True, f"'{named}', named in the file's metadata.", names)
    if len(rows) == 1:
        return Identity(spec, rows[0], True, f"'{names[0]}', the only variant with these tensors.", names)
    row, reason = _guess(rows, checkpoint)
    return Identity(
        spec, row, False,
        f"'{row.name}' ({row.title}), a guess {reason}: {len(rows)} variants have the same tensors. "
        f"Set 'variant' if it is another one: {', '.join(names)}.", names,
    )  # fmt: skip


def read_spec(checkpoint: Checkpoint) -> CrossDiTSpec:
    """Architecture from tensor shapes, checked against the metadata when the file carries a specification."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    found = recognise(shapes)
    if found is None or found.title != "a Kandinsky 5 transformer":
        raise CheckpointError(f"{checkpoint.path} is not a Kandinsky 5 transformer. {describe(shapes)}")
    try:
        derived = _derive(shapes)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.path} looks like a Kandinsky-style CrossDiT of unknown dimensions: {error} does not fit."
        ) from error
    if SPEC_KEY not in checkpoint.metadata:
        return derived
    try:
        spec = _parse(checkpoint.metadata[SPEC_KEY], derived)
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: its metadata '{SPEC_KEY}' is not a specification: {error}."
        ) from error
    # Axes, patch and the meaning of 33 channels do not show in shapes; all else must agree.
    hidden = {"axes_dims", *FAMILY_FIELDS}
    wrong = [
        f"{f.name} {getattr(spec, f.name)} (tensors: {getattr(derived, f.name)})"
        for f in fields(spec)
        if f.name not in hidden and getattr(spec, f.name) != getattr(derived, f.name)
    ]
    if wrong or spec.head_dim != derived.head_dim or spec.visual_embed_dim != derived.visual_embed_dim:
        raise CheckpointError(
            f"{checkpoint.path}: its metadata contradicts its tensors: {', '.join(wrong) or 'heads or channels'}."
        )
    return spec


def spec_metadata(row: Variant) -> dict[str, str]:
    """Metadata that lets `identify` recognise a file of this variant with certainty."""
    return {VARIANT_KEY: row.name, SPEC_KEY: json.dumps(asdict(row.spec))}


def _parse(text: str, derived: CrossDiTSpec) -> CrossDiTSpec:
    """CrossDiTSpec from JSON; a value of another kind than in `derived` raises `TypeError`."""
    given = json.loads(text)
    for key, value in given.items():
        like = getattr(derived, key)
        if isinstance(like, tuple):
            fits = isinstance(value, list) and [type(side) for side in value] == [int] * len(like)
        else:
            fits = key == "instruct_type" or type(value) is type(like)
        if not fits:
            raise TypeError(f"{key} {value!r}")
    return CrossDiTSpec(**{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()})


def _check_family(checkpoint: Checkpoint, spec: CrossDiTSpec, row: Variant) -> None:
    """Refuse a specification that is no smaller or larger model of the named row's kind, but another kind."""
    other = [
        f"{name} {getattr(spec, name)!r} ('{row.name}': {getattr(row.spec, name)!r})"
        for name in FAMILY_FIELDS
        if getattr(spec, name) != getattr(row.spec, name)
    ]
    if other:
        raise CheckpointError(
            f"{checkpoint.path}: its metadata names the variant '{row.name}' and a specification of another model: "
            f"{', '.join(other)}. Correct '{VARIANT_KEY}' or '{SPEC_KEY}', or download the file again."
        )


def _derive(shapes: dict[str, tuple[int, ...]]) -> CrossDiTSpec:
    """CrossDiTSpec from official tensor shapes; reference: the published key table."""
    width = shapes["visual_embeddings.in_layer.bias"][0]
    patch = 4  # 1*2*2 latent cells per token
    in_cells = shapes["visual_embeddings.in_layer.weight"][1]
    out_cells = shapes["out_layer.out_layer.weight"][0]
    if in_cells % patch or out_cells % patch:
        raise ValueError(f"{in_cells} input and {out_cells} output channels per token")
    channels, out_channels = in_cells // patch, out_cells // patch
    if channels not in (out_channels, 2 * out_channels + 1):
        raise ValueError(f"{channels} input channels for {out_channels} output channels")
    head = shapes["visual_transformer_blocks.0.self_attention.query_norm.weight"][0]
    if not head or not width:
        raise ValueError("an empty tensor")
    # How the head width splits into rotary axes does not show in any shape; unknown widths carry it in the metadata.
    axes = {row.spec.head_dim: row.spec.axes_dims for row in VARIANTS.values()}.get(head, (head - 4, 2, 2))
    spec = CrossDiTSpec(
        model_dim=width,
        ff_dim=shapes["visual_transformer_blocks.0.feed_forward.in_layer.weight"][0],
        time_dim=shapes["time_embeddings.in_layer.bias"][0],
        num_text_blocks=_count(shapes, "text_transformer_blocks"),
        num_visual_blocks=_count(shapes, "visual_transformer_blocks"),
        axes_dims=axes,
        in_text_dim=shapes["text_embeddings.in_layer.weight"][1],
        in_text_dim2=shapes["pooled_text_embeddings.in_layer.weight"][1],
        in_visual_dim=out_channels,
        out_visual_dim=out_channels,
        visual_cond=channels != out_channels,
    )
    # Both kinds of 33-channel weights look alike: the table knows which one has these dimensions, and of others only
    # editing is as wide as the image family.
    editing = replace(spec, visual_cond=False, instruct_type="channel")
    known = {row.spec for row in VARIANTS.values()}
    wide = {row.spec.model_dim for row in VARIANTS.values() if row.spec.instruct_type and row.repo}
    return editing if spec.visual_cond and (editing in known or (spec not in known and width in wide)) else spec


def _count(names: Iterable[str], stack: str) -> int:
    pattern = re.compile(rf"{stack}\.(\d+)\.")
    return 1 + max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1)


def _guess(rows: tuple[Variant, ...], checkpoint: Checkpoint) -> tuple[Variant, str]:
    """The row that the names around the file point to, and the reason in words."""
    for name in _names(checkpoint):
        if exact := [row for row in rows if Path(name).name in row.files]:
            return exact[0], f"from the file name '{name}'"
        words = _words(name)
        best = max(
            rows, key=lambda row: (len(words.intersection(row.tasks)), len(words.intersection(row.tags)))
        )
        if words.intersection(best.tasks + best.tags):
            return best, f"from the name '{name}'"
    sparse = checkpoint.config.get("attention_type") == "nabla"
    fitting = [row for row in rows if (row.attention.kind == "nabla") == sparse]
    if checkpoint.config and fitting:
        return fitting[0], f"from its configuration ({'block-sparse' if sparse else 'full'} attention)"
    return rows[0], f"by default, since the name '{checkpoint.path.name}' says nothing"


def _names(checkpoint: Checkpoint) -> Iterator[str]:
    """File and folder names that may say which variant this is, nearest first."""
    path = checkpoint.path.absolute()
    yield path.name
    if isinstance(origin := checkpoint.config.get("_name_or_path"), str):
        yield origin
    yield from (parent.name for parent in path.parents[: 4 if checkpoint.config else 1])


def _words(name: str) -> set[str]:
    lowered = name.lower()
    return {
        next(word for pattern, word in group if re.search(pattern, lowered))
        for group in NAME_WORDS
        if any(re.search(pattern, lowered) for pattern, _ in group)
    }


def _dimensions(spec: CrossDiTSpec) -> str:
    return (
        f"width {spec.model_dim}, {spec.num_text_blocks}+{spec.num_visual_blocks} blocks, "
        f"{spec.visual_embed_dim} channels, text {spec.in_text_dim}/{spec.in_text_dim2}"
    )


def _known() -> str:
    families = {row.family: row.spec for row in VARIANTS.values()}
    return "; ".join(f"{family} ({_dimensions(spec)})" for family, spec in families.items())
