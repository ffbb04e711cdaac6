"""The command line: `kandinsky5 run | generate | decode | attention-error | estimate | convert | nodes | variants`.

Exit codes: 0 done; 1 a node failed while running; 2 the command, the workflow or a value was refused and nothing ran;
130 cancelled with Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..kandinsky_core.errors import KandinskyError, MediaError

OK, FAILED, REFUSED, CANCELLED = 0, 1, 2, 130
BUNDLED = Path(__file__).parent.parent / "workflows"

logger = logging.getLogger("kandinsky5")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(message)s")
    from .run import RunError

    try:
        return arguments.command(arguments)
    except RunError as error:
        logger.info("Traceback of the failed node:", exc_info=error)
        return _fail(arguments, FAILED, str(error), (str(error),))
    except KandinskyError as error:
        return _fail(arguments, REFUSED, str(error), getattr(error, "problems", (str(error),)))
    except KeyboardInterrupt:
        return _fail(arguments, CANCELLED, "Cancelled.", ("Cancelled.",))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kandinsky5",
        description="Kandinsky 5.0 without ComfyUI.",
        epilog="Exit codes: 0 done, 1 a node failed while running, 2 refused before anything ran, 130 cancelled.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a workflow file, saved by ComfyUI's editor or in API format")
    run.add_argument("workflow", help="path, or name of a bundled workflow (t2v_nano, i2v_nano, …)")
    run.add_argument(
        "--set", metavar="NODE.INPUT=VALUE", action="append", default=[], dest="assignments",
        help="change an input; NODE is an id, a title or a type",
    )  # fmt: skip
    run.set_defaults(command=_run)

    generate = commands.add_parser("generate", help="make a clip or picture from a prompt")
    measure = commands.add_parser(
        "attention-error", help="measure how far block-sparse attention (NABLA) is from dense for one prompt"
    )
    for command, result in ((generate, None), (measure, "K5AttentionError")):
        _add_wish(command)
        command.set_defaults(command=_generate, result=result)
    measure.add_argument(
        "--P", default="0.95, 0.9, 0.8, 0.7", dest="masses", metavar="P, P, …",
        help="shares of the attention to keep (default: %(default)s)",
    )  # fmt: skip
    measure.add_argument(
        "--window", type=int, nargs=3, default=(11, 3, 3), metavar=("T", "H", "W"),
        help="sliding window in latent frames, tile rows, tile columns (default: 11 3 3)",
    )  # fmt: skip

    decode = commands.add_parser("decode", help="make the clip or picture of a latent that a run left behind")
    decode.add_argument("latent", nargs="?", help="path, or name in OUT/latents (default: the newest there)")
    decode.add_argument("--vae", help="autoencoder: path or name (default: the one the latent was made for)")
    decode.add_argument(
        "--mode", help="auto, reference, stream, late-tile or single-pass (default: as the latent was decoded)"
    )
    decode.add_argument("--memory", type=float, default=0.0, metavar="GIB", help="device memory that may be used")
    decode.add_argument("--fps", type=float, help="frames per second (default: as the latent was made, else 24)")
    decode.add_argument("--format", default="mp4", help="container: mp4, mov or mkv (default: mp4)")
    decode.add_argument("--codec", default="h264", help="h264 or lossless (default: h264)")
    decode.add_argument("--crf", type=float, default=14.0, help="quality of h264, 0 best to 51 (default: 14)")
    decode.add_argument("--compile", action="store_true", help="compile a video autoencoder's norms (torch.compile)")
    decode.set_defaults(command=_decode)

    estimate = commands.add_parser("estimate", help="what a run needs: memory by stage, what fits, what to change")
    _add_question(estimate)
    estimate.set_defaults(command=_estimate)

    for command in (run, generate, decode, measure):
        command.add_argument("--out", type=Path, default=Path("output"), help="folder for results (default: output)")
        command.add_argument("--device", help="device to compute on (default: the accelerator if there is one)")
        command.add_argument("--quiet", action="store_true", help="no progress, only the files written")

    convert = commands.add_parser("convert", help="write a transformer's weights in a smaller format")
    convert.add_argument("source", type=Path, metavar="IN", help="weights file, sharded index or diffusers folder")
    convert.add_argument("target", type=Path, metavar="OUT", help="new file, .safetensors or .gguf")
    convert.add_argument("--to", required=True, metavar="FORMAT", help="fp8, bf16, fp16, gguf-Q8_0, gguf-Q5_0, …")
    convert.add_argument("--variant", help="which published model the weights are (default: recognised)")
    convert.add_argument("--quiet", action="store_true", help="no progress")
    convert.set_defaults(command=_convert)
    nodes = commands.add_parser("nodes", help="list the node types that run without ComfyUI")
    nodes.set_defaults(command=_nodes)
    variants = commands.add_parser("variants", help="list the known models and their settings")
    variants.set_defaults(command=_variants)
    for command in (run, generate, decode, estimate, measure, nodes):
        command.add_argument(
            "--models", type=Path,
            help="models folder in ComfyUI's layout (default: $KANDINSKY5_MODELS, else ./models)",
        )  # fmt: skip
    for command in (run, generate, decode, estimate, measure, convert, nodes, variants):
        command.add_argument("--json", action="store_true", help="write one JSON object to standard output")
        command.add_argument("--verbose", action="store_true", help="write the log to standard error")
    return parser


def _add_wish(command: argparse.ArgumentParser) -> None:
    """Add the options that `Wish` reads."""
    command.add_argument("--prompt", required=True, help="what to show")
    command.add_argument("--negative", help="what to avoid (default: as released)")
    command.add_argument("--image", type=Path, help="picture that a clip begins with, or that is edited")
    command.add_argument(
        "--model", default="nano",
        help="'nano', 'nano-image' or 'nano-edit' (built in), a path, or a name in the models folder",
    )  # fmt: skip
    command.add_argument("--text-encoder", help="Qwen2.5-VL: path or name")
    command.add_argument("--clip", help="CLIP ViT-L/14: path or name")
    command.add_argument("--vae", help="autoencoder: path or name")
    command.add_argument("--variant", help="which published model the weights are (default: recognised)")
    command.add_argument("--dtype", default="auto", help="precision of the weights: auto, bf16, fp16, fp32")
    command.add_argument("--text-dtype", help="of Qwen, where it is another: auto, bf16, fp16, fp32, nf4")
    for name, kind, text in (
        ("width", int, "pixels, a multiple of 16"),
        ("height", int, "pixels, a multiple of 16"),
        ("frames", int, "4n+1; 1 makes a picture"),
        ("steps", int, "sampling steps"),
        ("guidance", float, "how strongly the prompt counts"),
        ("shift", float, "share of steps spent on the composition"),
    ):
        command.add_argument(f"--{name}", type=kind, help=f"{text} (default: as released)")
    command.add_argument("--seed", type=int, default=0, help="same seed, same result (default: 0)")
    command.add_argument(
        "--budget", help="device memory to run in: auto, 8, 12, 16 or 24 for a card of that size, or free GB "
        "(default: what is free, and only where not everything fits)",
    )  # fmt: skip


def _add_question(command: argparse.ArgumentParser) -> None:
    """Add the options that `Question` reads, and the budget."""
    command.add_argument("--variant", help="which model ('kandinsky5 variants' lists them)")
    command.add_argument("--workflow", help="read model and sizes from a workflow: path, or name of a bundled one")
    for name, kind, text in (
        ("width", int, "pixels, a multiple of 16"),
        ("height", int, "pixels, a multiple of 16"),
        ("frames", int, "4n+1; 1 is a picture"),
        ("batch", int, "clips at once"),
        ("guidance", float, "1: no second pass"),
        ("steps", int, "sampling steps"),
    ):
        command.add_argument(f"--{name}", type=kind, help=f"{text} (default: as the workflow says, else as released)")
    command.add_argument(
        "--precision", help="of the weights: bf16, published, fp16, fp32, fp8, q8_0 or q4_k (default: bf16)"
    )
    command.add_argument(
        "--attention", choices=("auto", "dense", "nabla"), default="auto",
        help="auto: as trained, or as the workflow has it",
    )  # fmt: skip
    command.add_argument(
        "--kept", type=float, default=0.25, help="share of the attention that NABLA keeps (default: %(default)s)"
    )
    command.add_argument("--start-image", action="store_true", help="a picture is encoded, too")
    command.add_argument(
        "--budget", default="auto",
        help="device memory to plan for: auto (what is free here), 8, 12, 16 or 24 for a card of that size, or free GB",
    )  # fmt: skip
    command.add_argument("--device", help="device that auto means (default: the accelerator if there is one)")


def _estimate(arguments: argparse.Namespace) -> int:
    from dataclasses import fields

    from ..kandinsky_core.memory.report import summary, values
    from .estimate import Question, budget_of, job_of
    from .workflow import parse, read_document

    host, types = _prepare(arguments)
    graph = None
    if arguments.workflow is not None:
        graph = parse(read_document(_workflow_path(arguments.workflow)), types)
    given = {field.name: getattr(arguments, field.name) for field in fields(Question)}
    job = job_of(Question(**given), graph, is_cpu=arguments.budget == "auto" and host.is_processor)
    budget_bytes = budget_of(arguments.budget, host)
    if arguments.json:
        _write_json(values(job, budget_bytes=budget_bytes))
    else:
        sys.stdout.write(summary(job, budget_bytes=budget_bytes) + "\n")
    return OK


def _run(arguments: argparse.Namespace) -> int:
    from .override import override
    from .workflow import parse, read_document

    host, types = _prepare(arguments)
    document = read_document(_workflow_path(arguments.workflow))
    graph = parse(document, types)
    override(graph, types, arguments.assignments)
    return _execute(arguments, graph, types, host, document)


def _generate(arguments: argparse.Namespace) -> int:
    from dataclasses import fields

    from .generate import Wish, build

    host, _ = _prepare(arguments)
    given = {field.name: getattr(arguments, field.name) for field in fields(Wish) if field.name in arguments}
    graph = build(Wish(**given), host)
    # Types are read again: the wish may have added files.
    return _execute(arguments, graph, node_types(), host, None, arguments.result)


def _decode(arguments: argparse.Namespace) -> int:
    from dataclasses import fields

    from .decode import Resumption, build

    host, _ = _prepare(arguments)
    graph = build(Resumption(**{field.name: getattr(arguments, field.name) for field in fields(Resumption)}), host)
    return _execute(arguments, graph, node_types(), host, None)


def _prepare(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Install the host the arguments describe and read the node types."""
    from ..nodes.host import install
    from ..nodes.host_standalone import StandaloneHost

    host = StandaloneHost(
        models=arguments.models, output=getattr(arguments, "out", None), device=getattr(arguments, "device", None)
    )
    install(host)
    return host, node_types()


