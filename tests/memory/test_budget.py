"""Plans fit their budgets, take what costs least, and say what to change when nothing fits."""

from __future__ import annotations

import pytest
from comfyui_kandinsky5.kandinsky_core.cost import Flops
from comfyui_kandinsky5.kandinsky_core.errors import BudgetError, KandinskyError
from comfyui_kandinsky5.kandinsky_core.memory.budget import (
    GB,
    PROFILES,
    cheapest_change,
    describe,
    make_plan,
    needed,
)
from comfyui_kandinsky5.kandinsky_core.memory.card import CARDS, Card, run_seconds, stage_seconds, time_class
from comfyui_kandinsky5.kandinsky_core.memory.estimate import (
    DECODE,
    ENCODE,
    SAMPLE,
    TEXT,
    Job,
    Stage,
    decode_stage,
    estimate,
)
from comfyui_kandinsky5.kandinsky_core.memory.plan import Plan
from comfyui_kandinsky5.kandinsky_core.memory.report import summary, values
from comfyui_kandinsky5.kandinsky_core.shapes import VideoShape
from comfyui_kandinsky5.kandinsky_core.vae.plan import MODES, REFERENCE
from comfyui_kandinsky5.kandinsky_core.variants import VARIANTS, VIDEO_LITE


def released(name: str, **changes) -> Job:
    row = VARIANTS[name]
    height, width = row.sizes[0]
    kept = 1.0 if row.attention.kind == "full" else 0.25
    shape = VideoShape(width_px=width, height_px=height, frames=row.frames[0])
    return Job(**({"row": row, "shape": shape, "kept": kept} | changes))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", ["lite_t2v_5s_sft", "lite_t2v_10s_sft", "lite_i2v_5s", "pro_t2v_5s_sd", "lite_t2i"])
def test_released_sizes_fit_every_card(name, profile):
    """12 and 8 GB cards run Lite, Image and Pro in SD: every stage of the plan fits, margin included."""
    job = released(name, has_start=name == "lite_i2v_5s")
    found = estimate(job, make_plan(job, PROFILES[profile]))
    assert all(needed(stage) <= PROFILES[profile] for stage in found.stages)


def test_nothing_travels_that_fits():
    job = released("lite_t2v_5s_sft")
    plan = make_plan(job, PROFILES["24 GB"])
    assert (plan.resident_blocks, plan.streams_text, plan.hidden_pieces, plan.head_groups) == (None, False, 1, 1)


def test_as_many_blocks_stay_as_fit():
    job = released("pro_t2v_5s_sd")
    plan = make_plan(job, PROFILES["12 GB"])
    assert 0 < plan.resident_blocks < 60
    one_more = estimate(job, Plan(
        budget_bytes=plan.budget_bytes, resident_blocks=plan.resident_blocks + 1, hidden_pieces=plan.hidden_pieces,
        head_groups=plan.head_groups, decode=plan.decode, streams_text=True,
    ))  # fmt: skip
    assert needed(one_more.stage(SAMPLE)) > plan.budget_bytes


def test_more_memory_never_travels_more():
    job = released("pro_t2v_5s_sd")
    travels = [estimate(job, make_plan(job, gb * GB)).stage(SAMPLE).bus_bytes for gb in range(8, 50, 6)]
    assert travels == sorted(travels, reverse=True) and travels[-1] == 0


@pytest.mark.parametrize(
    "fixed",
    [
        {"resident_blocks": 3}, {"prefetch": 0}, {"streams_text": True}, {"hidden_pieces": 5}, {"head_groups": 7},
    ],
)  # fmt: skip
def test_every_choice_can_be_made_by_hand(fixed):
    plan = make_plan(released("lite_t2v_5s_sft"), PROFILES["24 GB"], fixed)
    assert {name: getattr(plan, name) for name in fixed} == fixed


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != REFERENCE])
@pytest.mark.parametrize("profile", ["8 GB", "12 GB", "16 GB"])
def test_a_decode_mode_is_planned_for_beside_the_weights(mode, profile):
    job = released("lite_t2v_5s_sft")
    plan = make_plan(job, PROFILES[profile], {"decode_mode": mode})
    assert plan.decode.mode == mode and f"Decode: {mode}" in describe(job, plan)
    assert needed(decode_stage(job, plan)) <= PROFILES[profile]


def test_a_decode_mode_that_does_not_fit_is_refused_beforehand():
    with pytest.raises(BudgetError, match="mode reference"):
        decode_stage(released("lite_t2v_5s_sft"), Plan(budget_bytes=GB, decode_mode=REFERENCE))


def test_a_setting_that_does_not_exist_is_refused():
    with pytest.raises(KandinskyError, match="has no swap"):
        make_plan(released("nano_video"), GB, {"swap": 3})


