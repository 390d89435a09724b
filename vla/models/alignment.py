"""The stage-one model: CLIP towers, the text-conditioned pooler, action and state encoders, projections, scales."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from vla.losses.alignment import Group, grouped_late_interaction
from vla.losses.contrastive import at_least_float32, unit
from vla.models.action_encoder import ActionEncoder, ProjectionHead, mlp
from vla.models.clip import IMAGES, TEXTS, in_multiples, patch_embeds, text_features, vision_features, word_embeds
from vla.models.finetuning import merged
from vla.models.pooler import TextConditionedPooler

MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's clamp
PAIRS = ("vision_language", "word_patch", "context_action", "state")
TRANSITIONS = ("transition_action", "transition_language")  # further pairs, where they are switched on
TERMS = (*PAIRS, *TRANSITIONS)


@dataclass(frozen=True)
class TextEmbeds:
    """Embeddings of u distinct texts of at most l words."""

    words: Tensor  # (u, l, w) tokens
    named: Tensor  # (u, l, d) the tokens in the joint space, unit norm
    language: Tensor  # (u, d) unit norm


@dataclass(frozen=True)
class RowEmbeds:
    """Embeddings of f distinct images and the b rows that show them, unit norm but for `pooled`; None where a term is off."""

    vision: Tensor  # (f, d)
    context: Tensor | None  # (b, d)
    action: Tensor | None  # (b, d)
    similarity: Tensor | None  # (f, t) late interaction of images and the texts of their group
    scene: Tensor | None  # (f, d)
    state: Tensor | None  # (f, d)
    pooled: Tensor | None  # (f, q * width) patch tokens pooled without a text, not projected, for transitions


class AlignmentModel(nn.Module):
    """CLIP plus everything stage one trains beside it; `clip` is what other programs load."""

    def __init__(
        self,
        clip: CLIPModel,
        *,
        horizon: int,
        action_dim: int,
        state_dim: int,
        pooler_width: int,
        queries: int,
        temperature: float,
        learn_temperature: bool,
        temperatures: Mapping[str, tuple[float, bool]] = MappingProxyType({}),
        sigmoid: bool = False,
        transitions: bool = False,
    ) -> None:
        """Build it untrained; `temperatures` has, for pairs that differ, the initial temperature and whether it is learned."""
        super().__init__()
        self.clip = clip
        vision, text, d = clip.config.vision_config, clip.config.text_config, clip.config.projection_dim
        self.pooler = TextConditionedPooler(
            vision.hidden_size,
            text.hidden_size,
            n_patches=(vision.image_size // vision.patch_size) ** 2,
            width=pooler_width,
            queries=queries,
        )
        self.context_projection = ProjectionHead(queries * pooler_width, d)
        self.action_encoder = ActionEncoder(horizon, action_dim)
        self.action_projection = ProjectionHead(256, d)
        self.scene_projection = ProjectionHead(queries * pooler_width, d)
        self.state_encoder = mlp(state_dim, 128, 128)
        self.state_projection = ProjectionHead(128, d)
        self.transition_projection = ProjectionHead(2 * queries * pooler_width, d) if transitions else None
        pairs = TERMS if transitions else PAIRS
        starts = {pair: temperatures.get(pair, (temperature, learn_temperature)) for pair in pairs}
        self.logit_scales = nn.ParameterDict(
            {
                pair: nn.Parameter(torch.tensor(math.log(1 / start)), requires_grad=learn)
                for pair, (start, learn) in starts.items()
            }
        )
        # -log of the number of texts in a batch, or so: at the start the answer is no (arXiv:2303.15343).
        self.logit_bias = nn.Parameter(torch.tensor(-5.0)) if sigmoid else None
        clip.logit_scale.requires_grad_(False)  # the trained scale is written there by `exported_clip`

    def scale(self, pair: str) -> Tensor:
        """() exponentiated scale of a pair, at most 100."""
        return self.logit_scales[pair].clamp(max=MAX_LOGIT_SCALE).exp()

    def clamp_scales(self) -> None:
        """Keep every log scale at most log 100 after an update, so that it can come back down."""
        with torch.no_grad():
            for scale in self.logit_scales.values():
                scale.clamp_(max=MAX_LOGIT_SCALE)

    def exported_clip(self) -> CLIPModel:
        """The CLIP model with the trained vision-language scale where CLIP keeps it, low-rank updates merged."""
        with torch.no_grad():
            self.clip.logit_scale.copy_(self.logit_scales["vision_language"])
        return merged(self.clip)

    def beside_clip(self) -> dict[str, Tensor]:
        """The tensors of what is trained beside the encoder."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("clip.")}

    def texts(self, input_ids: Tensor, attention_mask: Tensor) -> TextEmbeds:
        """Embed the distinct texts of a batch, (u, l) ids and mask."""

        def embed(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            words, pooled = text_features(self.clip, input_ids, attention_mask)  # (u, l, w), (u, w)
            return words, word_embeds(self.clip, words), unit(self.clip.text_projection(pooled))

        return TextEmbeds(*in_multiples(TEXTS, embed, input_ids, attention_mask))

    def rows(
        self,
        texts: TextEmbeds,
        attention_mask: Tensor,
        pixels: Tensor,
        frame_of_row: Tensor,
        text_of_row: Tensor,
        action_chunk: Tensor,
        action_is_pad: Tensor,
        state: Tensor | None,
        *,
        groups: Sequence[Group] = (),
        width: int = 0,
        text_gradient: float = 0.1,
        acted: bool = True,
    ) -> RowEmbeds:
        """Embed images and the rows that show them.

        Args:
            texts, attention_mask: the embedded texts and their (u, l) mask.
            pixels: (f, 3, H, W) normalised images.
            frame_of_row, text_of_row: (b,) index of each row's image and text among them.
            action_chunk, action_is_pad: (b, h, a) normalised and (b, h).
            state: (f, s) of the images, normalised; None if it is not to be embedded.
            groups, width: who is compared word by word, see `grouped_late_interaction`; without groups nobody is.
            text_gradient: share of the context term's gradient that reaches the words.
            acted: whether contexts and actions are to be embedded.
        """

        def embed(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            tokens, pooled = vision_features(self.clip, pixels)  # (f, n, w), (f, w)
            return tokens, patch_embeds(self.clip, tokens), pooled

        tokens, patches, pooled = in_multiples(IMAGES, embed, pixels)
        pooled_scene = None if state is None and self.transition_projection is None else self.scene_features(tokens)
        context = action = None
        if acted:
            of_row = frame_of_row, text_of_row, text_gradient
            features = self.context_features(tokens, patches, texts.words, texts.named, attention_mask, *of_row)
            context = self.context_projection(features)
            action = self.action_projection(self.action_encoder(action_chunk, action_is_pad))
        return RowEmbeds(
            vision=unit(self.clip.visual_projection(pooled)),
            context=context,
            action=action,
            similarity=grouped_late_interaction(patches, texts.named, attention_mask, groups, width)
            if groups
            else None,
            scene=None if state is None else self.scene_projection(pooled_scene),
            state=None if state is None else self.state_projection(self.state_encoder(state)),
            pooled=None if self.transition_projection is None else pooled_scene,
        )

    def transitions(self, before: Tensor, after: Tensor) -> Tensor:
        """(p, d) unit-norm embeddings of what changes between two pictures, (p, q * width) pooled without a text each."""
        before, after = at_least_float32(before), at_least_float32(after)
        return self.transition_projection(torch.cat([before, after - before], dim=-1))

    def context_features(
        self,
        tokens: Tensor,
        patches: Tensor,
        words: Tensor,
        named: Tensor,
        mask: Tensor,
        frame_of_row: Tensor,
        text_of_row: Tensor,
        text_gradient: float = 1.0,
    ) -> Tensor:
        """(b, q * width): each row's patch tokens, among (f, n, w), pooled by its text, among (u, l, w) words.

        `patches` (f, n, d) and `named` (u, l, d) are their embeddings in the joint space.
        """
        words, named = (text_gradient * x + (1 - text_gradient) * x.detach() for x in (words, named))
        # index_select, whose gradient is faster than that of [].
        tokens, patches = (x.index_select(0, frame_of_row) for x in (tokens, patches))
        words, named = (x.index_select(0, text_of_row) for x in (words, named))
        similarity = named @ patches.transpose(1, 2)
        return self.pooler(tokens, words, mask[text_of_row], similarity).flatten(1)

    def scene_features(self, tokens: Tensor) -> Tensor:
        """(b, q * width): the patch tokens (b, n, w) pooled without a text."""
        b, width = len(tokens), self.clip.config.text_config.hidden_size
        no_words, no_likeness = tokens.new_zeros(b, 1, width), tokens.new_zeros(b, 1, tokens.shape[1])
        mask = torch.ones(b, 1, dtype=torch.bool, device=tokens.device)
        return self.pooler(tokens, no_words, mask, no_likeness).flatten(1)
