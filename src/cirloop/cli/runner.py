"""A run directory: opening a new one, going on in a used one, and refusing when that would lose or
mix results."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from cirloop.artifacts import run_lock, schema
from cirloop.artifacts.store import Store
from cirloop.cli.iterations import done_iterations
from cirloop.config import notices
from cirloop.config.base import differences
from cirloop.config.run import RunConfig, from_json, save
from cirloop.evaluation.best import gain_words
from cirloop.evaluation.significance import compare_iterations
from cirloop.loop import RESULTS, iterate
from cirloop.monitoring import events, preemption
from cirloop.monitoring.console import ERROR_WORDS, metric_rows, table, title_prefix
from cirloop.monitoring.run_log import RunLog
from cirloop.monitoring.trackers import DIRECTORY as TRACKED
from cirloop.monitoring.trackers import tracking
from cirloop.report import builder
from cirloop.report import page as page_file
from cirloop.report.run_monitor import RunMonitor
from cirloop.stages.context import CONFIG, RunContext
from cirloop.stages.preflight import check
from cirloop.types import EvalProtocol, UserError
from cirloop.validation import ValidationFailed, group_by_cause

logger = logging.getLogger(__name__)


def is_used(directory: Path) -> bool:
    """Tell whether `directory` holds a run. Raises UserError where it holds something else."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--experiment_dir {directory} is a file. Give a directory.")
    used = directory.is_dir() and any(
        p.suffix != ".tmp" and not p.name.startswith(run_lock.FILE) for p in directory.iterdir()
    )
    if used and not (directory / CONFIG).is_file():
        raise UserError(
            f"{directory} is not empty and is no run directory (no {CONFIG}). Give another"
            " --experiment_dir."
        )
    return used


def open_run(config: RunConfig) -> RunContext:
    """Open the run of `config`, whose lock the caller holds.

    Nothing else on disk changes before every check has passed.
    """
    directory = config.directory
    data = check(config)
    used = is_used(directory)
    resuming = config.auto_resume or config.resume_from_iteration is not None
    if used and not resuming:
        raise UserError(
            f"{directory} holds a run already. Ways out:\n  --auto_resume                 go on at"
            " the first stage that is not done\n  --resume_from_iteration N     keep the"
            " iterations below N, remake N and what follows\n  --experiment_dir DIR          start"
            " anew elsewhere"
        )
    start = config.resume_from_iteration
    if start is not None and not used:
        _refuse_no_run(config)
    if used:
        _check_same(config, from_json(directory / CONFIG))
    store = Store(directory)
    if start is not None:
        done = done_iterations(store)
        if start > (done[-1] + 1 if done else 0):
            raise UserError(
                f"--resume_from_iteration {start}: {directory} has iterations"
                f" {', '.join(map(str, done)) or 'none'}; the furthest to resume from is"
                f" {done[-1] + 1 if done else 0}."
            )
        for name in store.names:  # what is kept must be whole
            if (store.iteration_of(name) or 0) < start:
                store.load(name)
        archive = store.archive_from(start, also=[RESULTS, TRACKED])
        if archive is not None:
            logger.info("iterations %d and later moved to %s", start, archive)
    elif used:
        for name in store.names:
            store.load(name)
    for stale in directory.glob(".*.tmp"):  # a write that a stopped run did not finish
        stale.unlink()
    store.initialize(save(config, directory / CONFIG), directory / CONFIG)
    return RunContext(config, store, data)


def _refuse_no_run(config: RunConfig) -> NoReturn:
    raise UserError(
        f"--resume_from_iteration {config.resume_from_iteration}: {config.directory} holds no run."
        " Leave the flag out to start one."
    )


def _check_same(config: RunConfig, old: RunConfig) -> None:
    lines = differences(old.result_settings(), config.result_settings())
    if not lines:
        return
    if old.retrieval != config.retrieval:
        lines = [
            f"retrieval: {old.retrieval!r} -> {config.retrieval!r}. A simulated run and a real one"
            " never go on from each other."
        ]
    raise UserError(
        f"{config.directory} was made with other settings:\n  "
        + "\n  ".join(lines)
        + f"\nWays out: leave those flags out, and --experiment_dir {config.directory}"
        " --auto_resume goes on with the settings it was made with"
        f" ({config.directory / CONFIG}); or start anew with another --experiment_dir."
    )


def run(config: RunConfig) -> list[dict[str, Any]]:
    """Do the run, or what is left of it, and print the closing tables.

    Raises UserError where another run works in the directory, GracefulStop where SIGTERM asked this
    one to stop.
    """
    began = time.monotonic()
    is_used(config.directory)  # a directory of something else gets no lock
    log_notices(config)
    with RunLog(config.directory) as attempt, title_prefix(notices.title(config)):
        with run_lock.run_lock(config.directory), preemption.handle_sigterm():
            current = open_run(config)
            current.log = attempt.open()
            results = _iterate_monitored(current)
            current.store.remove_scratch()
        print_results(results, config.data.protocol)
        _print_accounts(current.store)
        current.costs.show()
        log_notices(config)
        _log_end(config, results, time.monotonic() - began)
    return results