def test_an_error_says_the_least_need_and_a_change_makes_it_fit():
    job = released("pro_t2v_10s_hd")
    with pytest.raises(BudgetError, match=r"'sample' needs at least \d+\.\d GB .* budget is 7\.0 GB"):
        make_plan(job, PROFILES["8 GB"])
    change = cheapest_change(job, PROFILES["8 GB"])
    make_plan(change.job, PROFILES["8 GB"], change.fixed)


def test_the_cheapest_change_comes_first():
    """What a user set by hand is given back before weights or sizes change; a batch before the size of a picture."""
    job = released("lite_t2v_5s_sft")
    assert cheapest_change(job, PROFILES["8 GB"], {"streams_text": False}).title == "leave streams_text automatic"
    many = released("lite_t2v_10s_sft", batch=6)
    with pytest.raises(BudgetError):
        make_plan(many, PROFILES["8 GB"])
    assert cheapest_change(many, PROFILES["8 GB"]).title.startswith("batch")


def test_nothing_is_promised_that_no_single_change_can_do():
    assert cheapest_change(released("pro_t2v_10s_hd"), GB // 10) is None


def test_a_plan_prints_every_choice():
    job = released("lite_i2v_5s", has_start=True)
    text = describe(job, make_plan(job, PROFILES["8 GB"]))
    for word in ("Budget", "Weights", "Text encoder", "Feed-forward", "Attention", "Encode", "Decode"):
        assert word in text


def test_two_passes_double_the_traffic_of_one():
    job = released("pro_t2v_5s_sd")
    plan = make_plan(job, PROFILES["12 GB"])
    both = estimate(job, plan).stage(SAMPLE).bus_bytes
    once = estimate(released("pro_t2v_5s_sd", guidance=1.0), plan).stage(SAMPLE).bus_bytes
    together = estimate(released("pro_t2v_5s_sd", in_one_batch=True), plan).stage(SAMPLE).bus_bytes
    assert both == 2 * once == 2 * together


def test_streaming_every_block_moves_the_bytes_of_the_table():
    """Performance reference §2.4, bytes a forward in GB; there with the modulation, which does not travel here."""
    for name, blocks_gb in (("lite_t2v_5s_sft", 3.8), ("pro_t2v_5s_sd", 36.8), ("lite_t2i", 11.7)):
        job = released(name, guidance=1.0)
        plan = Plan(budget_bytes=100 * GB, resident_blocks=0)
        moved = estimate(job, plan).stage(SAMPLE).bus_bytes / GB
        spec = job.row.spec
        modulation = 9 * spec.model_dim * (spec.time_dim + 1) * spec.num_visual_blocks * 2 / GB
        assert moved + modulation == pytest.approx(blocks_gb, rel=0.1)


def test_time_is_what_rates_say():
    stage = Stage(
        name=SAMPLE, weight_bytes=0, work_bytes=0, bus_bytes=2 * 10**9, steps=3,
        flops=Flops(product=4 * 10**12, attention=6 * 10**12, convolution=10**12),
    )  # fmt: skip
    card = Card(name="x", product=2, attention_64=3, attention_128=6, convolution=1, bus_bytes_s=10**9)
    assert stage_seconds(stage, card, VIDEO_LITE) == pytest.approx(3 * (2 + 2 + 1))
    assert stage_seconds(stage, card, VIDEO_LITE, is_sparse=True) == pytest.approx(3 * (2 + 2 / 0.75 + 1))


def test_lite_five_seconds_takes_as_long_as_the_reference_says():
    """Performance reference §1.5: 59, 24 and 7.9 minutes of steps on three cards."""
    job = released("lite_t2v_5s_sft")
    found = estimate(job, Plan(budget_bytes=80 * GB))
    for card, minutes in zip(CARDS[:3], (59, 24, 7.9), strict=True):
        assert stage_seconds(found.stage(SAMPLE), card, job.row.spec) / 60 == pytest.approx(minutes, rel=0.05)
    assert run_seconds(found, CARDS[0]) > run_seconds(found, CARDS[2])


@pytest.mark.parametrize(
    ("seconds", "name"), [(5, "seconds"), (60, "minutes"), (600, "tens of minutes"), (3600, "hours")]
)
def test_time_classes(seconds, name):
    assert time_class(seconds) == name


def test_reports_have_all_stages():
    job = released("lite_i2v_5s", has_start=True)
    text, found = summary(job, budget_bytes=PROFILES["12 GB"]), values(job, budget_bytes=PROFILES["12 GB"])
    assert [stage["name"] for stage in found["stages"]] == [TEXT, ENCODE, SAMPLE, DECODE]
    assert all(name in text for name in (TEXT, ENCODE, SAMPLE, DECODE))
