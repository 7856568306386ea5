"""What a run is judged by on held-out pairs, and what its report shows of them."""

from .judge import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
