"""Text encoding: templates, tokenizers, Qwen2.5-VL and CLIP, and the embedding cache."""

from .cache import EmbeddingCache, cache_key, encode_cached, encoder_hash
from .encoder import TextEncoder, TextFeatures, load_text_encoder
from .templates import TEMPLATES, Template, get_template

__all__ = [
    "TEMPLATES",
    "EmbeddingCache",
    "Template",
    "TextEncoder",
    "TextFeatures",
    "cache_key",
    "encode_cached",
    "encoder_hash",
    "get_template",
    "load_text_encoder",
]
