"""Damage to files, of the kinds that disks, downloads and hands do."""

import hashlib
import json

from safetensors.torch import load_file, save_file


def cut(file, share=0.5):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


def flip(file, at=0.5):
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 4
    file.write_bytes(content)


def change_json(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not ...}))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def contents(folder):
    """{path: sha256} of all files below."""
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()
    }
