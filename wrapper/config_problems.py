"""What is wrong with a configuration, in words: path of the field, what was found, what is allowed.

Owns the wording and the checks that compare several fields. Knows nothing of files.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from wrapper.config_actions import ActionsConfig, ToolConfig
from wrapper.config_fields import Allowed
from wrapper.config_models import Config, PoolConfig
from wrapper.patterns import names_something

_MAX_SHOWN = 60

_MEANT = {
    "pool_name": "name",
    "image": "container_image",
    "socket": "cri_socket",
    "user": "run_as_user",
    "memory_limit": "memory_limit_in_bytes",
    "command": "worker_command",
    "protocol": "worker_protocol",
    "min_workers": "min_warm_workers",
    "max_workers": "max_total_workers",
}
"""Names that are nearer to another in meaning than in spelling; used where the latter exists."""


def problems_of(document: Mapping[str, object]) -> tuple[Config | None, list[str]]:
    """The document as a Config and no problems; or None and all of them, one line each."""
    problems: list[str] = []
    config: Config | None = None
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems += [_in_words(one) for one in details if not _follows(one, details)]
    # A wrong field must not hide what is wrong between others: these checks run on every pool that
    # is right in itself, whatever the rest of the document holds.
    raw_pools = document.get("pools")
    pools: dict[int, PoolConfig] = {}
    for index, raw in enumerate(raw_pools if isinstance(raw_pools, list) else ()):
        try:
            pools[index] = PoolConfig.model_validate(raw)
        except ValidationError:
            pass  # reported above
    for index, pool in pools.items():
        problems += _within_pool(f"pools[{index}]", pool)
    problems += _between_pools(pools)
    try:
        actions = ActionsConfig.model_validate(document.get("actions", {}))
    except ValidationError:
        pass  # reported above
    else:
        problems += _about_actions(actions, pools)
    if config is not None:
        problems += _totals(config)
    return (None if problems else config), problems


def path_of(location: Sequence[str | int]) -> str:
    """`pools[1].lifecycle.gc_job_frequency`."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step != "[key]":
            name = step if step.isidentifier() else json.dumps(step, ensure_ascii=False)
            path += f".{name}" if path else name
    return path or "the document"


def shown(value: object) -> str:
    """A value as JSON, cut short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _follows(one: Any, others: list[Any]) -> bool:
    """Whether this error only says that the list lacks the items that others are about."""
    depth = len(one["loc"])
    return one["type"] == "too_short" and any(
        len(other["loc"]) > depth and other["loc"][:depth] == one["loc"] for other in others
    )


def _in_words(details: Any) -> str:
    """One error of pydantic's as a line of ours."""
    location: tuple[str | int, ...] = details["loc"]
    path = path_of(location)
    model, field = _field_at(location)
    if details["type"] == "extra_forbidden":
        return f"{path}: unknown name{_suggestion(location)}"
    rule = _allowed(field)
    allowed = rule.words
    if details["type"] == "missing":
        return f"{path}: must be given; allowed: {allowed}"
    if details["type"] == "model_type" and model is not None:
        return f"{path}: found {shown(details['input'])}; allowed: an object with {_names(model)}"
    found = "the name " + shown(details["input"]) if location[-1] == "[key]" else shown(details["input"])
    return f"{path}: found {found}; allowed: {allowed}{_near(details['input'], rule)}"


def _field_at(location: Sequence[str | int]) -> tuple[type[BaseModel] | None, FieldInfo | None]:
    """The innermost field on the way, and its model class if it holds one (or a list of one)."""
    model: type[BaseModel] | None = Config
    field: FieldInfo | None = None
    for step in location:
        if isinstance(step, int) or model is None or step not in model.model_fields:
            continue
        field = model.model_fields[step]
        model = _model_in(field.annotation)
    return model, field


def _model_at(location: Sequence[str | int]) -> type[BaseModel]:
    return _field_at(location)[0] or Config


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(argument) for argument in get_args(annotation))
    return next((model for model in found if model is not None), None)


def _allowed(field: FieldInfo | None) -> Allowed:
    # The outermost comes last, and says more than the type that it wraps.
    rules = () if field is None else tuple(item for item in field.metadata if isinstance(item, Allowed))
    return rules[-1] if rules else Allowed("what docs/configuration.md says")


