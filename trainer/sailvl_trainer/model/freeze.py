"""Freezing: which parts of the model are trainable in a stage."""

from __future__ import annotations

from typing import get_args

from torch import nn
from transformers import InternVLForConditionalGeneration

from sailvl_trainer.contract import Part


def select_part(model: InternVLForConditionalGeneration, part: Part) -> list[nn.Module]:
    """Return the modules of a part; the output head belongs to the language model."""
    return {
        "vision": [model.model.vision_tower],
        "connector": [model.model.multi_modal_projector],
        "language": [model.model.language_model, model.lm_head],
    }[part]


def set_trainable(model: InternVLForConditionalGeneration, parts: tuple[Part, ...]) -> list[str]:
    """Freeze everything but `parts`; return the names of the trainable parameters."""
    model.requires_grad_(False)
    for part in parts:
        for module in select_part(model, part):
            module.requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def set_frozen_to_eval(model: InternVLForConditionalGeneration) -> None:
    """Set frozen parts to evaluation mode: no dropout, no running statistics."""
    for part in get_args(Part):
        for module in select_part(model, part):
            if not any(p.requires_grad for p in module.parameters()):
                module.eval()
