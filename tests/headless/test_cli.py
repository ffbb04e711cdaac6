"""The command line on tiny random models: whole runs, exit codes, messages, metadata."""

from __future__ import annotations

import contextlib
import json
import resource

import pytest
import tiny
import tiny_graphs
import torch
from comfyui_kandinsky5.headless.cli import main
from comfyui_kandinsky5.kandinsky_core.io import open_checkpoint, save_checkpoint
from comfyui_kandinsky5.kandinsky_core.io.latents import keep_latent
from comfyui_kandinsky5.kandinsky_core.io.media import read_image, read_video, write_png
from comfyui_kandinsky5.kandinsky_core.memory.plan import Plan
from comfyui_kandinsky5.kandinsky_core.vae import compiled
from comfyui_kandinsky5.kandinsky_core.vae.plan import AUTO, SINGLE_PASS, plan_decode
from comfyui_kandinsky5.nodes import host as door
from comfyui_kandinsky5.nodes.video import K5DecodeVideo

TINY = ["--text-encoder", tiny.QWEN, "--clip", tiny.CLIP]
VIDEO = [*TINY, "--model", tiny.VIDEO, "--vae", tiny.VIDEO_VAE, "--steps", "2", "--frames", "5"]
SMALL = ["--width", "64", "--height", "48"]


