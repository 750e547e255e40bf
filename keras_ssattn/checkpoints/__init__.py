"""Language models in Hugging Face folders: their options, and their weights in both directions."""

from keras_ssattn.checkpoints.checkpoint import Checkpoint, write_checkpoint

__all__ = ["Checkpoint", "write_checkpoint"]
