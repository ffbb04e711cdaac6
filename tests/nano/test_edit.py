"""Drawn edits change one attribute, say which, and the judgement finds each fault by its own name."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from comfyui_kandinsky5.kandinsky_core.nano import draw
from comfyui_kandinsky5.kandinsky_core.nano import edit as edits

COUNT = 90


def picture(scene, size_px=64):
    """The first frame, `[H,W,3]`."""
    return draw.draw(scene, size_px=size_px, frames=1)[0]


@pytest.fixture(scope="module")
def drawn():
    """Edits of a stream no training uses, with the picture before."""
    return [(item, picture(item.before)) for item in edits.edits(987_654, COUNT)]


def test_an_edit_changes_one_attribute_and_keeps_the_rest():
    for item in edits.edits(1, 60):
        assert item.before.motion == item.after.motion == "still"
        assert item.after.names[item.kind] != item.before.names[item.kind]
        assert replace(item.after, **{item.kind: item.before.names[item.kind]}) == item.before
    assert edits.edit(1, 7) == edits.edit(1, 7) != edits.edit(1, 8)


def test_all_kinds_and_values_are_asked_for():
    found = Counter((item.kind, item.value) for item in edits.edits(2, 2000, unseen=False))
    assert set(found) == {(kind, value) for kind, values in edits.KINDS.items() for value in values}
    kinds = Counter(kind for kind, _ in found.elements())
    assert min(kinds.values()) > 500


def test_held_out_combinations_never_reach_training():
    for item in edits.edits(3, 300, unseen=False):
        assert not draw.held_out(item.before) and not draw.held_out(item.after)
    unseen = list(edits.edits(3, 100, unseen=True))
    assert all(draw.held_out(item.after) for item in unseen)
    assert len({draw.held_out(item.before) for item in unseen}) == 2


def test_instructions_name_the_new_value():
    rng = random.Random(0)
    for item in edits.edits(4, 200):
        words = edits.instruction(item, rng).lower()
        assert edits.BACKGROUND_PHRASES.get(item.value, item.value) in words
        assert ("background" in words) == (item.kind == "background")


def test_instructions_vary():
    rng = random.Random(1)
    item = edits.edit(4, 0)
    assert len({edits.instruction(item, rng) for _ in range(100)}) > 15


def test_an_instruction_says_one_thing_only():
    """No sentence asks for two different edits of the same picture."""
    meaning: dict[tuple, tuple[str, str]] = {}
    rng = random.Random(2)
    for item in edits.edits(5, 3000):
        key = (*item.before.names.values(), edits.instruction(item, rng).lower().rstrip("."))
        assert meaning.setdefault(key, (item.kind, item.value)) == (item.kind, item.value)


@pytest.mark.parametrize("size_px", [64, 128])
def test_true_edits_pass(drawn, size_px):
    for item, _ in drawn:
        found = edits.judge(picture(item.before, size_px), picture(item.after, size_px), item)
        assert found.asked and found.kept, (item, found)


def test_a_damaged_true_edit_passes(drawn, damaged):
    right = 0
    for item, before in drawn:
        found = edits.judge(before, damaged(picture(item.after)[None])[0], item)
        right += found.asked and found.kept
    assert right >= 0.95 * COUNT


def test_an_unchanged_picture_is_kept_and_not_what_was_asked(drawn):
    for item, before in drawn:
        found = edits.judge(before, before, item)
        assert not found.asked
        assert found.kept and found.moved == 0 and found.resized == 1


def test_a_repainted_picture_is_what_was_asked_and_not_kept(drawn):
    for item, before in drawn:
        others = {
            kind: next(name for name in names if name not in (item.before.names[kind], item.value))
            for kind, names in edits.KINDS.items()
            if kind != item.kind
        }
        found = edits.judge(before, picture(replace(item.after, **others)), item)
        assert found.asked and not found.others and not found.kept


@pytest.mark.parametrize("kind", edits.KINDS)
def test_one_more_change_is_not_kept(drawn, kind):
    for item, before in drawn:
        if item.kind == kind:
            continue
        names = edits.KINDS[kind]
        another = names[(names.index(item.before.names[kind]) + 1) % len(names)]
        found = edits.judge(before, picture(replace(item.after, **{kind: another})), item)
        assert found.asked and not found.others


def test_a_wrong_value_is_not_what_was_asked(drawn):
    for item, before in drawn:
        names = edits.KINDS[item.kind]
        wrong = next(name for name in names if name not in (item.value, item.before.names[item.kind]))
        found = edits.judge(before, picture(replace(item.after, **{item.kind: wrong})), item)
        assert not found.asked and found.kept


def test_a_moved_object_is_not_kept(drawn):
    for item, before in drawn:
        x, y = item.after.center
        found = edits.judge(before, picture(replace(item.after, center=(x + 0.08, y))), item)
        assert found.asked and found.others and found.resized < edits.RESIZED
        assert found.moved == pytest.approx(0.08, abs=0.02) and not found.kept


@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_a_resized_object_is_not_kept(drawn, factor):
    for item, before in drawn:
        found = edits.judge(before, picture(replace(item.after, radius=factor * item.after.radius)), item)
        assert found.asked and found.others and found.moved < edits.MOVED
        assert found.resized > edits.RESIZED and not found.kept


def test_without_an_object_nothing_is_kept(drawn):
    for item, before in drawn[:20]:
        plain = before[0, 0].expand(64, 64, 3)
        found = edits.judge(before, plain, item)
        assert not found.kept and not found.asked