@pytest.fixture
def cli(models, tmp_path, monkeypatch, capsys):
    """Run a command in the test's folder; gives exit code, standard output and standard error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("KANDINSKY5_MODELS", str(models))
    monkeypatch.setattr(door, "_current", [])
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def generate(cli, *arguments, prompt="a red circle"):
    return cli("generate", "--device", "cpu", "--prompt", prompt, *VIDEO, *SMALL, *arguments)


def test_text_to_video_writes_a_clip_with_its_history(cli):
    code, out, err = generate(cli, "--seed", "5")
    assert code == 0
    path = out.strip()
    assert path.endswith("output/kandinsky5_00001_.mp4")
    clip = read_video(path)
    assert clip.frames_THW3.shape == (5, 48, 64, 3)
    facts = json.loads(clip.metadata["kandinsky5"])
    assert {"version", "torch", "device"} <= facts.keys()
    recorded = {key: value for node in facts["nodes"].values() for key, value in node.items()}
    assert recorded["variant"] == "lite_i2v_5s"
    assert recorded["seed"] == 5
    assert recorded["prompts"][0] == "a red circle"
    prompt = json.loads(clip.metadata["prompt"])
    assert "K5Sample" in {node["class_type"] for node in prompt.values()}
    assert "Kandinsky 5 Sampler" not in out
    assert "[1/9]" in err


def test_the_same_seed_gives_the_same_file_and_another_seed_another(cli, tmp_path):
    for seed in ("1", "1", "2"):
        assert generate(cli, "--seed", seed, "--quiet")[0] == 0
    clips = [read_video(tmp_path / f"output/kandinsky5_0000{n}_.mp4").frames_THW3 for n in (1, 2, 3)]
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])


def test_image_to_video_begins_with_the_picture(cli, tmp_path):
    picture = torch.rand(40, 80, 3, generator=torch.Generator().manual_seed(0))
    write_png(tmp_path / "start.png", picture)
    assert generate(cli, "--image", "start.png", "--quiet")[0] == 0
    with_picture = read_video(tmp_path / "output/kandinsky5_00001_.mp4").frames_THW3
    assert generate(cli, "--quiet")[0] == 0
    without = read_video(tmp_path / "output/kandinsky5_00002_.mp4").frames_THW3
    assert not torch.equal(with_picture[0], without[0])


def test_one_frame_is_a_picture(cli, tmp_path):
    code, out, _ = generate(cli, "--frames", "1")
    assert code == 0
    assert out.strip().endswith(".png")
    assert read_image(out.strip()).pixels_1HW3.shape == (1, 48, 64, 3)


def test_text_to_image_uses_the_image_family(cli):
    image = [*TINY, "--model", tiny.IMAGE, "--vae", tiny.IMAGE_VAE, "--steps", "1"]
    code, out, err = cli("generate", "--prompt", "a lighthouse", *image, *SMALL)
    assert code == 0, err
    assert read_image(out.strip()).pixels_1HW3.shape == (1, 48, 64, 3)


def test_a_start_image_for_an_image_model_is_refused_before_anything_runs(cli, tmp_path):
    write_png(tmp_path / "start.png", torch.zeros(48, 64, 3))
    image = [*TINY, "--model", tiny.IMAGE, "--vae", tiny.IMAGE_VAE, "--image", "start.png"]
    code, _, err = cli("generate", "--prompt", "a lighthouse", *image, *SMALL)
    assert code == 2
    assert "takes no picture. Leave out --image" in err


EDIT = [*TINY, "--model", tiny.EDIT, "--vae", tiny.IMAGE_VAE, "--steps", "2", "--image", "start.png"]


def test_an_editing_model_changes_the_picture(cli, tmp_path):
    made = []
    for shade in (0.1, 0.9):
        write_png(tmp_path / "start.png", torch.full((40, 80, 3), shade))
        code, out, err = cli("generate", "--prompt", "make it red", *EDIT, *SMALL)
        assert code == 0, err
        made.append(read_image(out.splitlines()[-1]).pixels_1HW3)
    assert made[0].shape == (1, 48, 64, 3)
    assert (made[0] - made[1]).abs().mean() > 0.01


def test_a_length_for_an_edit_is_refused(cli, tmp_path):
    write_png(tmp_path / "start.png", torch.zeros(48, 64, 3))
    code, _, err = cli("generate", "--prompt", "make it red", *EDIT, "--frames", "5")
    assert code == 2 and "it has no 5 frames" in err


def test_files_of_one_name_from_two_folders_stay_apart(cli, models, tmp_path):
    for folder, source in (("qwen", tiny.QWEN), ("clip", tiny.CLIP)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model").symlink_to(models / "text_encoders" / source)
    code, out, err = generate(cli, "--text-encoder", "qwen/model", "--clip", "clip/model", "--json")
    assert code == 0, err
    assert {"qwen/model", "clip/model"} <= set(read_loader_inputs(out))


def read_loader_inputs(report):
    """Return what the text encoder loader of a run was given, from the saved clip."""
    clip = read_video(json.loads(report)["outputs"][0]["path"])
    graph = json.loads(clip.metadata["prompt"]).values()
    return next(node["inputs"].values() for node in graph if node["class_type"] == "K5LoadTextEncoder")


def test_json_holds_files_facts_and_times(cli):
    code, out, _ = generate(cli, "--json", "--quiet")
    report = json.loads(out)
    assert code == 0
    assert report["outputs"][0]["frames"] == 5
    assert report["outputs"][0]["width"] == 64
    assert report["timings_s"].keys() == {str(n) for n in range(1, 10)}
    assert "2 steps" in "".join(report["reports"].values())


def workflow(path, **changes):
    """Write a workflow in API format that makes a tiny clip."""
    graph = tiny_graphs.text_to_video(length=5, steps=1) | {
        "video": tiny_graphs.node("CreateVideo", images=["decode", 0], fps=8),
        "save": tiny_graphs.node("SaveVideo", video=["video", 0], filename_prefix="a/b", format="mp4"),
    }
    for place, value in changes.items():
        node, _, name = place.partition("_")
        graph[node]["inputs"][name] = value
    path.write_text(json.dumps(graph))
    return path


def test_run_takes_a_file_and_settings(cli, tmp_path):
    path = workflow(tmp_path / "w.json")
    settings = ["--set", "empty.length=1", "--set", "SaveVideo.filename_prefix=c"]
    code, out, err = cli("run", path, *settings, "--out", "here")
    assert code == 0, err
    assert out.strip() == str(tmp_path / "here/c_00001_.mp4")
    assert len(read_video(out.strip()).frames_THW3) == 1


def test_refusals_exit_with_2_and_name_all_problems(cli, tmp_path):
    path = workflow(tmp_path / "w.json", empty_width=70, sample_steps=-1)
    code, out, err = cli("run", path, "--json")
    assert code == 2
    problems = json.loads(out)["error"]["problems"]
    assert [text.partition(":")[0] for text in problems] == [
        "node empty 'Kandinsky 5 Empty Latent' (K5EmptyLatent)",
        "node sample 'Kandinsky 5 Sampler' (K5Sample)",
    ]
    assert "steps: -1 is below" in err
    assert not (tmp_path / "output").exists()


def test_cancelling_exits_with_130_and_leaves_no_file(cli, tmp_path, monkeypatch):
    from comfyui_kandinsky5.kandinsky_core.sampling import flow

    def cancelled(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(flow, "integrate", cancelled)
    code, _, err = generate(cli)
    assert code == 130
    assert "Cancelled." in err
    assert not list(tmp_path.glob("output/*"))


def damaged(models, folder, name, change):
    """Copy a tiny file with its tensors changed."""
    source = open_checkpoint(models / folder / name)
    tensors = {key: source.tensor(key).clone() for key in source.tensors}
    change(tensors)
    path = models.parent / f"damaged_{name}"
    save_checkpoint(path, tensors, source.metadata)
    return path


def test_a_truncated_file_is_refused_before_anything_runs(cli, models, tmp_path):
    whole = (models / "diffusion_models" / tiny.VIDEO).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    code, _, err = generate(cli, "--model", "cut.safetensors")
    assert code == 2
    assert "cut.safetensors" in err
    assert "download" in err.lower()


def test_a_model_in_the_wrong_loader_is_refused_with_its_nature(cli, models):
    code, _, err = generate(cli, "--model", models / "vae" / tiny.VIDEO_VAE)
    assert code == 2
    assert "not a Kandinsky 5 transformer" in err
    code, _, err = generate(cli, "--vae", models / "diffusion_models" / tiny.VIDEO)
    assert code == 2
    assert "K5LoadVAE" in err
    assert "transformer" in err


def test_nan_weights_are_named(cli, models):
    def spoil(tensors):
        tensors["out_layer.out_layer.weight"][0, 0] = float("nan")

    code, _, err = generate(cli, "--model", damaged(models, "diffusion_models", tiny.VIDEO, spoil))
    assert code == 1
    assert "K5Sample" in err
    assert "NaN" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "70"], "width 70 is not a positive multiple of 16. Use 64"),
        (["--frames", "0"], "0 frames"),
        (["--guidance", "nan"], "nan is not a finite number"),
        (["--shift", "inf"], "inf is not a finite number"),
        (["--frames", "6"], "must be 4k+1"),
        (["--image", "nothing.png"], "nothing.png"),
        (["--model", "nothing.safetensors"], "neither a file nor a name"),
        (["--variant", "lite_t2i"], "lite_t2i"),
        (["--dtype", "int3"], "int3"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_bad_values_exit_with_2_and_a_remedy(cli, arguments, message):
    code, out, err = generate(cli, *arguments)
    assert code == 2
    assert message in err
    assert out == ""


def test_an_unreadable_image_is_refused(cli, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n but not really")
    code, _, err = generate(cli, "--image", "broken.png")
    assert code == 2
    assert "LoadImage" in err
    assert "broken.png" in err


def test_an_empty_prompt_runs_and_is_reported(cli):
    code, _, err = generate(cli, prompt="")
    assert code == 0
    assert "(empty)" in err


def test_a_prompt_of_ten_thousand_words_is_cut_and_reported(cli):
    code, _, err = generate(cli, prompt="word " * 10_000)
    assert code == 0
    assert "were cut off (limit 256)" in err


@contextlib.contextmanager
def full_disk():
    """Let the system refuse every file that grows beyond 1 kB."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_an_output_folder_that_cannot_be_made_is_refused_before_anything_runs(cli, tmp_path):
    (tmp_path / "taken").touch()
    code, _, err = generate(cli, "--out", "taken/here")
    assert code == 2
    assert "taken/here cannot be written" in err
    assert "[1/" not in err


