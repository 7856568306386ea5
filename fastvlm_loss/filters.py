"""False-negative filters for the `filters=` option: which negatives leave the candidates as too much like the positive.

loss = clip_loss(image, text, scale, filters=filters.relative(0.95))
loss = clip_loss(image, text, scale, filters=[filters.absolute(0.1), filters.guide(guide_image, guide_text)])
"""

from .scores.filters import Filter, above_margin, absolute, guide, relative, similar

__all__ = ["Filter", "above_margin", "absolute", "guide", "relative", "similar"]
