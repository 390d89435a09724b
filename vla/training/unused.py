"""Options that another option leaves without effect, and that are refused where somebody gives them, rather than passed over."""

from collections.abc import Iterable

from vla.config import AlignConfig, PolicyTrainConfig
from vla.training.align_setup import pair_temperatures
from vla.training.pretrained import from_stage_one
from vla.training.start import starts_trained
from vla.types import UserError

Condition = tuple[
    tuple[str, ...], bool, str
]  # fields, or what their names begin with; whether they are used; what they need


SIZES = ("patch_size", "width", "layers", "heads", "text_width", "text_layers", "text_heads", "embed_dim", "vocab_size")


def conditions_of(config: AlignConfig | PolicyTrainConfig) -> tuple[Condition, ...]:
    """Options that only some configurations use."""
    own_words = (
        ("tower.vocab_size",),
        config.tower.vocabulary is None,
        "a vocabulary of its own (no tower.vocabulary)",
    )
    if isinstance(config, AlignConfig):
        loss, untrained = config.loss, config.tower.pretrained is None
        sizes = tuple(f"tower.{name}" for name in SIZES)
        brings = from_stage_one(config.tower.pretrained) and loss.learn_temperature
        off = [f"loss.{pair}" for pair in pair_temperatures(loss) if not getattr(loss, pair)]
        return (
            (("loss.temperatures",), not off, f"all of the terms that it names (off: {', '.join(off)})"),
            (("loss.action_beta",), bool(loss.context_action or loss.transition_action), "a term of actions"),
            (("loss.state_beta",), bool(loss.state), "loss.state above 0"),
            (("optimizer.pretrained_lr",), not untrained, "tower.pretrained"),
            (sizes, untrained, "untrained towers (no tower.pretrained, which brings its sizes)"),
            own_words,
            (
                ("loss.temperature",),
                not brings,
                "a start that has no scales of its own beside it (loss.temperatures, as in context_action=0.1, overrules those)",
            ),
        )
    augments = config.tune or config.cached_shifts != 1 or config.auxiliary > 0
    augmentations = ("data.shift_px", "data.color_jitter", "data.pasted_shapes")
    return (
        (("encoder_lr_scale", "tuned_part"), config.tune, "tune=true"),
        (augmentations, augments, "tune=true or another cached_shifts than 1, which keeps plain pictures alone"),
        (("cached_shifts",), not config.tune, "tune=false"),
        (("rollouts",), config.rollouts_every > 0, "rollouts_every above 0"),
        (("loss", "batch"), config.auxiliary > 0, "auxiliary above 0"),
        (("tower",), config.encoder == "random" and not config.start, "encoder=random and no start"),
        own_words,
        (("encoder",), not config.start, "a new policy; start brings its encoder"),
        (
            ("aligned_pooler",),
            not config.aligned_pooler or (config.encoder != "random" and not config.start),
            "a trained encoder and no start",
        ),
        (("pooler_lr_scale",), starts_trained(config), "aligned_pooler=true and a trained encoder"),
        (("head.flow_steps",), config.head.kind == "flow", "head.kind=flow"),
        (("head.token_noise",), not config.tune, "tune=false"),
        (("optimizer.layer_decay", "optimizer.pretrained_lr"), False, "stage one's encoders, where it belongs"),
    )


def unused_options(config: AlignConfig | PolicyTrainConfig, given: Iterable[str]) -> dict[str, str]:
    """Those of the given dotted names that change nothing, and what each needs."""
    conditions = conditions_of(config)
    return {
        name: needs
        for name in given
        for fields, used, needs in conditions
        if not used and any(name == field or name.startswith(f"{field}.") for field in fields)
    }


def refuse_unused(config: AlignConfig | PolicyTrainConfig, given: Iterable[str]) -> None:
    """Refuse given options that change nothing.

    Raises:
        UserError: names the first and what it needs.
    """
    for name, needs in unused_options(config, given).items():
        raise UserError(f"config error: {name} changes nothing without {needs}; leave it out")
