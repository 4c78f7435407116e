"""The held-out loss: cross-entropy a labelled position on samples that no step trains on, over all ranks."""

from __future__ import annotations

import torch

from sailvl_trainer.data.dataset import Encoder, Index
from sailvl_trainer.data.loader import held_out_batches
from sailvl_trainer.errors import Preempted
from sailvl_trainer.rank.context import Context
from sailvl_trainer.rank.distributed import sum_over_ranks
from sailvl_trainer.train.forward import PackedModel, arguments


@torch.no_grad()
def measure(
    context: Context,
    model: PackedModel,
    index: Index,
    encoder: Encoder,
    *,
    samples: int,
    pack_tiles: int,
    shuffle: bool = False,
) -> float:
    """Mean loss; `shuffle`: with another sample's picture, which a model that looks at pictures likes less.

    Raises Preempted when a stop is asked for: nothing is lost, what there is to save was saved before.
    """
    was_training = model.training
    model.eval()
    loss, labels = 0.0, 0
    batches = held_out_batches(
        index,
        encoder,
        samples=samples,
        pack_tiles=pack_tiles,
        rank=context.rank,
        world_size=context.world_size,
        shuffle=shuffle,
    )
    for batch in batches:
        if context.preemption.should_stop():
            saved = context.telemetry.progress.checkpoint
            raise Preempted(
                "stopped on request while the held-out loss was measured; no step is lost", checkpoint=saved
            )
        loss += float(model(**arguments(batch, context.device)))
        labels += batch.labels
        context.telemetry.update()
    model.train(was_training)
    total, count = sum_over_ranks(loss, labels)
    return total / max(1.0, count)
