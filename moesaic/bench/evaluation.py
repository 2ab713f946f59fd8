"""Runs tasks of lm-eval (EleutherAI's lm-evaluation-harness) on a model in this process.

lm-eval reads the tasks and their data sets, makes requests of them, and computes the metrics. ``lm_eval_adapter``
answers the requests. lm-eval is imported when a function needs it, so this module also works where it is missing.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from moesaic.engine import Engine, Limits
from moesaic.errors import DownloadError, InvalidParameter, InvalidRequest, NotFound, NotInstalled
from moesaic.llm import LLM
from moesaic.loading import Loaded, torch_threads
from moesaic.sampling_defaults import sampling_defaults
from moesaic.text import chat_choice
from moesaic.text.tokenizer import Tokenizer
from moesaic.text_tables import aligned
from moesaic.token_rows import check_tokenizer

STEP_TOKENS = 512
LIST = "list"
"""The name in place of tasks that asks for their names."""
SUFFIXES = (".yaml", ".yml")
NOT_COUNTED = ("alias", "name", "sample_len", "sample_count")
"""Keys of a task's results that are no metrics."""


@dataclass(frozen=True)
class Options:
    """What lm-eval does with each task; None: as the task says."""

    num_fewshot: int | None = None
    """Number of examples before each question."""
    limit: float | None = None
    """Number of questions of each task, or a share of them if less than 1."""
    apply_chat_template: bool = False
    """Whether a question is a message in the model's chat format, and examples are earlier messages."""
    system_instruction: str | None = None
    gen_kwargs: str | None = None
    """Generation settings, as "temperature=0.7,max_gen_toks=64"."""
    confirm_run_unsafe_code: bool = False
    """Whether tasks may run code that the model wrote."""
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise InvalidParameter("num_fewshot", f"is {self.num_fewshot}, expected at least 0")
        if self.limit is not None and not self.limit > 0:
            raise InvalidParameter("limit", f"is {self.limit}, expected more than 0")


def require() -> ModuleType:
    """Return the package lm-eval.

    Raises:
        NotInstalled: it is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warns when a data set forks
    try:
        import lm_eval
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as error:
        raise NotInstalled(f"moesaic eval needs lm-eval ({error}): pip install 'moesaic[eval]'") from error
    module: ModuleType = lm_eval
    return module


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval by name, and where lm-eval finds them."""

    names: list[str]
    manager: Any
    """The ``TaskManager`` that reads them."""

    @classmethod
    def find(cls, names: Sequence[str], folders: Sequence[Path]) -> Tasks:
        """Return the tasks that match ``names``: names of tasks, groups and tags, patterns, or YAML files of tasks.

        Tasks in ``folders`` come before lm-eval's own, which are read only if one is asked for: that takes a while.

        Raises:
            NotInstalled: lm-eval is not installed.
            NotFound: a name matches nothing, or a folder does not exist.
        """
        for folder in folders:
            if not folder.is_dir():
                raise NotFound(f"{folder}: no such folder of tasks")
        own = _manager(folders, include_defaults=False)
        wanted = [name for name in names if not _is_file(name)]
        whole = all(own.match_tasks([name]) and name not in own.all_groups for name in wanted)
        manager = own if whole else _manager(folders, include_defaults=True)
        found = [match for name in names for match in ([name] if _is_file(name) else _matches(manager, name))]
        return cls(list(dict.fromkeys(found)), manager)


def _manager(folders: Sequence[Path], *, include_defaults: bool) -> Any:
    return require().tasks.TaskManager(include_path=list(map(str, folders)), include_defaults=include_defaults)


def _is_file(name: str) -> bool:
    return name.endswith(SUFFIXES) and Path(name).is_file()


def _matches(manager: Any, name: str) -> list[str]:
    matches: list[str] = manager.match_tasks([name])
    if not matches:
        near = difflib.get_close_matches(name, manager.all_tasks, 3)
        hint = f"; similar names: {', '.join(near)}" if near else ""
        raise NotFound(f"lm-eval has no task {name!r}{hint}; `moesaic eval --tasks list` lists them")
    return matches


def task_names(folders: Sequence[Path]) -> Iterator[str]:
    """Yield the kind and the name of each group, tag and task of lm-eval and of ``folders``."""
    manager = _manager(folders, include_defaults=True)
    kinds = {"group": manager.all_groups, "tag": manager.all_tags, "task": manager.all_subtasks}
    yield from (f"{kind:<5}  {name}" for kind, names in kinds.items() for name in names)