def node_types() -> Any:
    """Read every node type that runs without ComfyUI; a host must be installed."""
    from ..nodes import node_list
    from .catalogue import catalogue
    from .core_nodes import core_nodes

    return catalogue([*node_list(), *core_nodes()])


def _execute(
    arguments: argparse.Namespace, graph: Any, types: Any, host: Any, document: Any, result_type: str | None = None
) -> int:
    """Run a graph and write what it saved, or the report of the node of type `result_type`."""
    from .progress import ProgressLine
    from .run import run

    _require_writable(host.output)
    on_call = None
    line = ProgressLine(sys.stderr)
    if not arguments.quiet:
        on_call, host.on_progress = line.start, line.advance
    try:
        result = run(graph, types, host, workflow=document, on_call=on_call)
    finally:
        line.clear()
    if arguments.json:
        _write_json({
            "outputs": result.files, "facts": {**host.versions(), "nodes": result.facts},
            "reports": result.reports, "timings_s": {name: round(value, 3) for name, value in result.seconds.items()},
        })  # fmt: skip
        return OK
    for name, report in result.reports.items():
        if graph[name].type == result_type:
            sys.stdout.write(f"{report}\n")
        elif not arguments.quiet:
            sys.stderr.write(f"{graph[name]}: {report}\n")
    for file in result.files:
        sys.stdout.write(f"{file['path']}\n")
    return OK


