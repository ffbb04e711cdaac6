"""Errors of the core. Every message says what was given, what is possible and what to set."""


class KandinskyError(ValueError):
    """Base of all errors this project raises on purpose."""


class ShapeError(KandinskyError):
    """A size, frame count or tensor shape the model cannot take."""


class VariantError(KandinskyError):
    """An unknown model variant, or a specification that contradicts itself."""


class CheckpointError(KandinskyError):
    """A weights file that is broken, foreign, incomplete or in the wrong loader."""


class TextError(KandinskyError):
    """A prompt, template or tokenizer problem."""


class MediaError(KandinskyError):
    """An image or video that cannot be read or written."""


class BackendUnavailable(KandinskyError):
    """An optional package or device feature that is not there."""


class BudgetError(KandinskyError):
    """Work that does not fit in the memory there is, in any way that is known."""
