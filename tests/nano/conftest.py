"""What several tests of the nano family share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core.nano import autoencoder, run
from comfyui_kandinsky5.kandinsky_core.nano.plot import curves


@pytest.fixture(scope="module")
def one_thread():
    """Training repeats itself on one thread, and small layers gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small():
    """Less data for the bases and the tests of the autoencoders, and a warm-up that leaves steps to learn in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "WARMUP", 3)
        patch.setattr(autoencoder, "BASIS_CLIPS", ((12, 32), (4, 64)))
        patch.setattr(autoencoder, "BASIS_PICTURES", ((30, 32), (10, 64)))
        patch.setattr(autoencoder, "TESTS", ((2, 16), (1, 32)))
        patch.setattr(autoencoder, "FRAMES", 5)
        yield


@pytest.fixture
def losses():
    """Read the losses of a run: folder -> stage -> values in the order of the steps."""
    return lambda folder: {
        stage: named["loss"][1] for stage, named in curves(folder / "log.jsonl").items() if "loss" in named
    }


@pytest.fixture
def damaged():
    """Blur pictures `[T,H,W,3]` and add noise, as a poor autoencoder would; the noise goes on from call to call."""
    generator = torch.Generator().manual_seed(0)

    def damage(clip_THWC):
        soft_THWC = F.avg_pool2d(clip_THWC.movedim(-1, 1), 3, 1, 1, count_include_pad=False).movedim(1, -1)
        return soft_THWC + 0.03 * torch.randn(soft_THWC.shape, generator=generator)

    return damage
