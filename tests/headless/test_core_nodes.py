"""The stand-ins for ComfyUI's own nodes do what those do."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.headless.core_nodes import LoadImage, SaveImage
from comfyui_kandinsky5.kandinsky_core.io.media import write_png
from PIL import Image

GREEN = torch.tensor([0.0, 1.0, 0.0]).expand(2, 3, 3)


@pytest.fixture
def inside(host, tmp_path, monkeypatch):
    """Work in a folder with the same green picture at three places."""
    monkeypatch.chdir(tmp_path)
    for place in ("input/x.png", "out/sub/x.png", "out/temp/x.png"):
        write_png(tmp_path / place, GREEN)
    return tmp_path


def test_a_transparent_picture_gives_its_colours_and_a_mask(inside):
    picture = Image.new("RGBA", (3, 2), (255, 0, 0, 255))
    picture.putpixel((2, 1), (0, 0, 255, 0))
    picture.save("input/clear.png")
    image, mask = LoadImage.execute("clear.png").result
    assert image[0, 1, 2].tolist() == [0, 0, 1]
    assert mask.shape == (1, 2, 3)
    assert mask.nonzero().tolist() == [[0, 1, 2]] and mask[0, 1, 2] == 1


def test_an_opaque_picture_gives_an_empty_mask(inside):
    image, mask = LoadImage.execute("x.png").result
    assert torch.equal(image[0], GREEN)
    assert torch.equal(mask, torch.zeros(1, 64, 64))


@pytest.mark.parametrize("name", ["x.png", "x.png [input]", "sub/x.png [output]", "sub/x.png[output]", "x.png [temp]"])
def test_a_name_may_say_its_folder(inside, name):
    assert LoadImage.validate_inputs(name) is True
    assert torch.equal(LoadImage.execute(name).result[0][0], GREEN)


@pytest.mark.parametrize("name", ["../../input/x.png [output]", "x.png [output]", "sub/../../secret.png [output]"])
def test_a_folder_named_is_the_only_one_searched(inside, name):
    write_png(inside / "secret.png", GREEN)
    assert LoadImage.validate_inputs(name) is not True


def test_a_linked_prefix_is_left_to_the_run(inside):
    assert SaveImage.validate_inputs(None) is True
    assert "leads out" in SaveImage.validate_inputs("../x")
