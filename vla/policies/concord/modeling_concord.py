"""The `concord` policy: an action head on the patch tokens of a CLIP encoder, with everything it needs in its folder."""

from collections import deque
from pathlib import Path
from typing import Any, Self

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerBase

from vla.models.clip import (
    IMAGE_MEAN,
    IMAGE_STD,
    Encoder,
    patch_embeds,
    patch_tokens,
    text_features,
    tokenize,
    word_embeds,
)
from vla.models.clip_build import build_clip, fix_words
from vla.models.clip_files import load_clip_at, load_tokenizer, untrained_like
from vla.models.policy_network import PolicyNetwork
from vla.policies.concord.configuration_concord import ConcordConfig
from vla.policies.concord.processor_concord import floored_stats
from vla.precision import multiplies_bf16
from vla.types import ACTION_KEY, STATE_KEY, TASK_KEY, UserError, first_line

CLIP_FOLDER = "clip"  # configuration and tokenizer of the encoder, inside the policy folder
WEIGHTS = "model.safetensors"
HUB_ARGUMENTS = ("revision", "cache_dir", "force_download", "token", "local_files_only")


class ConcordPolicy(PreTrainedPolicy):
    """Reads one camera (b, 3, H, W) in [0, 1], proprio (b, s) normalised, and `task`, a list of b instructions."""

    config_class = ConcordConfig
    name = "concord"

    def __init__(
        self,
        config: ConcordConfig,
        *,
        clip: Encoder | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset_meta: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        config.validate_features()
        if clip is None:
            texts = [] if dataset_meta is None else [str(task) for task in dataset_meta.tasks.index]
            clip, tokenizer = new_encoder(config, texts)
        self.clip, self.tokenizer = clip, tokenizer
        vision, text = clip.config.vision_config, clip.config.text_config
        self.network = PolicyNetwork(
            token_width=vision.hidden_size,
            text_width=text.hidden_size,
            n_patches=(vision.image_size // vision.patch_size) ** 2,
            state_dim=config.robot_state_feature.shape[0],
            action_dim=config.action_feature.shape[0],
            kind=config.kind,
            horizon=config.horizon,
            queries=config.queries,
            width=config.width,
            hidden=config.hidden,
            layers=config.layers,
            state_dropout=config.state_dropout,
            flow_steps=config.flow_steps,
            hide=config.hide,
        )
        choose_trained(clip, config.tune, config.tuned_part)
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)
        self._words: dict[str, Tensor] = {}
        self.register_load_state_dict_post_hook(lambda policy, _: policy._words.clear())
        self.reset()

    def get_optim_params(self) -> list[dict[str, Any]]:
        """Two groups: the network, and the encoder at its own learning rate if it is tuned."""
        groups: list[dict[str, Any]] = [{"params": list(self.network.parameters())}]
        encoder = [p for p in self.clip.parameters() if p.requires_grad]
        if encoder:
            groups.append({"params": encoder, "lr": self.config.optimizer_lr * self.config.encoder_lr_scale})
        return groups

    def reset(self) -> None:
        """Forget the queued actions; to be called when an episode starts."""
        self._queue: deque[Tensor] = deque(maxlen=self.config.n_action_steps)

    def train(self, mode: bool = True) -> Self:
        """As usual, but a frozen encoder never trains; training makes remembered word tokens stale, as loading and moving do."""
        if mode:
            self._words.clear()
        super().train(mode)
        if not self.config.tune:
            self.clip.eval()
        return self

    def _apply(self, *arguments: Any, **named: Any) -> Self:
        self._words.clear()
        return super()._apply(*arguments, **named)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """() cloning loss of a batch with `action` (b, h, a) and, if it pads, `action_is_pad` (b, h)."""
        chunk = batch[ACTION_KEY]
        pad = batch.get(f"{ACTION_KEY}_is_pad")
        if pad is None:
            pad = torch.zeros(chunk.shape[:2], dtype=torch.bool, device=chunk.device)
        loss = self.network.head.loss(self._features(batch), chunk, pad)
        return loss, {"loss": loss.item()}

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """(b, h, a) normalised actions."""
        self.eval()
        return self.network.head.predict(self._features(batch))

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """(b, a): the next action of the queue, refilled by a new look every `n_action_steps`."""
        if not self._queue:
            chunk = self.predict_action_chunk(batch)[:, : self.config.n_action_steps]
            self._queue.extend(chunk.transpose(0, 1))
        return self._queue.popleft()

    def tokens(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) in [0, 1] -> (b, n, w) patch tokens; another size than the encoder's is resized."""
        pixels = (images - self.image_mean) / self.image_std
        if (
            self.training or self.config.precision == "no" or not multiplies_bf16(pixels.device)
        ):  # training brings its own autocast
            return patch_tokens(self.clip, pixels)
        with torch.autocast(pixels.device.type, torch.bfloat16):
            return patch_tokens(self.clip, pixels).float()

    def words(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts -> word tokens (b, l, w) and mask (b, l); each distinct text is encoded once, and kept while evaluating."""
        distinct = list(dict.fromkeys(texts))
        keep = not self.training
        missing = [text for text in distinct if text not in self._words] if keep else distinct
        encoded = dict(self._words) if keep else {}
        if missing:
            ids, mask = (t.to(self.image_mean.device) for t in tokenize(self.tokenizer, missing))
            features, _ = text_features(self.clip, ids, mask)
            encoded |= {text: f[: int(m.sum())] for text, f, m in zip(missing, features, mask, strict=True)}
            if keep:
                self._words = encoded
        rows = [encoded[text] for text in texts]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=padded.device)
        return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]

    @torch.no_grad()
    def attention(self, batch: dict[str, Any]) -> Tensor:
        """(b, side, side): where the text-conditioned pooling looks last, averaged over queries and heads, sums to 1."""
        self.eval()
        seen = self.network.seen(*self._read(batch))
        _, weights = self.network.pooler(*seen, need_weights=True)
        side = round(weights.shape[-1] ** 0.5)
        return weights.float().mean(1).unflatten(-1, (side, side))

    def _features(self, batch: dict[str, Any]) -> Tensor:
        return self.network.features(*self._read(batch), batch[STATE_KEY])

    def _read(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Patch tokens, word tokens with their mask, and their similarity."""
        (camera,) = self.config.image_features
        for key in (camera, STATE_KEY, TASK_KEY):
            if key not in batch:
                raise ValueError(f"the batch lacks {key!r}; it has {sorted(batch)}")
        texts = batch[TASK_KEY]
        texts = [texts] * len(batch[camera]) if isinstance(texts, str) else list(texts)
        trained = any(p.requires_grad for p in self.clip.parameters())  # tuned, or with adapters in it
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            tokens = self.tokens(batch[camera])
            words, mask = self.words(texts)
            similarity = self.similarity(tokens, words)
        return tokens, words, mask, similarity

    def similarity(self, tokens: Tensor, words: Tensor) -> Tensor:
        """(b, n, w) patch tokens, (b, l, w) word tokens -> (b, l, n) cosines in the joint space."""
        return word_embeds(self.clip, words) @ patch_embeds(self.clip, tokens).transpose(1, 2)

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save_pretrained(save_directory, state_dict)
        self.clip.config.save_pretrained(save_directory / CLIP_FOLDER)
        self.tokenizer.save_pretrained(save_directory / CLIP_FOLDER)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        strict: bool = True,
        **kwargs,
    ) -> Self:
        """Load a policy folder, or a hub repository; keys that are missing or left over raise.

        LeRobot's training gives its `dataset_stats` and later puts the same dictionary into the saved processors, as it is; ranges that are
        too small are therefore widened in it.

        Raises:
            UserError: absent or damaged files, or weights that do not fit (the keys are named).
        """
        if stats := kwargs.get("dataset_stats"):
            stats.update(floored_stats(stats))
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            told = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            folder = Path(snapshot_download(str(pretrained_name_or_path), **told))
        try:
            config = config or PreTrainedConfig.from_pretrained(folder)
            clip = untrained_like(folder / CLIP_FOLDER)
            tokenizer = load_tokenizer(folder / CLIP_FOLDER)
            state = load_file(folder / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder}: not a complete concord policy: {first_line(error)}") from error
        policy = cls(config, clip=clip, tokenizer=tokenizer)
        expected = set(policy.state_dict())
        if expected != set(state):
            missing, surplus = sorted(expected - set(state)), sorted(set(state) - expected)
            raise UserError(
                f"{folder / WEIGHTS}: missing keys {missing[:3]}, unexpected keys {surplus[:3]}; "
                "if another version of concord wrote it, train it again"
            )
        policy.load_state_dict(state, strict=strict)
        return policy.to(config.device).eval()


def choose_trained(clip: Encoder, tune: bool, part: str) -> None:
    """Switch gradients on for what of the encoder is fine-tuned, and off for the rest."""
    if tune and part == "last_block" and not isinstance(clip, CLIPModel):
        raise UserError(
            f"config error: tuned_part: last_block is for CLIP encoders, not a {type(clip.vision_model).__name__}"
        )
    clip.requires_grad_(tune and part == "all")
    fix_words(clip)
    clip.logit_scale.requires_grad_(False)
    vision = clip.vision_model
    if tune and part == "vision":
        vision.requires_grad_(True)
        clip.visual_projection.requires_grad_(True)
    elif tune and part == "last_block":
        vision.encoder.layers[-1].requires_grad_(True)
        vision.post_layernorm.requires_grad_(True)


def new_encoder(config: ConcordConfig, texts: list[str]) -> tuple[Encoder, PreTrainedTokenizerBase]:
    """The encoder that a new policy starts from."""
    if config.encoder is not None:
        return load_clip_at(config.encoder, config.image_size, "--policy.image_size")
    return build_clip(
        texts,
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.tower_width,
        layers=config.tower_layers,
        heads=config.tower_heads,
        text_width=config.text_width,
        text_layers=3,
        text_heads=4,
        embed_dim=128,
        vocab_size=1024,
    )
