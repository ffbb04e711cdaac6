"""Text encoding: templates, tokenizers, Qwen2.5-VL and CLIP, and the embedding cache."""

from .encoder import TextEncoder, TextFeatures, load_text_encoder
from .templates import TEMPLATES, Template, get_template

__all__ = ["TEMPLATES", "Template", "TextEncoder", "TextFeatures", "get_template", "load_text_encoder"]