def _names(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _suggestion(location: Sequence[str | int]) -> str:
    """What an unknown name may have meant: a name here, or one in another section."""
    name, model = str(location[-1]), _model_at(location[:-1])
    here = list(model.model_fields)
    if _MEANT.get(name) in here:
        return f'; did you mean "{_MEANT[name]}"?'
    written = name.lower().replace("-", "_")
    elsewhere = {path.rpartition(".")[2]: path for path in field_paths(Config)}
    near_here = difflib.get_close_matches(written, here, n=1, cutoff=0.7)
    near_elsewhere = difflib.get_close_matches(written, list(elsewhere), n=1, cutoff=0.8)
    if near_here and name not in elsewhere:
        return f'; did you mean "{near_here[0]}"?'
    if near_elsewhere:
        pool = path_of(location[:2]) if len(location) > 2 else "pools[0]"
        return f'; did you mean "{elsewhere[near_elsewhere[0]].replace("pools[]", pool)}"?'
    return f"; known here: {_names(model)}"


def field_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every field of a model and of those inside, as `pools[].lifecycle.gc_job_frequency`."""
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        many = "[]" if inner is not None and "tuple" in str(field.annotation) else ""
        yield f"{prefix}{name}"
        if inner is not None:
            yield from field_paths(inner, f"{prefix}{name}{many}.")


def _near(value: object, rule: Allowed) -> str:
    near = difflib.get_close_matches(value.lower(), rule.choices, n=1) if isinstance(value, str) else None
    return f'; did you mean "{near[0]}"?' if near else ""


def _within_pool(path: str, pool: PoolConfig) -> Iterator[str]:
    warm, limits = pool.warm_workers, pool.limits
    if warm and not pool.worker_command:
        yield (
            f"{path}.min_warm_workers: found {warm} while worker_command is empty; "
            "allowed: 0, or give the worker_command to start"
        )
    if warm > pool.max_workers:
        yield (
            f"{path}.min_warm_workers: found {warm}; "
            f"allowed: at most {path}.max_workers, which is {pool.max_workers}"
        )
    if warm > limits.max_instances_per_key:
        yield (
            f"{path}.min_warm_workers: found {warm}; "
            f"allowed: at most {path}.limits.max_instances_per_key, which is {limits.max_instances_per_key} "
            "(warm workers all have the same key)"
        )
    if not pool.worker_command and not pool.keys:
        yield (
            f"{path}.keys: found no pattern while worker_command is empty, so nothing could use this pool; "
            "allowed: at least one pattern, or give a worker_command"
        )
    yield from _about_tools(f"{path}.tools", pool.tools, may_be_any=bool(pool.worker_command))
    yield from _about_containers(path, pool)


def _about_containers(path: str, pool: PoolConfig) -> Iterator[str]:
    for name in ("cri_socket", "container_image"):
        value = getattr(pool, name)
        if pool.runtime == "cri" and value is None:
            yield f'{path}.{name}: must be given with runtime "cri"'
        elif value is not None and "runtime" not in pool.model_fields_set:
            yield (
                f'{path}.{name}: found without a runtime; allowed: say runtime: "cri" to run the workers in '
                'containers, or runtime: "process" to run them as plain processes, not isolated'
            )
    if pool.runtime == "process" and "isolation" in pool.model_fields_set:
        foreign = sorted(pool.isolation.model_fields_set - {"run_as_user", "run_as_group"})
        if foreign or not pool.isolation.model_fields_set:
            yield (
                f'{path}.isolation: found {", ".join(foreign) or "nothing"} with runtime "process", which '
                'isolates nothing; allowed: run_as_user and run_as_group, or runtime "cri"'
            )
    if pool.has_own_execroots and pool.limits.max_requests_per_worker_at_once > 1:
        yield (
            f"{path}.limits.max_requests_per_worker_at_once: found "
            f"{pool.limits.max_requests_per_worker_at_once}; allowed: 1 for workers with an execroot of "
            'their own, which holds one action at a time, or execroot.strategy "inplace"'
        )


def _about_actions(actions: ActionsConfig, pools: Mapping[int, PoolConfig]) -> Iterator[str]:
    roots: list[tuple[str, str]] = []
    for index, root in enumerate(actions.work_roots):
        path = f"actions.work_roots[{index}]"
        yield from _plain(f"{path}.path", root.path)
        for earlier_path, earlier in roots:
            if _lies_in(root.path, earlier) or _lies_in(earlier, root.path):
                yield (
                    f"{path}.path: found {shown(root.path)} beside {earlier_path} ({shown(earlier)}); "
                    "allowed: work roots of which none is, or lies in, another"
                )
        roots.append((f"{path}.path", root.path))
    for index, root in enumerate(actions.work_roots):
        if root.execroots is None:
            continue
        path = f"actions.work_roots[{index}].execroots"
        yield from _plain(path, root.execroots)
        for root_path, inside in roots:
            if _lies_in(root.execroots, inside):
                yield (
                    f"{path}: found {shown(root.execroots)}, which lies in {root_path} ({shown(inside)}); "
                    "allowed: a place outside of all work roots, which their host may empty"
                )
    yield from _about_tools("actions.tools", actions.tools)
    known = [root.path for root in actions.work_roots]
    for index, pool in pools.items():
        work_root = pool.execroot.work_root
        if known and pool.execroot.strategy == "rename" and work_root not in (None, *known):
            yield (
                f"pools[{index}].execroot.work_root: found {shown(work_root)}; allowed: one of "
                f"actions.work_roots ({', '.join(known)}), or null"
            )


def _plain(path: str, value: str) -> Iterator[str]:
    """A path that is compared with others has to be written in one way only."""
    if value.startswith("//") or os.path.normpath(value) != value:  # normpath leaves two slashes in front
        yield (
            f"{path}: found {shown(value)}; allowed: an absolute path "
            'without ".", "..", double or trailing slashes'
        )


def _lies_in(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _about_tools(path: str, tools: Sequence[ToolConfig], *, may_be_any: bool = False) -> Iterator[str]:
    for index, tool in enumerate(tools):
        where = f"{path}[{index}].pattern"
        if not may_be_any and not names_something(tool.pattern):
            yield (
                f"{where}: found {shown(tool.pattern)}, which names no tool: whatever has a flagfile would "
                "be started as a worker; allowed: a pattern with some text of its own"
            )
        for earlier_index, earlier in enumerate(tools[:index]):
            if tool.pattern == earlier.pattern or _covers(earlier.pattern, tool.pattern):
                yield (
                    f"{where}: found {shown(tool.pattern)}, which {path}[{earlier_index}].pattern "
                    f"({shown(earlier.pattern)}) has taken: the first match wins; allowed: a pattern not "
                    "taken before, or the narrower tool first"
                )
                break


def _between_pools(pools: Mapping[int, PoolConfig]) -> Iterator[str]:
    names: dict[str, int] = {}
    patterns: list[tuple[str, str]] = []
    for index, pool in pools.items():
        first = names.setdefault(pool.name, index)
        if first != index:
            yield (
                f"pools[{index}].name: found {shown(pool.name)}, which is pools[{first}]'s name; "
                "allowed: a name of its own"
            )
        for position, pattern in enumerate(pool.keys):
            path = f"pools[{index}].keys[{position}]"
            for earlier_path, earlier in patterns:
                if pattern == earlier or _covers(earlier, pattern):
                    yield (
                        f"{path}: found {shown(pattern)}, which {earlier_path} ({shown(earlier)}) has taken: "
                        "the first match in the document's order wins; allowed: a pattern not taken before, "
                        "or the narrower pool first"
                    )
                    break
            patterns.append((path, pattern))


def _covers(wide: str, narrow: str) -> bool:
    """Whether surely every key that `narrow` matches is matched by `wide` too.

    A `*` also matches the special characters of a pattern, so a pattern whose only special one is
    `*` covers every pattern that it matches as text. For others this says no.
    """
    return not set(wide) & set("?[") and fnmatchcase(narrow, wide)


def _totals(config: Config) -> Iterator[str]:
    warm = sum(pool.warm_workers for pool in config.pools)
    if config.max_total_workers is not None and warm > config.max_total_workers:
        yield (
            f"max_total_workers: found {config.max_total_workers}; allowed: at least {warm}, "
            "the sum of min_warm_workers of all pools"
        )
