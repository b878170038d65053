"""Tasks of lm-eval by name: which there are in groups and tags, and whether they may run here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def task_configs(index: Mapping[str, Any], names: Sequence[Any], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configurations of tasks by name, with groups and tags expanded; nothing of the tasks is loaded or run.

    Args:
        index: `lm_eval.tasks.TaskManager().task_index`.
        names: Names of tasks, groups or tags, or the entries of a group.
        overrides: The settings of a group for all of its tasks.

    Raises:
        ValueError: For a name that is not in the index.
    """
    found: dict[str, Any] = {}
    for item in names:
        own = {**(overrides or {}), **(item if isinstance(item, dict) else {})}
        name = item if isinstance(item, str) else item.get("group") or item.get("task")
        rest = {key: value for key, value in own.items() if key not in ("task", "group")}
        entry = index.get(name) if isinstance(name, str) else None
        if entry is None and isinstance(item, str):
            raise ValueError(f"`tasks` must be names of tasks, groups or tags of lm-eval (lm-eval ls tasks), got {name!r}.")
        config = (entry.cfg if entry is not None else item) or {}
        if entry is not None and entry.kind.name == "TAG":
            tagged = [task for task, other in index.items() if name in other.tags and other.kind.name != "TAG"]
            found |= task_configs(index, tagged, rest)
        elif isinstance(config.get("task"), list):
            group = {key: value for key, value in config.items() if key in ("unsafe_code", "output_type")}
            found |= task_configs(index, config["task"], {**group, **rest})
        else:
            found[name] = {**config, **rest}
    return found


def check_tasks(index: Mapping[str, Any], names: Sequence[str], allow_code_execution: bool = False) -> None:
    """Refuses tasks that cannot be run, before a model is loaded.

    Args:
        index: `lm_eval.tasks.TaskManager().task_index`.
        names: Names of tasks, groups or tags.
        allow_code_execution: Whether tasks may run the programs that the model writes.

    Raises:
        ValueError: For a name that lm-eval does not know, or a task that runs generated programs if that is not allowed.
    """
    if not names:
        raise ValueError("`tasks` must be a non-empty list of names, got [].")
    for name, config in task_configs(index, names).items():
        if config.get("unsafe_code") and not allow_code_execution:
            raise ValueError(
                f"The task {name} runs programs that the model writes, on this machine and with your rights: it is refused "
                "without --allow-code-execution (in Python: allow_code_execution=True), best in a container without network."
            )
