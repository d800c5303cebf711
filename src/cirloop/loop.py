"""The method, on one page.

M_0 = train(base, human)                                  the warm-up
for t = 1 .. T:
    N_t-1 = mine(M_t-1, S_1..S_t-1)                       hard_negatives_iter_{t-1}.json
    S_t   = caption(N_t-1)                                augmented_samples_iter_{t}.json
    M_t   = train(M_t-1, human + S_1..S_t, N_t-1)         checkpoint_iter_{t}/
    E_t   = evaluate(M_t)                                 evaluation_iter_{t}.json
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.store import Artifact
from cirloop.config.run import RunConfig
from cirloop.monitoring import events

if TYPE_CHECKING:
    from cirloop.stages.context import RunContext

RESULTS = "evaluation_results.json"


def expected_artifacts(config: RunConfig, accounts: bool) -> list[str]:
    """Return the names of a run's artifacts in the order in which `iterate` makes them.

    `accounts`: the data set knows the truth, so that mining and captions are counted.
    """
    names = ["evaluation_base.json"] if config.evaluation.evaluate_base else []
    names += ["checkpoint_iter_0", "evaluation_iter_0.json"]
    judges = config.captioning.measures_judge(config.foundation, filters=config.mining.verifies)
    for t in range(1, config.num_iterations + 1):
        if config.mining.mines_in(t):
            names += ["judge_iter_1.json"] if judges and t == 1 else []
            names.append(f"hard_negatives_iter_{t - 1}.json")
            names += [f"augmented_samples_iter_{t}.json"] if config.captioning.enabled else []
            names += [f"accounting_iter_{t}.json"] if accounts else []
        names += [f"ranked_negatives_iter_{t}.json"] if config.training.ranks_negatives else []
        names += [f"checkpoint_iter_{t}", f"evaluation_iter_{t}.json"]
    return names


def iterate(run: RunContext) -> list[dict[str, Any]]:
    """Do what is not done yet; return the evaluations, base first."""
    from cirloop.stages import futile
    from cirloop.stages.account import account
    from cirloop.stages.caption import caption
    from cirloop.stages.evaluate import evaluate, stops_before, summary
    from cirloop.stages.judge import measure_judge
    from cirloop.stages.mine import mine
    from cirloop.stages.rank_negatives import rank_negatives
    from cirloop.stages.train import train

    config = run.config
    split = config.evaluation.split
    results: list[dict[str, Any]] = []

    def note(evaluation: Artifact) -> None:
        results.append(evaluation.read())
        write_json(run.store.directory / RESULTS, run.mark | summary(results, config))
        if evaluation.made_now:
            events.emit("evaluated")
        futile.check_moved(run, results)

    try:
        if config.evaluation.evaluate_base:
            note(evaluate(run, "base", None, split, 0))
        model = train(run, 0, None, [], None)
        note(evaluate(run, "iter_0", model, split, 0))
        augmented: list[Artifact] = []
        for t in range(1, config.num_iterations + 1):
            if stops_before(run, t, results):
                break
            if (t - 1) % config.mining.strategy.refresh_every(config.num_iterations) == 0:
                scorer = model
            if config.mining.mines_in(t):
                measure_judge(run, t, model)
                negatives = mine(run, t - 1, scorer, augmented)
                samples = caption(run, t, negatives, model, augmented)
                augmented += [samples] if samples else []
                account(run, t, negatives, samples)
            explicit = rank_negatives(run, t, model, augmented) or negatives
            model = train(run, t, model, augmented, explicit)
            note(evaluate(run, f"iter_{t}", model, split, t))
    except futile.FutileRound as end:
        write_json(run.store.directory / RESULTS, run.mark | summary(results, config, end))
    return results
