"""The validation loss (`heldOutLoss` in the API): mean cross-entropy per loss token on held-out samples."""

from __future__ import annotations

import torch

from sailvl_trainer.data.dataset import ShardDataset
from sailvl_trainer.data.encoder import SampleEncoder
from sailvl_trainer.data.loader import load_validation_batches
from sailvl_trainer.errors import Preempted
from sailvl_trainer.rank.context import Context
from sailvl_trainer.rank.distributed import sum_over_ranks
from sailvl_trainer.train.forward import PackedModel


@torch.no_grad()
def measure_validation_loss(
    context: Context,
    model: PackedModel,
    dataset: ShardDataset,
    encoder: SampleEncoder,
    *,
    samples: int,
    pack_tiles: int,
    shuffle_images: bool = False,
) -> float | None:
    """Return the mean loss on at most `samples` samples; None if they contain no loss token. COLLECTIVE.

    `shuffle_images` shows each sample another sample's image, which raises the loss if the model uses the image. Raises
    Preempted if a stop is requested; nothing is lost then, since everything worth saving was saved before.
    """
    was_training = model.training
    model.eval()
    loss_sum, loss_tokens = 0.0, 0
    batches = load_validation_batches(
        dataset,
        encoder,
        samples=samples,
        pack_tiles=pack_tiles,
        rank=context.rank,
        world_size=context.world_size,
        shuffle_images=shuffle_images,
    )
    for batch in batches:
        if context.preemption.should_stop():
            saved = context.telemetry.progress.checkpoint
            raise Preempted("stopped on request while measuring the held-out loss; no step is lost", checkpoint=saved)
        loss_sum += float(model(**batch.to(context.device).model_inputs))
        loss_tokens += batch.loss_tokens
        context.telemetry.update()
    model.train(was_training)
    total_loss, total_tokens = sum_over_ranks(loss_sum, loss_tokens)
    return total_loss / total_tokens if total_tokens else None