@pytest.mark.parametrize("prefix", ["../x", "/x", ""])
def test_a_prefix_outside_the_output_folder_is_refused_before_anything_runs(cli, tmp_path, prefix):
    code, _, err = cli("run", workflow(tmp_path / "w.json", save_filename_prefix=prefix))
    assert code == 2
    assert "leads out of the output folder" in err
    assert "[1/" not in err


def test_a_full_disk_ends_in_a_message_and_no_half_file(cli, tmp_path, caplog):
    with full_disk():
        code, _, err = generate(cli)
    assert code == 1
    assert "SaveVideo" in err
    assert "cannot be written" in err
    assert not [path for path in tmp_path.glob("output/**/*") if path.is_file()]
    assert "The latent is NOT safe" in caplog.text


def test_lists_of_nodes_and_variants(cli):
    code, out, _ = cli("nodes", "--json")
    assert code == 0
    assert json.loads(out)["K5Sample"]["inputs"]["seed"] == "INT"
    code, out, _ = cli("variants")
    assert code == 0
    assert "kandinsky5lite_t2v_sft_5s.safetensors" in out


def test_a_saved_latent_becomes_the_same_clip(cli, tmp_path):
    assert generate(cli, "--seed", "5", "--quiet")[0] == 0
    made = tmp_path / "output/kandinsky5_00001_.mp4"
    code, out, err = cli("decode", "--device", "cpu")
    assert code == 0 and out.strip().endswith("kandinsky5_00002_.mp4")
    assert "64 × 48 pixels, 5 frames" in err and f"seed 5, VAE {tiny.VIDEO_VAE}" in err
    again, first = read_video(out.strip()), read_video(made)
    assert torch.equal(again.frames_THW3, first.frames_THW3) and again.fps == first.fps == 24
    assert len(list((tmp_path / "output/latents").iterdir())) == 1  # the same latent is not kept twice


