"""The command line: compose the config, run one task, say in an exit code how it went.

Exit codes: 0 done; 2 the user's input is wrong (one or two lines, a traceback only with `debug=true`); 75 a signal has
ended the run (`training/preemption.py`); 1 anything else, without a traceback where training has diverged.
Of a sweep: 0 all jobs are done; 2 none is, each for wrong input; 1 anything else.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmprune_train.config.command import AGAIN, SAME, Command
from mmprune_train.config.renamed import refuse_former
from mmprune_train.config.typed import readable
from mmprune_train.current_folder import leave_out_in_children, search_last
from mmprune_train.errors import NotFinite
from mmprune_train.printed import harmless_output
from mmprune_train.storage.secrets import note_arguments
from mmprune_train.tasks import check_keys, find_task
from mmprune_train.usage import usage

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from mmprune_train.config.schema import Config


def compose_and_run() -> None:
    """Let Hydra read `sys.argv`; raises what went wrong in composing or in the task."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra's errors come back to us instead of ending the process
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from mmprune_train.config.compose import config_from, register_schema
    from mmprune_train.storage.conf import conf_dir
    from mmprune_train.sweeps.watch import finish_sweep

    failures: list[Exception] = []

    def run_task(cfg: DictConfig) -> Any:
        """Check the composed config and run its task; the result goes to Hydra's sweepers."""
        settings = HydraConfig.get()
        sources = [one for one in settings.runtime.config_sources if one.schema != "structured"]
        sweeping = settings.mode == RunMode.MULTIRUN
        command = Command.of(settings.overrides.task, sweeping, [f"{one.schema}://{one.path}" for one in sources])
        folders = [Path(one.path) for one in sources if one.provider == "command-line"]  # --config-dir
        task = partial(execute, command=command, folders=folders)
        if sweeping:
            from mmprune_train.sweeps.job import run_job

            note_arguments([*settings.overrides.task, *settings.overrides.hydra])
            with harmless_output():  # a launcher may have started another process for the job
                return run_job(cfg, settings, command, task)
        try:
            return task(config_from(cfg))
        except Exception as error:  # kept from Hydra, which would announce it with a line of its own
            failures.append(error)
            return None

    register_schema()
    try:
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(run_task)()
    finally:
        code = finish_sweep()
    if failures:
        raise failures[0]
    if code:
        sys.exit(code)


def execute(config: Config, command: Command, folders: Sequence[Path] = ()) -> Any:
    """Run the config's task.

    Args:
        config: checked.
        command: what it was composed from.
        folders: those of --config-dir.
    """
    from mmprune_train.config.notes import notes
    from mmprune_train.config.pruner import components
    from mmprune_train.storage.files import check_yaml_files
    from mmprune_train.training.cluster import has_part

    if config.trust_components or components(config.pruner):
        search_last()
    check_keys(config.task, command)
    if not has_part(config.task, config.trainer.devices, config.trainer.num_nodes, command.sweeping):
        return None
    for folder in folders:
        check_yaml_files(folder)
    for note in notes(config, command):
        print(f"note: {note}", file=sys.stderr, flush=True)
    return find_task(config.task)(config, command)


def main() -> None:
    """Entry of `python -m mmprune_train` and of `mmprune`."""
    leave_out_in_children()
    note_arguments(sys.argv[1:])
    with harmless_output():
        _run(sys.argv[1:])


def _run(arguments: list[str]) -> None:
    try:
        if "--help" in arguments or "-h" in arguments:
            print(usage(arguments))
            return
        refuse_former(arguments)
        sys.argv[1:] = readable(arguments)
        compose_and_run()
    except KeyboardInterrupt:
        print(f"interrupted; {_what_follows(arguments)}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        from mmprune_train.config.explain import user_mistake

        mistake = user_mistake(error, arguments)
        message = str(error) if isinstance(error, NotFinite) else mistake
        if message is None or any(argument.lstrip("+").lower() == "debug=true" for argument in arguments):
            traceback.print_exception(error)
        if message is not None:
            print(f"error: {message}", file=sys.stderr)
        sys.exit(1 if mistake is None else 2)


def _what_follows(arguments: list[str]) -> str:
    """An interruption: training, evaluations and sweeps go on where they were, other tasks begin anew."""
    tasks = [argument.partition("=")[2] for argument in arguments if argument.startswith("task=")]
    goes_on = tasks[-1:] in ([], ["train"], ["evaluate"]) or "-m" in arguments or "--multirun" in arguments
    return f"{AGAIN} continues it" if goes_on else f"{SAME} starts it again"


if __name__ == "__main__":
    main()