def start(loaded: Loaded, name: str, at_once: int, chat_format: str | None = None) -> LLM:
    """Start an engine that reads as many tokens as the plan of the model says and scores one more; return it as an LLM.

    Args:
        loaded: the model.
        name: the name of the model.
        at_once: number of requests that run at the same time.
        chat_format: as for ``LLM.load``.

    Raises:
        InvalidParameter, InvalidRequest, NotFound: as for ``LLM.load``.
    """
    if loaded.model.shape.labels:
        raise InvalidRequest(f"{loaded.path} holds a classifier, which has no probabilities of tokens")
    tokenizer = Tokenizer.open(loaded.path)
    check_tokenizer(tokenizer, loaded.model.vocab_size, loaded.path)
    selected = chat_choice.select(chat_format, tokenizer, loaded.path, loaded.config.get("model_type"))
    defaults = sampling_defaults(loaded.generation, loaded.generation_file)
    plan, context = loaded.plan, loaded.plan.context + 1
    engine = Engine(
        loaded.model,
        cache_tokens=plan.cache_tokens + plan.block_size,
        block_size=plan.block_size,
        context=context,
        limits=Limits(max(STEP_TOKENS, at_once), at_once, queue=4 * at_once, queue_tokens=4 * at_once * context),
        dtype=plan.cache_dtype,
        torch_threads=torch_threads(loaded.model),
        lazy_cache=True,
    )
    return LLM(loaded, tokenizer, engine, selected, name, defaults)


def evaluate(llm: LLM, tasks: Tasks, options: Options, at_once: int) -> dict[str, Any]:
    """Return lm-eval's results for a model from ``start``: its figures by task, and with "samples" each request.

    Raises:
        DownloadError: the data set of a task cannot be loaded.
        InvalidRequest: lm-eval refuses a task or a setting.
    """
    lm_eval = require()
    from moesaic.bench.lm_eval_adapter import EngineLM

    try:
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=EngineLM(llm, at_once, options.seed),
            tasks=tasks.names,
            task_manager=tasks.manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            system_instruction=options.system_instruction,
            gen_kwargs=options.gen_kwargs,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
            batch_size=at_once,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
        )
    except OSError as error:
        raise DownloadError(f"lm-eval cannot load a task's data: {error}") from error
    except (ValueError, KeyError) as error:
        raise InvalidRequest(f"lm-eval: {error}") from error
    return results


def row(format_name: str | None, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of a model in a format, without the samples, as a dictionary for a results file."""
    kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better", "config")
    figures = {key: results[key] for key in kept if key in results}
    return {"format": format_name or "as stored", **json.loads(json.dumps(figures, default=str))}


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a table of the metrics of each task: one column for each of ``rows``, from ``row``."""
    yield from aligned(grid(rows), left=3)


def grid(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the cells of the table of ``lines``, with its heading."""
    titles = ["task", "shots", "metric", *(str(entry["format"]) for entry in rows)]
    table = [titles]
    for task, metric in _metrics(rows[0]):
        shots = str(rows[0].get("n-shot", {}).get(task, ""))
        values = [_value(entry["results"].get(task, {}), metric) for entry in rows]
        table.append([str(rows[0]["results"][task].get("alias", task)), shots, metric.removesuffix(",none"), *values])
    return table


def _metrics(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each task and name of a metric, without standard errors."""
    for task, figures in entry["results"].items():
        for key in figures:
            if key not in NOT_COUNTED and not key.partition(",")[0].endswith("_stderr"):
                yield task, key


def _value(figures: Mapping[str, Any], metric: str) -> str:
    """Return a metric with its standard error, if it has one, as text."""
    value = figures.get(metric, "")
    name, _, kind = metric.partition(",")
    error = figures.get(f"{name}_stderr,{kind}")
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return f"{text} ± {error:.4f}" if isinstance(error, float) else text


def write_samples(path: Path, results: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Write each request of lm-eval's results, with the answer and the metrics, as a line of JSON.

    ``results`` has the format of a model and its results.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for format_name, found in results:
            for task, samples in found["samples"].items():
                for sample in samples:
                    line = {"format": format_name, "task": task, **sample}
                    file.write(json.dumps(line, default=str, ensure_ascii=False) + "\n")