def test_a_decode_mode_of_a_memory_plan_is_that_of_the_resumed_clip(cli, tmp_path, host):
    """Single-pass and auto differ here, so a mode that got lost would be seen."""
    samples = torch.randn(1, 16, 6, 6, 8, generator=torch.Generator().manual_seed(0))
    vae = host.load_vae(host.models / "vae" / tiny.VIDEO_VAE, dtype="auto")
    spec, thw = tiny.VIDEO_VAE_SPEC, tuple(samples.shape[2:])
    ways = {mode: plan_decode(spec, thw, free_bytes=None, itemsize=4, mode=mode) for mode in (SINGLE_PASS, AUTO)}
    frames = {}
    for mode, way in ways.items():
        door.install(host)  # a command brings its own
        plan = Plan(budget_bytes=1 << 30, decode_mode=mode, decode=way)
        video = K5DecodeVideo.execute(
            vae, {"samples": samples}, 8.0, f"made/{mode}", "mkv", "lossless", 14.0, "auto", 0.0, 8, plan
        ).result[0]
        frames[mode] = read_video(video.path).frames_THW3
        latent = next(iter(host.latents().values()))
        code, out, err = cli("decode", latent, "--format", "mkv", "--codec", "lossless", "--device", "cpu")
        assert code == 0, err
        assert torch.equal(read_video(out.strip()).frames_THW3, frames[mode])
        latent.unlink()
    assert not torch.equal(frames[SINGLE_PASS], frames[AUTO])


def test_a_saved_latent_is_found_by_path_and_takes_other_settings(cli, tmp_path):
    assert generate(cli, "--quiet")[0] == 0
    latent = next((tmp_path / "output/latents").iterdir()).rename(tmp_path / "mine.latent")
    assert cli("decode")[0] == 2  # none is left in the folder
    code, out, _ = cli("decode", latent, "--vae", tiny.VIDEO_VAE, "--fps", "8", "--quiet")
    assert code == 0 and read_video(out.strip()).fps == 8
    code, _, err = cli("decode", "gone.latent")
    assert code == 2 and "gone.latent is neither a file nor a latent" in err


def test_a_compiled_decode_without_a_compiler_says_why(cli, tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no compiler in sight")

    monkeypatch.setattr(compiled, "check", refuse)
    latent = keep_latent(tmp_path, torch.zeros(1, 16, 2, 6, 8), facts={"vae": tiny.VIDEO_VAE})
    for options, lines in (("--compile",), 1), ((), 0):
        code, out, err = cli("decode", latent, *options)
        assert code == 0 and out.strip().endswith(".mp4")
        assert err.count("torch.compile is left for the rest of this decode") == lines


def test_facts_of_a_foreign_latent_are_not_believed(cli, tmp_path):
    facts = {"mode": "fast", "fps": "quick", "vae": 7, "variant": [1]}
    latent = keep_latent(tmp_path, torch.zeros(1, 16, 2, 6, 8), facts=facts)
    code, out, _ = cli("decode", latent, "--vae", tiny.VIDEO_VAE, "--quiet")
    assert code == 0 and read_video(out.strip()).fps == 24


def test_a_saved_picture_becomes_a_picture(cli, tmp_path):
    image = [*TINY, "--model", tiny.IMAGE, "--vae", tiny.IMAGE_VAE, "--steps", "1"]
    assert cli("generate", "--prompt", "a lighthouse", *image, *SMALL, "--quiet")[0] == 0
    code, out, _ = cli("decode", "--quiet")
    assert code == 0
    pictures = [read_image(tmp_path / f"output/kandinsky5_0000{n}_.png").pixels_1HW3 for n in (1, 2)]
    assert torch.equal(*pictures)


def test_a_failed_decode_names_the_latent_and_the_command_that_resumes(cli, tmp_path, monkeypatch):
    from comfyui_kandinsky5.nodes.host_standalone import StandaloneHost

    def fails(*_):
        raise RuntimeError("the card fell off the bus")

    with monkeypatch.context() as broken:
        broken.setattr(StandaloneHost, "workplace", fails)
        code, _, err = generate(cli)
    assert code == 1 and "RuntimeError: the card fell off the bus. The latent is safe: " in err
    command = err.strip().rpartition("kandinsky5 ")[2].split()
    assert command[0] == "decode" and cli(*command, "--quiet")[0] == 0
