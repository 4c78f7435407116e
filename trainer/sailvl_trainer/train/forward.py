"""The model's forward pass on packs: one call of the vision tower, and logits only where there is a target.

Suffixes: T tokens of a pack, N tiles, P loss tokens, D model width, V vocabulary size, F image tokens.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import nn
from torch.nn import functional
from transformers import InternVLForConditionalGeneration

from sailvl_trainer.data.chat import IGNORE_INDEX
from sailvl_trainer.model.build import set_frozen_to_eval


class PackedModel(nn.Module):
    """Wraps the model for an engine: takes a pack, returns its summed loss."""

    def __init__(self, model: InternVLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for frozen parts, which stay in evaluation mode."""
        super().train(mode)
        set_frozen_to_eval(self.model)
        return self

    def forward(
        self,
        input_ids_1T: torch.Tensor,
        labels_1T: torch.Tensor,
        position_ids_1T: torch.Tensor,
        pixels_N3HW: torch.Tensor,
    ) -> torch.Tensor:
        """Return the cross-entropy summed over the loss tokens; without any, a zero that is attached to the graph."""
        hidden_TD = self.encode(input_ids_1T, position_ids_1T, pixels_N3HW)
        has_loss_T = labels_1T[0] != IGNORE_INDEX
        if not has_loss_T.any():
            return hidden_TD.sum() * 0.0
        logits_PV = self.model.lm_head(hidden_TD[has_loss_T])
        return functional.cross_entropy(logits_PV.float(), labels_1T[0][has_loss_T], reduction="sum")

    def encode(
        self, input_ids_1T: torch.Tensor, position_ids_1T: torch.Tensor, pixels_N3HW: torch.Tensor
    ) -> torch.Tensor:
        """Return the last hidden states (T, D). Needs no mask: transformers detects samples by restarting positions."""
        inner = self.model.model
        embeds_1TD = inner.get_input_embeddings()(input_ids_1T)
        features = inner.get_image_features(
            pixels_N3HW,
            vision_feature_layer=-1,
            vision_feature_select_strategy=self.model.config.vision_feature_select_strategy,
        )
        features_FD = features.pooler_output.flatten(0, 1).to(embeds_1TD.dtype)
        is_image_1T1 = (input_ids_1T == self.model.config.image_token_id).unsqueeze(-1)
        if bool(is_image_1T1.any()):
            embeds_1TD = embeds_1TD.masked_scatter(is_image_1T1, features_FD)
        else:  # the black tile of a pack without images: every rank runs the tower, so that no collective hangs
            embeds_1TD = embeds_1TD + features_FD.sum() * 0.0
        output = inner.language_model(inputs_embeds=embeds_1TD, position_ids=position_ids_1T, use_cache=False)
        hidden_TD: torch.Tensor = output.last_hidden_state[0]
        return hidden_TD
