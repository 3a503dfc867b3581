"""What is installed here, what it can use, and what is missing: for a report of something that went wrong.

python -m hf_llama_repro.info
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from . import __version__
from .command import Parser, add_version, run

DISTRIBUTION = "hf-llama-repro"
# Used where they are there, and in no extra: name on the registry -> for what.
OTHERS = {
    "torchao": "weight-only quantization",
    "deepspeed": "finetune/accelerate/zero2.yaml and zero3.yaml",
    "llama-cpp-python": "running GGUF files",
}
Section = dict[str, str]


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements() -> list[tuple[str, Requirement]]:
    """(extra, requirement) of this package as it is installed; the extra is "" for what it cannot do without."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for requirement in map(Requirement, lines):
        marker = str(requirement.marker or "")
        extra = marker.partition("extra ==")[2].strip(" \"'") if "extra ==" in marker else ""
        if extra != "dev" and requirement.name != DISTRIBUTION:
            found.append((extra, requirement))
    return found


def packages() -> tuple[Section, Section]:
    """What is needed and what may be there, each with its version and what is wrong with it."""
    needed: Section = {}
    optional: Section = {}
    for extra, requirement in requirements():
        version = installed_version(requirement.name)
        remedy = f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install '{requirement.name}'"
        if version is None:
            text = f"not installed: {remedy}"
        elif not requirement.specifier.contains(version, prereleases=True):
            wanted = requirement.specifier
            text = f"{version}: outside of {wanted}; pip install '{requirement.name}{wanted}'"
        else:
            text = version
        if requirement.name not in needed:
            (optional if extra else needed).setdefault(requirement.name, text)
    for name, purpose in OTHERS.items():
        optional.setdefault(name, installed_version(name) or f"not installed: pip install {name} ({purpose})")
    return needed, optional


def machine() -> Section:
    lines = {
        "system": platform.platform(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} threads",
    }
    memory = Path("/proc/meminfo")
    if memory.is_file():
        kilobytes = dict(line.split(":") for line in memory.read_text().splitlines() if ":" in line)
        total, free = (int(kilobytes[key].split()[0]) * 1024 / 1e9 for key in ("MemTotal", "MemAvailable"))
        lines["memory"] = f"{total:.1f} GB, {free:.1f} GB of them free"
    return lines


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def devices() -> Section:
    """What PyTorch computes on, and how."""
    import torch

    lines = {}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        capability = f"{properties.major}.{properties.minor}"
        lines[f"cuda:{number}"] = (
            f"{properties.name}, {total / 1e9:.1f} GB, {free / 1e9:.1f} GB of them free, capability {capability}"
        )
    if not lines:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
        lines["cuda"] = f"none; PyTorch is a build for {build}"
    bf16 = "computes in bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "has no bfloat16"
    lines["cpu"] = f"{torch.backends.cpu.get_cpu_capability()}, {bf16}, {torch.get_num_threads()} threads"
    return lines


def integrations() -> Section:
    """Whether the programs that this package reaches into know it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from . import cpu_kernel
    from .configuration_llama_repro import LlamaReproConfig
    from .registration import MODEL_TYPE

    opened = type(AutoConfig.for_model(MODEL_TYPE)) is LlamaReproConfig
    opened = opened and LlamaReproConfig in AutoModelForCausalLM._model_mapping
    lines = {"transformers": _yes(opened, "Auto classes open the model type")}
    try:
        from peft.utils import constants

        known = MODEL_TYPE in constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        lines["peft"] = _yes(known, "knows the layers of the model type")
    except ImportError as error:
        lines["peft"] = f"cannot be imported: {error}"
    plugins = [entry.value for entry in importlib.metadata.entry_points(group="vllm.general_plugins")]
    lines["vllm"] = _yes(any(value.startswith(__package__ or "") for value in plugins), "is told of the model type")
    lines["compiled CPU kernels"] = cpu_kernel.description()
    return lines


def _yes(holds: bool, text: str) -> str:
    return f"{'yes' if holds else 'no'}: {text}"


def folders() -> Section:
    """Where the files are that other programs are given."""
    here = Path(__file__).parent
    found = {}
    for name in ("recipes", "templates", "accelerate"):
        places = [here / "finetune" / name, here.parent / "finetune" / name]  # installed; in a checkout
        found[name] = str(next((place for place in places if place.is_dir()), "not found"))
    return found


def gather() -> dict[str, Section]:
    """Section -> name -> what there is to say of it."""
    needed, optional = packages()
    sections: dict[str, Section] = {
        DISTRIBUTION: {"version": __version__, "folder": str(Path(__file__).parent)},
        "machine": machine(),
        "needed": needed,
        "optional": optional,
    }
    for name, section in (("devices", devices), ("integrations", integrations)):
        try:
            sections[name] = section()
        except (ImportError, OSError, AttributeError) as error:  # a report is wanted most where something does not load
            sections[name] = {"unknown": f"{type(error).__name__}: {error}"}
    sections["folders"] = folders()
    return sections


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hf-llama-info",
        description="Print versions, devices, and which integrations are there: to be put into a report of a problem.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_version(parser)
    return parser


def show(sections: dict[str, Section], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(sections, indent=2))
        return
    width = max(len(name) for section in sections.values() for name in section)
    for title, section in sections.items():
        print(f"{title}")
        for name, text in section.items():
            print(f"  {name:<{width}}  {text}")


def main(argv: list[str] | None = None) -> int:
    arguments: Any = build_parser().parse_args(argv)
    return run(lambda: show(gather(), as_json=arguments.json))


if __name__ == "__main__":
    sys.exit(main())
