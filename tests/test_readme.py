"""What the README shows is true: its Python runs, top to bottom, and its files exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_snippets_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 3
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert scope["logit_scale"].isfinite() and scope["loss"].isfinite()


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_example_of_a_new_loss_runs(tmp_path):
    """docs/adding_a_loss.md: one file, registered, passes its row of the matrix."""
    import torch

    from fastvlm_loss import losses
    from fastvlm_loss.losses import registry
    from fastvlm_loss.testing import Case, violations

    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "adding_a_loss.md").read_text(), re.S)[1]
    try:
        exec(compile(code, "squared.py", "exec"), {"__package__": losses.__name__, "__name__": "squared"})
        spec = registry["squared_clip_loss"]
        for backend in ("torch", "auto"):
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                assert not violations(spec, Case(m=40, d=16, dtype=dtype, bias=1.0, backend=backend))
    finally:
        registry.pop("squared_clip_loss", None)
