"""The command line: ``gka-compile demo | export | fused | run | info``."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["app", "main"]

app = typer.Typer(
    name="gka-compile",
    help="Gated KalmaNet that compiles, exports and deploys. Start with [bold]gka-compile demo[/bold].",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console()


def _say(what: str) -> None:
    console.print(f"… {what}", highlight=False)


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected a device of this machine, got cuda, and PyTorch finds no GPU")
    return device


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(min=1, help="How long to train.")] = 60,
    out: Annotated[Path, typer.Option(help="Folder for checkpoint/ and artifact/.")] = Path("gka-demo"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    length: Annotated[int, typer.Option(min=2, max=900, help="Bytes to generate.")] = 200,
) -> None:
    """Train a small language model on the standard library's source, compile it, export it, and compare all forms of it.

    Generates the same bytes greedily from the eager model, torch.compile, AOTInductor and ONNX Runtime (the last two in processes
    that never import the model), prints a table, and exits 1 if any of them disagrees. Where TensorRT-RTX is installed its engines
    are built as well, and run if the GPU is one of those that they are for.
    """
    from .demo import CONFIG, PROMPT, TOLERANCE, Built, compare, is_of_demo, train
    from .export.artifact import SEALED

    SEALED.check_replaceable(out / "artifact")
    if (checkpoint := out / "checkpoint").exists() and not is_of_demo(checkpoint):
        raise FileExistsError(f"out: expected no {checkpoint}, or one that an earlier demo left, got another")
    model, loss = train(CONFIG, seconds, _device(device))
    model.save(out / "checkpoint")
    console.print(f"trained to {loss:.2f} nats per byte; weights in {out / 'checkpoint'}", highlight=False)
    eager, others = compare(model, out / "artifact", length, _say)
    rows = (eager, *others)
    console.print(bytes([*PROMPT, *eager.tokens[0].tolist()]).decode(errors="replace"), style="dim", markup=False, highlight=False)
    table = Table(title=f"{length} bytes, greedily; a form agrees with the same bytes and logits within {TOLERANCE:g}")
    for column in ("form", "max logit error", "tokens/s", "size", "build", "agrees"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for row in rows:
        size = "" if row.size is None else f"{row.size / 1e6:.1f} MB"
        built = "" if row.build_seconds is None else f"{row.build_seconds:.0f} s"
        if isinstance(row, Built):
            table.add_row(row.name, "not run", "", size, built, "")
            continue
        error, agrees = ("", "") if row is eager else (f"{row.error(eager):.1e}", "yes" if row.agrees(eager) else "NO")
        table.add_row(row.name, error, f"{row.tokens_per_second:.0f}", size, built, agrees)
    console.print(table)
    if not all(row.agrees(eager) for row in rows if not isinstance(row, Built)):
        raise typer.Exit(1)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with config.json and model.safetensors.")],
    out: Annotated[Path, typer.Argument(help="Artifact folder: new, or an artifact to replace.")],
    backend: Annotated[
        list[str] | None, typer.Option(help="aoti, onnx or tensorrt; repeat for more. Default: aoti and onnx.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device of the programs: auto, cpu or cuda; aoti compiles for it.")] = "auto",
    flavour: Annotated[
        str | None, typer.Option(help="Of tensorrt: rtx (the default), or tensorrt, which builds for the GPU of this machine.")
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="GPU that tensorrt builds for, such as 8.9; repeat for more. Default: 8.6, 8.9, 12.0, 12.1."),
    ] = None,
    longest_prompt: Annotated[int | None, typer.Option(min=1, help="Most tokens of one prefill of tensorrt.")] = None,
    mixed: Annotated[bool, typer.Option(help="tensorrt: float16 products in the solve.")] = False,
) -> None:
    """Turn a checkpoint into an artifact that runs without the model's Python code."""
    from .export import DEFAULT_BACKENDS, save_artifact
    from .export.program import lengths_up_to
    from .model import ByteLM

    engines: dict[str, Any] = {} if flavour is None else {"flavour": flavour}
    if compute_capability is not None:
        engines["compute_capabilities"] = compute_capability
    if longest_prompt is not None:
        engines["lengths"] = lengths_up_to(longest_prompt)
    if mixed:
        engines["mixed"] = True
    if engines and "tensorrt" not in (backend or ()):
        options = "--flavour, --compute-capability, --longest-prompt, --mixed"
        raise ValueError(f"{options}: expected none without --backend tensorrt, got {engines}")
    model = ByteLM.load(checkpoint, _device(device)).eval()
    manifest = save_artifact(model, out, tuple(backend or DEFAULT_BACKENDS), _say, engines or None)
    for name, entry in manifest["backends"].items():
        files = ", ".join(f"{file} ({manifest['files'][file]['bytes'] / 1e6:.1f} MB)" for file in entry["programs"].values())
        console.print(f"{name}: {files}, built in {entry['seconds']:.0f} s", highlight=False)


