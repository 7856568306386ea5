"""The demo, ``python -m fastvlm_loss.demo``: two small towers trained on real pairs with the public loss."""
