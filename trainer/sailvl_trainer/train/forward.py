"""The model's forward on packs: one call of the vision tower, logits only where there is loss.

Suffixes: T positions, N tiles, P = positions with loss, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import nn
from torch.nn import functional
from transformers import InternVLForConditionalGeneration

from sailvl_trainer.data.chat import IGNORE
from sailvl_trainer.data.collate import Batch
from sailvl_trainer.model.freeze import keep_frozen_still


class PackedModel(nn.Module):
    """Wraps the model for an engine: a pack in, the sum of its losses out."""

    def __init__(self, model: InternVLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> Self:
        """Parts that are frozen stay in evaluation mode."""
        super().train(mode)
        keep_frozen_still(self.model)
        return self

    def forward(
        self,
        input_ids_1T: torch.Tensor,
        labels_1T: torch.Tensor,
        position_ids_1T: torch.Tensor,
        pixels_N3HW: torch.Tensor,
    ) -> torch.Tensor:
        """Cross-entropy summed over the labelled positions; 0, but with a graph, where there are none."""
        hidden_TD = self.encode(input_ids_1T, position_ids_1T, pixels_N3HW)
        chosen_T = labels_1T[0] != IGNORE
        if not chosen_T.any():
            return hidden_TD.sum() * 0.0
        logits_PV = self.model.lm_head(hidden_TD[chosen_T])
        return functional.cross_entropy(logits_PV.float(), labels_1T[0][chosen_T], reduction="sum")

    def encode(
        self, input_ids_1T: torch.Tensor, position_ids_1T: torch.Tensor, pixels_N3HW: torch.Tensor
    ) -> torch.Tensor:
        """Last hidden states. No mask is given: transformers finds the packed samples where positions restart."""
        inner = self.model.model
        embeds_1TD = inner.get_input_embeddings()(input_ids_1T)
        features = inner.get_image_features(
            pixels_N3HW,
            vision_feature_layer=-1,
            vision_feature_select_strategy=self.model.config.vision_feature_select_strategy,
        )
        features_FD = features.pooler_output.flatten(0, 1).to(embeds_1TD.dtype)
        mask_1T1 = (input_ids_1T == self.model.config.image_token_id).unsqueeze(-1)
        if bool(mask_1T1.any()):
            embeds_1TD = embeds_1TD.masked_scatter(mask_1T1, features_FD)
        else:  # the black tile of a pack without pictures: every rank runs the tower, so that no collective waits
            embeds_1TD = embeds_1TD + features_FD.sum() * 0.0
        output = inner.language_model(inputs_embeds=embeds_1TD, position_ids=position_ids_1T, use_cache=False)
        hidden_TD: torch.Tensor = output.last_hidden_state[0]
        return hidden_TD


def arguments(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch as PackedModel's arguments, on the device."""
    return {
        name: getattr(batch, name).to(device, non_blocking=True)
        for name in ("input_ids_1T", "labels_1T", "position_ids_1T", "pixels_N3HW")
    }
