"""What the trainer trains: one contract for pre-training, fine-tuning and tokenizers."""

from torch import Tensor, nn


class Task(nn.Module):
    """A module that turns a batch into a loss.

    The trainer calls ``forward`` with what the job makes of a batch, then ``after_step``; it measures and exports
    ``outcome()`` and knows nothing else. Everything in the state dict is saved and restored.

    ``forward`` returns a dict of tensors: ``loss`` is minimised, every entry without dimensions is recorded.
    """

    def after_step(self, step: int, total: int) -> None:
        """Update what follows the trained weights, such as a moving average; called after each optimiser step.

        Args:
            step: steps done before this one.
            total: steps of the whole run.
        """

    def outcome(self) -> nn.Module:
        """Return the network that is measured during training and exported."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that optimisers should not shrink, besides vectors and biases."""
        return set()


Output = dict[str, Tensor]
