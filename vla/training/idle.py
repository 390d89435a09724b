"""Options of stage two that another option leaves without effect, and that are refused rather than passed over."""

from collections.abc import Iterable

from vla.config import PolicyTrainConfig
from vla.config_io import to_dict
from vla.training.run import differences
from vla.training.start import starts_trained
from vla.types import UserError


def refuse_idle(config: PolicyTrainConfig, given: Iterable[str] | None = None, path: str = "") -> None:
    """Refuse options that change nothing: of `given` dotted names, else of all that are not as usual.

    Args:
        path: leads to the configuration.
    Raises:
        UserError: names the option and what it needs.
    """
    names = differences(to_dict(PolicyTrainConfig()), to_dict(config)) if given is None else list(given)
    conditions = (
        (("encoder_lr_scale", "tuned_part"), config.tune, "tune=true"),
        (("loss", "batch"), config.auxiliary, "auxiliary above 0"),
        (("tower",), config.encoder == "random" and not config.start, "encoder=random"),
        (("pooler_lr_scale",), starts_trained(config), "aligned_pooler=true"),
        (("head.flow_steps",), config.head.kind == "flow", "head.kind=flow"),
        (("head.token_noise",), not config.tune, "tune=false"),
        (("optimizer.layer_decay", "optimizer.pretrained_lr"), False, "stage one's encoders, where it belongs"),
    )
    for name in names:
        for idle, used, needs in conditions:
            if not used and any(name == field or name.startswith(f"{field}.") for field in idle):
                raise UserError(f"config error: {path}{name} changes nothing without {needs}; leave it out")
