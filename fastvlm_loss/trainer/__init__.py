"""The reference trainer: image-text pre-training with this library's losses."""
