"""Configuration of the `concord` policy."""

from dataclasses import dataclass, field

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig


@PreTrainedConfig.register_subclass("concord")
@dataclass
class ConcordConfig(PreTrainedConfig):
    """An action head on the patch tokens of an aligned CLIP encoder.

    `encoder` names a CLIPModel folder or hub id that a *new* policy starts from; a saved policy holds its own encoder
    and never looks there. Without it a new policy gets an untrained tower of the sizes below.
    """

    encoder: str | None = None
    tune: bool = False  # train the encoder too
    tuned_part: str = "all"  # what of it: all, vision or last_block (of the vision tower)
    hide: str = "none"  # a control that never gets the "language" or the "vision"
    encoder_lr_scale: float = 0.1  # learning rate of the encoder relative to the rest
    precision: str = "no"  # it was trained in; the vision tower acts in bf16 only where the hardware has it
    kind: str = "l1"  # action head: l1 or flow
    horizon: int = 16  # timesteps predicted
    n_action_steps: int = 8  # timesteps executed before the next look
    queries: int = 6  # of the text-conditioned pooler
    width: int = 128  # of the pooler
    hidden: int = 384  # width of the features between pooler and head
    layers: int = 2  # between pooler and head
    state_dropout: float = 0.1  # share of the training samples whose state is hidden
    flow_steps: int = 8  # Euler steps of a flow head
    image_size: int = 96  # px; other sizes are resized to the encoder's
    patch_size: int = 12  # of an untrained tower, like the next four
    tower_width: int = 128
    tower_layers: int = 4
    tower_heads: int = 4
    text_width: int = 128
    optimizer_lr: float = 5e-4
    optimizer_weight_decay: float = 0.05
    scheduler_warmup_steps: int = 200
    scheduler_decay_steps: int = 20_000
    push_to_hub: bool = False
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            # Images are normalised inside the policy, with ImageNet's statistics, as in stage one.
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.QUANTILES,
            "ACTION": NormalizationMode.QUANTILES,
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_action_steps <= self.horizon:
            raise ValueError(f"n_action_steps {self.n_action_steps} must be between 1 and horizon {self.horizon}")
        for name, known in (
            ("tuned_part", ("all", "vision", "last_block")),
            ("hide", ("none", "language", "vision")),
            ("precision", ("no", "bf16")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.horizon))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(lr=self.optimizer_lr, weight_decay=self.optimizer_weight_decay, betas=(0.9, 0.98))

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
            peak_lr=self.optimizer_lr,
            decay_lr=0.01 * self.optimizer_lr,
        )

    def validate_features(self) -> None:
        """One camera, a proprio state and an action, or a ValueError that says what is missing."""
        if len(self.image_features) != 1:
            raise ValueError(f"concord reads one camera, the features hold {sorted(self.image_features)}")
        if self.robot_state_feature is None:
            raise ValueError("concord needs observation.state among the input features")
        if self.action_feature is None:
            raise ValueError("concord needs action among the output features")
