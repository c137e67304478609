"""`agentrl doctor`: what this machine has, and whether a tokenizer or a configuration is fit for training."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path

from rich.console import Console

import agentrl
from agentrl.cli import FAILED, inputs
from agentrl.console.live import plan_table
from agentrl.tuning import tune

EXTRAS = {"peft": "lora", "matplotlib": "plot", "tensorboard": "tensorboard", "wandb": "wandb", "httpx": "endpoint"}


def doctor(*, model: Path | None = None, config: Path | None = None) -> int:
    """Describe this machine; check a model folder's tokenizer and chat template, or a configuration.

    Args:
        model: a Hugging Face folder; its chat template is put through the cases that training relies on.
        config: a configuration; it is resolved and checked, and its model's tokenizer too.
    """
    console = Console(highlight=False)
    console.print(plan_table(machine()))
    good = True
    if config is not None:
        loaded = inputs.load([str(config)], verb="doctor --config")
        path = getattr(loaded.config.model, "path", None)
        console.print(f"  {config} is sound", markup=False)
        model = model or (Path(path) if path else None)
    if model is not None:
        from agentrl.chat.doctor import diagnose

        report = diagnose(model)
        good = report.ok
        console.print(str(report), markup=False)
    return 0 if good else FAILED


def machine() -> list[tuple[str, str]]:
    """What training depends on, as (what, how) rows."""
    changed = tune()
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    page = os.sysconf("SC_PAGE_SIZE")
    memory = page * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    missing = [extra for name, extra in EXTRAS.items() if importlib.util.find_spec(name) is None]
    return [
        ("agentrl", agentrl.__version__),
        ("python", f"{platform.python_version()} on {platform.platform(terse=True)}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads on {cores} cores"),
        ("gpu", ", ".join(gpus) or "none"),
        ("memory", f"{memory:.1f} GiB"),
        ("disk", f"{free:.1f} GiB free here"),
        ("tuned", ", ".join(f"{name}={value}" for name, value in changed.items()) or "nothing: all set already"),
        ("extras missing", ", ".join(missing) or "none"),
    ]
