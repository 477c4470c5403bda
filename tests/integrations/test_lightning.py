"""Lightning's Trainer takes a loader as it is: it moves batches and sets epochs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from logitcache.targets import Batch
from tests.integrations.loops import (
    EPOCHS,
    expected,
    loader_of,
    loss_of,
    optimizer_of,
    require_equal,
    student,
    top_k_cache,
)

lightning = pytest.importorskip("lightning.pytorch", exc_type=ImportError)
# Lightning calls what newer releases of torch have deprecated.
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


class Student(lightning.LightningModule):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.module = student()
        self.keys: list[Any] = []
        self.measured: list[set[int]] = []

    def training_step(self, batch: Batch, number: int) -> Tensor:
        self.keys.append(batch.keys.tolist())
        loss = loss_of(self.module, batch)
        self.log("loss", loss, on_epoch=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Batch, number: int) -> None:
        self.measured.append(set(batch.keys[:, 0].tolist()))
        self.log(
            "agreement",
            (batch.targets.logits.argmax(1) == self.module(batch.images / 255).argmax(1)).float().mean(),
            batch_size=len(batch),
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.module)


def trained(folder: Path, **loaders: Any) -> Student:
    module = Student()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet["enable_model_summary"] = False
    trainer = lightning.Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=1, default_root_dir=folder, **quiet)
    trainer.fit(module, **loaders)
    return module


def test_the_trainer_takes_the_steps_of_a_plain_loop_and_validates_without_a_warning(tmp_path: Path) -> None:
    cache = top_k_cache(tmp_path)
    weights, keys = expected(cache)
    module = trained(tmp_path, train_dataloaders=loader_of(cache), val_dataloaders=loader_of(cache))
    assert module.keys == keys
    require_equal(module.module.state_dict(), weights)
    batches = len(loader_of(cache))
    of_epochs = [module.measured[-batches * epoch :][:batches] for epoch in (3, 2, 1)]
    assert of_epochs == [[{epoch % 2}] * batches for epoch in range(EPOCHS)]
