"""What is frozen stays as it was: no gradient, no optimizer state. Asserted after an attempt's first step."""

from __future__ import annotations

from collections.abc import Collection

from sailvl_trainer.rank.distributed import all_gather_object
from sailvl_trainer.train.engines import Engine


def require_frozen(engine: Engine, learning: Collection[str]) -> None:
    """All ranks call it; `learning`: names of the parameters that learn, as the model has them."""
    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    with_gradient = [name for name, parameter in frozen.items() if parameter.grad is not None]
    assert not with_gradient, f"frozen, but with a gradient: {with_gradient[:3]}"
    owned = set[str]().union(*all_gather_object({f.name.removeprefix("model.") for f in engine.fragments()}))
    wrong = sorted(owned ^ set(learning))
    assert not wrong, f"with optimizer state but frozen, or the other way round: {wrong[:3]}"