def _require_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be made or written, leaving nothing there."""
    folder = folder.absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        raise MediaError(f"--out {folder} cannot be written: {error.strerror}. Choose another folder.") from error


def _workflow_path(given: str) -> Path:
    """Return the path of a workflow given as path or as the name of a bundled one."""
    bundled = BUNDLED / f"{given}.json"
    return bundled if bundled.is_file() and not Path(given).exists() else Path(given)


def _convert(arguments: argparse.Namespace) -> int:
    from ..kandinsky_core.io.convert import convert
    from .progress import ProgressLine

    line = ProgressLine(sys.stderr, arguments.target.name)
    try:
        result = convert(
            arguments.source, arguments.target, arguments.to, variant=arguments.variant,
            on_tensor=None if arguments.quiet else line.advance,
        )  # fmt: skip
    finally:
        line.clear()
    if arguments.json:
        _write_json({
            "path": str(arguments.target), "variant": result.identity.variant.name, "tensors": result.counts,
            "kept_as_F16": result.unpacked, "bytes_before": result.bytes_before, "bytes_after": result.bytes_after,
        })  # fmt: skip
        return OK
    sys.stderr.write(f"{result.report()}\n")
    sys.stdout.write(f"{arguments.target}\n")
    return OK


def _nodes(arguments: argparse.Namespace) -> int:
    _, types = _prepare(arguments)
    rows = {
        name: {
            "title": known.title,
            "inputs": {port.name: port.type for port in known.inputs},
            "outputs": dict(zip(known.output_names, known.outputs, strict=True)),
        }
        for name, known in types.items()
    }
    if arguments.json:
        _write_json(rows)
        return OK
    for name, row in rows.items():
        ports = f"  in:  {', '.join(row['inputs'])}\n  out: {', '.join(row['outputs'])}\n"
        sys.stdout.write(f"{name}: {row['title']}\n{ports}")
    return OK


def _variants(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from ..kandinsky_core.variants import VARIANTS

    if arguments.json:
        _write_json({name: asdict(row) for name, row in VARIANTS.items()})
        return OK
    for name, row in VARIANTS.items():
        preset = f"{row.steps} steps, guidance {row.guidance:g}, shift {row.shift:g}"
        sys.stdout.write(f"{name}: {row.title}\n  {', '.join(row.tasks)}; {preset}; {', '.join(row.files)}\n")
    return OK


def _fail(arguments: argparse.Namespace, code: int, message: str, problems: Sequence[str]) -> int:
    if arguments.json:
        _write_json({"error": {"exit_code": code, "message": message, "problems": list(problems)}})
    sys.stderr.write(message.rstrip() + "\n")
    return code


def _write_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")


if __name__ == "__main__":
    sys.exit(main())
