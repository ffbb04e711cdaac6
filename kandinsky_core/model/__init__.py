"""CrossDiT and its parts."""

from .attention import Attend, Attention, dense, masked
from .crossdit import CrossDiT, OnBlock, TextBlock, VisualBlock
from .layers import Modulate, Ops
from .modulation import ModulationTable
from .regime import Regime
from .rope import rope_1d, rope_3d, rotate

__all__ = [
    "Attend",
    "Attention",
    "CrossDiT",
    "Modulate",
    "ModulationTable",
    "OnBlock",
    "Ops",
    "Regime",
    "TextBlock",
    "VisualBlock",
    "dense",
    "masked",
    "rope_1d",
    "rope_3d",
    "rotate",
]
