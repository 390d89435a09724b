"""The arms of the matched comparison, as data."""

from dataclasses import dataclass
from typing import Literal

Source = Literal["random", "cloned", "none", "language", "action", "all", "named", "vision"]


@dataclass(frozen=True)
class Arm:
    """How a policy gets its encoder.

    `source`: an untrained tower, one pretrained by cloning, one aligned on triplets of which this part is shuffled ("none": the
    real alignment), or one that the user names: an encoder, or a vision model alone. `snapshot`: the alignment as of this
    step; 0 is its end. `name`: of the encoder, if the user named it. `after`: the arm whose policies this one's go on from.
    `number`: the only number of demonstrations that it is trained on; None for all that are compared.
    """

    source: Source
    says: str
    tuned_part: Literal["nothing", "vision", "last_block"] = "nothing"
    hide: Literal["none", "language", "vision"] = "none"
    snapshot: int = 0
    name: str = ""
    after: str = ""
    number: int | None = None

    @property
    def encoder(self) -> str:
        """The encoder's name among those of one comparison and training seed."""
        return self.name or (f"{self.source}@{self.snapshot}" if self.snapshot else self.source)


ARMS = {
    "scratch": Arm("random", "trained end to end by cloning alone", tuned_part="vision"),
    "random-frozen": Arm("random", "untrained, frozen"),
    "cloning-pretrained-frozen": Arm("cloned", "trained by cloning on all demonstrations, then frozen"),
    "aligned-frozen": Arm("none", "aligned, then frozen"),
    "aligned-last-block": Arm("none", "aligned, its last block fine-tuned", tuned_part="last_block"),
    "aligned-tuned": Arm("none", "aligned, then fine-tuned", tuned_part="vision"),
    "aligned-head-tuned": Arm(
        "none", "as aligned-frozen, then fine-tuned together with its head", tuned_part="vision", after="aligned-frozen"
    ),
    "shuffle-language": Arm("language", "aligned with instructions of other episodes, frozen"),
    "shuffle-action": Arm("action", "aligned with actions of other rows, frozen"),
    "shuffle-all": Arm("all", "aligned with instructions and actions of others, frozen"),
    "no-language": Arm("none", "aligned, frozen; the policy gets no instruction", hide="language"),
    "no-vision": Arm("none", "aligned, frozen; the policy gets no picture", hide="vision"),
}

# (first, second, what the difference shows); reported where both were run.
CONTRASTS = (
    ("aligned-frozen", "shuffle-all", "alignment on real triplets against the same training on shuffled ones"),
    ("aligned-frozen", "random-frozen", "alignment against no training of the encoder"),
    ("aligned-frozen", "cloning-pretrained-frozen", "contrast against cloning as pretraining"),
    ("aligned-frozen", "shuffle-language", "what the instructions of the triplets give"),
    ("aligned-frozen", "shuffle-action", "what the actions of the triplets give"),
    ("aligned-tuned", "scratch", "alignment then fine-tuning against cloning alone; the minutes of both are above"),
    ("aligned-tuned", "aligned-frozen", "fine-tuning against freezing"),
    (
        "aligned-head-tuned",
        "scratch",
        "alignment, head, then fine-tuning against cloning alone; the minutes of both are above",
    ),
    ("aligned-head-tuned", "aligned-frozen", "what fine-tuning adds to a trained head"),
    ("aligned-frozen", "no-language", "what the instruction gives the policy"),
    ("aligned-frozen", "no-vision", "what the picture gives the policy"),
)
