"""Where the YAML files are and what they offer; light enough for `--help`."""

from __future__ import annotations

from pathlib import Path


def conf_dir() -> Path:
    """Folder of the YAML files: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise RuntimeError(f"mmprune_train is installed without its conf/ folder (looked inside and beside {package})")


def options(group: str) -> list[str]:
    """Names that a config group offers, e.g. `options("pruner")`."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def default_options() -> dict[str, list[str]]:
    """Group -> the options that `conf/config.yaml` chooses."""
    import yaml

    defaults = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    pairs = [pair for entry in defaults if isinstance(entry, dict) for pair in entry.items()]
    return {group: value if isinstance(value, list) else [value] for group, value in pairs}
