"""Tiny random text encoders, saved the way the real ones are: HF folders and ComfyUI single files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.text import load_text_encoder
from safetensors.torch import save_file

PROMPT = "a blue cube"
IMAGE = torch.zeros(3, 112, 112)
QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>",
)  # fmt: skip
# The end marker is not the largest id: transformers' old lookup by the largest id would go wrong.
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|extra|>")
QWEN_VOCABULARY, CLIP_VOCABULARY = 256 + len(QWEN_SPECIAL), 256 + len(CLIP_SPECIAL)


def same(one, other, atol=0.0):
    """Assert that two encoders give the same, of a prompt alone and with a picture."""
    for template, images in (("video", None), ("image_edit", [IMAGE])):
        left, right = (each.encode(PROMPT, template, images=images) for each in (one, other))
        torch.testing.assert_close(left.features_LD, right.features_LD, atol=atol, rtol=0)
        torch.testing.assert_close(left.pooled_P, right.pooled_P, atol=atol, rtol=0)


def save_tokenizer(folder: Path, special: tuple[str, ...]) -> Path:
    """A byte-level tokenizer without merges: one token a byte, then the special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(special))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def qwen_config():
    """Qwen2.5-VL with the published head widths (128 text, 80 vision), so that a single file can be told by shapes."""
    from transformers import Qwen2_5_VLConfig

    ids = {name: 256 + index for index, name in enumerate(QWEN_SPECIAL)}
    text = {
        "vocab_size": QWEN_VOCABULARY, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
        "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {
        "depth": 8, "hidden_size": 160, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256,
        "fullatt_block_indexes": [7],
    }  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


@pytest.fixture(scope="session")
def qwen():
    """transformers' whole Qwen2.5-VL, tiny: the reference, and the source of all Qwen files."""
    from transformers import Qwen2_5_VLModel

    torch.manual_seed(0)
    return _loud(Qwen2_5_VLModel(qwen_config()).eval())


@pytest.fixture(scope="session")
def clip():
    """transformers' CLIP text model, as wide as CLIP ViT-L/14 and two layers deep."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=CLIP_VOCABULARY,
        hidden_size=768,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=12,
        eos_token_id=257,
        bos_token_id=256,
        pad_token_id=257,
    )
    return _loud(CLIPTextModel(config).eval())


@pytest.fixture(scope="session")
def folders(tmp_path_factory, qwen, clip):
    """(Qwen folder, CLIP folder) with weights, config.json and tokenizer, as save_pretrained leaves them."""
    home = tmp_path_factory.mktemp("hf")
    for model, name, special in ((qwen, "text_encoder", QWEN_SPECIAL), (clip, "text_encoder_2", CLIP_SPECIAL)):
        model.save_pretrained(home / name)
        save_tokenizer(home / name, special)
    return home / "text_encoder", home / "text_encoder_2"


@pytest.fixture(scope="session")
def encoder(folders):
    """The tiny encoder, from folders."""
    return load_text_encoder(*folders)


@pytest.fixture(scope="session")
def comfy_qwen(qwen):
    """Tensors of the Qwen model under the names of ComfyUI's single file."""
    tensors = {name.replace("language_model.", "model.", 1): value for name, value in qwen.state_dict().items()}
    return tensors | {"lm_head.weight": torch.zeros(QWEN_VOCABULARY, 256)}


@pytest.fixture(scope="session")
def comfy_clip(clip):
    """Tensors of the CLIP model under the names of ComfyUI's clip_l.safetensors."""
    return {f"text_model.{name.removeprefix('text_model.')}": value for name, value in clip.state_dict().items()}


@pytest.fixture
def load_single(tmp_path, folders):
    """Write tensors as single files and load them with the folders' tokenizers."""

    def load(qwen_tensors, clip_tensors, **options):
        files = tmp_path / "qwen_2.5_vl_7b.safetensors", tmp_path / "clip_l.safetensors"
        for file, tensors in zip(files, (qwen_tensors, clip_tensors), strict=True):
            save_file({name: value.clone() for name, value in tensors.items()}, file)
        return load_text_encoder(
            *files, tokenizer_path=folders[0], clip_tokenizer_path=folders[1], **options
        )

    return load


def _loud(model: torch.nn.Module) -> torch.nn.Module:
    """Unit-gain matrices and uneven norms: transformers' own 0.02 would hide a missing norm or a swapped layer."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(std=value[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                value.uniform_(0.5, 1.5)
            else:
                value.normal_(std=0.1)
    return model