@app.command()
def fused(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with config.json and model.safetensors.")],
    out: Annotated[Path, typer.Argument(help="New folder for the ONNX files, the kernels and their sources.")],
    compute_capability: Annotated[list[str], typer.Option(help="GPU that kernels are compiled for, such as 8.7; repeat for more.")],
    form: Annotated[str, typer.Option(help="plugin, for TensorRT, or fused, for ONNX Runtime.")] = "plugin",
    longest_prompt: Annotated[int | None, typer.Option(min=1, help="Most tokens of one prefill of TensorRT.")] = None,
) -> None:
    """Turn a checkpoint into files for TensorRT or ONNX Runtime with this package's own kernels; needs Triton, but no GPU."""
    from .export import save_fused
    from .export.program import lengths_up_to
    from .model import ByteLM

    if longest_prompt is not None and form != "plugin":
        raise ValueError(f"--longest-prompt: expected none without --form plugin, got {longest_prompt}")
    lengths = None if longest_prompt is None else lengths_up_to(longest_prompt)
    manifest = save_fused(ByteLM.load(checkpoint).eval(), out, compute_capability, form, lengths=lengths, progress=_say)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    console.print(
        f"{out}: prefill.onnx, step.onnx, {len(manifest['files'])} files of kernels ({size / 1e6:.1f} MB)", highlight=False
    )
    if form == "plugin":
        console.print(f"On the device: TENSORRT_INCLUDE_DIR=... sh {out / 'build.sh'}", highlight=False)


@app.command()
def run(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder, as gka-compile export or demo writes it.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "import ",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Bytes to generate.")] = 200,
    backend: Annotated[str, typer.Option(help="aoti, onnx or tensorrt.")] = "aoti",
    provider: Annotated[str | None, typer.Option(help="Of ONNX Runtime, such as CUDAExecutionProvider.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest byte.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the draws.")] = 0,
) -> None:
    """Continue a text with an artifact; the text alone goes to standard output."""
    import torch

    from .export import Runner

    if not prompt:
        raise ValueError("--prompt: expected at least one byte, got none")
    runner = Runner.load(artifact, backend, provider=provider)
    generator = torch.Generator(runner.device).manual_seed(seed)
    given = os.fsencode(prompt)  # any bytes
    tokens = torch.tensor([list(given)])
    new = runner.generate(tokens, max_new_tokens, temperature=temperature, generator=generator)
    sys.stdout.write((given + bytes(new[0].tolist())).decode(errors="replace") + "\n")


@app.command()
def info(artifact: Annotated[Path | None, typer.Argument(help="An artifact to describe as well.")] = None) -> None:
    """Devices, backends and versions found here; with ARTIFACT, what it holds (every file is checked)."""
    import torch

    from . import __version__

    table = Table(show_header=False)
    table.add_row("gka-compile", __version__)
    table.add_row("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("GPUs", ", ".join(devices) or "none")
    for package, use in (
        ("torch", ""),
        ("triton", "kernels on a GPU"),
        ("onnx", "ONNX export"),
        ("onnxscript", "ONNX export"),
        ("onnxruntime", "backend onnx"),
        ("onnxruntime-gpu", "backend onnx on a GPU"),
        ("onnxruntime-ep-nv-tensorrt-rtx", "TensorRT-RTX inside ONNX Runtime"),
        ("tensorrt-rtx", "backend tensorrt"),
        ("tensorrt", "backend tensorrt"),
        ("torch-tensorrt", "TensorRT inside torch"),
        ("torch-tensorrt-rtx", "TensorRT-RTX inside torch"),
    ):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        table.add_row(package, found + (f" ({use})" if use else ""))
    console.print(table)
    if artifact is None:
        return
    from .export import load_manifest

    manifest = load_manifest(artifact)
    about = Table(title=f"{artifact} (whole)", show_header=False)
    about.add_row("exported on", manifest["target"])
    about.add_row("made by", f"gka-compile {manifest['gka_compile']}")
    for name, entry in manifest["backends"].items():
        versions = ", ".join(f"{package} {version}" for package, version in entry["versions"].items())
        gpus = f"; {entry['library']}, for GPUs {', '.join(entry['compute_capabilities'])}" if name == "tensorrt" else ""
        about.add_row(f"backend {name}", f"{', '.join(entry['programs'].values())} ({versions}{gpus})")
    for entry in manifest["state"]:
        about.add_row(f"state {entry['name']}", f"{entry['dtype']} {entry['shape']}")
    console.print(about)


def main() -> None:
    """Entry point: errors of use are one line on standard error and exit code 2."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # torch about itself
    warnings.filterwarnings("ignore", message=".*TRITON_DEFAULT_FP_FUSION.*")  # of Triton 3.9, about 3.10
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # torchvision is not needed
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
