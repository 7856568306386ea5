"""Shared by the tests of the trainer's data: pictures, shards, and batches compared to the bit."""

import io
import json
import tarfile

import torch
from PIL import Image


def picture(colour=(200, 30, 30), size=(20, 20), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def shard(path, members):
    """A .tar of these members, name to content."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            content = json.dumps(content).encode() if isinstance(content, dict) else content
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def pairs(first, count):
    """Members of ``count`` samples whose red value is their number."""
    members = {}
    for i in range(first, first + count):
        members[f"{i:04}.png"] = picture((i, 0, 0))
        members[f"{i:04}.txt"] = f"thing number {i}".encode()
        members[f"{i:04}.cls"] = b"7"
    return members


def same(a, b):
    """Whether two batches are equal to the bit."""
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], dict):
            same(a[name], b[name])
        elif isinstance(a[name], torch.Tensor):
            assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
        else:
            assert a[name] == b[name], name
