"""Where training stands: all that a schedule may depend on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A step of training, counted from 0 over all epochs, in a run of so many epochs of so many steps."""

    step: int
    steps_per_epoch: int
    num_epochs: int

    @property
    def epoch(self) -> float:
        """Epochs done, with their fraction."""
        return self.step / max(1, self.steps_per_epoch)

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1)."""
        return self.epoch / self.num_epochs