def _log_end(config: RunConfig, results: Sequence[dict[str, Any]], seconds: float) -> None:
    """Log why the run ended early, where it did, what was gained, and where the results are, the
    report last."""
    stopped = schema.read(config.directory / RESULTS).get("stopped_early", {})
    if "reason" in stopped:
        logger.warning(
            "ended after round %d of %d by --stop_on_futile_round: %s",
            stopped["after"],
            config.num_iterations,
            stopped["reason"],
        )
    gain = gain_words(results)
    if gain:
        logger.info("%s", gain)
    page = config.directory / page_file.FILE
    report = f"; open {page}" if config.runtime.report and page.exists() else ""
    logger.info("finished in %.0f s; results in %s%s", seconds, config.directory / RESULTS, report)


def log_notices(config: RunConfig) -> None:
    """Log what a reader of the run's numbers must know."""
    for notice in notices.of(config):
        logger.warning("%s", notice)


def _iterate_monitored(current: RunContext) -> list[dict[str, Any]]:
    """Run the loop with its monitor, trackers and report subscribed."""
    config = current.config
    counts = config.num_iterations > 0 and current.data.train.oracle is not None
    with ExitStack() as stack:
        stack.enter_context(tracking(config.directory, config.runtime.report_to, config.to_json()))
        monitor = RunMonitor(config, current.store, current.costs, counts)
        stack.enter_context(events.subscribe(monitor, "the view of the run"))
        if config.runtime.report:
            reporter = builder.reporter(config, current.store, current.data)
            stack.enter_context(events.subscribe(reporter, "the report"))
        stack.callback(events.emit, "head", head=None)
        results = iterate(current)
        # The report gets the last comparison, also where nothing was left to do.
        events.emit("finished")
        return results


NO_ERRORS = dict.fromkeys(ERROR_WORDS, "")
"""Of a benchmark without targets."""


def _print_accounts(store: Store) -> None:
    accounts = [
        store.load(n).read() for n in sorted(store.names) if n.startswith("accounting_iter_")
    ]
    if not accounts:
        return
    columns = ["iteration", "mined negatives", "false negatives", "accepted texts", "true"]
    has_anchors = any("accepted_of_anchors" in a for a in accounts)
    if has_anchors:
        columns += ["of anchors", "true"]
    rows = []
    for a in accounts:
        mined = (a["mined"], _fraction(a["false_negatives"], a["mined"]))
        texts = [a["accepted"], _fraction(a["true_captions"], a["accepted"])]
        if has_anchors:
            num = a.get("accepted_of_anchors", 0)
            texts += [num, _fraction(a.get("true_captions_of_anchors", 0), num)]
        rows.append((a["iteration"], *mined, *texts))
    table("Mining and captions, counted exactly", columns, rows)


def print_results(results: Sequence[dict[str, Any]], protocol: EvalProtocol) -> None:
    """Print the closing tables: a row per iteration, then the comparison of neighbours."""
    last = results[-1]
    columns = [c for c in protocol.reported if any(c in r["metrics"] for r in results)]
    title = (
        f"{last['split']}, percent ± standard error over {last['queries']} queries."
        f" {last['protocol']}"
    )
    if last["ablated"]:
        title += f". ABLATED: {'no texts' if last['ablated'] == 'text' else 'grey references'}"
    if last["missing_images"] or last["dropped_queries"]:
        title += (
            f". {last['missing_images']} images missing, {last['dropped_queries']} queries dropped"
        )
    table(title, ("iteration", *columns), metric_rows(results, columns))
    comparisons = compare_iterations(results)
    if comparisons:
        rows = [
            [
                f"{c['from']} -> {c['to']}",
                f"{100 * c['difference']:+.1f} ± {100 * c['se']:.1f}",
                f"{c['p_corrected']:.4f}",
                *((c["errors"] or NO_ERRORS).values()),
            ]
            for c in comparisons
        ]
        title = (
            f"Paired over queries, {comparisons[0]['metric']}: difference in points, p of a"
            " randomisation test, corrected for the number of rows (Holm); queries whose first"
            " image is wrong in both, newly, or no longer"
        )
        table(title, ("iterations", "difference", "p", *ERROR_WORDS.values()), rows)


def _fraction(part: int, total: int) -> str:
    return f"{part} ({100 * part / total:.1f}%)" if total else "0"


def dry_run(config: RunConfig) -> None:
    """Check configuration, data and model; print the plan with sizes and an estimate, or every
    problem.

    Writes nothing but features, what was found out about the images, and the problems.
    """
    from cirloop.stages import estimate  # it measures, with what a training process loads

    log_notices(config)
    try:
        data = check(config)
    except ValidationFailed as error:
        table(error.count, ("where", "what"), group_by_cause(error.rows), numbers=False)
        raise UserError(
            "\n".join([f"{error.count}, in the table above.", *error.remedies])
        ) from None
    if is_used(config.directory) and (
        config.auto_resume or config.resume_from_iteration is not None
    ):
        _check_same(config, from_json(config.directory / CONFIG))
    if config.resume_from_iteration is not None and not is_used(config.directory):
        _refuse_no_run(config)
    title = f"{notices.title(config)}Plan (nothing was trained)"
    table(title, ("what", "value"), estimate.plan_rows(config, data), numbers=False)
