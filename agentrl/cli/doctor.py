"""`agentrl doctor`: what this machine has, and whether a tokenizer or a configuration is fit for training."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import agentrl
from agentrl.cli import DONE, FAILED, inputs
from agentrl.console import visible
from agentrl.console.live import plan_table
from agentrl.tuning import tune

if TYPE_CHECKING:
    from agentrl.chat.doctor import Finding

EXTRAS = {"peft": "lora", "matplotlib": "plot", "tensorboard": "tensorboard", "wandb": "wandb", "httpx": "endpoint"}


def doctor(*, model: Path | None = None, config: Path | None = None) -> int:
    """Describe this machine; check a model folder's tokenizer and chat template, or a configuration.

    Args:
        model: a Hugging Face folder; its chat template is put through the cases that training relies on.
        config: a configuration; it is resolved and checked, and its model's tokenizer too.
    """
    console = Console(highlight=False)
    loaded = inputs.load([str(config)], verb="doctor --config") if config is not None else None
    options: dict[str, Any] = {}
    if loaded is not None:
        path = getattr(loaded.config.model, "path", None)
        model = model or (Path(path) if path else None)
        options = loaded.config.chat.model_dump()
    console.print(plan_table(machine()))
    if loaded is not None:
        console.print(f"  {config} is sound", markup=False)
    if model is None:
        return DONE
    from agentrl.chat.doctor import diagnose

    findings = diagnose(model, **options)
    console.print(findings_table(findings))
    broken = sum(finding.ok is False for finding in findings)
    console.print(f"  {model}: " + (f"{broken} broken" if broken else "fit for training"), markup=False)
    return FAILED if broken else DONE


def findings_table(findings: Sequence[Finding]) -> RenderableType:
    """One row a case: sound, broken, or worth knowing."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold", style="dim")
    for finding in findings:
        mark, style = {True: ("ok", "green"), False: ("broken", "bold red"), None: ("note", "bold")}[finding.ok]
        grid.add_row(Text(f"  {mark}", style), visible(finding.name), Text(visible(finding.detail)))
    return Padding(grid, (0, 0, 1, 0))


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
