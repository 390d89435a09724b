"""Pre- and post-processing of the `concord` policy: LeRobot's own steps, with floored quantile ranges."""

from typing import Any

import torch
from lerobot.processor import PolicyAction, PolicyProcessorPipeline, make_default_pre_post_processors

from vla.policies.concord.configuration_concord import ConcordConfig
from vla.types import ACTION_KEY, RANGE_FLOOR, STATE_KEY


def make_concord_pre_post_processors(
    config: ConcordConfig, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]:
    """The pipelines around the policy.

    Raises:
        ValueError: statistics are given but lack q01 or q99 of state or action.
    """
    stats = None if dataset_stats is None else {**dataset_stats, **_floored(dataset_stats)}
    return make_default_pre_post_processors(config, stats)


def _floored(stats: dict[str, dict[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
    floored = {}
    for key in (STATE_KEY, ACTION_KEY):
        missing = [name for name in ("q01", "q99") if name not in stats.get(key, {})]
        if missing:
            raise ValueError(f"statistics of {key} lack {', '.join(missing)}")
        values = {name: torch.as_tensor(v, dtype=torch.float32) for name, v in stats[key].items() if name != "count"}
        centre, half = (values["q01"] + values["q99"]) / 2, (values["q99"] - values["q01"]) / 2
        half = half.clamp_min(RANGE_FLOOR / 2)
        floored[key] = values | {"q01": centre - half, "q99": centre + half}
    return floored
