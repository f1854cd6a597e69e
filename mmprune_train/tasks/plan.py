"""`task=plan`: parameters, tokens, FLOPs, memory, hours and disk of the run that this command line would start."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from mmprune_train.config.command import Command
from mmprune_train.config.identity import run_dir
from mmprune_train.config.schema import Config
from mmprune_train.devices import CPU, Device, device_peak, present_device
from mmprune_train.errors import NotHere
from mmprune_train.model.arch import arch_config
from mmprune_train.planning.lengths import data_dependent, solve_share
from mmprune_train.planning.plan import StagePlan, plan_stage
from mmprune_train.planning.remedies import first_that_fits
from mmprune_train.planning.report import fits, longest, of_stage, stage_text, verdict
from mmprune_train.planning.samples import StageSamples, stage_samples
from mmprune_train.quiet import quiet
from mmprune_train.storage.files import rows_of, write_json
from mmprune_train.storage.locks import publishing
from mmprune_train.training.precision import choose_precision
from mmprune_train.training.starts import start_of
from mmprune_train.training.throughput import measured_tflops

HEADLINE = 0.22
"""Share of tokens that the method's authors keep on average."""
PLANNED = "a100_80gb"
"""Device to plan for where there is none and none is named."""
SOLVED_ON = 64
"""Samples on which the budgets' share is found."""


def run(config: Config, command: Command = Command()) -> dict[str, Any]:
    """Write `plan/result.json` to the run directory. Nothing is downloaded, no weights are read."""
    check_starts(config)
    device = chosen_device(config)
    compute = planned_dtype(config, device)
    if device.name == CPU:
        device = replace(device, tflops=measured_tflops(torch.device(CPU), compute))
    elif compute != torch.bfloat16:
        device = replace(device, tflops=None)  # the table knows bf16 alone
    told = {name: told_stage(config, name, device, compute) for name in config.stages}
    hours = [entry["hours"] for _, entry in told.values()]
    result = {
        "device": device.__dict__,
        "mfu": config.plan.mfu,
        "precision": str(compute).removeprefix("torch."),
        "stages": {name: entry for name, (_, entry) in told.items()},
        "hours": None if None in hours else sum(hours),
    }
    folder = run_dir(config) / "plan"
    with publishing(folder):
        write_json(folder / "result.json", result)
    peak = "throughput not known"
    if device.tflops is not None:
        source = "measured now" if device.name == CPU else "at most"
        peak = f"{device.tflops:.4g} TFLOP/s {source}, {config.plan.mfu:g} of it assumed"
    print(f"{device.name}, {result['precision']} ({peak})")
    for text, _ in told.values():
        print(f"\n{text}")
    if result["hours"] is not None:
        total = f"all stages with pruner={config.pruner.name}: {result['hours']:.1f} hours at that throughput"
        print(f"\n{total}, data loading and evaluation left out")
    print(f"\n{folder / 'result.json'}", flush=True)
    return result


def told_stage(config: Config, name: str, device: Device, compute: torch.dtype) -> tuple[str, dict[str, Any]]:
    """A stage as text, and for result.json."""
    data = stage_samples(config, name, config.encoder.patches, config.plan.samples)
    share, kept = budget_share(config, name, data)

    def planned(changed: Config) -> StagePlan:
        with quiet():
            return plan_stage(changed, name, data, share, device, compute)

    plan = planned(config)
    entry = of_stage(plan, device, config.plan.mfu)
    lines = [stage_text(plan, device, config.plan.mfu, data.source, kept)]
    for label, cost in (("dense", plan.dense), ("pruned", plan.pruned)):
        if cost is None:
            continue
        remedy = None
        if not fits(cost, device):

            def total(changed: Config, label: str = label) -> float:
                again = planned(changed)
                return (again.dense if label == "dense" else again.own).memory.total

            remedy = first_that_fits(config, name, total, device.memory_bytes, gpu=device.name != CPU)
        said = f"{name}, {label}: {verdict(cost, device, remedy)}"
        entry[label] |= {"verdict": said, "fits_with": remedy}
        lines.append(f"{said} ({longest(cost)})")
    entry |= {"lengths": data.source, "kept": kept, "hours": entry["pruned" if plan.pruned else "dense"]["hours"]}
    return "\n".join(lines), entry


def check_starts(config: Config) -> None:
    """Raise UserError where what `init_from` names is not there or does not fit; a hub id may have to be fetched."""
    for name in config.stages:
        with suppress(NotHere):
            start_of(config, None, name, download=False)


def chosen_device(config: Config) -> Device:
    """`plan.device`; null: the GPU that is here, else `PLANNED`; the processor where `trainer.accelerator` says so."""
    if config.plan.device is not None:
        return device_peak(config.plan.device)
    if config.trainer.accelerator == "cpu":
        return device_peak(CPU)
    return present_device() or device_peak(PLANNED)


def planned_dtype(config: Config, device: Device) -> torch.dtype:
    """Of matrix products: every GPU that can be named computes in bf16."""
    if config.trainer.precision == "auto" and device.name != CPU:
        return torch.bfloat16
    return choose_precision(config.trainer.precision, CPU).dtype


def budget_share(config: Config, name: str, data: StageSamples) -> tuple[float, str]:
    """What a budget that depends on the images keeps of its row, and where that comes from."""
    asking = data_dependent(config.pruner)
    if not asking:
        return 1.0, "exact, the budgets are fixed"
    keep, source = config.plan.keep, "plan.keep"
    if keep is None:
        rows = list(rows_of(run_dir(config) / name / "metrics.jsonl"))
        keep = fmean(row["visual_keep_ratio"] for row in rows) if rows else HEADLINE
        source = f"measured by {run_dir(config) / name}" if rows else "ASSUMED, the method's headline; set plan.keep"
    depth = int(arch_config("llm.arch", config.llm.arch).num_hidden_layers)
    share = solve_share(config.pruner, data.samples[:SOLVED_ON], config.encoder.patches, depth, keep)
    note = "" if config.pruner.schedule.name == "constant" else "; pruner.schedule moves it, early steps may run dense"
    return share, f"{keep:.2f} of the visual tokens, averaged over layers ({source}){note}"
